"""Devices for tests that punish mistakes: an early read finds NaN, an early overwrite is overwritten late."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from mball.memory.arena import POISON_BYTE, Arena
from mball.memory.device import ArenaRead, Device, Event


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

    def wait(self, event: Event) -> None:
        self.device.wait(event)

    def discard(self, offset: int, size: int) -> None:
        self.device.discard(offset, size)

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
            np.frombuffer(read.destination, dtype=np.uint8)[: read.size_bytes] = POISON_BYTE
            self.num_poisoned += 1
        return self.device.copy(reads, after)

    def discard(self, offset: int, size: int) -> None:
        assert self._arena is not None, "the arena was not made by device.arena(), so nothing can be poisoned in it"
        self._arena.poison(offset, size)
        self.num_poisoned += 1
        self.device.discard(offset, size)


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
        self._error: Exception | None = None
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
        except Exception as error:
            self._error = error

    def done(self) -> bool:
        return self._error is not None or (self._event is not None and self._event.done())

    def wait(self) -> None:
        self.start()
        if self._error is not None:
            raise self._error
        assert self._event is not None
        self._event.wait()
