"""Segments, pages that change owners and donors in any order of calls, some of which fail: one owner a page, always."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mball.errors import DeviceError
from mball.memory.allocator.segment_allocator import SegmentAllocator
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_streams import CudaStreams
from mball.memory.page_pool import PagePool
from tests.memory.conftest import LOADED
from tests.memory.driver.segment_scenes import (
    EXTENT_BYTES,
    GRANULE_BYTES,
    LIMIT_BYTES,
    MEMORY_BYTES,
    Extents,
    fill,
    force_closed,
    holds,
    library,
)
from tests.memory.driver.standin import CODES, Order, StandIn

NUM_STREAMS = 2
BETWEEN_MARKS = 1000  # where in a granule work of streams writes
WORK = b"work of a stream"


class Segments(RuleBasedStateMachine):
    """An allocator, a pool of the arena's, three extents that may be offered, and what each segment must hold."""

    def __init__(self) -> None:
        super().__init__()
        assert LOADED
        self.standin: StandIn = LOADED
        self.segments: dict[int, tuple[int, int]] = {}  # by address: size and seed
        self.donors: dict[int, int] = {}  # by number: address
        self.seeds = itertools.count()
        self.failed = False

    @initialize(limit=st.integers(0, 32), order=st.sampled_from(Order), seed=st.integers(0, 99))
    def open(self, limit: int, order: Order, seed: int) -> None:
        self.standin.forget()
        self.standin.configure(granule_bytes=GRANULE_BYTES, memory_bytes=MEMORY_BYTES)
        self.standin.run_in(order, seed)
        self.driver = CudaDriver()
        self.streams = CudaStreams(self.driver)
        self.extents = Extents(self.driver, 3)
        with self.driver.current():
            self.some_streams = [self.streams.create_stream() for _ in range(NUM_STREAMS)]
            self.join = self.streams.create_event()
            self.events = {address: self.streams.create_event() for address in self.extents.pages}
        self.pool = PagePool(self.driver, limit_bytes=MEMORY_BYTES)
        self.given_bytes = limit * GRANULE_BYTES  # what the limit would be without pages that changed owners
        self.allocator = SegmentAllocator(library(), limit_bytes=self.given_bytes, extent_bytes=EXTENT_BYTES)
        self.generation = self.allocator.generation

    def work(self, stream: int, address: int) -> None:
        """Gives a stream something to do in a segment."""
        source = (ctypes.c_char * len(WORK)).from_buffer_copy(WORK)
        with self.driver.current():
            place = address + BETWEEN_MARKS
            self.streams.copy_in(place, ctypes.addressof(source), len(WORK), self.some_streams[stream])

    @rule(num_bytes=st.integers(1, 9 * GRANULE_BYTES), stream=st.integers(0, NUM_STREAMS - 1))
    def allocate(self, num_bytes: int, stream: int) -> None:
        before = self.allocator.statistics()
        size_bytes = -(-num_bytes // GRANULE_BYTES) * GRANULE_BYTES
        could_bytes = before.limit_bytes - before.in_use_bytes + before.offered_bytes
        try:
            address = self.allocator.allocate(num_bytes, self.some_streams[stream])
        except DeviceError:
            is_short = self.standin.taken_bytes - before.pooled_bytes - before.offered_bytes + size_bytes > MEMORY_BYTES
            assert size_bytes > could_bytes or is_short
            return
        assert size_bytes <= could_bytes
        self.segments[address] = size_bytes, next(self.seeds)
        fill(address, *self.segments[address])
        self.work(stream, address)

    @precondition(lambda self: self.segments)
    @rule(which=st.integers(0, 99), stream=st.integers(0, NUM_STREAMS - 1))
    def free(self, which: int, stream: int) -> None:
        address = list(self.segments)[which % len(self.segments)]
        self.work(stream, address)
        self.free_on(stream, address)

    def free_on(self, stream: int, address: int) -> None:
        """Frees a segment on a stream that is after the other, since both may have worked in it."""
        del self.segments[address]
        self.put_after_the_other(stream)
        self.allocator.free(address, self.some_streams[stream])

    def put_after_the_other(self, stream: int) -> None:
        with self.driver.current():
            self.streams.record(self.join, self.some_streams[1 - stream])
            self.streams.wait(self.some_streams[stream], self.join)

    @rule(sizes=st.lists(st.sampled_from([1, 1, 2, 4, 5]), max_size=4))
    def lend(self, sizes: list[int]) -> None:
        with self.driver.current():
            try:
                self.pool.give(self.pool.take([size * GRANULE_BYTES for size in sizes]))
            except DeviceError:  # the GPU has no more
                return
            pooled_bytes = self.pool.pooled_bytes
            assert self.allocator.lend_from(self.pool, MEMORY_BYTES) == pooled_bytes
        self.given_bytes += pooled_bytes

    @rule(granules=st.integers(0, 20))
    def take_back(self, granules: int) -> None:
        with self.driver.current():
            taken_bytes = self.allocator.return_to(self.pool, granules * GRANULE_BYTES)
        assert taken_bytes <= granules * GRANULE_BYTES
        self.given_bytes -= taken_bytes

    @precondition(lambda self: len(self.donors) < len(self.extents.pages))
    @rule(stream=st.none() | st.integers(0, NUM_STREAMS - 1))
    def offer(self, stream: int | None) -> None:
        address = next(address for address in self.extents.pages if address not in self.donors.values())
        event = self.events[address]
        if stream is not None:
            self.work(stream, address)
            self.put_after_the_other(stream)  # which may have worked there the last time
        with self.driver.current():
            if stream is not None:
                self.streams.record(event, self.some_streams[stream])
            else:
                self.streams.synchronize(event)
        number = self.allocator.offer(address, self.extents.pages[address], 0 if stream is None else event)
        self.donors[number] = address

    @precondition(lambda self: self.donors)
    @rule(which=st.integers(0, 2))
    def withdraw(self, which: int) -> None:
        number = list(self.donors)[which % len(self.donors)]
        taken = number in self.allocator.taken()
        assert self.allocator.withdraw(number) != taken
        address = self.donors.pop(number)
        if taken:
            self.given_bytes += EXTENT_BYTES
            self.extents.drop(address)

    @rule(granules=st.integers(0, 20))
    def trim(self, granules: int) -> None:
        before = self.allocator.statistics()
        gone_bytes = self.allocator.trim(granules * GRANULE_BYTES)
        assert gone_bytes >= min(granules * GRANULE_BYTES, before.pooled_bytes)

    @rule(granules=st.integers(0, 32))
    def set_limit(self, granules: int) -> None:
        now = self.allocator.statistics()
        changed_bytes = granules * GRANULE_BYTES - now.limit_bytes
        try:
            self.allocator.set_limit(granules * GRANULE_BYTES)
        except DeviceError:
            assert now.in_use_bytes + now.leaving_bytes > granules * GRANULE_BYTES
        else:
            self.given_bytes += changed_bytes

    @rule(first=st.integers(1, 12), code=st.sampled_from(sorted(CODES.values())), granules=st.integers(1, 9))
    def allocate_with_a_failure(self, first: int, code: int, granules: int) -> None:
        self.standin.forget()
        self.standin.fail(first, code=code)
        address = 0
        try:
            address = self.allocator.allocate(granules * GRANULE_BYTES)
        except DeviceError:
            pass
        finally:
            self.standin.forget()
            self.standin.pop_contexts()
        if address:
            self.segments[address] = granules * GRANULE_BYTES, next(self.seeds)
            fill(address, *self.segments[address])
        self.failed = True

    @rule()
    def time_passes(self) -> None:
        self.standin.run()

    @invariant()
    def bytes_are_conserved(self) -> None:
        if not hasattr(self, "allocator"):
            return
        now = self.allocator.statistics()
        assert now.held_bytes == now.pooled_bytes + now.in_use_bytes + now.leaving_bytes <= now.limit_bytes
        taken = self.allocator.taken()
        assert now.limit_bytes == self.given_bytes + len(taken) * EXTENT_BYTES
        assert now.in_use_bytes == sum(size_bytes for size_bytes, _ in self.segments.values())
        assert self.allocator.generation == self.generation + now.num_taken
        extent_bytes = (len(self.extents.pages) - len(taken)) * EXTENT_BYTES
        assert self.standin.handle_bytes == now.held_bytes + self.pool.created_bytes + extent_bytes
        assert self.standin.mapped_bytes <= now.in_use_bytes + now.leaving_bytes + extent_bytes
        if not self.failed:
            assert self.standin.mapped_bytes == now.in_use_bytes + now.leaving_bytes + extent_bytes

    @invariant()
    def segments_lie_apart_and_hold_what_they_held(self) -> None:
        if not hasattr(self, "allocator"):
            return
        listed = sorted((one.address, one.size_bytes, one.is_leaving) for one in self.allocator.segments())
        assert all(one + size <= two for (one, size, _), (two, *_) in itertools.pairwise(listed))
        in_use = {address: size_bytes for address, size_bytes, is_leaving in listed if not is_leaving}
        assert in_use == {address: size_bytes for address, (size_bytes, _) in self.segments.items()}
        for address, (size_bytes, seed) in self.segments.items():
            assert holds(address, size_bytes, seed)

    def teardown(self) -> None:
        if not hasattr(self, "allocator"):
            return
        try:
            self.give_all_back()
        except BaseException:
            force_closed(self.standin, self.allocator)
            self.standin.sweep()
            raise

    def give_all_back(self) -> None:
        for address in list(self.segments):
            self.free_on(0, address)
        for number, address in self.donors.items():
            if not self.allocator.withdraw(number):
                self.extents.drop(address)
        self.allocator.close()
        with self.driver.current():
            for stream in self.some_streams:
                self.streams.drain(stream)  # an error if one of them found its memory gone
                self.streams.destroy_stream(stream)
            for event in (self.join, *self.events.values()):
                self.streams.destroy_event(event)
            self.pool.trim()
        self.extents.close()
        self.driver.close()
        assert self.standin.is_empty()
        self.standin.run()
        assert self.standin.is_idle()
        assert self.standin.num_retained == 0


Segments.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_any_sequence_of_calls(standin: StandIn) -> None:
    run: Callable[[], None] = Segments.TestCase().runTest
    run()


@pytest.mark.parametrize("num_granules", [1, 3, 4, 7, 9])
def test_a_long_life_ends_with_nothing(standin: StandIn, num_granules: int) -> None:
    standin.configure(granule_bytes=GRANULE_BYTES)
    allocator = SegmentAllocator(library(), limit_bytes=LIMIT_BYTES, extent_bytes=EXTENT_BYTES)
    for turn in range(300):
        address = allocator.allocate((turn % num_granules + 1) * GRANULE_BYTES)
        allocator.free(address)
    assert allocator.statistics().peak_held_bytes <= LIMIT_BYTES
    allocator.close()
    assert standin.is_empty()
