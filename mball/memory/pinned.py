"""Host memory that a GPU copies at the speed of its link: a slab of exactly the size that is needed.

[Note: pinning] Only memory whose pages cannot move is copied by the GPU itself; other memory goes through small buffers
of the driver, at a fraction of the speed, and keeps the caller waiting. Pinning brings pages in and tells the GPU of
each, some 0.1 s a GiB and more, so it goes on in the background, a chunk at a time, and copies do not wait for it: a
chunk that is not pinned yet is copied slowly. A copy must not cross from one chunk into another, since the driver takes
memory that was pinned in one call, or none. What is pinned is counted as the process's memory like any other. The limit
of locked memory (ulimit -l) is not asked: some drivers pin beyond it; where one refuses, it is named.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from mball.errors import DeviceError
from mball.memory import facts, libc
from mball.memory.cuda_streams import CudaStreams
from mball.memory.region import Region
from mball.units import MIB, format_bytes, round_up

_log = logging.getLogger(__name__)

CHUNK_BYTES = 256 * MIB


@dataclass(slots=True, eq=False)
class _Chunks:
    """What is pinned of a slab. Known to its finaliser, which must not know the slab."""

    streams: CudaStreams
    pinned: list[int] = field(default_factory=list)  # addresses, from the first chunk on

    def unpin(self) -> None:
        """Unpins the last chunk first, so that what is pinned stays a beginning. Raises DeviceError; call again."""
        if self.streams.driver.is_forked:  # the parent's
            self.pinned.clear()
        if not self.pinned:
            return
        with self.streams.driver.current():
            while self.pinned:
                self.streams.unregister(self.pinned[-1])
                self.pinned.pop()


def _release(chunks: _Chunks, address: int, size_bytes: int) -> None:
    try:
        chunks.unpin()
    except DeviceError as error:
        # The GPU may still reach it, and the kernel must not give these addresses to somebody else.
        _log.warning("%s of pinned memory stay taken: %s", format_bytes(size_bytes), error)
        return
    libc.unmap(address, size_bytes)


class PinnedSlab:
    """`size_bytes` of host memory, rounded up to the page, pinned in chunks; tensors and views hold it.

    `start` pins in the background, all or a beginning, `pin` all at once. Where pinning fails the rest stays pageable:
    slower, and logged once. Pages come from the GPU's NUMA node, where `node` names it.
    """

    def __init__(
        self,
        streams: CudaStreams,
        size_bytes: int,
        *,
        node: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        headroom: Callable[[], int] = facts.headroom_bytes,
    ) -> None:
        """Takes addresses; pages come as they are written or pinned.

        `headroom` says how many bytes this process may still take from the machine or its control group.

        Raises DeviceError when there is not so much memory.
        """
        assert size_bytes > 0
        assert chunk_bytes % libc.PAGE_BYTES == 0
        self._streams = streams
        self._headroom = headroom
        self._chunk_bytes = chunk_bytes
        self.size_bytes = round_up(size_bytes, libc.PAGE_BYTES)
        available_bytes = headroom()
        if self.size_bytes > available_bytes:
            raise DeviceError(
                f"{format_bytes(self.size_bytes)} ({self.size_bytes} bytes) of host memory are needed, and "
                f"{format_bytes(available_bytes)} are left of the machine or the control group: free some, raise the "
                "limit, or leave the weights on disk"
            )
        try:
            self.address = libc.map_memory(None, self.size_bytes, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
        except OSError as error:
            raise DeviceError(
                f"cannot map {format_bytes(self.size_bytes)} ({self.size_bytes} bytes) of host memory: {error}; free "
                "some, or raise the limit (ulimit -v, vm.overcommit_memory)"
            ) from error
        self._chunks = _Chunks(streams)
        release = partial(_release, self._chunks, self.address, self.size_bytes)
        self._region = Region(self.address, self.size_bytes, release, what="pinned slab")
        with contextlib.suppress(OSError):  # a kernel without huge pages
            libc.advise(self.address, self.size_bytes, libc.HUGEPAGE)
        if node is not None:
            try:
                libc.prefer_node(self.address, self.size_bytes, node)
            except OSError as error:
                _log.debug("pages are not asked of NUMA node %d: %s", node, error)
        self._wanted_bytes = 0
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self._lock = threading.Lock()  # one pins at a time

    @property
    def pinned_bytes(self) -> int:
        """How much is pinned, from the start on."""
        return min(len(self._chunks.pinned) * self._chunk_bytes, self.size_bytes)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._region.closed

    def start(self, end: int | None = None) -> None:
        """Begins to pin in the background: all, or what lies before `end`. Raises DeviceError when closed or forked."""
        self._check_open()
        wanted_bytes = self.size_bytes if end is None else min(end, self.size_bytes)
        if wanted_bytes > self._wanted_bytes:
            self._wanted_bytes = wanted_bytes
            thread = threading.Thread(target=self._pin, name="mball-pin", daemon=True)
            thread.start()
            self._threads.append(thread)

    def finish(self) -> None:
        """Blocks until what `start` began is over."""
        for thread in self._threads:
            thread.join()

    def pin(self) -> None:
        """Pins what is not pinned yet. Blocks. Where that fails it says so in the log, and the rest stays pageable."""
        self._wanted_bytes = self.size_bytes
        self._pin()

    def _pin(self) -> None:
        with self._lock:
            while not self._stopping and (first := self.pinned_bytes) < self._wanted_bytes:
                size = min(self._chunk_bytes, self.size_bytes - first)
                if (left_bytes := self._headroom()) < size:
                    self._give_up(f"the machine or the control group has {format_bytes(left_bytes)} left")
                    return
                try:
                    with self._streams.driver.current():
                        self._streams.register(self.address + first, size)
                        self._chunks.pinned.append(self.address + first)
                except DeviceError as error:
                    self._give_up(str(error))
                    return

    def spans(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """Yields `[offset, offset + size)` as (address, size) of copies that cross from no chunk into another.

        Raises DeviceError if not all of it is in the slab.
        """
        end = offset + size
        if self.closed or not 0 <= offset <= end <= self.size_bytes:
            raise DeviceError(
                f"bytes [{offset}, {end}) are not in the slab of {self.size_bytes} bytes, or it is closed"
            )
        while offset < end:
            part = min(end - offset, self._chunk_bytes - offset % self._chunk_bytes)
            yield self.address + offset, part
            offset += part

    def view(self, offset: int, size: int) -> memoryview:
        """Returns `size` bytes from `offset`, writable. Raises DeviceError out of range or closed."""
        return self._region.view(offset, size)

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """Returns a tensor on the bytes from `offset`; see `Region.tensor`."""
        return self._region.tensor(offset, dtype, shape)

    def close(self) -> None:
        """Unpins; the memory goes once no tensor or view is left. Copies that use it are over. Idempotent.

        Raises DeviceError when the driver does not unpin: call it again. What it did not unpin stays taken.
        """
        self.unpin()
        self._region.close()

    def unpin(self) -> None:
        """Unpins for good; the memory stays. Copies that use it are over. Idempotent. Raises DeviceError as `close`."""
        self._stopping = True
        # Of a forked child's threads there are none, and the lock may have been held by one.
        with contextlib.nullcontext() if self._streams.driver.is_forked else self._lock:
            self._chunks.unpin()

    def _check_open(self) -> None:
        self._streams.driver.refuse_fork()
        if self.closed:
            raise DeviceError("the pinned slab is closed; make a new one")

    def _give_up(self, why: str) -> None:
        limit_bytes = facts.locked_limit_bytes()
        limit = "" if limit_bytes is None else f" (ulimit -l allows {format_bytes(limit_bytes)})"
        _log.warning(
            "%s of %s of host memory are pinned%s, the rest is copied more slowly: %s",
            format_bytes(self.pinned_bytes),
            format_bytes(self.size_bytes),
            limit,
            why,
        )
