"""Host memory as a device below a GPU: what steps are to a GPU, copies to the GPU are to it.

[Note: two levels] A plan may say what host memory holds of the weights, and what comes there from disk before which
copy. That is a plan like any other, so it is executed like any other, over an arena in pinned memory. Here is the
device for that: its copies are reads from disk, and what uses its memory are copies to the GPU. `take_out` makes such
a copy of what was read here, or is being read, and `record` is the end of those that were asked for until now.

[Note: two threads] A read waits for the last copy out of its place, and a copy of what has not landed for its read.
The host should do neither, so each has a thread that does one after the other. Neither waits for what the other was
asked later: a read waits for copies that were asked for before it, and a copy for reads that were.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch

from mball.errors import DeviceError, MballError
from mball.memory import facts
from mball.memory.arena import Arena
from mball.memory.cuda_events import EventPool, StreamEvent
from mball.memory.cuda_feed import order
from mball.memory.device import NO_DONORS, ArenaRead, CopySource, Donors, Event, Gauge, Held, HostMoment, Moment, Pinned
from mball.memory.gauge import HostGauge
from mball.memory.pinned import CHUNK_BYTES
from mball.memory.pinned_memory import PinnedMemory


@dataclass(slots=True, eq=False)
class _Landing:
    """Reads under way into `[first, end)` of the arena; `asked` has their handle once they were begun."""

    first: int
    end: int
    asked: Future[Event] = field(default_factory=Future)

    @property
    def began_s(self) -> float | None:
        return getattr(self._handle, "began_s", None)

    @property
    def ended_s(self) -> float | None:
        return getattr(self._handle, "ended_s", None)

    @property
    def _handle(self) -> Event | None:
        return self.asked.result() if self.asked.done() and self.asked.exception() is None else None

    def done(self) -> bool:
        return self.asked.done() and (self.asked.exception() is not None or self.asked.result().done())

    def wait(self) -> None:
        self.asked.result().wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """Bytes of a file at `offset_bytes` of the arena, there when `landing` is over."""

    offset_bytes: int
    size_bytes: int
    landing: Event


class _All:
    """The end of several pieces of work, one of which may have failed: it is over, too."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = events

    def done(self) -> bool:
        return all(event.done() for event in self._events)

    def wait(self) -> None:
        for event in self._events:
            with contextlib.suppress(MballError):  # says who asked for it
                event.wait()


