"""Readers that wrap a reader and make it late, broken or dirty, to show what an engine forgot.

They nest: `PoisonedReader(DelayedReader(ThreadedReader(files), seed=1))`.
"""

from __future__ import annotations

import errno
import os
import queue
import random
import threading
import time
from collections.abc import Collection, Sequence

from mball.errors import StorageError
from mball.storage.reader import Read, Reader, ReadHandle, ReadStatistics

POISON = 0xFF  # every float of such bytes is a NaN


class _Wrapper:
    def __init__(self, inner: Reader) -> None:
        self.inner = inner

    @property
    def path(self) -> str:
        return self.inner.path

    @property
    def statistics(self) -> ReadStatistics:
        return self.inner.statistics

    def submit(self, reads: Sequence[Read]) -> ReadHandle:
        return self.inner.submit(reads)

    def drain(self) -> None:
        self.inner.drain()

    def close(self) -> None:
        self.inner.close()


class PoisonedReader(_Wrapper):
    """Fills each destination with NaN bytes when the read is submitted."""

    def submit(self, reads: Sequence[Read]) -> ReadHandle:
        for read in reads:
            read.destination[: read.size_bytes] = bytes([POISON]) * read.size_bytes
        return self.inner.submit(reads)


class _Failed:
    def __init__(self, reads: Sequence[Read], cause: OSError) -> None:
        self.size_bytes = sum(read.size_bytes for read in reads)
        self._reads = [(read.file, read.offset_bytes, read.size_bytes) for read in reads]
        self._cause = cause

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        file, offset, size = self._reads[0]
        raise StorageError(f"reading {size} B at offset {offset} B of {file} failed: {self._cause}") from self._cause


class FailingReader(_Wrapper):
    """Lets the submits numbered in `fail` (from 0) fail, when they are waited for: a disk error."""

    def __init__(self, inner: Reader, *, fail: Collection[int], cause: OSError | None = None) -> None:
        super().__init__(inner)
        self._fail = set(fail)
        self._cause = cause or OSError(errno.EIO, os.strerror(errno.EIO))
        self.num_submits = 0
        self.num_failed = 0

    def submit(self, reads: Sequence[Read]) -> ReadHandle:
        number, self.num_submits = self.num_submits, self.num_submits + 1
        if number in self._fail:
            self.num_failed += 1
            return _Failed(reads, self._cause)
        return self.inner.submit(reads)


class _Late:
    """A handle whose reads are submitted later; `start` may be called from any thread, once counts."""

    def __init__(self, inner: Reader, reads: Sequence[Read]) -> None:
        self.size_bytes = sum(read.size_bytes for read in reads)
        self._inner = inner
        self._reads: Sequence[Read] = tuple(reads)
        self._handle: ReadHandle | None = None
        self._error: Exception | None = None
        self._started = threading.Event()

    def start(self) -> None:
        if self._started.is_set():
            return
        try:
            self._handle = self._inner.submit(self._reads)
        except StorageError as error:
            self._error = error
        self._reads = ()
        self._started.set()

    def done(self) -> bool:
        return self._started.is_set() and (self._handle is None or self._handle.done())

    def wait(self) -> None:
        self._started.wait()
        if self._error is not None:
            raise self._error
        assert self._handle is not None
        self._handle.wait()


class DelayedReader(_Wrapper):
    """Holds each submit back for a random time below `max_delay_s`, in order."""

    def __init__(self, inner: Reader, *, seed: int, max_delay_s: float = 0.01) -> None:
        super().__init__(inner)
        self._random = random.Random(seed)
        self._max_delay_s = max_delay_s
        self._queue: queue.Queue[tuple[float, _Late] | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def submit(self, reads: Sequence[Read]) -> ReadHandle:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="late-reads", daemon=True)
            self._thread.start()
        late = _Late(self.inner, reads)
        self._queue.put((self._random.uniform(0, self._max_delay_s), late))
        return late

    def drain(self) -> None:
        self._queue.join()
        self.inner.drain()

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self.inner.close()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            delay_s, late = item
            time.sleep(delay_s)
            late.start()
            self._queue.task_done()
            del item, late
        self._queue.task_done()


class LastMomentReader(_Wrapper):
    """Reads only when waited for: the latest order there is, the same in every run.

    What an engine uses without having waited still holds what it held before.
    """

    def __init__(self, inner: Reader) -> None:
        super().__init__(inner)
        self._held: list[_Late] = []

    def submit(self, reads: Sequence[Read]) -> ReadHandle:
        late = _LastMoment(self.inner, reads)
        self._held = [held for held in self._held if not held.done()]
        self._held.append(late)
        return late

    def drain(self) -> None:
        for late in self._held:
            late.start()
        self._held.clear()
        self.inner.drain()

    def close(self) -> None:
        self._held.clear()
        self.inner.close()


class _LastMoment(_Late):
    def wait(self) -> None:
        self.start()
        super().wait()
