"""The way from disk to a GPU that goes around the host: buffers of its own memory that cuFile reads into.

[Note: staging] What is read lands in buffers that are registered with cuFile, and a copy within the GPU brings it to
its slot, at a hundred times the speed of a disk. An arena is not registered itself: its pages come and go with plans,
its handles would have to be made for RDMA, a slot's bytes lie as odd as their file has them, and a small GPU opens
256 MiB to other devices, all in all.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from mball.errors import DeviceError
from mball.memory.cuda_events import EventPool
from mball.memory.cufile import CuFile, CuFileError
from mball.memory.device import ArenaRead, Event
from mball.memory.libc import PAGE_BYTES
from mball.memory.ring import Ring, RingBuffer, shift_bytes
from mball.units import format_bytes, round_down, round_up

_log = logging.getLogger(__name__)


# Calls the second until it returns, and says of the first, in the words of the third, if that takes very long.
Watched = Callable[["GdsReading", Callable[[], object], Callable[[], str]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StraightFile:
    """The descriptor that reads a file past the page cache, and the size that reads are held against."""

    descriptor: int
    size_bytes: int


class GdsReading:
    """A read of `size_bytes` of a file, under way on a thread."""

    def __init__(self, future: Future[None], file: str, size_bytes: int, watched: Watched) -> None:
        self._future = future
        self._file = file
        self._watched = watched
        self.size_bytes = size_bytes

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        self._watched(self, self._future.result, lambda: f"reading {self._file} straight into the GPU")


class GdsRing(Ring):
    """`num_buffers` buffers of `buffer_bytes` of a GPU, and a thread for each that is read into.

    A file that cuFile does not register, or failed to read once, is not read this way any more, see `takes`: a log line
    says why. Whatever cuFile said of it, the other way says what is wrong with the file, or reads it.
    """

    def __init__(
        self,
        pool: EventPool,
        find: Callable[[str], StraightFile | None],
        watched: Watched,
        *,
        num_buffers: int,
        buffer_bytes: int,
    ) -> None:
        """Takes the GPU's memory, opens it to disks, and starts the threads, at once.

        Args:
            pool: of the GPU.
            find: returns a file that is open until `close`, None for one that is not to be read this way.
            watched: waits for a read.
            num_buffers: how many buffers; as many reads go on at a time.
            buffer_bytes: of each, a multiple of the page.

        Raises:
            CuFileError: cuFile is not there, or would not go straight; or it does not register memory of this GPU; or
                this process may not have so many threads.
            DriverError: the GPU has not so much memory.
        """
        assert buffer_bytes % PAGE_BYTES == 0
        self._driver = pool.streams.driver
        self._find = find
        self._watched = watched
        self._handles: dict[str, int] = {}
        self._sizes: dict[str, int] = {}  # of these files, in bytes
        self._others: set[str] = set()  # files that are not to be read this way
        self.refused: dict[str, str] = {}  # files that cuFile does not read, and why
        self._registered = False
        self._buffer_bytes = buffer_bytes
        self.size_bytes = num_buffers * buffer_bytes
        self._address = 0
        with self._driver.current():
            self._cufile = CuFile()
        try:
            with self._driver.current():
                self._address = address = self._driver.allocate(self.size_bytes)
                self._cufile.register_memory(address, self.size_bytes)
                self._registered = True
            self._threads = _started(num_buffers)
        except BaseException:
            self._give_back()
            raise
        super().__init__(pool, [RingBuffer(n * buffer_bytes, address + n * buffer_bytes) for n in range(num_buffers)])

    def takes(self, file: str) -> bool:
        """Returns whether a file is read this way. Registers it the first time."""
        if file in self.refused or file in self._others:
            return False
        if file not in self._handles:
            found = self._find(file)
            if found is None:
                self._others.add(file)
                return False
            self._sizes[file] = found.size_bytes
            try:
                with self._driver.current():
                    self._handles[file] = self._cufile.register_file(found.descriptor)
            except CuFileError as error:
                self.refuse(file, error)
        return file not in self.refused

    def refuse(self, file: str, error: CuFileError) -> None:
        """Says that a file is not read this way from now on."""
        if file not in self.refused:
            self.refused[file] = why = str(error)  # the error itself holds frames
            _log.warning("%s is read through pinned host memory, not by GPUDirect Storage: %s", file, why)

    def read(self, buffer: RingBuffer, read: ArenaRead, first: int, size: int) -> Event:
        """The event raises CuFileError; see `refuse`. A read ends where its file does, and begins before."""
        begin = round_down(read.offset_bytes + first, PAGE_BYTES)
        least = min(shift_bytes(read, first) + size, max(self._sizes[read.file] - begin, 1))
        try:
            future = self._threads.submit(self._fill, self._handles[read.file], buffer, begin, least)
        except RuntimeError as error:  # Python ends threads before devices are closed
            raise DeviceError(f"{read.file} is not read any more: {error}") from error
        return GdsReading(future, read.file, size, self._watched)

    def bytes_per_s(self, file: str, size_bytes: int, *, time_limit_s: float = 0.1) -> float:
        """Returns how fast a file comes that `takes` said yes to, read from its beginning until the time is up.

        Before anything else is read. Raises CuFileError.
        """
        under_way: deque[Future[None]] = deque()
        done_bytes = 0
        began_s = time.perf_counter()
        for number, begin in enumerate(range(0, size_bytes, self._buffer_bytes)):
            if done_bytes and time.perf_counter() > began_s + time_limit_s:
                break
            if len(under_way) == len(self.buffers):
                under_way.popleft().result()
            size = min(self._buffer_bytes, size_bytes - begin)
            buffer = self.buffers[number % len(self.buffers)]
            under_way.append(self._threads.submit(self._fill, self._handles[file], buffer, begin, size))
            done_bytes += size
        for each in under_way:
            each.result()
        return done_bytes / (time.perf_counter() - began_s)

    def _fill(self, handle: int, buffer: RingBuffer, begin: int, least: int) -> None:
        """Reads whole pages until `least` bytes are there; the last page of a file may be cut off."""
        whole = round_up(least, PAGE_BYTES)
        there = 0
        with self._driver.current():
            while True:
                from_page = round_down(there, PAGE_BYTES)
                size = self._cufile.read(
                    handle, begin + from_page, whole - from_page, self._address, buffer.offset + from_page
                )
                if from_page + size >= least:
                    return
                if from_page + size < there + PAGE_BYTES:
                    raise CuFileError(
                        f"cuFile read {format_bytes(from_page + size)} ({from_page + size} bytes) of {least} bytes "
                        f"from byte {begin} on, and stopped there"
                    )
                there = from_page + size

    def _copy(self, address: int, source: int, size: int, stream: int) -> None:
        self._pool.streams.copy_within(address, source, size, stream)

    def close(self) -> None:
        """Waits for reads under way, and gives threads, files, memory and cuFile back, in this order.

        Idempotent. Raises DeviceError: call it again then.
        """
        self._threads.shutdown()
        self._give_back()

    def _give_back(self) -> None:
        with self._driver.current():
            # Out of the books first: an interrupt may then lose something, but nothing is given back twice.
            while self._handles:
                self._cufile.deregister_file(self._handles.popitem()[1])
            if self._registered:
                self._registered = False
                try:
                    self._cufile.deregister_memory(self._address)
                except CuFileError:
                    self._registered = True
                    raise
            if self._address:
                address, self._address = self._address, 0
                try:
                    self._driver.free(address)
                except DeviceError:
                    self._address = address
                    raise
        self._cufile.close()


def _started(num_threads: int) -> ThreadPoolExecutor:
    """Returns threads that all run already.

    A pool that cannot start one more queues what it refuses, and others read it late, into the buffer of a later read.
    """
    threads = ThreadPoolExecutor(num_threads, thread_name_prefix="mball-gds")
    together = threading.Barrier(num_threads)  # so none is free to take what is for the next
    try:
        for _ in range(num_threads):
            threads.submit(together.wait)
    except BaseException as error:
        together.abort()
        threads.shutdown()
        if isinstance(error, RuntimeError):
            raise CuFileError(
                f"{num_threads} threads that read straight into the GPU cannot be started: {error}; let this process "
                "have more threads (ulimit -u)"
            ) from error
        raise
    return threads
