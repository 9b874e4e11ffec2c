"""Writes in the background: a bounded queue, and a few threads that let reads go first.

[Note: lifetimes] As in `threads.py`: threads know the queue only, never the file that fills it, and what is written is
held from submit until its write is over.

[Note: interrupts] As in `threads.py`: locks are taken by `with`, chunks enter the queue in one call, and what is under
way is known from state that only worker threads change.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy

from mball.errors import StorageError
from mball.storage.extents import PAGE_BYTES
from mball.storage.pending import PendingChunks
from mball.storage.reader import ReadHandle
from mball.storage.watchdog import watched
from mball.units import MIB, format_bytes

CHUNK_BYTES = 2 * MIB
# Of one `pwritev`; the kernel takes 1024.
_MAX_VIEWS = 512
# How often a writer that gives way looks whether reads are over.
_LOOK_S = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """Put `source`, C-contiguous bytes, at `offset_bytes` of the file. It stays as it is until the write is over.

    Writes are fastest where offset, size and the source's address are multiples of 4096, and in long runs.
    """

    offset_bytes: int
    source: memoryview


class _Chunk:
    """Neighbours in the file that are written by one call, from `offset` on."""

    __slots__ = ("asked_s", "handle", "offset", "size", "views")

    def __init__(self, offset: int, view: memoryview) -> None:
        self.offset = offset
        self.size = len(view)
        self.views = [view]
        self.asked_s = 0.0
        self.handle: PendingChunks

    @property
    def end(self) -> int:
        return self.offset + self.size

    def takes(self, offset: int, first: int) -> bool:
        """Whether what begins at `offset`, in that chunk of the file's grid, is its neighbour."""
        return self.end == offset and self.offset // CHUNK_BYTES == first and len(self.views) < _MAX_VIEWS

    def release(self) -> None:
        for view in self.views:
            view.release()


class Target:
    """Where chunks go: the descriptors of one file. They stay the owner's."""

    __slots__ = ("buffered", "direct", "label", "on_failure")

    def __init__(self, label: str, buffered: int, direct: int | None, on_failure: Callable[[int, int], None]) -> None:
        self.label = label
        self.buffered = buffered
        self.direct = direct
        self.on_failure = on_failure

    def write(self, chunk: _Chunk, bounce: memoryview) -> tuple[int, int]:
        """Writes all of a chunk; returns (bytes past the page cache, requests made). Raises OSError."""
        views = chunk.views
        whole = chunk.offset % PAGE_BYTES == chunk.size % PAGE_BYTES == 0
        ragged = any(_address(view) % PAGE_BYTES or len(view) % PAGE_BYTES for view in views)
        if ragged and (len(views) > 1 or (self.direct is not None and whole)):
            views = [_gathered(views, bounce)]
        done = direct_bytes = num_requests = 0
        while done < chunk.size:
            fd = self.direct if whole and done % PAGE_BYTES == 0 else None
            num_requests += 1
            rest = _after(views, done)
            try:
                got = os.pwritev(self.buffered if fd is None else fd, rest, chunk.offset + done)
            except OSError as error:
                if fd is None or error.errno != errno.EINVAL:
                    raise
                self.direct = None  # this file system does not take it after all
                continue
            finally:
                for view in rest:
                    view.release()
            if not got:
                raise OSError(errno.EIO, "the file system wrote nothing")
            direct_bytes += 0 if fd is None else got
            done += got
        return direct_bytes, num_requests


def _address(view: memoryview) -> int:
    return int(numpy.frombuffer(view, dtype=numpy.uint8).__array_interface__["data"][0])


def _gathered(views: Sequence[memoryview], bounce: memoryview) -> memoryview:
    done = 0
    for view in views:
        # numpy copies without the interpreter's lock.
        numpy.copyto(
            numpy.frombuffer(bounce, dtype=numpy.uint8)[done : done + len(view)],
            numpy.frombuffer(view, dtype=numpy.uint8),
        )
        done += len(view)
    return bounce[:done]


