"""A reader around another one: what comes from swap is what was written there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from mball.storage.files import FileTable
from mball.storage.reader import Read, Reader, ReadHandle, ReadStatistics


class _CheckedReads:
    """A `ReadHandle` whose first `wait` checks what came."""

    __slots__ = ("_checks", "_inner", "size_bytes")

    def __init__(self, inner: ReadHandle, checks: list[Callable[[], None]], size_bytes: int) -> None:
        self._inner = inner
        self._checks = checks
        self.size_bytes = size_bytes

    @property
    def began_s(self) -> float | None:
        return self._inner.began_s

    @property
    def ended_s(self) -> float | None:
        return self._inner.ended_s

    def done(self) -> bool:
        return self._inner.done()

    def wait(self) -> None:
        self._inner.wait()
        for check in self._checks:
            check()
        # Not before: after a failure every call raises, and of two threads that wait both check.
        self._checks = []


class CheckedReader:
    """Reads through another `Reader`, which it closes.

    * What a swap file among `files` still has to write comes from memory.
    * What comes from a swap file is held against its checksums by who waits for it first, see `SwapCheck`. It must not
      be used before that. A handle holds its destinations until then.
    * Swap files write less while reads are under way.
    """

    def __init__(self, inner: Reader, files: FileTable) -> None:
        self._inner = inner
        self._files = files

    @property
    def path(self) -> str:
        return self._inner.path

    @property
    def statistics(self) -> ReadStatistics:
        return self._inner.statistics

    def submit(self, reads: Sequence[Read]) -> ReadHandle:
        swaps = self._files.swaps
        left: list[Read] = []
        checks: list[Callable[[], None]] = []
        memory_bytes = 0
        for read in reads:
            swap = swaps.get(read.file)
            if swap is None or not _fits(read):  # the reader says what is wrong with it
                left.append(read)
                continue
            rest, expected = swap.begin(read)
            left += rest
            memory_bytes += read.size_bytes - sum(part.size_bytes for part in rest)
            if expected and rest:
                checks.append(partial(swap.check, read, expected))
        handle = self._inner.submit(left)
        for swap in swaps.values():
            swap.give_way_to(handle)
        return _CheckedReads(handle, checks, handle.size_bytes + memory_bytes)

    def drain(self) -> None:
        self._inner.drain()

    def close(self) -> None:
        self._inner.close()


def _fits(read: Read) -> bool:
    view = read.destination
    is_bytes = not view.readonly and view.c_contiguous and view.itemsize == 1
    return is_bytes and read.offset_bytes >= 0 and 0 <= read.size_bytes <= view.nbytes
