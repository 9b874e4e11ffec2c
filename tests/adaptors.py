"""Devices for tests that punish mistakes: an early read finds NaN, an early overwrite is overwritten late."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch

from mball.compute import Compute, OpenCompute, open_compute
from mball.config import Config
from mball.errors import MballError
from mball.memory.arena import Arena
from mball.memory.device import ArenaRead, Device, Donors, Event, Gauge, Graphs, Held, Moment, Pinned
from mball.storage import FileTable


def adapted(adapt: Callable[[Device], Device], open_compute: OpenCompute = open_compute) -> OpenCompute:
    """Returns what opens a device with another one around it."""

    def opened(config: Config, files: FileTable) -> Compute:
        compute = open_compute(config, files)
        return replace(compute, device=adapt(compute.device))

    return opened


class DeviceAdaptor:
    """Passes everything on to another device."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def arena(self, reserve_bytes: int) -> Arena:
        return self.device.arena(reserve_bytes)

    def copy(self, reads: Sequence[ArenaRead], after: Event | None) -> Event:
        return self.device.copy(reads, after)

    def record(self) -> Event:
        return self.device.record()

    def moment(self) -> Moment:
        return self.device.moment()

    def wait(self, event: Event) -> None:
        self.device.wait(event)

    def discard(self, offset: int, size: int) -> None:
        self.device.discard(offset, size)

    @property
    def place(self) -> torch.device:
        return self.device.place

    def follow(self) -> None:
        self.device.follow()

    def make_room(self) -> None:
        self.device.make_room()

    def allocating(self) -> AbstractContextManager[None]:
        return self.device.allocating()

    def donors(self) -> Donors:
        return self.device.donors()

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
        return self.device.rows_of(home, reads)

    def gauge(self) -> Gauge:
        return self.device.gauge()

    def graphs(self) -> Graphs | None:
        return self.device.graphs()

    def synchronize(self) -> None:
        self.device.synchronize()

    def close(self) -> None:
        self.device.close()


class PoisonedDevice(DeviceAdaptor):
    """Fills every destination with NaN before its copy starts, and every discarded range.

    Put it around a `DelayedDevice`, not inside: the poison must be there when the copy is asked for.
    """

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._arena: Arena | None = None
        self.num_poisoned = 0

    def arena(self, reserve_bytes: int) -> Arena:
        assert self._arena is None or self._arena.closed, "a device has one arena"
        self._arena = self.device.arena(reserve_bytes)
        return self._arena

    def copy(self, reads: Sequence[ArenaRead], after: Event | None) -> Event:
        if after is not None:
            after.wait()
        for read in reads:
            self._held().poison(read.arena_offset_bytes, read.size_bytes)
            self.num_poisoned += 1
        # Behind the poison, which is compute where there are streams.
        return self.device.copy(reads, self.device.record())

    def discard(self, offset: int, size: int) -> None:
        self._held().poison(offset, size)
        self.num_poisoned += 1
        self.device.discard(offset, size)

    def _held(self) -> Arena:
        assert self._arena is not None, "the arena was not made by device.arena(), so nothing can be poisoned in it"
        return self._arena


class GuardError(AssertionError):
    """Memory of the arena changed, or was about to, that no copy may touch."""


