"""The bare yardstick for writes, alone and beside reads: threads that `pwritev` past the page cache, in a loop.

Written apart from `mball.storage`, on purpose, like `preadv.py`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from statistics import median

from bench.speed.preadv import Setting

_MIB = 1 << 20
SETTINGS = [
    Setting(num_threads=threads, chunk_bytes=chunk * _MIB) for threads in (1, 2, 4, 8) for chunk in (1, 2, 4)
]  # fmt: skip


class WriteYardstick:
    """Writes the same memory to the same place again and again, and reads another file meanwhile if asked to.

    Args:
        descriptor: of a file that has these bytes already, open past the page cache; stays the caller's.
        source: what is written.
        reads: of what is read beside that, past the page cache.
        destination: where to; as much is read.

    Each method raises OSError when a request fails or is short.
    """

    def __init__(self, descriptor: int, source: memoryview, reads: int, destination: memoryview) -> None:
        self._descriptor = descriptor
        self._source = source
        self._reads = reads
        self._destination = destination

    def write(self, setting: Setting) -> float:
        """Writes everything once; returns the seconds that took."""
        return _timed([(setting, len(self._source), self._write)])

    def both(self, setting: Setting) -> float:
        """Writes everything and reads as much, at one time; returns the seconds until both were done."""
        return _timed([(setting, len(self._source), self._write), (setting, len(self._destination), self._read)])

    def best(
        self, act: Callable[[Setting], float], settings: Sequence[Setting] = SETTINGS, repeats: int = 3
    ) -> Setting:
        """Returns the setting with which `act`, one of the above, is fastest, by the median of `repeats` times."""
        return min(settings, key=lambda setting: median(act(setting) for _ in range(repeats)))

    def _write(self, first: int, end: int) -> None:
        if os.pwritev(self._descriptor, [self._source[first:end]], first) != end - first:
            raise OSError(f"wrote less than {end - first} B at {first}")

    def _read(self, first: int, end: int) -> None:
        if os.preadv(self._reads, [self._destination[first:end]], first) != end - first:
            raise OSError(f"read less than {end - first} B at {first}")


def _timed(jobs: Sequence[tuple[Setting, int, Callable[[int, int], None]]]) -> float:
    failures: list[OSError] = []

    def work(chunks: list[tuple[int, int]], act: Callable[[int, int], None]) -> None:
        while chunks and not failures:
            try:
                act(*chunks.pop())
            except IndexError:
                return  # another thread took the last one
            except OSError as error:
                failures.append(error)

    threads = []
    for setting, size_bytes, act in jobs:
        step = setting.chunk_bytes
        chunks = [(first, min(first + step, size_bytes)) for first in range(0, size_bytes, step)][::-1]
        threads += [threading.Thread(target=work, args=(chunks, act)) for _ in range(setting.num_threads)]
    began_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return time.perf_counter() - began_s
