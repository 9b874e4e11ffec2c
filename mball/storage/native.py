"""A reader whose threads are C: requests are made, finished and begun anew while Python is busy.

[Note: who holds what] The C library allocates nothing. A pool is memory of a `_Pool`, a request that of its handle;
handles that are under way are held by the pool, and with them the destinations and files. Who looks at a handle that
is over (by `done`, `wait`, or any call of the reader) lets go of these. A pool with threads is held by this module: not
even an interrupt can take its memory away under them.

[Note: interrupts] Ctrl-C may hit the main thread between any two statements. Calls that do not block keep the GIL, so
nobody waits to get it back from a busy thread; those that block come back every 50 ms to let signals be handled. What
is under way only the C library knows and changes, one call at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from mball.c_library import CLibrary
from mball.errors import DeviceError
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
from mball.storage.pending import Pending
from mball.storage.reader import Read, ReadStatistics

READ_POOL = CLibrary(source=Path(__file__).with_name("read_pool.c"), title="the readers' C library")

_FILE_ENDED, _CLOSED = -1, -2
# How long a signal may wait for somebody who waits for a read.
_WAIT_NS = 50_000_000
# By name and order as in C.
_CHUNK = numpy.dtype(
    [
        ("buffered", "i4"),
        ("direct", "i4"),
        ("offset", "i8"),
        ("address", "u8"),
        ("size", "u8"),
        ("required", "u8"),
        ("alignment", "u8"),
        ("may_be_cached", "u8"),
    ]
)


class _Request(ctypes.Structure):
    _fields_ = (
        ("next", ctypes.c_void_p),
        ("chunks", ctypes.c_void_p),
        ("num_chunks", ctypes.c_uint32),
        ("num_begun", ctypes.c_uint32),
        ("remaining", ctypes.c_uint32),
        ("error", ctypes.c_int32),
        ("failed", ctypes.c_uint32),
        ("refused", ctypes.c_uint32),
        ("done", ctypes.c_uint64),
        ("began_ns", ctypes.c_int64),
        ("ended_ns", ctypes.c_int64),
    )


class _Statistics(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint64),
        ("direct", ctypes.c_uint64),
        ("num_requests", ctypes.c_uint64),
        ("busy_ns", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPoolLibrary:
    """The C library's functions; see there. All but the last three come back at once, and keep the GIL."""

    read_by: Callable[..., None]
    pool_size: Callable[[], int]
    pid: Callable[..., int]
    start: Callable[..., int]
    submit: Callable[..., int]
    over: Callable[..., int]
    statistics: Callable[..., None]
    stop: Callable[..., None]
    wait: Callable[..., int]
    drain: Callable[..., int]
    ended: Callable[..., int]


def load_read_pool(cache: Path | None = None) -> ReadPoolLibrary:
    """Returns the library; see `CLibrary.load`.

    Raises:
        DeviceError: there is none, and why, in one line.
    """
    library = READ_POOL.load(cache)
    at_once, blocking = ctypes.PYFUNCTYPE, ctypes.CFUNCTYPE
    pool, request, number, duration = ctypes.c_void_p, ctypes.POINTER(_Request), ctypes.c_uint32, ctypes.c_int64

    def function(name: str, kind: Any, result: Any, *arguments: Any) -> Any:
        return kind(result, *arguments)((f"mball_{name}", library))

    return ReadPoolLibrary(
        read_by=function("read_by", at_once, None, ctypes.c_void_p),
        pool_size=function("pool_size", at_once, ctypes.c_uint64),
        pid=function("pool_pid", at_once, ctypes.c_int32, pool),
        start=function("pool_start", at_once, ctypes.c_int, pool, number),
        submit=function("pool_submit", at_once, ctypes.c_int, pool, request),
        over=function("request_over", at_once, ctypes.c_int, request),
        statistics=function("pool_statistics", at_once, None, pool, ctypes.POINTER(_Statistics)),
        stop=function("pool_stop", at_once, None, pool),
        wait=function("request_wait", blocking, ctypes.c_int, pool, request, duration),
        drain=function("pool_drain", blocking, ctypes.c_int, pool, duration),
        ended=function("pool_ended", blocking, ctypes.c_int, pool, duration),
    )


class _Pool:
    """The memory of a pool in C, and the handles that are under way in it."""

    def __init__(self, library: ReadPoolLibrary) -> None:
        self.library = library
        self.memory = ctypes.create_string_buffer(library.pool_size())
        self.closed = False
        # Reentrant: a garbage collection inside the lock may run the finaliser of the reader.
        self.lock = threading.RLock()
        self.under_way: dict[int, NativeReads] = {}

    @property
    def pid(self) -> int | None:
        """The process that has the threads, once there are some."""
        return self.library.pid(self.memory) or None

    def let_go(self) -> None:
        """Settles the oldest handles, as far as they are over."""
        with self.lock:
            while self.under_way:
                key = next(iter(self.under_way))
                if not self.under_way[key].settle():
                    break
                self.under_way.pop(key, None)


_with_threads: set[_Pool] = set()


