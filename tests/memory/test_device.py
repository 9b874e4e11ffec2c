"""The device seam, and the devices that punish mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from mball.errors import StorageError
from mball.memory import Arena, CpuDevice, Device, Event
from tests.adaptors import DelayedDevice, GuardedDevice, GuardError, PoisonedDevice

PAGE = 4096


@dataclass
class FakeBytes:
    """Fills a destination with one byte, and `excess_bytes` beyond it."""

    destination: memoryview
    value: int
    excess_bytes: int = 0
    arena: Arena | None = None
    arena_offset_bytes: int = 0

    def land(self) -> None:
        size = len(self.destination)
        self.destination[:] = bytes([self.value]) * size
        if self.excess_bytes:
            assert self.arena is not None
            beyond = self.arena.view(self.arena_offset_bytes + size, self.excess_bytes)
            beyond[:] = bytes([self.value]) * self.excess_bytes


@dataclass
class FakeRead:
    arena: Arena
    arena_offset_bytes: int
    size_bytes: int
    value: int
    file: str = "fake"
    offset_bytes: int = 0

    def into(self, destination: memoryview, first: int = 0) -> FakeBytes:
        return FakeBytes(destination, self.value, arena=self.arena, arena_offset_bytes=self.arena_offset_bytes + first)


@dataclass
class FakeHandle:
    """Lands when it is waited for."""

    reads: Sequence[FakeBytes]
    fails: bool = False
    landed: bool = False

    def done(self) -> bool:
        return self.landed

    def wait(self) -> None:
        if self.fails:
            raise StorageError("injected")
        if not self.landed:
            for read in self.reads:
                read.land()
        self.landed = True


@dataclass
class FakeSource:
    handles: list[FakeHandle] = field(default_factory=list)
    fail_next: bool = False
    closed: bool = False

    def submit(self, reads: Sequence[FakeBytes]) -> FakeHandle:
        self.handles.append(FakeHandle(list(reads), fails=self.fail_next))
        self.fail_next = False
        return self.handles[-1]

    def drain(self) -> None:
        for handle in self.handles:
            if not handle.fails:
                handle.wait()

    def close(self) -> None:
        self.closed = True


@dataclass
class Latch:
    """An event that says when it was waited for."""

    source: FakeSource
    submitted_before: int = -1

    def done(self) -> bool:
        return self.submitted_before >= 0

    def wait(self) -> None:
        self.submitted_before = len(self.source.handles)


@pytest.mark.parametrize("wrap", [lambda d: d, PoisonedDevice, lambda d: DelayedDevice(d, 3)])
def test_no_copy_starts_before_what_it_comes_after(wrap: type) -> None:
    for _ in range(8):
        source = FakeSource()
        device: Device = wrap(CpuDevice(source))
        arena = device.arena(PAGE)
        arena.resize(PAGE)
        latch = Latch(source)
        event = device.copy([FakeRead(arena, 0, PAGE, 1)], latch)
        device.wait(event)
        assert latch.submitted_before == 0
        assert len(source.handles) == 1
        assert event.done()
        assert arena.tensor(0, torch.uint8, (PAGE,)).eq(1).all()
        device.close()
        assert source.closed
        arena.close()


def test_compute_on_the_cpu_is_over_when_it_returns() -> None:
    event = CpuDevice(FakeSource()).record()
    assert event.done()
    event.wait()


def test_an_error_of_a_copy_is_raised_by_wait_each_time() -> None:
    for seed in range(6):
        source = FakeSource(fail_next=True)
        device = PoisonedDevice(DelayedDevice(CpuDevice(source), seed))
        arena = device.arena(PAGE)
        arena.resize(PAGE)
        event = device.copy([FakeRead(arena, 0, PAGE, 1)], None)
        for _ in range(2):
            with pytest.raises(StorageError, match="injected"):
                device.wait(event)
        device.synchronize()
        arena.close()


def test_poison_is_there_until_the_copy_lands_and_after_a_discard() -> None:
    device = PoisonedDevice(CpuDevice(FakeSource()))
    arena = device.arena(2 * PAGE)
    arena.resize(2 * PAGE)
    tensor = arena.tensor(0, torch.float32, (2 * PAGE // 4,)).fill_(2)
    event = device.copy([FakeRead(arena, PAGE, PAGE, 0)], device.record())
    assert tensor[: PAGE // 4].eq(2).all()
    assert tensor[PAGE // 4 :].isnan().all()
    device.wait(event)
    assert tensor[PAGE // 4 :].eq(0).all()
    device.discard(PAGE, PAGE // 2)
    assert tensor[PAGE // 4 : PAGE * 3 // 8].isnan().all()
    assert tensor[PAGE * 3 // 8 :].eq(0).all()
    assert device.num_poisoned == 2
    arena.close()


def test_delays_are_out_of_order_and_the_same_for_the_same_seed() -> None:
    def order(seed: int) -> list[int]:
        source = FakeSource()
        device = DelayedDevice(CpuDevice(source), seed)
        arena = device.arena(32 * PAGE)
        arena.resize(32 * PAGE)
        events: list[Event] = [device.copy([FakeRead(arena, i * PAGE, PAGE, i)], device.record()) for i in range(32)]
        assert len(source.handles) < 32, "nothing is late"
        for event in reversed(events):
            device.wait(event)
        for i in range(32):
            assert arena.tensor(i * PAGE, torch.uint8, (PAGE,)).eq(i).all()
        assert device.num_delayed > 0
        arena.close()
        return [handle.reads[0].value for handle in source.handles]

    assert order(1) == order(1) != sorted(order(1))
    assert order(1) != order(2)


def test_a_copy_nobody_waited_for_lands_in_the_end() -> None:
    source = FakeSource()
    device = DelayedDevice(CpuDevice(source), 0)
    arena = device.arena(16 * PAGE)
    arena.resize(16 * PAGE)
    for i in range(16):
        device.copy([FakeRead(arena, i * PAGE, PAGE, 7)], None)
    device.synchronize()
    assert arena.tensor(0, torch.uint8, (16 * PAGE,)).eq(7).all()
    device.close()
    arena.close()


def test_a_guarded_device_finds_a_copy_that_leaves_its_slot() -> None:
    """Even when nobody reads the slot beside it again."""

    def begin(source: FakeSource) -> tuple[GuardedDevice, Arena]:
        device = GuardedDevice(PoisonedDevice(CpuDevice(source)))
        arena = device.arena(4 * PAGE)
        arena.resize(4 * PAGE)
        device.wait(device.copy([FakeRead(arena, 2 * PAGE, PAGE, 2)], None))
        return device, arena

    # A read that is longer than its slot, into one that holds a bundle.
    device, arena = begin(FakeSource())
    with pytest.raises(GuardError, match="not free"):
        device.copy([FakeRead(arena, PAGE, 2 * PAGE, 1)], None)
    # The same into room that is taken later.
    device, arena = begin(FakeSource())
    device.wait(device.copy([FakeRead(arena, 0, 2 * PAGE, 1)], None))
    with pytest.raises(GuardError, match="not free"):
        device.copy([FakeRead(arena, PAGE, PAGE, 1)], None)
    # A read that says the right size and brings one byte more, into a bundle and into free room.
    for slot in (1, 2):
        source = FakeSource()
        device, arena = begin(source)
        device.discard(2 * PAGE, PAGE)
        device.wait(device.copy([FakeRead(arena, PAGE * 2, PAGE, 2)], None))
        event = device.copy([FakeRead(arena, slot * PAGE - PAGE, PAGE, 1)], None)
        source.handles[-1].reads[0].excess_bytes = 1
        with pytest.raises(GuardError, match=f"1 bytes of the arena changed from {slot * PAGE} on"):
            device.wait(event)
        device.synchronize()  # it complains once
    # A slot that is given away while its copy runs, and then compute that writes to the arena.
    device, arena = begin(FakeSource())
    device.copy([FakeRead(arena, 0, PAGE, 1)], None)
    with pytest.raises(GuardError, match="while a copy writes there"):
        device.discard(0, PAGE)
    device, arena = begin(FakeSource())
    arena.tensor(3 * PAGE, torch.uint8, (1,)).fill_(1)
    with pytest.raises(GuardError, match="changed"):
        arena.resize(3 * PAGE)


def test_a_guarded_device_lets_right_copies_pass() -> None:
    for seed in range(6):
        device = GuardedDevice(PoisonedDevice(DelayedDevice(CpuDevice(FakeSource()), seed)))
        arena = device.arena(8 * PAGE)
        for round_ in range(4):
            arena.resize((8 - round_) * PAGE)
            events = [device.copy([FakeRead(arena, i * PAGE, PAGE, i)], device.record()) for i in range(4)]
            for i in (2, 0):
                device.wait(events[i])
            device.synchronize()
            for i in range(4):
                assert arena.tensor(i * PAGE, torch.uint8, (PAGE,)).eq(i).all()
                device.discard(i * PAGE, PAGE)
        assert device.num_checked > 30
        device.close()
        arena.close()
