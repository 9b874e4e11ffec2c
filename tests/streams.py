"""Adversarial streams: a device whose copies and compute run in any order that the recorded events allow.

[Note: what may run when]
Compute is one queue in order. Each copy is a queue of its own, since two copies may land in any order: it waits for
what it comes after, *begins* (its destination is NaN from then on) and *ends* (its bytes are there). A `Pace` decides
which heads of these queues run before the host goes on; whoever blocks on an event makes what it needs run, and no
more than the pace wants besides. Operators come to the compute queue by `tests/deferral.py`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch

from mball.errors import MballError
from mball.memory.arena import POISON_BYTE, Arena
from mball.memory.device import ArenaRead, Device, Event
from mball.torch_private.dispatch import without_dispatch
from tests.adaptors import DeviceAdaptor


class StreamError(AssertionError):
    """Something was asked of a stream that no real one survives."""


class Kind(Enum):
    """What an entry of a queue does."""

    COMPUTE = "compute"
    BEGIN = "begin"
    END = "end"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How willingly queues run by themselves: 1, at once; 0, only when somebody blocks on what comes of it.

    Attributes:
        compute: of the compute queue.
        begins: of a copy's begin.
        ends: of its end.
        seed: of the choices among what may run.
    """

    compute: float
    begins: float
    ends: float
    seed: int = 0

    @classmethod
    def any(cls, seed: int) -> Pace:
        """Returns a pace that the seed chooses; earliest and latest are as likely as all between them."""
        chosen = random.Random(seed)
        rates = (0.0, 0.1, 0.4, 0.7, 1.0)
        return cls(compute=chosen.choice(rates), begins=chosen.choice(rates), ends=chosen.choice(rates), seed=seed)

    def of(self, kind: Kind) -> float:
        """Returns how willingly entries of this kind run."""
        return {Kind.COMPUTE: self.compute, Kind.BEGIN: self.begins, Kind.END: self.ends}[kind]


CORNERS = {
    "all at once": Pace(compute=1, begins=1, ends=1),
    "all late": Pace(compute=0, begins=0, ends=0),
    "compute late": Pace(compute=0, begins=1, ends=1),
    "copies late": Pace(compute=1, begins=0, ends=0),
    "copies begin at once and end late": Pace(compute=1, begins=1, ends=0),
    "compute late, copies begin at once and end late": Pace(compute=0, begins=1, ends=0),
}


class StreamEvent:
    """A point in one queue."""

    def __init__(self, streams: Streams, queue: Queue) -> None:
        self.queue = queue
        self.reached = False
        self.error: MballError | None = None
        self._streams = streams

    def reach(self) -> None:
        """Says that the queue got here."""
        self.reached = True

    def done(self) -> bool:
        self._streams.let_time_pass()
        return self.reached

    def wait(self) -> None:
        self._streams.reach(self)
        if self.error is not None:
            raise self.error


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Something that a queue does once it is at the head and `after` is reached."""

    kind: Kind
    run: Callable[[], None]
    after: StreamEvent | None = None

    @property
    def ready(self) -> bool:
        """Whether it may run as far as other queues go."""
        return self.after is None or self.after.reached


Queue = deque[Entry]
# What operators raise, and what streams find wrong.
_ERRORS = (StreamError, MballError, RuntimeError, IndexError, ValueError, TypeError)


class Streams:
    """The queues of a device, and who is next.

    Attributes:
        compute: the queue of operators.
        num_run: entries that ran so far.
    """

    def __init__(self, pace: Pace) -> None:
        self.compute: Queue = deque()
        self.num_run = 0
        self._copies: list[Queue] = []
        self._error: Exception | None = None
        self.follow(pace)

    def follow(self, pace: Pace) -> None:
        """Goes on at this pace."""
        self._pace = pace
        self._random = random.Random(pace.seed)

    def begin_copy(self) -> Queue:
        """Returns a new queue for one copy."""
        queue: Queue = deque()
        self._copies.append(queue)
        return queue

    def event(self, queue: Queue, kind: Kind) -> StreamEvent:
        """Returns the event that `queue` reaches when it has done all that it holds now."""
        event = StreamEvent(self, queue)
        queue.append(Entry(kind=kind, run=event.reach))
        return event

    def let_time_pass(self) -> None:
        """Runs as much as the pace wants."""
        while willing := [queue for queue in self._ready() if self._wants(queue)]:
            self._advance(self._random.choice(willing))

    def reach(self, event: StreamEvent) -> None:
        """Runs until `event` is reached."""
        self.let_time_pass()
        while not event.reached:
            self._advance(self._first_of(event))
            self.let_time_pass()

    def finish_copies(self) -> None:
        """Runs until no copy is left."""
        while self._copies:
            queue = self._random.choice(self._copies)
            after = queue[0].after
            if after is not None:
                self.reach(after)
            if queue:
                self._advance(queue)

    def finish_compute(self) -> None:
        """Runs until the compute queue is empty."""
        self.reach(self.event(self.compute, Kind.COMPUTE))

    def _ready(self) -> Iterator[Queue]:
        return (queue for queue in (self.compute, *self._copies) if queue and queue[0].ready)

    def _wants(self, queue: Queue) -> bool:
        rate = self._pace.of(queue[0].kind)
        return rate == 1 or (rate > 0 and self._random.random() < rate)

    def _first_of(self, event: StreamEvent) -> Queue:
        """Returns the queue that has to go on first for `event` to be reached one day."""
        queue = event.queue
        while True:
            if not queue:
                raise StreamError("an event is waited for that no queue will ever reach")
            after = queue[0].after
            if after is None or after.reached:
                return queue
            queue = after.queue

    def _advance(self, queue: Queue) -> None:
        entry = queue.popleft()
        if not queue:
            self._copies = [copy for copy in self._copies if copy]
        self.num_run += 1
        try:
            entry.run()
        except _ERRORS as error:  # as on a device: the queue goes on, and whoever looks at its results is told
            self._error = self._error or error

    def check(self) -> None:
        """Raises the first error of an entry, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error


