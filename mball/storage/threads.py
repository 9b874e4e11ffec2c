"""A reader of plain system calls: a few threads, each reading one chunk at a time into its destination.

[Note: lifetimes] Threads know the `_Pool` only, never the reader, so that a reader that is dropped is collected
and its finaliser stops them. A destination is held from submit until its read is over, so that memory never goes
away under a request, and then released by name: idle threads and tracebacks of failures may still know the chunk.

[Note: interrupts] Ctrl-C may hit the main thread between any two statements. Locks are therefore taken by `with`
on the lock itself (atomic in CPython), chunks enter the queue in one call, and what is under way is known from
state that only worker threads change.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence

from mball.storage.cached import is_all_cached
from mball.storage.chunks import (
    CLOSED,
    DEFAULT_CHUNK_BYTES,
    DEFAULT_NUM_THREADS,
    Chunk,
    ChunkedReader,
    file_ended,
    named,
    reader_is_closed,
    refuse_fork,
)
from mball.storage.files import FileTable
from mball.storage.pending import PendingChunks
from mball.storage.reader import Read, ReadStatistics


def _read(chunk: Chunk) -> tuple[int, int]:
    """Reads a chunk, and returns (bytes past the page cache, requests made)."""
    done = direct_bytes = num_requests = 0
    buffered = False
    if chunk.alignment_bytes is not None and chunk.may_be_cached:
        buffered = is_all_cached(chunk.file.buffered, chunk.offset_bytes, chunk.required_bytes)
    while done < chunk.required_bytes:
        # After a short read at an odd place only the page cache can go on.
        alignment_bytes = None if buffered else chunk.alignment_bytes
        fd = chunk.file.direct() if alignment_bytes is not None and done % alignment_bytes == 0 else None
        with chunk.view[done:] as rest:
            num_requests += 1
            try:
                got = os.preadv(chunk.file.buffered if fd is None else fd, [rest], chunk.offset_bytes + done)
            except OSError as error:
                if fd is None or alignment_bytes is None or error.errno != errno.EINVAL:
                    raise
                buffered = True
                chunk.file.fall_back(error, alignment_bytes)
                continue
        if not got:
            raise file_ended(chunk.offset_bytes + done)
        direct_bytes += 0 if fd is None else got
        done += got
    return direct_bytes, num_requests


class _Pool:
    """The queue between the submitter and the worker threads, and the counters."""

    def __init__(self) -> None:
        # Reentrant: a garbage collection inside the lock may run the finaliser of the reader.
        self.lock = threading.RLock()
        self.ready = threading.Condition(self.lock)
        self.idle = threading.Condition(self.lock)
        self.pending: deque[tuple[Chunk, PendingChunks]] = deque()
        self.stopping = False
        self.pid: int | None = None
        self.num_active = 0
        self.busy_since_s = 0.0
        self.busy_s = 0.0
        self.size_bytes = 0
        self.direct_bytes = 0
        self.num_requests = 0

    def take(self) -> tuple[Chunk, PendingChunks] | None:
        with self.lock:
            while not self.pending and not self.stopping:
                self.ready.wait()
            if self.stopping:
                return None
            now_s = time.perf_counter()
            if not self.num_active:
                self.busy_since_s = now_s
            self.num_active += 1
            chunk, handle = self.pending.popleft()
            handle.begin(now_s)
            return chunk, handle

    def run(self, chunk: Chunk, handle: PendingChunks) -> None:
        size_bytes = direct_bytes = num_requests = 0
        cause: BaseException | None = RuntimeError("the reading thread died; its traceback is on stderr")
        try:
            # One failed chunk fails the handle: reading its other chunks would be wasted.
            if handle.failure is None:
                direct_bytes, num_requests = _read(chunk)
                size_bytes = chunk.required_bytes
            cause = None
        except (OSError, ValueError, MemoryError) as error:
            cause = error
        finally:
            failure = None if cause is None else (chunk.failure_message(cause), cause)
            chunk.view.release()
            with self.lock:
                self.num_active -= 1
                self.size_bytes += size_bytes
                self.direct_bytes += min(direct_bytes, size_bytes)
                self.num_requests += num_requests
                if not self.num_active:
                    self.busy_s += time.perf_counter() - self.busy_since_s
                    if not self.pending:
                        self.idle.notify_all()
                handle.finish(failure)


def _work(pool: _Pool) -> None:
    while (taken := pool.take()) is not None:
        pool.run(*taken)
        del taken


def _stop(pool: _Pool, threads: list[threading.Thread]) -> None:
    if pool.pid != os.getpid():
        # A forked child has no threads to stop, and the lock may have been held by one.
        return
    with pool.lock:
        pool.stopping = True
        pool.ready.notify_all()
        while pool.pending:
            chunk, handle = pool.pending.popleft()
            cause = RuntimeError(CLOSED)
            handle.finish((chunk.failure_message(cause), cause))
            chunk.view.release()
        pool.idle.notify_all()
    for thread in threads:
        # A garbage collection may run this in one of the threads.
        if thread is not threading.current_thread():
            thread.join()


class ThreadedReader(ChunkedReader):
    """A `Reader` of `num_threads` daemon threads, started by the first submit.

    Each read is cut at multiples of `chunk_bytes`. What is aligned (file offset, and the destination's address with the
    same remainder by 4096) goes past the page cache, ragged ends through it. The table stays the caller's, to be closed
    after the reader.
    """

    def __init__(
        self,
        files: FileTable,
        *,
        num_threads: int = DEFAULT_NUM_THREADS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ) -> None:
        super().__init__(files, num_threads=num_threads, chunk_bytes=chunk_bytes)
        self._pool = _Pool()
        self._threads: list[threading.Thread] = []
        self._finalizer = weakref.finalize(self, _stop, self._pool, self._threads)

    @property
    def statistics(self) -> ReadStatistics:
        pool = self._pool
        if pool.pid not in (None, os.getpid()):
            return ReadStatistics(size_bytes=0, direct_bytes=0, num_requests=0, busy_s=0.0)
        with pool.lock:
            running_s = time.perf_counter() - pool.busy_since_s if pool.num_active else 0.0
            return ReadStatistics(
                size_bytes=pool.size_bytes,
                direct_bytes=pool.direct_bytes,
                num_requests=pool.num_requests,
                busy_s=pool.busy_s + running_s,
            )

    def submit(self, reads: Sequence[Read]) -> PendingChunks:
        self._start()
        chunks = self._cut(reads)
        handle = PendingChunks(f"reading {named(reads)}", len(chunks), sum(chunk.required_bytes for chunk in chunks))
        pool = self._pool
        with pool.lock:
            if pool.stopping:
                raise reader_is_closed()
            pool.pending.extend([(chunk, handle) for chunk in chunks])
            pool.ready.notify(len(chunks))
        return handle

    def drain(self) -> None:
        refuse_fork(self._pool.pid)
        pool = self._pool
        with pool.lock:
            # An interrupt may have come between queueing and waking the threads.
            pool.ready.notify_all()
            while pool.num_active or (pool.pending and self._threads):
                pool.idle.wait()

    def close(self) -> None:
        self._pool.stopping = True
        # Not through the finaliser, which runs only once: an interrupted close can be called again.
        _stop(self._pool, self._threads)
        self._finalizer.detach()

    def _start(self) -> None:
        refuse_fork(self._pool.pid)
        pool = self._pool
        if len(self._threads) == self._num_threads:
            return
        if pool.stopping:
            raise reader_is_closed()
        pool.pid = os.getpid()
        with pool.lock:
            while len(self._threads) < self._num_threads:
                name = f"mball-read-{len(self._threads)}"
                thread = threading.Thread(target=_work, args=(pool,), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