class HostLevel:
    """The host's memory below a GPU, behind the device seam. Used by one thread at a time, like the GPU."""

    def __init__(
        self,
        pool: EventPool,
        source: CopySource,
        *,
        node: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        headroom: Callable[[], int] = facts.headroom_bytes,
    ) -> None:
        """Takes nothing yet; threads start with the first copy. `pool` and `source` stay the caller's."""
        self._pool = pool
        self._source = source
        self.memory = PinnedMemory(pool.streams, node=node, chunk_bytes=chunk_bytes, headroom=headroom)
        self._arena: Arena | None = None
        self._there: dict[tuple[str, int, int], Staged] = {}
        self._landings: list[_Landing] = []
        self._taken: list[Event] = []  # copies out of here that may not be over
        self._closed = False
        self._is_mine = threading.local()
        begin = partial(setattr, self._is_mine, "value", True)
        self._reads = ThreadPoolExecutor(1, "mball-stage", begin)
        self._copies = ThreadPoolExecutor(1, "mball-copy", begin)

    # -- the seam ----------------------------------------------------------------------------------------------------

    @property
    def place(self) -> torch.device:
        return torch.device("cpu")

    @property
    def computes_at_once(self) -> bool:
        return False

    @property
    def reads_mappings(self) -> bool:
        return False

    @property
    def below(self) -> None:
        """There is no other level."""

    def arena(self, reserve_bytes: int) -> Arena:
        """Raises DeviceError also where the machine or the control group has not so much memory left."""
        self._arena = arena = Arena(self.memory, reserve_bytes)
        return arena

    def copy(self, reads: Sequence[ArenaRead], after: Event | None) -> Event:
        """Reads once `after` is over, and what is still being read to the same place."""
        self._check_open()
        assert self._arena is not None, "the arena was not made by device.arena(), so nothing can be copied to it"
        landing = _Landing(
            min((read.arena_offset_bytes for read in reads), default=0),
            max((read.arena_offset_bytes + read.size_bytes for read in reads), default=0),
        )
        self._landings = [each for each in self._landings if not each.done()]
        before: list[Event] = [e for e in self._landings if e.first < landing.end and landing.first < e.end]
        self._landings.append(landing)
        for read in reads:
            self._there[_key(read)] = Staged(
                offset_bytes=read.arena_offset_bytes, size_bytes=read.size_bytes, landing=landing
            )
        # The last thing: who is interrupted before has asked for nothing, and after it is read for nothing.
        # It waits for all copies out of here, also those that nobody told it of: what came unplanned has no step here.
        before += [self.record()] if after is None else [after, self.record()]
        landing.asked = self._reads.submit(self._read, list(reads), before)
        return landing

    def follow(self) -> None:
        """Does nothing: copies to the GPU have a stream of their own."""

    def make_room(self) -> None:
        """Does nothing."""

    def cap(self, left_bytes: int | None) -> Held:
        """Does nothing: nobody computes here."""
        return Held()

    def allocating(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def donors(self) -> Donors:
        return NO_DONORS

    def record(self) -> Event:
        self._taken = [event for event in self._taken if not event.done()]
        return _All(tuple(self._taken))

    def moment(self) -> Moment:
        return HostMoment(time.perf_counter())

    def wait(self, event: Event) -> None:
        """Does nothing: `take_out` waits for each read itself."""

    def discard(self, offset: int, size: int) -> None:
        for key, staged in list(self._there.items()):
            if staged.offset_bytes < offset + size and offset < staged.offset_bytes + staged.size_bytes:
                del self._there[key]

    def expect(self, reads: Iterable[ArenaRead]) -> None:
        """Does nothing."""

    def changed(self, file: str, offset_bytes: int, size_bytes: int) -> None:
        """Does nothing: who executes plans here drops what has changed, and brings it again."""

    def rows_of(self, home: torch.Tensor, reads: Sequence[ArenaRead]) -> torch.Tensor:
        return home

    def pinned(self) -> Pinned:
        """What is pinned here the GPU tells."""
        return Pinned()

    def gauge(self) -> Gauge:
        return HostGauge()

    def graphs(self) -> None:
        """Nothing is computed here."""

    def synchronize(self) -> None:
        """Blocks until nothing is read any more, and the stream of copies has all that was asked for."""
        for thread in (self._reads, self._copies):
            if not self._closed:
                thread.submit(_nothing).result()
        self._source.drain()
        self._landings.clear()

    def settle(self) -> None:
        """Says that streams have done all that they were given.

        Of a copy that an interrupt kept from them nobody will ever say that it is over, and nobody may wait for it.
        """
        self._taken.clear()

    def close(self) -> None:
        self._closed = True
        if self._pool.streams.driver.is_forked:  # the threads are the parent's
            return
        # The collector may drop a model in any thread.
        wait = not getattr(self._is_mine, "value", False)
        self._reads.shutdown(wait)
        self._copies.shutdown(wait)

    # -- copies to the GPU -------------------------------------------------------------------------------------------

    def find(self, read: ArenaRead) -> Staged | None:
        """Returns where the bytes are that `read` brings, or will be; None if nobody has asked for them."""
        return self._there.get(_key(read))

    def take_out(
        self, pieces: Sequence[tuple[int, Staged]], after: Event | None, stream: int, event: StreamEvent
    ) -> None:
        """Copies what was found to addresses of the GPU once `after` is over; settles one part of `event`.

        Blocks no longer than the driver does. Errors, also those of reads, stay with the event.
        """
        self._taken.append(event)
        copy = partial(self._take_out, list(pieces), after, stream, event)
        if all(piece.landing.done() for _, piece in pieces):
            copy()
        else:
            self._copies.submit(copy)

    def _take_out(
        self, pieces: Sequence[tuple[int, Staged]], after: Event | None, stream: int, event: StreamEvent
    ) -> None:
        arena = self._arena
        assert arena is not None, "something was found there"
        try:
            for _, piece in pieces:
                piece.landing.wait()
            with self._pool.streams.driver.current():
                if after is not None:
                    order(stream, after)
                for address, piece in pieces:
                    for source, size in self.memory.spans(arena.address + piece.offset_bytes, piece.size_bytes):
                        self._pool.streams.copy_in(address, source, size, stream)
                        address += size
                event.settle(self._pool.record(stream))
        except MballError as error:
            event.fail(error, stream)
        except BaseException as error:
            event.fail(DeviceError(f"a copy to the GPU ended by {type(error).__name__}: {error}"), stream)
            raise

    def _read(self, reads: Sequence[ArenaRead], before: Sequence[Event]) -> Event:
        for event in before:
            with contextlib.suppress(MballError):  # it is over, and who asked for it is told
                event.wait()
        arena = self._arena
        if self._closed or arena is None:
            raise DeviceError("the device is closed, so nothing more is read for it; make another")
        return self._source.submit([read.into(arena.view(read.arena_offset_bytes, read.size_bytes)) for read in reads])

    def _check_open(self) -> None:
        self._pool.streams.driver.refuse_fork()
        if self._closed:
            raise DeviceError("the device is closed, so nothing can be copied to it; make another")


def _key(read: ArenaRead) -> tuple[str, int, int]:
    return read.file, read.offset_bytes, read.size_bytes


def _nothing() -> None:
    """What is done when a thread has come to the end of what it was asked."""
