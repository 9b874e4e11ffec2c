"""Events of a GPU's work, as the engine sees them."""

from __future__ import annotations

import threading
from collections import deque

from mball.errors import DeviceError
from mball.memory.cuda_errors import DriverError
from mball.memory.cuda_streams import CudaStreams


class EventPool:
    """The driver's events, recycled: a pass needs some hundred, and each lives for a step or two.

    An event may be given back while streams still wait for it: they wait for what it stood for when they were told to.
    Thread-safe: an event is given back by whichever thread lets it go last, also by the collector within a call.
    """

    def __init__(self, streams: CudaStreams, *, has_times: bool = False) -> None:
        """`has_times` says that the events remember when they were over."""
        self.streams = streams
        self._has_times = has_times
        self.closed = False
        self._made: list[int] = []
        self._free: deque[int] = deque()

    def take(self) -> int:
        """Returns an event that nobody else has. Called inside `with driver.current()`.

        Raises DriverError, or DeviceError when closed.
        """
        if self.closed:
            raise DeviceError("the device is closed and its events are destroyed, so none is recorded; make another")
        try:
            return self._free.popleft()
        except IndexError:
            event = self.streams.create_event(has_time=self._has_times)
            self._made.append(event)
            return event

    def give(self, event: int) -> None:
        """Takes back what was taken. Never blocks, never fails."""
        if not self.closed:
            self._free.append(event)

    def record(self, stream: int) -> int:
        """Takes an event and records it on a stream.

        Raises DriverError, the event is then back in the pool; or DeviceError when closed.
        """
        event = self.take()
        try:
            self.streams.record(event, stream)
        except BaseException:
            self.give(event)
            raise
        return event

    def close(self) -> None:
        """Destroys all events; those that somebody still has count as over. Idempotent. Raises DriverError."""
        self.closed = True
        self._free.clear()
        while self._made:
            # Out of the books first: an interrupt may then lose an event, but none is destroyed twice.
            event = self._made.pop()
            try:
                self.streams.destroy_event(event)
            except DriverError:
                self._made.append(event)
                raise


class StreamMoment:
    """When a stream was over with all that it had been given, by the GPU's clock."""

    __slots__ = ("_event", "_pool")

    def __init__(self, pool: EventPool, stream: int) -> None:
        """Made inside `with driver.current()`, of a pool whose events have times. Raises as `EventPool.record`."""
        self._pool = pool
        self._event = pool.record(stream)

    def since(self, earlier: StreamMoment) -> float:
        """Raises DeviceError also when the device is closed."""
        if self._pool.closed:
            raise DeviceError("the device is closed, so its clock cannot be read any more: read it before")
        streams = self._pool.streams
        with streams.driver.current():
            streams.synchronize(self._event)
            return streams.elapsed_s(earlier._event, self._event)

    def __del__(self) -> None:
        if hasattr(self, "_event"):
            self._pool.give(self._event)


class StreamEvent:
    """All that was given to some streams up to some moment, and to those that its work is still on its way to.

    Its parts are `num_parts` pieces of work; each is settled when its stream has it, or fails. Until then, which
    concerns reads from disk only, the host blocks where it has to: only it can know whether a read went well.
    """

    __slots__ = ("_error", "_events", "_gate", "_lock", "_pool", "_remaining", "_unsure")

    def __init__(self, pool: EventPool, num_parts: int) -> None:
        self._pool = pool
        self._remaining = num_parts
        self._events: list[int] = []
        self._unsure: list[int] = []  # streams that some of it was given to, nobody knows how much
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        # Held until all parts are settled. A bare lock: waiting for it can be interrupted and begun again.
        self._gate = threading.Lock()
        if num_parts:
            self._gate.acquire()

    @property
    def handle(self) -> int | None:
        """The driver's event, as long as this lives, where a single one tells when all of it is over."""
        return self._events[0] if len(self._events) == 1 and not (self._remaining or self._unsure) else None

    def settle(self, event: int) -> None:
        """Says that a stream has one part, all of it: `event` tells when it is over."""
        with self._lock:
            self._events.append(event)
            self._close_part()

    def fail(self, error: BaseException, stream: int) -> None:
        """Says that one part failed; the stream may have some of it, and is drained before the error is raised."""
        with self._lock:
            self._unsure.append(stream)
            self._error = self._error or error
            self._close_part()

    def _close_part(self) -> None:
        self._remaining -= 1
        if not self._remaining:
            self._gate.release()

    def done(self) -> bool:
        driver = self._pool.streams.driver
        if self._pool.closed or driver.is_forked:
            return True
        if self._remaining:
            return False
        if self._error is not None:
            return True
        try:
            with driver.current():
                return all(self._pool.streams.is_done(event) for event in self._events)
        except DriverError as error:
            self._error = self._error or error
            return True

    def wait(self) -> None:
        """Raises the error of the work each time: a StorageError of a read, a DriverError of a copy."""
        self._pool.streams.driver.refuse_fork()
        with self._gate:
            pass
        if (self._events or self._unsure) and not self._pool.closed:
            with self._pool.streams.driver.current():
                for event in self._events:
                    self._pool.streams.synchronize(event)
                for stream in tuple(self._unsure):
                    self._pool.streams.drain(stream)
                self._unsure.clear()  # another thread may have done so as well
        if self._error is not None:
            raise self._error.with_traceback(None)

    def order(self, stream: int) -> None:
        """Has a stream wait. The host blocks until all parts are settled, then until a failed one writes no more.

        Called inside `with driver.current()`. Raises what `wait` raises.
        """
        with self._gate:
            pass
        if self._error is not None:
            self.wait()
        if self._pool.closed:
            return
        for event in self._events:
            self._pool.streams.wait(stream, event)

    def __del__(self) -> None:
        for event in self._events:
            self._pool.give(event)
