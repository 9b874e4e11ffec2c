"""The bare yardstick: threads that `preadv` extents past the page cache into huge pages that are already there.

Written apart from `mball.storage`, on purpose: it must not share what is slow there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

_MADV_POPULATE_WRITE = 23
_HUGE_BYTES = 2 << 20
_ALIGNMENT_BYTES = 4096
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Bytes `[offset, offset + size)` of a file."""

    path: str
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How it reads: that many threads, each one chunk at a time."""

    num_threads: int
    chunk_bytes: int


SETTINGS = [
    Setting(num_threads=threads, chunk_bytes=chunk * _MIB) for threads in (2, 4, 8) for chunk in (2, 4, 8)
]  # fmt: skip


def huge_pages(size_bytes: int) -> memoryview:
    """Returns anonymous memory on huge pages where the kernel has them, all of it backed; at a multiple of 2 MiB.

    It is given back with the last view of it.
    """
    # Private: shared memory, which is the default here, gets no huge pages.
    whole = mmap.mmap(-1, size_bytes + _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    anchor = ctypes.c_char.from_buffer(whole)
    address = ctypes.addressof(anchor)
    del anchor
    with suppress(OSError):  # a kernel without huge pages
        whole.madvise(mmap.MADV_HUGEPAGE, 0, len(whole))
    if libc.madvise(address, len(whole), _MADV_POPULATE_WRITE):
        for offset in range(0, len(whole), mmap.PAGESIZE):  # an older kernel: touch each page
            whole[offset] = 0
    start = -address % _HUGE_BYTES
    return memoryview(whole)[start : start + size_bytes]


class Yardstick:
    """Reads the same spans again and again; `spans` are widened to the alignment that direct reads need.

    Raises:
        OSError: the files cannot be read past the page cache.
        ValueError: a span is larger than `memory`, so that not all of it would be read.
    """

    def __init__(self, spans: Sequence[Span], memory: memoryview) -> None:
        self._files = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in {span.path for span in spans}}
        self._memory = memory
        self._file_bytes = {path: os.fstat(descriptor).st_size for path, descriptor in self._files.items()}
        self._spans = [_aligned(span) for span in spans]
        largest_bytes = max((span.size_bytes for span in self._spans), default=0)
        if largest_bytes > len(memory):
            self.close()
            raise ValueError(f"a span of {largest_bytes} B does not fit into {len(memory)} B of memory to read into")
        self.size_bytes = sum(span.size_bytes for span in spans)

    def read(self, setting: Setting) -> float:
        """Reads everything once; returns the seconds that took. Raises OSError when a read fails or is short."""
        chunks = iter(list(self._chunks(setting.chunk_bytes)))
        lock = threading.Lock()
        failures: list[OSError] = []

        def work() -> None:
            while True:
                with lock:
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                path, offset, view = chunk
                try:
                    size_bytes = os.preadv(self._files[path], [view], offset)
                    # Widened spans may end behind the file.
                    wanted_bytes = min(len(view), self._file_bytes[path] - offset)
                    if size_bytes != wanted_bytes:
                        raise OSError(f"{path}: read {size_bytes} of {wanted_bytes} B at {offset}")
                except OSError as error:
                    failures.append(error)
                    return

        threads = [threading.Thread(target=work) for _ in range(setting.num_threads)]
        began_s = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took_s = time.perf_counter() - began_s
        if failures:
            raise failures[0]
        return took_s

    def best_setting(self, settings: Sequence[Setting] = SETTINGS, repeats: int = 3) -> Setting:
        """Returns the setting that read fastest, by its best time of `repeats`."""
        return min(settings, key=lambda setting: min(self.read(setting) for _ in range(repeats)))

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def _chunks(self, chunk_bytes: int) -> Iterator[tuple[str, int, memoryview]]:
        place = 0
        for span in self._spans:
            if place + span.size_bytes > len(self._memory):
                place = 0
            for done in range(0, span.size_bytes, chunk_bytes):
                length = min(chunk_bytes, span.size_bytes - done)
                view = self._memory[place + done : place + done + length]
                yield span.path, span.offset_bytes + done, view
            place += span.size_bytes


def _aligned(span: Span) -> Span:
    begin = span.offset_bytes // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES
    end = -(-(span.offset_bytes + span.size_bytes) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return Span(path=span.path, offset_bytes=begin, size_bytes=end - begin)
