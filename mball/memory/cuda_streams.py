"""The CUDA driver's calls that order work: streams, events, copies beside compute, and host memory for them."""

from __future__ import annotations

import threading
import time

from mball.memory.cuda_driver import CudaDriver
from mball.memory.device import Pinned


class CudaStreams:
    """Streams and events of one GPU, as the driver's handles. Every call is made inside `with driver.current():`.

    A stream runs what it is given in turn; two streams know nothing of each other but what waits for events say.
    Nothing blocks unless it says so. An event that was never recorded is over: who waits for it waits for nothing.
    Each call raises DriverError, GpuLostError if work that was asked for before broke the context.
    """

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._registered: dict[int, int] = {}  # bytes of what is pinned, by address
        self._registering_s = 0.0
        self._lock = threading.Lock()

    @property
    def driver(self) -> CudaDriver:
        """The driver that all calls go to."""
        return self._driver

    def create_stream(self) -> int:
        """Returns a stream of the highest priority, which does not wait for the default stream."""
        non_blocking = 1
        _, highest = self._driver.call("cuCtxGetStreamPriorityRange")
        return int(self._driver.call("cuStreamCreateWithPriority", non_blocking, highest))

    def destroy_stream(self, stream: int) -> None:
        """Gives a stream up; what it was given still runs."""
        self._driver.call("cuStreamDestroy", stream)

    def drain(self, stream: int) -> None:
        """Blocks until all is over that the stream was given."""
        self._driver.call("cuStreamSynchronize", stream)

    def create_event(self, *, has_time: bool = False) -> int:
        """Returns an event, one that remembers when it was over with `has_time`, which takes the GPU longer."""
        disable_timing = 2
        return int(self._driver.call("cuEventCreate", 0 if has_time else disable_timing))

    def destroy_event(self, event: int) -> None:
        """Gives an event up; streams that wait for it go on waiting."""
        self._driver.call("cuEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        """Makes the event stand for all that the stream was given so far; who waits already waits for what it was."""
        self._driver.call("cuEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """Has what the stream is given from now on wait for what the event stands for now."""
        self._driver.call("cuStreamWaitEvent", stream, event, 0)

    def is_done(self, event: int) -> bool:
        """Returns whether it is over what the event stands for."""
        return self._driver.is_ready("cuEventQuery", event)

    def synchronize(self, event: int) -> None:
        """Blocks until it is over what the event stands for."""
        self._driver.call("cuEventSynchronize", event)

    def elapsed_s(self, first: int, last: int) -> float:
        """Returns the seconds between two events that remember when they were over, and are."""
        return float(self._driver.call("cuEventElapsedTime", first, last)) / 1e3

    def copy_in(self, address: int, source: int, size_bytes: int, stream: int) -> None:
        """Copies host memory to the GPU. Pinned, it is read when the stream gets there; else now, which may block.

        Pinned memory is registered in one piece from the first byte to the last, or not at all.
        """
        self._driver.call("cuMemcpyHtoDAsync", address, source, size_bytes, stream, size_bytes=size_bytes)

    def copy_out(self, destination: int, address: int, size_bytes: int, stream: int) -> None:
        """Copies the GPU's memory to the host. Blocks until it is there unless the host memory is pinned."""
        self._driver.call("cuMemcpyDtoHAsync", destination, address, size_bytes, stream, size_bytes=size_bytes)

    def copy_within(self, destination: int, source: int, size_bytes: int, stream: int) -> None:
        """Copies from one place of the GPU's memory to another."""
        self._driver.call("cuMemcpyDtoDAsync", destination, source, size_bytes, stream, size_bytes=size_bytes)

    def register(self, address: int, size_bytes: int) -> None:
        """Pins host memory, which brings its pages in: some 0.1 s a GiB and more. Blocks.

        Bytes stay as they are; others may use the memory meanwhile.
        """
        began_s = time.perf_counter()
        self._driver.call("cuMemHostRegister", address, size_bytes, 0, size_bytes=size_bytes)
        with self._lock:
            self._registering_s += time.perf_counter() - began_s
            self._registered[address] = size_bytes

    def unregister(self, address: int) -> None:
        """Unpins what was pinned from `address` on, which no copy under way uses. May block."""
        self._driver.call("cuMemHostUnregister", address)
        with self._lock:
            self._registered.pop(address, None)

    def pinned(self) -> Pinned:
        """Returns what is pinned now, and how long pinning took so far."""
        with self._lock:
            return Pinned(size_bytes=sum(self._registered.values()), time_s=self._registering_s)