class GuardedDevice(DeviceAdaptor):
    """Watches every byte of the arena: bytes change only where a copy is under way.

    A copy's destination must be free: never used before, or discarded since. A copy that reaches past the slot
    of its bundle is found when it takes bytes of another slot, in use or read again or not, and at the latest
    when somebody else's copy wants what it took. What is not seen: bytes that nobody wants until the arena ends,
    and a stray write into a range whose own copy is under way.

    Put it around a `PoisonedDevice`, whose poison is expected where a range is discarded or a copy begins. Not
    for tests with real interrupts: one that strikes in here leaves its books wrong.
    """

    _FREE, _COPYING, _HELD = range(3)

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._arena: Arena | None = None
        self._state = np.zeros(0, dtype=np.uint8)
        self._expected = np.zeros(0, dtype=np.uint8)
        self._copying: dict[int, tuple[Event, list[slice]]] = {}
        self._failed = False  # it complains once, so that what is broken can still be closed
        self.num_checked = 0

    def arena(self, reserve_bytes: int) -> Arena:
        self._arena = arena = self.device.arena(reserve_bytes)
        resize = arena.resize

        def resized(num_bytes: int) -> None:
            self.check()
            resize(num_bytes)
            kept = min(len(self._state), arena.backed_bytes)
            content = self._content()
            self._expected = np.concatenate([self._expected[:kept], content[kept:]])
            self._state = np.concatenate([self._state[:kept], np.zeros(len(content) - kept, dtype=np.uint8)])

        arena.resize = resized  # type: ignore[method-assign]
        return arena

    def copy(self, reads: Sequence[ArenaRead], after: Event | None) -> Event:
        self.check()
        ranges = [slice(read.arena_offset_bytes, read.arena_offset_bytes + read.size_bytes) for read in reads]
        for each in ranges:
            if (self._state[each] != self._FREE).any():
                self._fail(f"a copy goes to bytes [{each.start}, {each.stop}) of the arena, which are not free")
            self._state[each] = self._COPYING
        event = None
        try:
            event = self.device.copy(reads, after)
        finally:
            if event is None:
                self._settle(ranges, self._FREE)
        self._copying[id(event)] = event, ranges
        return event

    def wait(self, event: Event) -> None:
        try:
            self.device.wait(event)
        finally:
            _, ranges = self._copying.pop(id(event), (event, []))
            self._settle(ranges, self._HELD)
        self.check()

    def discard(self, offset: int, size: int) -> None:
        self.check()
        gone = slice(offset, offset + size)
        if (self._state[gone] == self._COPYING).any():
            self._fail(f"bytes [{offset}, {offset + size}) of the arena are given away while a copy writes there")
        self.device.discard(offset, size)
        self._settle([gone], self._FREE)

    def synchronize(self) -> None:
        self.device.synchronize()
        self._settle([slice(None)], self._HELD, only_copying=True)
        self._copying.clear()
        self.check()

    def close(self) -> None:
        if self._arena is not None:
            self.synchronize()
        self.device.close()

    def check(self) -> None:
        """Raises GuardError if a byte changed that no copy was under way to."""
        changed = np.flatnonzero((self._content() != self._expected) & (self._state != self._COPYING))
        self.num_checked += 1
        if len(changed):
            self._fail(f"{len(changed)} bytes of the arena changed from {changed[0]} on, where no copy goes")

    def _fail(self, message: str) -> None:
        if not self._failed:
            self._failed = True
            raise GuardError(message)

    def _settle(self, ranges: Sequence[slice], state: int, *, only_copying: bool = False) -> None:
        content = self._content()
        for each in ranges:
            chosen = self._state[each] == self._COPYING if only_copying else slice(None)
            self._expected[each][chosen] = content[each][chosen]
            self._state[each][chosen] = state

    def _content(self) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        assert self._arena is not None, "the arena was not made by device.arena(), so it cannot be watched"
        if self._arena.closed:
            return self._expected
        return np.frombuffer(self._arena.view(0, self._arena.backed_bytes), dtype=np.uint8)


class DelayedDevice(DeviceAdaptor):
    """Starts copies late and out of order, as the seed says; some only when they are waited for.

    A copy that nobody waits for starts at the latest in `synchronize`: an overwrite that did not wait for it
    is itself overwritten then.
    """

    _LONGEST = 4

    def __init__(self, device: Device, seed: int) -> None:
        super().__init__(device)
        self._random = random.Random(seed)
        self._pending: list[_DelayedCopy] = []
        self.num_delayed = 0

    def copy(self, reads: Sequence[ArenaRead], after: Event | None) -> Event:
        self._let_time_pass()
        copy = _DelayedCopy(self.device, tuple(reads), after, self._random.randrange(self._LONGEST + 1))
        if copy.delay == 0:
            copy.start()
        else:
            self.num_delayed += 1
            self._pending.append(copy)
        return copy

    def record(self) -> Event:
        self._let_time_pass()
        return self.device.record()

    def wait(self, event: Event) -> None:
        self.device.wait(event)

    def synchronize(self) -> None:
        pending, self._pending = self._pending, []
        for copy in pending:
            copy.start()
        self.device.synchronize()

    def close(self) -> None:
        self.synchronize()
        self.device.close()

    def _let_time_pass(self) -> None:
        self._random.shuffle(self._pending)
        for copy in self._pending:
            # The longest delay never runs out: that copy waits to be waited for.
            if copy.delay < self._LONGEST:
                copy.delay -= 1
            if copy.delay <= 0:
                copy.start()
        self._pending = [copy for copy in self._pending if not copy.started]


class _DelayedCopy:
    def __init__(self, device: Device, reads: Sequence[ArenaRead], after: Event | None, delay: int) -> None:
        self._device = device
        self._reads = reads
        self._after = after
        self._event: Event | None = None
        self._error: MballError | None = None
        self.delay = delay

    @property
    def started(self) -> bool:
        return self._event is not None or self._error is not None

    def start(self) -> None:
        """Hands the copy to the device, once. An error is raised by `wait`, as that of a late copy would be."""
        if self.started:
            return
        try:
            self._event = self._device.copy(self._reads, self._after)
        except MballError as error:
            self._error = error

    def done(self) -> bool:
        return self._error is not None or (self._event is not None and self._event.done())

    def wait(self) -> None:
        self.start()
        if self._error is not None:
            raise self._error
        assert self._event is not None
        self._event.wait()
