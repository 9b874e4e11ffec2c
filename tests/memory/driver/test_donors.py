"""Extents of an arena that segments take: one owner a page, and nobody's before its last use is over."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mball.errors import DeviceError
from mball.memory import Arena
from mball.memory.allocator.segment_allocator import SegmentAllocator
from mball.memory.cuda_donors import CudaDonors
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_events import EventPool, StreamEvent
from mball.memory.cuda_streams import CudaStreams
from mball.memory.cuda_virtual import CudaMemory
from mball.memory.device import COMPLETE, Event, Extent
from mball.memory.page_pool import Page, PagePool
from tests.memory.conftest import LOADED
from tests.memory.driver.segment_scenes import (
    EXTENT_BYTES,
    GRANULE_BYTES,
    MEMORY_BYTES,
    fill,
    force_closed,
    holds,
    library,
)
from tests.memory.driver.standin import CODES, StandIn
from tests.memory.driver.test_device_mutants import swept
from tests.memory.driver.test_segments import busy_stream

NUM_EXTENTS = 6


@dataclass(slots=True)
class Pair:
    """An arena and the segments beside it, which have nothing but what they are given."""

    driver: CudaDriver
    memory: CudaMemory
    arena: Arena
    segments: SegmentAllocator
    donors: CudaDonors
    held: list[int] = field(default_factory=list)  # addresses of segments

    def allocate(self, num_extents: int) -> None:
        self.held.append(self.segments.allocate(num_extents * EXTENT_BYTES))

    def fill(self, first: int = 0) -> None:
        """Marks the extents from `first` on."""
        for offset in range(first * EXTENT_BYTES, self.arena.backed_bytes, EXTENT_BYTES):
            fill(self.arena.address + offset, EXTENT_BYTES, offset)

    def check(self) -> None:
        """All that is backed and on nobody's offer is as it was filled, and every page has one owner."""
        for offset in range(0, self.arena.backed_bytes, EXTENT_BYTES):
            if self.donors.is_offered(Extent(offset, offset + EXTENT_BYTES)):
                continue
            assert holds(self.arena.address + offset, EXTENT_BYTES, offset), offset
        assert LOADED
        taken_bytes = sum(EXTENT_BYTES for _ in self.segments.taken())  # of which the memory did not hear yet
        held_bytes = self.segments.statistics().held_bytes
        assert self.memory.created_bytes + held_bytes - taken_bytes == LOADED.handle_bytes

    def close(self) -> None:
        self.donors.withdraw()
        for address in self.held:
            self.segments.free(address)
        self.segments.close()
        self.arena.close()
        self.memory.close_after_use()


@contextlib.contextmanager
def made(standin: StandIn, limit_bytes: int = 0) -> Iterator[Pair]:
    standin.configure(granule_bytes=GRANULE_BYTES, memory_bytes=MEMORY_BYTES)
    driver = CudaDriver()
    memory = CudaMemory(driver, pool=PagePool(driver, limit_bytes=MEMORY_BYTES), extent_bytes=EXTENT_BYTES)
    segments = SegmentAllocator(library(), limit_bytes=limit_bytes, extent_bytes=EXTENT_BYTES)
    arena = Arena(memory, 2 * NUM_EXTENTS * EXTENT_BYTES)
    pair = Pair(driver, memory, arena, segments, CudaDonors(segments, memory, arena))
    try:
        arena.resize(NUM_EXTENTS * EXTENT_BYTES)
        pair.fill()
        yield pair
        pair.close()
    except BaseException:
        pair.donors.withdraw()
        force_closed(standin, segments)
        raise


@pytest.fixture
def pair(standin: StandIn) -> Iterator[Pair]:
    with made(standin) as pair:
        yield pair


def test_the_arena_ends_before_the_first_that_was_taken(pair: Pair) -> None:
    extents = pair.donors.extents()
    assert [tuple(extent) for extent in extents] == [
        (first, first + EXTENT_BYTES) for first in range(0, NUM_EXTENTS * EXTENT_BYTES, EXTENT_BYTES)
    ]
    pair.donors.offer(extents[:2:-1], COMPLETE)
    assert [pair.donors.is_offered(extent) for extent in extents] == [False] * 3 + [True] * 3
    assert not pair.donors.has_lost
    pair.allocate(2)
    assert pair.donors.has_lost
    pair.donors.withdraw(0, 1)  # all comes back where some was taken
    assert (pair.arena.backed_bytes, pair.donors.taken_bytes) == (4 * EXTENT_BYTES, 2 * EXTENT_BYTES)
    assert not any(map(pair.donors.is_offered, extents))
    assert pair.segments.statistics().num_offered == 0
    pair.check()
    pair.arena.resize(NUM_EXTENTS * EXTENT_BYTES)
    pair.fill(4)
    pair.check()


