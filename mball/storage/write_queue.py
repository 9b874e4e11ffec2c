"""Writes in the background: a bounded queue, and a few threads that let reads go first.

[Note: lifetimes] As in `threads.py`: threads know the queue only, never the file that fills it, and what is written is
held from submit until its write is over.

[Note: interrupts] As in `threads.py`: locks are taken by `with`, chunks enter the queue in one call, and what is under
way is known from state that only worker threads change.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from mball.errors import StorageError
from mball.storage.pending import PendingChunks
from mball.storage.reader import ReadHandle
from mball.storage.scratch import give_back, huge_page_memory
from mball.storage.watchdog import watched
from mball.storage.writes import CHUNK_BYTES, Target, WriteChunk, Written
from mball.units import MIB, format_bytes

# How often a writer that gives way looks whether reads are over.
_LOOK_S = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """How much may wait to be written, and how much of the disk that gets.

    Attributes:
        num_threads: that write.
        depth: requests that may wait.
        high_bytes: how much waits when who writes has to wait, until it is `low_bytes` or less.
        share: the part of the time in which one of them is under way while others read, unless it is waited for.
    """

    num_threads: int = 8
    depth: int = 256
    high_bytes: int = 256 * MIB
    low_bytes: int = 128 * MIB
    share: float = 0.25


class WriteQueue:
    """What waits to be written to one file, what is being written, and the counters. `lock` guards all of it."""

    def __init__(self, target: Target, limits: QueueLimits) -> None:
        # Reentrant: a garbage collection inside the lock may run the finaliser of the file.
        self.lock = threading.RLock()
        self.ready = threading.Condition(self.lock)
        self.changed = threading.Condition(self.lock)
        self.target = target
        self.limits = limits
        self.pending: deque[WriteChunk] = deque()
        self.active: set[WriteChunk] = set()
        self.queued_bytes = 0
        self.full = False
        self.stopping = False
        self.pid = os.getpid()
        self.threads: list[threading.Thread] = []
        self._reads: list[ReadHandle] = []
        self._next_turn_s = 0.0
        self.written_bytes = 0
        self.direct_bytes = 0
        self.num_requests = 0
        self.queue_s = 0.0
        self.busy_s = 0.0
        self._busy_since_s = 0.0

    # -- for who writes ------------------------------------------------------------------------------------------

    def wait_for_room(self) -> None:
        """Blocks while the queue is full; the caller holds the lock, once."""
        while self.full and not self.stopping:
            watched(self, self.changed.wait, lambda: f"writing to {self.target.label}")

    @property
    def size_bytes(self) -> int:
        """Bytes that wait or are being written."""
        return self.queued_bytes

    def done(self) -> bool:
        """Whether there is room for more."""
        return not self.full

    def put(self, chunks: Sequence[WriteChunk]) -> PendingChunks:
        """Queues chunks; the caller holds the lock, and has called `start`."""
        size_bytes = sum(chunk.size for chunk in chunks)
        handle = PendingChunks(f"writing to {self.target.label}", len(chunks), size_bytes)
        now_s = time.perf_counter()
        for chunk in chunks:
            chunk.handle, chunk.asked_s = handle, now_s
        self.pending.extend(chunks)
        self.queued_bytes += size_bytes
        if self.queued_bytes >= self.limits.high_bytes or len(self.pending) >= self.limits.depth:
            self.full = True
        self.ready.notify(len(chunks))
        return handle

    def overlapping(self, first: int, end: int) -> list[WriteChunk]:
        """Returns what is still to be written to bytes `[first, end)`; the caller holds the lock."""
        return [
            chunk
            for chunks in (self.active, self.pending)
            for chunk in chunks
            if chunk.offset < end and first < chunk.end
        ]

    def settle(self, first: int, end: int) -> None:
        """Blocks until nothing is to be written to bytes `[first, end)` any more; the caller holds the lock, once."""
        self.ready.notify_all()  # an interrupt may have come between queueing and waking the threads
        while found := self.overlapping(first, end):
            for chunk in found:
                chunk.handle.urgent = True
            watched(found[0].handle, self.changed.wait, lambda: f"writing to {self.target.label}")

    # -- for who reads -------------------------------------------------------------------------------------------

    def give_way_to(self, handle: ReadHandle) -> None:
        """Has writes give way until these reads are over."""
        with self.lock:
            self._reads = [read for read in self._reads if not read.done()]
            self._reads.append(handle)

    # -- for threads ---------------------------------------------------------------------------------------------

    def take(self) -> WriteChunk | None:
        with self.lock:
            while True:
                while not self.pending and not self.stopping:
                    self.ready.wait()
                if self.stopping:
                    return None
                if (wait_s := self._turn_in_s()) is None:
                    break
                self.ready.wait(wait_s)
            chunk = self.pending.popleft()
            now_s = time.perf_counter()
            if not self.active:
                self._busy_since_s = now_s
            self.active.add(chunk)
            self.queue_s += now_s - chunk.asked_s
            chunk.handle.begin(now_s)
            return chunk

    def _turn_in_s(self) -> float | None:
        """Returns None when a chunk may be written now, else after how long to ask again."""
        if self.limits.share >= 1 or self.pending[0].handle.urgent:
            return None
        self._reads = [read for read in self._reads if not read.done()]
        if not self._reads:
            return None
        if self.active:  # beside reads one at a time
            return _LOOK_S
        left_s = self._next_turn_s - time.perf_counter()
        return None if left_s <= 0 else min(left_s, _LOOK_S)

    def run(self, chunk: WriteChunk, bounce: memoryview) -> None:
        began_s = time.perf_counter()
        written: Written | None = None
        cause: BaseException = RuntimeError("the writing thread died; its traceback is on stderr")
        try:
            if chunk.handle.failure is None:
                written = self.target.write(chunk, bounce)
            else:
                cause = OSError(errno.ECANCELED, "another write of the same submit failed")
        except (OSError, ValueError, MemoryError) as error:
            cause = error
        finally:
            outcome = written or (self._failure_message(chunk, cause), cause)
            with self.lock:
                chunk.release()  # reads take what is under way from it, inside the lock
                ended_s = time.perf_counter()
                share = self.limits.share
                self._next_turn_s = ended_s + (ended_s - began_s) * (1 - share) / share
                self.active.discard(chunk)
                if not self.active:
                    self.busy_s += ended_s - self._busy_since_s
                self._over(chunk, outcome)

    def _over(self, chunk: WriteChunk, outcome: Written | tuple[str, BaseException]) -> None:
        # Where nothing is left an interrupt inside `put` is put right.
        self.queued_bytes = max(self.queued_bytes - chunk.size, 0) if self.pending or self.active else 0
        if self.queued_bytes <= self.limits.low_bytes and len(self.pending) <= self.limits.depth // 2:
            self.full = False
        if isinstance(outcome, Written):
            self.written_bytes += chunk.size
            self.direct_bytes += outcome.direct_bytes
            self.num_requests += outcome.num_requests
            chunk.extent.written(chunk.filled, outcome.sums)
            chunk.handle.finish(None)
        else:
            chunk.extent.fail(chunk.offset, chunk.end)
            chunk.handle.finish(outcome)
        self.changed.notify_all()

    def _failure_message(self, chunk: WriteChunk, cause: BaseException) -> str:
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        number = cause.errno if isinstance(cause, OSError) else None
        hint = {
            errno.ENOSPC: "free disk space, or choose another swap_dir",
            errno.EDQUOT: "raise the quota of this user, or choose another swap_dir",
            errno.EFBIG: "raise `ulimit -f`, or choose another swap_dir",
        }.get(number or 0, "check the disk, or choose another swap_dir")
        return (
            f"writing {format_bytes(chunk.size)} ({chunk.size} B) at offset {chunk.offset} B of {self.target.label} "
            f"failed ({reason}); {hint}"
        )

    def start(self) -> None:
        """Starts all threads that can be; the caller holds the lock. Raises StorageError if none can, or if closed."""
        if self.stopping:
            raise StorageError(f"{self.target.label} is closed")
        while len(self.threads) < self.limits.num_threads:
            thread = threading.Thread(target=_work, args=(self,), name=f"mball-write-{len(self.threads)}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                if self.threads:
                    return  # the next write tries again
                raise StorageError(
                    f"no thread can be started to write to {self.target.label} ({error}); raise the limit of processes "
                    "(ulimit -u)"
                ) from error
            self.threads.append(thread)

    def stop(self) -> None:
        """Fails what has not begun and ends the threads. May be called again."""
        if self.pid != os.getpid():
            return  # a forked child has no threads to stop, and the lock may have been held by one
        with self.lock:
            self.stopping = True
            self.ready.notify_all()
            while self.pending:
                chunk = self.pending.popleft()
                cause = RuntimeError("the swap file was closed")
                chunk.release()
                self._over(chunk, (self._failure_message(chunk, cause), cause))
            self.changed.notify_all()
        for thread in self.threads:
            # A garbage collection may run this in one of the threads.
            if thread is not threading.current_thread():
                thread.join()


def _work(queue: WriteQueue) -> None:
    # It takes no memory before something has to be gathered.
    bounce = huge_page_memory(CHUNK_BYTES, populate=False)
    while (chunk := queue.take()) is not None:
        queue.run(chunk, bounce)
        if not queue.pending:
            give_back(bounce)
