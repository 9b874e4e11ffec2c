"""From disk to a GPU: reads into the buffers of a ring, and a copy out of each.

[Note: the feed] The driver cannot be told to wait for a read: an event that was not recorded yet is over in its eyes.
So a thread hands copies to the stream as reads land, and records the event of a request behind its last copy. Until
then `StreamEvent` keeps the host waiting. Reads go on while copies do: a read begins as soon as a buffer is free, its
last copy being over by its own event, and copies are handed on in the order of the reads. Files that cuFile reads
straight into the GPU go through a ring there; whatever becomes of such a read, the pinned ring can make it again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mball.errors import DeviceError, MballError
from mball.memory.cuda_events import EventPool, StreamEvent
from mball.memory.cufile import CuFileError
from mball.memory.device import ArenaRead, Event
from mball.memory.gds_ring import GdsRing
from mball.memory.pinned_ring import PinnedRing
from mball.memory.ring import Ring, RingBuffer, shift_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedPart:
    """`size_bytes` of a read, from byte `first` of it on, to an address of the GPU."""

    read: ArenaRead
    first: int
    size_bytes: int
    address: int

    @property
    def shift_bytes(self) -> int:
        """How far behind a page boundary of the file it begins."""
        return shift_bytes(self.read, self.first)


@dataclass(slots=True, kw_only=True, eq=False)
class _Request:
    """What one copy asks of the feed; `num_open` parts are not handed to the stream."""

    parts: deque[FeedPart]
    after: Event | None
    event: StreamEvent
    num_open: int
    error: BaseException | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class _Landing:
    """A read under way into a buffer."""

    request: _Request
    part: FeedPart
    ring: Ring
    buffer: RingBuffer
    event: Event


@dataclass(slots=True, kw_only=True, eq=False)
class _Queue:
    """What is asked for and not settled, and who serves it; under `changed`.

    Ctrl-C may come between any two lines of who asks: so one list says it all, and the thread itself says that it runs.
    """

    changed: threading.Condition = field(default_factory=threading.Condition)
    requests: list[_Request] = field(default_factory=list)
    worker: threading.Thread | None = None
    stopping: bool = False
    ended_by: str = ""  # the error that nobody foresaw, if the thread died of one; set before `stopping`


def cut(read: ArenaRead, address: int, buffer_bytes: int) -> Iterator[FeedPart]:
    """Yields the parts of a read that fit a buffer, cut at page boundaries of the file."""
    first = 0
    while first < read.size_bytes:
        room = buffer_bytes - shift_bytes(read, first)
        size = min(room, read.size_bytes - first)
        yield FeedPart(read=read, first=first, size_bytes=size, address=address + first)
        first += size


class DiskFeed:
    """Brings stretches of files to a GPU through `make_ring()`, on `stream`, by a thread that the first one starts."""

    def __init__(self, pool: EventPool, stream: int, make_ring: Callable[[], PinnedRing], buffer_bytes: int) -> None:
        """`stream` stays the caller's."""
        self._pool = pool
        self._stream = stream
        self._make_ring = make_ring
        self._buffer_bytes = buffer_bytes
        self._ring: PinnedRing | None = None
        self._gds: GdsRing | None = None
        self._landings: deque[_Landing] = deque()
        self._queue = _Queue()

    def submit(self, reads: Sequence[tuple[ArenaRead, int]], after: Event | None, event: StreamEvent) -> None:
        """Brings each read to an address, once `after` is over; settles one part of `event`. Does not block.

        Raises DeviceError when closed, or when the thread died; nothing is begun then.
        """
        parts = deque(part for read, address in reads for part in cut(read, address, self._buffer_bytes))
        request = _Request(parts=parts, after=after, event=event, num_open=len(parts))
        queue = self._queue
        with queue.changed:
            if queue.ended_by:
                raise self._death()
            if queue.stopping:
                raise DeviceError("the device is closed, so nothing can be copied to it; make another")
            if queue.worker is None:
                threading.Thread(target=self._work, name="mball-feed", daemon=True).start()
                while queue.worker is None:
                    queue.changed.wait()
            queue.requests.append(request)
            queue.changed.notify_all()

    def go_straight(self, ring: GdsRing) -> None:
        """Has files that `ring` takes come through it; closes it at the end. Its buffers are as large as all others.

        Called before anything is submitted.
        """
        self._gds = ring

    def drain(self) -> None:
        """Blocks until every copy that was asked for is with the stream, or failed."""
        queue = self._queue
        with queue.changed:
            queue.changed.notify_all()  # an interrupt may have come between asking and waking the thread
            while queue.requests:
                queue.changed.wait()

    def close(self) -> None:
        """Fails what was not begun, ends the thread, drains the stream and unpins. Idempotent. Raises DeviceError."""
        queue = self._queue
        with queue.changed:
            queue.stopping = True
            queue.changed.notify_all()
        # The collector may drop a model in any thread.
        if queue.worker is not None and queue.worker is not threading.current_thread():
            queue.worker.join()
        if self._ring is not None or self._gds is not None:
            with self._pool.streams.driver.current():
                self._pool.streams.drain(self._stream)
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if self._gds is not None:
            self._gds.close()
            self._gds = None

    # -- on the thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        queue = self._queue
        with queue.changed:
            if queue.worker is not None:  # an interrupt had another one started
                return
            queue.worker = threading.current_thread()
            queue.changed.notify_all()
        try:
            while self._await():
                request = self._pending()
                if request is None or not self._begin(request):
                    self._hand_on()
        except BaseException as error:
            # Its words only: its traceback would hold what this thread worked with, pinned memory among it.
            queue.ended_by = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise
        finally:
            with queue.changed:  # of requests there are some only if this thread dies
                queue.stopping = True
                left, queue.requests = queue.requests, []
                queue.changed.notify_all()
            for request in left:
                request.event.fail(self._death(), self._stream)

    def _death(self) -> DeviceError:
        return DeviceError(
            f"the thread that feeds the GPU died of {self._queue.ended_by} (its traceback is on stderr), so nothing is "
            "copied from disk any more; make another device"
        )

    def _await(self) -> bool:
        """Blocks until there is something to do; returns whether there is."""
        queue = self._queue
        with queue.changed:
            while not (queue.requests or queue.stopping):
                queue.changed.wait()
            return bool(queue.requests)

    def _pending(self) -> _Request | None:
        """Returns the request that the next read belongs to."""
        queue = self._queue
        with queue.changed:
            request = next((request for request in queue.requests if request.parts), None)
        if request is not None and queue.stopping:
            self._fail(request, DeviceError("the device was closed before this was read; make another"))
            return None
        return request

    def _begin(self, request: _Request) -> bool:
        """Starts the next read of a request; returns False where a landing has to be handed on first."""
        part = request.parts[0]
        try:
            with self._pool.streams.driver.current():
                ring = self._ring_for(part)
                buffer = ring.turn()
                if self._landings and not ring.is_free(buffer):
                    return False
                if len(self._landings) == len(ring.buffers):  # all of its own are, at most
                    return False
                ring.free(buffer)
            event = ring.read(buffer, part.read, part.first, part.size_bytes)
        except MballError as error:
            self._fail(request, error)
            return True
        request.parts.popleft()
        self._landings.append(_Landing(request=request, part=part, ring=ring, buffer=buffer, event=event))
        ring.take_turn()
        return True

    def _ring_for(self, part: FeedPart) -> Ring:
        if self._gds is not None and self._gds.takes(part.read.file):
            return self._gds
        if self._ring is None:
            self._ring = self._make_ring()
        return self._ring

    def _hand_on(self) -> None:
        """Waits for the oldest read and has the stream copy it.

        After an error that nobody foresaw the part stays open, so that its request is among those that `_work` fails.
        """
        if not self._landings:
            return
        landing = self._landings[0]
        request, part = landing.request, landing.part
        try:
            landing.event.wait()
            if request.error is None:
                with self._pool.streams.driver.current():
                    if request.after is not None:
                        order(self._stream, request.after)
                        request.after = None
                    landing.ring.copy_out(landing.buffer, part.shift_bytes, part.address, part.size_bytes, self._stream)
        except CuFileError as error:
            assert self._gds is not None
            self._gds.refuse(part.read.file, error)
            self._landings.popleft()
            request.parts.appendleft(part)  # it is open again, and comes by the other way
            return
        except MballError as error:
            self._fail(request, error)
        self._landings.popleft()
        self._close_parts(request, 1)

    def _fail(self, request: _Request, error: BaseException) -> None:
        """Reads no more of a request; its event says why once nothing of it is under way."""
        request.error = request.error or error
        num_left = len(request.parts)
        request.parts.clear()
        self._close_parts(request, num_left)

    def _close_parts(self, request: _Request, num_parts: int) -> None:
        request.num_open -= num_parts
        if request.num_open or not num_parts:
            return
        if request.error is None:
            try:
                with self._pool.streams.driver.current():
                    request.event.settle(self._pool.record(self._stream))
            except DeviceError as error:
                request.error = error
        if request.error is not None:
            request.event.fail(request.error, self._stream)
        queue = self._queue
        with queue.changed:
            queue.requests.remove(request)
            queue.changed.notify_all()


def order(stream: int, event: Event) -> None:
    """Has a stream wait for an event, or the host if it is not the GPU's own. Inside `with driver.current()`.

    Raises the error of the event's work.
    """
    if isinstance(event, StreamEvent):
        event.order(stream)
    else:
        event.wait()
