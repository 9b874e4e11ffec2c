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
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence

import numpy

from mball.errors import DeviceError, StorageError
from mball.storage.files import DIRECT_ALIGNMENT_BYTES, DirectIO, FileTable, OpenFile
from mball.storage.reader import Read, ReadStatistics
from mball.units import MIB, format_bytes, round_down, round_up

DEFAULT_NUM_THREADS = 8
DEFAULT_CHUNK_BYTES = 2 * MIB


class PendingReads:
    """The handle of one submit; see `ReadHandle`."""

    __slots__ = ("_failure", "_gate", "_pid", "_remaining", "_size_bytes", "began_s", "ended_s")

    def __init__(self, num_chunks: int, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._remaining = num_chunks
        self._failure: tuple[str, BaseException] | None = None
        self.began_s: float | None = None
        self.ended_s: float | None = None
        self._pid = os.getpid()
        # Held until the last chunk is over. A bare lock: waiting on it can be interrupted and begun again safely.
        self._gate = threading.Lock()
        if num_chunks:
            self._gate.acquire()

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def done(self) -> bool:
        return self._remaining == 0

    def wait(self) -> None:
        if self._remaining and os.getpid() != self._pid:
            raise DeviceError(
                f"a read of {format_bytes(self._size_bytes)} was under way when the process forked; its threads live "
                f"in process {self._pid} only. Wrap the model in the child, or start the child with 'spawn'"
            )
        with self._gate:
            pass
        if self._failure is not None:
            message, cause = self._failure
            raise StorageError(message) from cause

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def finish(self, failure: tuple[str, BaseException] | None) -> None:
        """Counts one chunk as over; the caller holds the pool's lock."""
        if failure is not None and self._failure is None:
            self._failure = failure
        self._remaining -= 1
        if not self._remaining:
            self.ended_s = time.perf_counter()
            self._gate.release()


class _Chunk:
    """One request: fill `view` from `offset_bytes` on; at least `required_bytes` of it."""

    __slots__ = ("direct", "file", "handle", "offset_bytes", "required_bytes", "view")

    def __init__(self, file: OpenFile, offset_bytes: int, view: memoryview, required_bytes: int, direct: bool) -> None:
        self.file = file
        self.offset_bytes = offset_bytes
        self.view = view
        self.required_bytes = required_bytes
        self.direct = direct
        self.handle: PendingReads

    def run(self) -> tuple[int, int]:
        """Reads, and returns (bytes past the page cache, requests made)."""
        done = direct_bytes = num_requests = 0
        while done < self.required_bytes:
            # After a short read at an odd place only the page cache can go on.
            fd = self.file.direct() if self.direct and done % DIRECT_ALIGNMENT_BYTES == 0 else None
            with self.view[done:] as rest:
                num_requests += 1
                try:
                    got = os.preadv(self.file.buffered if fd is None else fd, [rest], self.offset_bytes + done)
                except OSError as error:
                    if fd is None or error.errno != errno.EINVAL:
                        raise
                    self.file.fall_back(error)
                    continue
            if not got:
                raise OSError(
                    errno.EIO,
                    f"the file ends at {self.offset_bytes + done} B, so it was truncated while in use",
                )
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
        self.pending: deque[_Chunk] = deque()
        self.stopping = False
        self.pid: int | None = None
        self.num_active = 0
        self.busy_since_s = 0.0
        self.busy_s = 0.0
        self.size_bytes = 0
        self.direct_bytes = 0
        self.num_requests = 0

    def take(self) -> _Chunk | None:
        with self.lock:
            while not self.pending and not self.stopping:
                self.ready.wait()
            if self.stopping:
                return None
            now_s = time.perf_counter()
            if not self.num_active:
                self.busy_since_s = now_s
            self.num_active += 1
            chunk = self.pending.popleft()
            if chunk.handle.began_s is None:
                chunk.handle.began_s = now_s
            return chunk

    def run(self, chunk: _Chunk) -> None:
        size_bytes = direct_bytes = num_requests = 0
        cause: BaseException | None = RuntimeError("the reading thread died; its traceback is on stderr")
        try:
            # One failed chunk fails the handle: reading its other chunks would be wasted.
            if not chunk.handle.failed:
                direct_bytes, num_requests = chunk.run()
                size_bytes = chunk.required_bytes
            cause = None
        except (OSError, ValueError, MemoryError) as error:
            cause = error
        finally:
            failure = None if cause is None else (_failure_message(chunk, cause), cause)
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
                chunk.handle.finish(failure)


def _failure_message(chunk: _Chunk, cause: BaseException) -> str:
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return (
        f"reading {chunk.required_bytes} B at offset {chunk.offset_bytes} B of {chunk.file.label} failed: {reason}. "
        "Check the disk and the file; the next pass reads anew"
    )


def _work(pool: _Pool) -> None:
    while (chunk := pool.take()) is not None:
        pool.run(chunk)


def _stop(pool: _Pool, threads: list[threading.Thread]) -> None:
    if pool.pid != os.getpid():
        # A forked child has no threads to stop, and the lock may have been held by one.
        return
    with pool.lock:
        pool.stopping = True
        pool.ready.notify_all()
        while pool.pending:
            chunk = pool.pending.popleft()
            cause = RuntimeError("the reader was closed")
            chunk.handle.finish((_failure_message(chunk, cause), cause))
            chunk.view.release()
        pool.idle.notify_all()
    for thread in threads:
        # A garbage collection may run this in one of the threads.
        if thread is not threading.current_thread():
            thread.join()


class ThreadedReader:
    """A `Reader` of `num_threads` daemon threads, started by the first submit.

    Each read is cut at multiples of `chunk_bytes`. What is aligned to 4096 B (file offset, and the destination's
    address with the same remainder) goes past the page cache, ragged ends through it. The table stays the
    caller's, to be closed after the reader.
    """

    def __init__(
        self,
        files: FileTable,
        *,
        num_threads: int = DEFAULT_NUM_THREADS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ) -> None:
        assert num_threads > 0
        assert chunk_bytes > 0
        assert chunk_bytes % DIRECT_ALIGNMENT_BYTES == 0
        self._files = files
        self._num_threads = num_threads
        self._chunk_bytes = chunk_bytes
        self._pool = _Pool()
        self._threads: list[threading.Thread] = []
        self._finalizer = weakref.finalize(self, _stop, self._pool, self._threads)

    @property
    def window_bytes(self) -> int:
        """The bytes that are read at one time when many are asked for."""
        return self._num_threads * self._chunk_bytes

    @property
    def path(self) -> str:
        reasons = ", ".join(self._files.buffered_reasons)
        if not self._files.any_direct and reasons:
            return f"buffered ({reasons})"
        statistics = self.statistics
        odd_bytes = statistics.size_bytes - statistics.direct_bytes
        parts = ["O_DIRECT"]
        if odd_bytes:
            parts.append(f"{format_bytes(odd_bytes)} buffered ({reasons or 'not aligned'})")
        return ", ".join(parts)

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

    def submit(self, reads: Sequence[Read]) -> PendingReads:
        self._start()
        chunks = [chunk for read in reads for chunk in self._chunks(read)]
        handle = PendingReads(len(chunks), sum(chunk.required_bytes for chunk in chunks))
        for chunk in chunks:
            chunk.handle = handle
        pool = self._pool
        with pool.lock:
            if pool.stopping:
                raise StorageError("the reader is closed; make another")
            pool.pending.extend(chunks)
            pool.ready.notify(len(chunks))
        return handle

    def drain(self) -> None:
        self._check_process()
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
        self._check_process()
        pool = self._pool
        if len(self._threads) == self._num_threads:
            return
        if pool.stopping:
            raise StorageError("the reader is closed; make another")
        pool.pid = os.getpid()
        with pool.lock:
            while len(self._threads) < self._num_threads:
                name = f"mball-read-{len(self._threads)}"
                thread = threading.Thread(target=_work, args=(pool,), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)

    def _check_process(self) -> None:
        if self._pool.pid not in (None, os.getpid()):
            raise DeviceError(
                f"the reader belongs to process {self._pool.pid}, and this is its forked child {os.getpid()}, which "
                "has no reading threads. Wrap the model in the child, or start the child with 'spawn'"
            )

    def _chunks(self, read: Read) -> Iterator[_Chunk]:
        """Cuts `read` into a ragged head, aligned chunks, and a ragged tail."""
        file = self._files[read.file]
        view = read.destination
        if view.readonly or not view.c_contiguous or view.itemsize != 1:
            raise StorageError(f"read of {read.file}: the destination must be writable, contiguous bytes")
        begin, end = read.offset_bytes, read.offset_bytes + read.size_bytes
        if begin < 0 or read.size_bytes < 0 or read.size_bytes > view.nbytes:
            raise StorageError(
                f"read of {read.size_bytes} B at offset {begin} B of {read.file} does not fit its destination of "
                f"{view.nbytes} B"
            )
        if not read.size_bytes:
            return
        file_bytes = file.size_bytes()
        if begin >= file_bytes:
            raise StorageError(f"read at offset {begin} B of {read.file} begins past its end, {file_bytes} B")
        view = view.cast("B")
        aligned_begin = round_up(begin, DIRECT_ALIGNMENT_BYTES)
        aligned_end = round_down(end, DIRECT_ALIGNMENT_BYTES)
        address = int(numpy.frombuffer(view, dtype=numpy.uint8).__array_interface__["data"][0])
        if (
            self._files.mode is DirectIO.OFF
            or aligned_begin >= aligned_end
            or (address - begin) % DIRECT_ALIGNMENT_BYTES
            or file.direct() is None
        ):
            step = self._chunk_bytes
            cuts = [begin, *range(round_down(begin, step) + step, end, step), end]
            spans = [(first, last, False) for first, last in itertools.pairwise(cuts)]
        else:
            spans = [(begin, aligned_begin, False)]
            spans += [
                (first, min(first + self._chunk_bytes, aligned_end), True)
                for first in range(aligned_begin, aligned_end, self._chunk_bytes)
            ]
            spans.append((aligned_end, end, False))
        for first, last, direct in spans:
            required_bytes = min(last, file_bytes) - first
            if first < last and required_bytes > 0:
                yield _Chunk(file, first, view[first - begin : last - begin], required_bytes, direct)