def _after(views: Sequence[memoryview], done: int) -> list[memoryview]:
    rest = []
    for view in views:
        if done < len(view):
            rest.append(view[done:])
        done = max(done - len(view), 0)
    return rest


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """How much may wait to be written, and how much of the disk that gets.

    Attributes:
        num_threads: that write.
        depth: requests that may wait.
        high_bytes: how much waits when who writes has to wait, until it is `low_bytes` or less.
        share: the part of the time in which one of them is under way while others read, unless it is waited for.
    """

    num_threads: int = 4
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
        self.pending: deque[_Chunk] = deque()
        self.active: set[_Chunk] = set()
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

    def put(self, writes: Sequence[Write]) -> PendingChunks:
        """Queues writes; the caller holds the lock."""
        if self.stopping:
            raise StorageError(f"{self.target.label} is closed")
        chunks = list(_chunks(writes))
        size_bytes = sum(chunk.size for chunk in chunks)
        handle = PendingChunks(f"writing to {self.target.label}", len(chunks), size_bytes)
        now_s = time.perf_counter()
        for chunk in chunks:
            chunk.handle, chunk.asked_s = handle, now_s
        self._start()
        self.pending.extend(chunks)
        self.queued_bytes += size_bytes
        if self.queued_bytes >= self.limits.high_bytes or len(self.pending) >= self.limits.depth:
            self.full = True
        self.ready.notify(len(chunks))
        return handle

    def overlapping(self, first: int, end: int) -> list[_Chunk]:
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

    def take(self) -> _Chunk | None:
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

    def run(self, chunk: _Chunk, bounce: memoryview) -> None:
        began_s = time.perf_counter()
        direct_bytes = num_requests = size = 0
        cause: BaseException | None = RuntimeError("the writing thread died; its traceback is on stderr")
        try:
            if chunk.handle.failure is None:
                direct_bytes, num_requests = self.target.write(chunk, bounce)
                size = chunk.size
                cause = None
            else:
                cause = OSError(errno.ECANCELED, "another write of the same submit failed")
        except (OSError, ValueError, MemoryError) as error:
            cause = error
        finally:
            failure = None if cause is None else (self._failure_message(chunk, cause), cause)
            with self.lock:
                chunk.release()  # reads take what is under way from it, inside the lock
                ended_s = time.perf_counter()
                share = self.limits.share
                self._next_turn_s = ended_s + (ended_s - began_s) * (1 - share) / share
                self.written_bytes += size
                self.direct_bytes += direct_bytes
                self.num_requests += num_requests
                self.active.discard(chunk)
                if not self.active:
                    self.busy_s += ended_s - self._busy_since_s
                self._over(chunk, failure)

    def _over(self, chunk: _Chunk, failure: tuple[str, BaseException] | None) -> None:
        # Where nothing is left an interrupt inside `put` is put right.
        self.queued_bytes = max(self.queued_bytes - chunk.size, 0) if self.pending or self.active else 0
        if self.queued_bytes <= self.limits.low_bytes and len(self.pending) <= self.limits.depth // 2:
            self.full = False
        if failure is not None:
            self.target.on_failure(chunk.offset, chunk.end)
        chunk.handle.finish(failure)
        self.changed.notify_all()

    def _failure_message(self, chunk: _Chunk, cause: BaseException) -> str:
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

    def _start(self) -> None:
        while len(self.threads) < self.limits.num_threads:
            thread = threading.Thread(target=_work, args=(self,), name=f"mball-write-{len(self.threads)}", daemon=True)
            thread.start()
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


def _chunks(writes: Sequence[Write]) -> Iterator[_Chunk]:
    """Cuts at multiples of the chunk, and puts together what lies side by side in the file."""
    last: _Chunk | None = None
    for write in writes:
        done, size = 0, len(write.source)
        while done < size:
            offset = write.offset_bytes + done
            first = offset // CHUNK_BYTES
            upto = min(size, (first + 1) * CHUNK_BYTES - write.offset_bytes)
            view = write.source[done:upto]
            if last is not None and last.takes(offset, first):
                last.views.append(view)
                last.size += len(view)
            else:
                if last is not None:
                    yield last
                last = _Chunk(offset, view)
            done = upto
    if last is not None:
        yield last


def _work(queue: WriteQueue) -> None:
    # Huge enough for a chunk, and aligned as direct writes need it.
    bounce = memoryview(mmap.mmap(-1, CHUNK_BYTES))
    while (chunk := queue.take()) is not None:
        queue.run(chunk, bounce)
