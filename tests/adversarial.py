"""The adversarial device: copies and compute in any order that the recorded events allow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch

from mball.errors import MballError
from mball.memory.arena import Arena
from mball.memory.device import ArenaRead, Device, Event, Held, Pinned
from mball.torch_private.dispatch import without_dispatch
from tests.adaptors import DeviceAdaptor
from tests.streams import Entry, Kind, Pace, StreamError, StreamEvent, Streams


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
                self._open_arena().poison(start, end - start)

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

    @property
    def place(self) -> torch.device:
        return self.device.place

    def follow(self) -> None:
        self.device.follow()

    def make_room(self) -> None:
        self.device.make_room()

    def allocating(self) -> AbstractContextManager[None]:
        return self.device.allocating()

    def pinned(self) -> Pinned:
        return self.device.pinned()

    def cap(self, left_bytes: int | None) -> Held:
        return self.device.cap(left_bytes)

    @property
    def computes_at_once(self) -> bool:
        return self.device.computes_at_once

    @property
    def reads_mappings(self) -> bool:
        return self.device.reads_mappings

    @property
    def below(self) -> Device | None:
        return self.device.below

    def expect(self, reads: Iterable[ArenaRead]) -> None:
        self.device.expect(reads)

    def changed(self, file: str, offset_bytes: int, size_bytes: int) -> None:
        self.device.changed(file, offset_bytes, size_bytes)

    def rows_of(self, home: torch.Tensor, reads: Sequence[ArenaRead]) -> torch.Tensor:
        if not self.device.reads_mappings:
            return self.device.rows_of(home, reads)
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
        start = read.arena_offset_bytes
        end = start + read.size_bytes
        if arena.closed or end > arena.backed_bytes:
            raise StreamError(f"a copy writes to bytes [{start}, {end}) of the arena, which were given back before")
        return start, end


def _nothing() -> None:
    """A wait does nothing but come after its event."""