@dataclass(slots=True, kw_only=True, eq=False)
class _Discard:
    """Ranges of the arena that are poisoned when the compute queue gets there, unless a later copy was faster."""

    ranges: list[tuple[int, int]] = field(default_factory=list)

    def spare(self, start: int, end: int) -> None:
        """Leaves `[start, end)` alone."""
        self.ranges = [
            (low, high)
            for first, last in self.ranges
            for low, high in ((first, min(last, start)), (max(first, end), last))
            if low < high
        ]


class AdversarialDevice(DeviceAdaptor):
    """Defers copies, and the compute that `tests/deferral.py` hands it, as the pace says.

    Memory that the arena gave up is not the engine's any more: a copy that goes there is an error, and what reads there
    finds nothing of what was there.

    Attributes:
        streams: its queues.
        deferring: whether operators are deferred; else they run when they are called, so whoever waits has to block.
        num_copies: asked for so far.
    """

    def __init__(self, device: Device, pace: Pace) -> None:
        super().__init__(device)
        self.streams = Streams(pace)
        self.deferring = False
        self.num_copies = 0
        self._arena: Arena | None = None
        self._discards: list[_Discard] = []

    def arena(self, reserve_bytes: int) -> Arena:
        assert self._arena is None or self._arena.closed, "a device has one arena"
        self._arena = arena = self.device.arena(reserve_bytes)
        close = arena.close

        def closed() -> None:
            # The tensors of queued operators keep these addresses alive; a driver would not.
            if not arena.closed:
                arena.poison(0, arena.backed_bytes)
            close()

        arena.close = closed  # type: ignore[method-assign]
        return arena

    def copy(self, reads: Sequence[ArenaRead], after: Event | None) -> Event:
        self.num_copies += 1
        queue = self.streams.begin_copy()
        event = StreamEvent(self.streams, queue)
        kept = tuple(reads)
        earlier = tuple(self._discards)

        def begin() -> None:
            for read in kept:
                start, end = self._range(read)
                for discard in earlier:
                    discard.spare(start, end)
                np.frombuffer(read.destination, dtype=np.uint8)[: read.size_bytes] = POISON_BYTE

        def end() -> None:
            try:
                for read in kept:
                    self._range(read)
                self.device.copy(kept, None).wait()
            except MballError as error:
                event.error = error
            finally:
                event.reach()

        if isinstance(after, StreamEvent):
            queue.append(Entry(kind=Kind.BEGIN, run=begin, after=after))
        else:
            if after is not None:
                after.wait()
            queue.append(Entry(kind=Kind.BEGIN, run=begin))
        queue.append(Entry(kind=Kind.END, run=end))
        self.streams.let_time_pass()
        return event

    def record(self) -> Event:
        event = self.streams.event(self.streams.compute, Kind.COMPUTE)
        self.streams.let_time_pass()
        return event

    def wait(self, event: Event) -> None:
        if isinstance(event, StreamEvent) and self.deferring:
            self.streams.compute.append(Entry(kind=Kind.COMPUTE, run=_nothing, after=event))
            self.streams.let_time_pass()
        else:
            event.wait()

    def discard(self, offset: int, size: int) -> None:
        discard = _Discard(ranges=[(offset, offset + size)])
        self._discards.append(discard)

        def poison() -> None:
            self._discards.remove(discard)
            arena = self._open_arena()
            for start, end in discard.ranges:
                # What was given back since needs no poison.
                if start < (kept_end := min(end, arena.backed_bytes)) and not arena.closed:
                    arena.poison(start, kept_end - start)

        self.streams.compute.append(Entry(kind=Kind.COMPUTE, run=poison))
        self.streams.let_time_pass()

    def rows_of(self, home: torch.Tensor) -> torch.Tensor:
        # Compute comes late, and homes are the host's: it may write them, and gives their pages back.
        with without_dispatch(), torch.inference_mode(False):
            return home.detach().clone()

    def synchronize(self) -> None:
        self.streams.finish_copies()
        self.device.synchronize()

    def close(self) -> None:
        self.synchronize()
        self.device.close()

    @contextmanager
    def deferral(self) -> Iterator[None]:
        """Says that operators are deferred meanwhile; the compute queue is empty afterwards."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
            self.streams.finish_compute()
        self.streams.check()

    def _open_arena(self) -> Arena:
        assert self._arena is not None, "the arena was not made by device.arena()"
        return self._arena

    def _range(self, read: ArenaRead) -> tuple[int, int]:
        """Returns the bytes of the arena that a copy writes to."""
        arena = self._open_arena()
        start = np.frombuffer(read.destination, dtype=np.uint8).ctypes.data - arena.address
        end = start + read.size_bytes
        if arena.closed or end > arena.backed_bytes:
            raise StreamError(f"a copy writes to bytes [{start}, {end}) of the arena, which were given back before")
        return start, end


def _nothing() -> None:
    """A wait does nothing but come after its event."""