def test_what_meets_a_range_comes_back_and_the_rest_stays(pair: Pair) -> None:
    extents = pair.donors.extents()
    pair.donors.offer(extents[::-1], COMPLETE)
    pair.donors.withdraw(2 * EXTENT_BYTES - 1, 3 * EXTENT_BYTES)
    assert [pair.donors.is_offered(extent) for extent in extents] == [True, False, False, True, True, True]
    with pytest.raises(DeviceError, match="MBALL_OVER_LIMIT"):
        pair.allocate(5)
    pair.allocate(4)  # and those are not taken
    pair.donors.withdraw()
    assert (pair.arena.backed_bytes, pair.donors.taken_bytes) == (0, 4 * EXTENT_BYTES)
    pair.arena.resize(0)
    pair.check()


def test_holes_go_with_what_lies_above_them_whatever_the_driver_refuses(standin: StandIn) -> None:
    """It is refused at each position in turn, and done again."""
    position = 0
    while True:
        position += 1
        with made(standin) as pair:
            extents = pair.donors.extents()
            pair.donors.offer([extents[4], extents[1]], COMPLETE)
            pair.allocate(2)
            standin.forget()
            standin.fail(position, position, code=CODES["NOT_SUPPORTED"])
            failed = False
            for _ in range(2):
                try:
                    pair.donors.withdraw()
                    pair.arena.resize(pair.arena.backed_bytes)
                    break
                except DeviceError:
                    assert not failed, "it was refused once"
                    failed = True
            standin.forget()
            standin.pop_contexts()
            pair.check()
            assert pair.arena.backed_bytes == pair.arena.taken_bytes == EXTENT_BYTES
            pair.arena.resize(4 * EXTENT_BYTES)
            assert standin.handle_bytes == NUM_EXTENTS * EXTENT_BYTES, "pages of the arena's were not used again"
            pair.fill(1)
            pair.check()
        if not failed:
            break
    assert position > 3


def recorded(pool: EventPool, stream: int) -> StreamEvent:
    event = StreamEvent(pool, 1)
    event.settle(pool.record(stream))
    return event


def late_compute(pair: Pair, standin: StandIn) -> None:
    """What was issued before an extent was offered, and is late, still finds its memory."""
    pool = EventPool(CudaStreams(pair.driver))
    last = pair.donors.extents()[-1]
    with busy_stream(standin, pair.driver, pair.arena.address + last.first) as stream:
        with pair.driver.current():
            pair.donors.offer([last], recorded(pool, stream))
            of_others = recorded(pool, stream)
            (donor,) = pair.donors._donors.values()
            assert donor.after is not of_others
            assert isinstance(donor.after, StreamEvent)
            assert donor.after.handle != of_others.handle, "the event is somebody else's by now"
        pair.allocate(1)
        assert pair.segments.statistics().num_waits == 1
        pair.donors.withdraw()
    with pair.driver.current():
        pool.close()


def test_an_extent_is_taken_after_its_last_use(pair: Pair, standin: StandIn) -> None:
    late_compute(pair, standin)


def without_the_event(patch: pytest.MonkeyPatch) -> None:
    offer = SegmentAllocator.offer

    def at_once(self: SegmentAllocator, address: int, page: Page, _: int = 0, **kwargs: Any) -> int:
        return offer(self, address, page, 0, **kwargs)

    patch.setattr(SegmentAllocator, "offer", at_once)


def without_who_keeps_the_event(patch: pytest.MonkeyPatch) -> None:
    offer = CudaDonors.offer

    def forgetful(self: CudaDonors, extents: Iterable[Extent], after: Event) -> None:
        offer(self, extents, after)
        for donor in self._donors.values():
            donor.after = COMPLETE

    patch.setattr(CudaDonors, "offer", forgetful)


