"""Queues of copies and compute that run in any order that the recorded events allow; see `AdversarialDevice`.

[Note: what may run when]
Compute is one queue in order. Each copy is a queue of its own, since two copies may land in any order: it waits for
what it comes after, *begins* (its destination is NaN from then on) and *ends* (its bytes are there). A `Pace` decides
which heads of these queues run before the host goes on; whoever blocks on an event makes what it needs run, and no
more than the pace wants besides. Operators come to the compute queue by `tests/deferral.py`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from mball.errors import MballError


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