class NativeReads(Pending):
    """The handle of one submit."""

    __slots__ = ("_chunks", "_pool", "_records", "_request")

    def __init__(self, doing: str, pool: _Pool, chunks: list[Chunk]) -> None:
        super().__init__(doing, sum(chunk.required_bytes for chunk in chunks))
        self._pool = pool
        self._chunks: list[Chunk] | None = chunks
        # Of what is not direct any more by now a chunk knows when it is read.
        direct = [None if chunk.alignment_bytes is None else chunk.file.direct() for chunk in chunks]
        self._records = numpy.array(
            [
                (
                    chunk.file.buffered,
                    -1 if fd is None else fd,
                    chunk.offset_bytes,
                    chunk.address,
                    len(chunk.view),
                    chunk.required_bytes,
                    chunk.alignment_bytes or 1,
                    chunk.may_be_cached,
                )
                for chunk, fd in zip(chunks, direct, strict=True)
            ],
            dtype=_CHUNK,
        )
        self._request = _Request(chunks=self._records.ctypes.data, num_chunks=len(chunks))

    @property
    def began_s(self) -> float | None:
        return self._request.began_ns / 1e9 or None

    @property
    def ended_s(self) -> float | None:
        return self._request.ended_ns / 1e9 or None

    def done(self) -> bool:
        if not self._pool.library.over(self._request):
            return False
        self._let_go()
        return True

    def _block(self) -> None:
        while not self._pool.library.wait(self._pool.memory, self._request, _WAIT_NS):
            pass
        self._let_go()

    def start(self) -> None:
        """Submits it. Raises StorageError when the reader is closed."""
        pool = self._pool
        # Who looks for handles that are over must not meet this one: it would seem to be.
        with pool.lock:
            pool.under_way[id(self)] = self
            if pool.library.submit(pool.memory, self._request):
                del pool.under_way[id(self)]
                raise reader_is_closed()

    def _let_go(self) -> None:
        pool = self._pool
        # In a forked child the lock may have been held by another thread.
        with pool.lock if pool.pid == os.getpid() else contextlib.nullcontext():
            self.settle()
            pool.under_way.pop(id(self), None)

    def settle(self) -> bool:
        """Lets go of files and destinations if it is over, and returns whether it is. Inside the pool's lock."""
        request, chunks = self._request, self._chunks
        if not self._pool.library.over(request):
            return False
        if chunks is None:
            return True
        if request.refused:
            refused = chunks[request.refused - 1]
            assert refused.alignment_bytes is not None
            error = OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            refused.file.fall_back(error, refused.alignment_bytes)
        if request.error:
            failed = chunks[request.failed]
            cause: Exception
            if request.error == _FILE_ENDED:
                cause = file_ended(failed.offset_bytes + request.done)
            elif request.error == _CLOSED:
                cause = RuntimeError(CLOSED)
            else:
                cause = OSError(request.error, os.strerror(request.error))
            self.failure = failed.failure_message(cause), cause
        for chunk in chunks:
            chunk.view.release()
        self._chunks = None
        return True


def _stop(pool: _Pool) -> None:
    pool.closed = True
    if pool.pid != os.getpid():
        # A forked child has no threads to stop, and the mutex may have been held by one.
        return
    pool.library.stop(pool.memory)
    while not pool.library.ended(pool.memory, _WAIT_NS):
        pass
    pool.let_go()
    _with_threads.discard(pool)


class NativeReader(ChunkedReader):
    """A `Reader` of `num_threads` threads of C, started by the first submit; else as `ThreadedReader`.

    Destinations are held until they are over and somebody looks: at the handle, or by another call of the reader.
    """

    def __init__(
        self,
        files: FileTable,
        library: ReadPoolLibrary,
        *,
        num_threads: int = DEFAULT_NUM_THREADS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ) -> None:
        super().__init__(files, num_threads=num_threads, chunk_bytes=chunk_bytes)
        self._pool = _Pool(library)
        self._finalizer = weakref.finalize(self, _stop, self._pool)

    @property
    def statistics(self) -> ReadStatistics:
        pool = self._pool
        found = _Statistics()
        if pool.pid == os.getpid():
            pool.let_go()
            pool.library.statistics(pool.memory, found)
        return ReadStatistics(
            size_bytes=found.size,
            direct_bytes=found.direct,
            num_requests=found.num_requests,
            busy_s=found.busy_ns / 1e9,
        )

    def submit(self, reads: Sequence[Read]) -> NativeReads:
        pool = self._pool
        self._start()
        pool.let_go()
        handle = NativeReads(f"reading {named(reads)}", pool, self._cut(reads))
        if handle.size_bytes:
            handle.start()
        return handle

    def drain(self) -> None:
        pool = self._pool
        refuse_fork(pool.pid)
        while pool.pid is not None and not pool.library.drain(pool.memory, _WAIT_NS):
            pass
        pool.let_go()

    def close(self) -> None:
        # Not through the finaliser, which runs only once: an interrupted close can be called again.
        _stop(self._pool)
        self._finalizer.detach()

    def _start(self) -> None:
        pool = self._pool
        refuse_fork(pool.pid)
        if pool.closed:
            raise reader_is_closed()
        if pool.pid is not None:
            return
        with pool.lock:
            _with_threads.add(pool)
            if error := pool.library.start(pool.memory, self._num_threads):
                _stop(pool)
                raise DeviceError(
                    f"{self._num_threads} threads cannot be started to read files ({os.strerror(error)}): give "
                    "io_threads a smaller number, or raise the limit of processes (ulimit -u)"
                )