@pytest.mark.parametrize("mutant", [without_the_event, without_who_keeps_the_event])
def test_what_is_left_out_is_missed(
    mutant: Callable[[pytest.MonkeyPatch], None], standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    with swept(standin):
        with pytest.raises((DeviceError, AssertionError)), made(standin) as pair:
            late_compute(pair, standin)
        del pair


def test_nothing_is_offered_that_somebody_else_may_use(pair: Pair) -> None:
    """An event of another device, which the library cannot look at: it is over, or there is no offer."""

    class Late:
        is_over = False

        def done(self) -> bool:
            return self.is_over

        def wait(self) -> None:
            raise AssertionError("nobody waits")

    late: Event = Late()
    last = pair.donors.extents()[-1]
    pair.donors.offer([last], late)
    assert not pair.donors.is_offered(last)
    Late.is_over = True
    pair.donors.offer([last], late)
    assert pair.donors.is_offered(last)


def test_a_forked_child_takes_nothing_back(pair: Pair) -> None:
    pair.donors.offer(pair.donors.extents()[-1:], COMPLETE)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            pair.donors.withdraw()
        except DeviceError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert "CUDA does not survive a fork" in pipe.read().decode()
    os.waitpid(child, 0)
    pair.allocate(1)
    pair.donors.withdraw()
    assert pair.donors.taken_bytes == EXTENT_BYTES
    pair.arena.resize(pair.arena.backed_bytes)


def test_an_interrupt_counts_nothing_twice(standin: StandIn) -> None:
    """Ctrl-C at any line of a withdrawal, which the next one ends."""
    code = CudaDonors.withdraw.__code__
    lines = sorted({line for _, _, line in code.co_lines() if line and line > code.co_firstlineno})
    num_struck = 0
    for struck in lines:

        def local(frame: FrameType, event: str, _: object, struck: int = struck) -> Any:
            if event == "line" and frame.f_lineno == struck:
                raise KeyboardInterrupt
            return local

        with made(standin) as pair:
            for num_extents in (2, 1):
                extents = pair.donors.extents()
                pair.donors.offer(extents[:0:-1], COMPLETE)
                pair.allocate(num_extents)
                sys.settrace(lambda frame, _, __, local=local: local if frame.f_code is code else None)
                try:
                    pair.donors.withdraw()
                except KeyboardInterrupt:
                    num_struck += 1
                finally:
                    sys.settrace(None)
                pair.donors.withdraw()
                assert pair.donors.taken_bytes == pair.segments.statistics().taken_bytes, struck
                pair.arena.resize(pair.arena.backed_bytes)
                pair.check()
            assert pair.donors.taken_bytes == 3 * EXTENT_BYTES
    assert num_struck > len(lines), "few lines were struck"


def test_a_limit_fits_what_is_in_use(pair: Pair, standin: StandIn) -> None:
    segments = pair.segments
    assert segments.fit_limit(3 * EXTENT_BYTES) == 0
    pair.allocate(2)
    assert segments.fit_limit(EXTENT_BYTES) == segments.statistics().limit_bytes == 2 * EXTENT_BYTES
    segments.set_limit(3 * EXTENT_BYTES)
    pair.allocate(1)
    segments.free(pair.held.pop())
    assert segments.statistics().pooled_bytes == EXTENT_BYTES
    standin.forget()
    standin.fail(1, code=CODES["NOT_SUPPORTED"], function="cuMemRelease")
    with pytest.raises(DeviceError, match="MBALL_BUSY"):
        segments.fit_limit(0)
    assert segments.statistics().limit_bytes == 3 * EXTENT_BYTES
    assert segments.fit_limit(0) == segments.statistics().held_bytes == 2 * EXTENT_BYTES


ACTIONS = st.one_of(
    st.tuples(st.just("offer"), st.lists(st.integers(0, NUM_EXTENTS - 1), unique=True)),
    st.tuples(st.just("withdraw"), st.tuples(st.integers(0, NUM_EXTENTS), st.integers(0, NUM_EXTENTS))),
    st.tuples(st.just("allocate"), st.integers(1, 3 * EXTENT_BYTES)),
    st.tuples(st.just("free"), st.integers(0, 5)),
    st.tuples(st.just("resize"), st.integers(0, NUM_EXTENTS)),
    st.tuples(st.just("fail"), st.integers(1, 9)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ACTIONS, max_size=25), st.integers(0, 8))
def test_both_owners_stay_within_the_budget(actions: list[tuple[str, object]], num_granules: int) -> None:
    """Whatever is offered, taken, withdrawn, given back and refused, in any order."""
    assert LOADED
    standin = LOADED
    budget_bytes = NUM_EXTENTS * EXTENT_BYTES + num_granules * GRANULE_BYTES
    with made(standin, num_granules * GRANULE_BYTES) as pair:
        for action, argument in actions:
            with contextlib.suppress(DeviceError):
                _act(pair, standin, action, argument)
            if action != "fail":
                standin.forget()
                standin.pop_contexts()
            assert standin.handle_bytes <= budget_bytes
            pair.check()
        standin.forget()
        pair.donors.withdraw()
        pair.check()


def _act(pair: Pair, standin: StandIn, action: str, argument: object) -> None:
    if action == "offer":
        assert isinstance(argument, list)
        known = pair.donors.extents()
        chosen = [known[number] for number in argument if number < len(known)]
        pair.donors.offer([extent for extent in chosen if not pair.donors.is_offered(extent)], COMPLETE)
    elif action == "withdraw":
        assert isinstance(argument, tuple)
        pair.donors.withdraw(argument[0] * EXTENT_BYTES, argument[1] * EXTENT_BYTES)
    elif action == "allocate":
        assert isinstance(argument, int)
        pair.held.append(pair.segments.allocate(argument))
    elif action == "free" and pair.held:
        assert isinstance(argument, int)
        pair.segments.free(pair.held.pop(argument % len(pair.held)))
    elif action == "resize":  # as the engine does: to no more than there is
        assert isinstance(argument, int)
        pair.donors.withdraw()
        pair.arena.resize(min(argument * EXTENT_BYTES, pair.arena.backed_bytes))
        pair.memory.take_from(pair.segments)
        before = pair.arena.backed_bytes
        room = sum(
            EXTENT_BYTES * len(handles) for size, handles in pair.memory._pool._pooled.items() if size == EXTENT_BYTES
        )
        pair.arena.resize(max(min(argument * EXTENT_BYTES, before + room), before))
        pair.fill(before // EXTENT_BYTES)
        pair.memory.give_to(pair.segments)
    elif action == "fail":
        assert isinstance(argument, int)
        standin.forget()
        standin.fail(argument, argument, code=CODES["NOT_SUPPORTED"])
