"""Segments for PyTorch: what they are made of, who owns which page, what waits for what, and what is told of it."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import random
from collections.abc import Iterator

import pytest
import torch
from torch.cuda import _memory_viz

from mball.errors import DeviceError
from mball.memory.allocator.records import Action
from mball.memory.allocator.segment_allocator import SegmentAllocator
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_errors import DriverError, GpuLostError
from mball.memory.cuda_streams import CudaStreams
from mball.memory.page_pool import Page, PagePool
from tests.memory.driver.segment_scenes import (
    EXTENT_BYTES,
    GRANULE_BYTES,
    LIMIT_BYTES,
    MEMORY_BYTES,
    Extents,
    fill,
    holds,
    library,
    small_allocator,
)
from tests.memory.driver.standin import CODES, Order, StandIn


@pytest.fixture
def allocator(standin: StandIn) -> Iterator[SegmentAllocator]:
    with small_allocator(standin) as allocator:
        yield allocator


@pytest.fixture
def driver(allocator: SegmentAllocator) -> Iterator[CudaDriver]:
    driver = CudaDriver()
    yield driver
    driver.close()


@contextlib.contextmanager
def busy_stream(standin: StandIn, driver: CudaDriver, address: int) -> Iterator[int]:
    """A stream that was given work at `address`, which is done when somebody waits for it."""
    streams = CudaStreams(driver)
    standin.run_in(Order.LATEST)
    source = bytearray(b"late" * 8)
    with driver.current():
        stream = streams.create_stream()
        streams.copy_in(address, torch.frombuffer(source, dtype=torch.uint8).data_ptr(), len(source), stream)
    yield stream
    with driver.current():
        streams.drain(stream)  # an error if the memory was not there any more
        streams.destroy_stream(stream)
    standin.run()


# -- what segments are made of ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "extents", "granules"),
    [(1, 0, 1), (GRANULE_BYTES, 0, 1), (GRANULE_BYTES + 1, 0, 2), (EXTENT_BYTES, 1, 0), (EXTENT_BYTES + 1, 1, 1),
     (3 * EXTENT_BYTES - 1, 3, 0), (2 * EXTENT_BYTES + 3 * GRANULE_BYTES, 2, 3)],
)  # fmt: skip
def test_a_segment_is_extents_and_granules_with_one_grant(
    allocator: SegmentAllocator, standin: StandIn, asked: int, extents: int, granules: int
) -> None:
    standin.forget()
    address = allocator.allocate(asked)
    size_bytes = extents * EXTENT_BYTES + granules * GRANULE_BYTES
    assert standin.calls("cuMemCreate") == standin.calls("cuMemMap") == extents + granules
    assert standin.calls("cuMemSetAccess") == 1
    assert standin.mapped_bytes == standin.handle_bytes == size_bytes
    assert address % (EXTENT_BYTES if extents else GRANULE_BYTES) == 0
    fill(address, size_bytes, 1)
    assert holds(address, size_bytes, 1)
    (segment,) = allocator.segments()
    assert (segment.address, segment.size_bytes, segment.requested_bytes) == (address, size_bytes, asked)
    now = allocator.statistics()
    assert (now.num_segments, now.in_use_bytes, now.held_bytes, now.created_bytes) == (1, *[size_bytes] * 3)
    standin.forget()
    allocator.free(address)
    assert standin.calls("cuMemUnmap") == 1
    assert allocator.statistics().pooled_bytes == size_bytes
    assert not allocator.segments()


def test_pooled_pages_are_used_again(allocator: SegmentAllocator, standin: StandIn) -> None:
    allocator.free(allocator.allocate(2 * EXTENT_BYTES + GRANULE_BYTES))
    standin.forget()
    addresses = [allocator.allocate(EXTENT_BYTES), allocator.allocate(EXTENT_BYTES), allocator.allocate(1)]
    assert standin.calls("cuMemCreate") == 0
    for address in addresses:
        allocator.free(address)


def test_segments_lie_apart_and_keep_what_they_hold(allocator: SegmentAllocator) -> None:
    sizes = [GRANULE_BYTES, EXTENT_BYTES, 3 * GRANULE_BYTES, EXTENT_BYTES + GRANULE_BYTES]
    addresses = [allocator.allocate(size) for size in sizes]
    for seed, (address, size) in enumerate(zip(addresses, sizes, strict=True)):
        fill(address, size, seed)
    allocator.free(addresses[1])
    addresses[1] = allocator.allocate(sizes[1])
    fill(addresses[1], sizes[1], 1)
    spans = sorted(zip(addresses, sizes, strict=True))
    assert all(one + size <= two for (one, size), (two, _) in itertools.pairwise(spans))
    assert all(holds(address, size, seed) for seed, (address, size) in enumerate(zip(addresses, sizes, strict=True)))
    for address in addresses:
        allocator.free(address)


# -- the limit --------------------------------------------------------------------------------------------------------


def test_the_limit_is_hard(allocator: SegmentAllocator, standin: StandIn) -> None:
    held = [allocator.allocate(EXTENT_BYTES) for _ in range(LIMIT_BYTES // EXTENT_BYTES)]
    standin.forget()
    with pytest.raises(DeviceError, match=r"cannot allocate 1 B \(1 bytes\) on GPU 0: mball_malloc said MBALL_OVER_L"):
        allocator.allocate(1)
    assert standin.calls("cuMemCreate") == 0
    assert allocator.last_failure().name == "MBALL_OVER_LIMIT"
    allocator.free(held.pop())
    # Pages of the other size go to the driver, so that these come.
    held += [allocator.allocate(GRANULE_BYTES) for _ in range(EXTENT_BYTES // GRANULE_BYTES)]
    now = allocator.statistics()
    assert now.held_bytes == now.peak_held_bytes == now.limit_bytes == LIMIT_BYTES == standin.handle_bytes
    assert (now.released_bytes, now.num_failed) == (EXTENT_BYTES, 1)
    for address in held:
        allocator.free(address)


def test_sizes_that_no_gpu_has_are_refused(allocator: SegmentAllocator, standin: StandIn) -> None:
    standin.forget()
    for size in (0, -1, -(2**63), 2**63 - 1, LIMIT_BYTES + 1):
        with pytest.raises(DeviceError):
            allocator.allocate(size)
    assert standin.calls("cuMemCreate") == 0


def test_the_limit_can_be_changed_down_to_what_is_in_use(allocator: SegmentAllocator) -> None:
    used, spare = allocator.allocate(EXTENT_BYTES), allocator.allocate(EXTENT_BYTES)
    allocator.free(spare)
    allocator.set_limit(EXTENT_BYTES)
    now = allocator.statistics()
    assert (now.held_bytes, now.limit_bytes, now.pooled_bytes) == (EXTENT_BYTES, EXTENT_BYTES, 0)
    with pytest.raises(DeviceError, match="MBALL_BUSY, it is in use"):
        allocator.set_limit(EXTENT_BYTES - 1)
    assert allocator.statistics().limit_bytes == EXTENT_BYTES
    with pytest.raises(DeviceError, match="MBALL_INVALID"):
        allocator.set_limit(2**63)
    allocator.set_limit(2 * EXTENT_BYTES)
    allocator.free(allocator.allocate(EXTENT_BYTES))
    allocator.free(used)


def test_when_the_gpu_has_no_memory_left_pooled_pages_go_first(allocator: SegmentAllocator, standin: StandIn) -> None:
    allocator.free(allocator.allocate(EXTENT_BYTES))
    standin.configure(granule_bytes=GRANULE_BYTES, memory_bytes=EXTENT_BYTES)
    address = allocator.allocate(EXTENT_BYTES - 1)  # which is an extent
    with pytest.raises(
        DriverError, match=r"cuMemCreate said CUDA_ERROR_OUT_OF_MEMORY \(2\); lower the budget"
    ) as error:
        allocator.allocate(GRANULE_BYTES)
    assert error.value.code_name == "CUDA_ERROR_OUT_OF_MEMORY"
    allocator.free(address)
    granules = [allocator.allocate(GRANULE_BYTES) for _ in range(EXTENT_BYTES // GRANULE_BYTES)]
    for address in granules:
        allocator.free(address)
    assert allocator.trim(1) == GRANULE_BYTES
    assert allocator.trim(MEMORY_BYTES) == EXTENT_BYTES - GRANULE_BYTES
    assert allocator.trim(MEMORY_BYTES) == standin.handle_bytes == 0
    assert allocator.statistics().limit_bytes == LIMIT_BYTES


# -- pages that change owners -----------------------------------------------------------------------------------------


def test_pages_change_owners_and_take_their_bytes_of_the_limit_along(
    allocator: SegmentAllocator, driver: CudaDriver, standin: StandIn
) -> None:
    with driver.current():
        pool = PagePool(driver, limit_bytes=MEMORY_BYTES)
        pool.give(pool.take([EXTENT_BYTES, EXTENT_BYTES, GRANULE_BYTES, GRANULE_BYTES, GRANULE_BYTES]))
        assert allocator.lend_from(pool, EXTENT_BYTES + 2 * GRANULE_BYTES) == EXTENT_BYTES + 2 * GRANULE_BYTES
        assert pool.created_bytes == pool.pooled_bytes == EXTENT_BYTES + GRANULE_BYTES
        now = allocator.statistics()
        assert now.held_bytes == now.pooled_bytes == now.lent_bytes == EXTENT_BYTES + 2 * GRANULE_BYTES
        assert now.limit_bytes == LIMIT_BYTES + now.lent_bytes
        standin.forget()
        address = allocator.allocate(EXTENT_BYTES)
        assert standin.calls("cuMemCreate") == 0
        assert allocator.return_to(pool, MEMORY_BYTES) == 2 * GRANULE_BYTES  # the extent is in use
        allocator.free(address)
        assert allocator.return_to(pool, EXTENT_BYTES - 1) == 0
        assert allocator.return_to(pool, EXTENT_BYTES) == EXTENT_BYTES
        now = allocator.statistics()
        assert (now.held_bytes, now.limit_bytes) == (0, LIMIT_BYTES)
        assert pool.created_bytes == pool.pooled_bytes == 2 * EXTENT_BYTES + 3 * GRANULE_BYTES == standin.handle_bytes
        pool.trim()


def test_more_pages_than_are_taken_back_at_a_time(allocator: SegmentAllocator, standin: StandIn) -> None:
    standin.configure(granule_bytes=GRANULE_BYTES)
    allocator.set_limit(600 * GRANULE_BYTES)
    for address in [allocator.allocate(GRANULE_BYTES) for _ in range(600)]:
        allocator.free(address)
    pages = allocator.take_back(599 * GRANULE_BYTES)
    assert len({page.handle for page in pages}) == 599
    assert allocator.statistics().limit_bytes == allocator.statistics().held_bytes == GRANULE_BYTES
    allocator.lend(pages)


def test_a_page_has_one_owner(allocator: SegmentAllocator, driver: CudaDriver, standin: StandIn) -> None:
    with driver.current():
        one, two = (Page(driver.create(GRANULE_BYTES), GRANULE_BYTES) for _ in range(2))
        for pages in ([one, one], [two, Page(two.handle, 0)], [one, Page(two.handle, GRANULE_BYTES + 1)]):
            with pytest.raises(DeviceError, match="MBALL_INVALID"):
                allocator.lend(pages)
            assert allocator.statistics().held_bytes == 0  # none, not some
        allocator.lend([one])
        for again in (one, Page(one.handle, EXTENT_BYTES)):
            with pytest.raises(DeviceError, match="MBALL_INVALID"):
                allocator.lend([two, again])
        assert (allocator.owns(one.handle), allocator.owns(two.handle)) == (True, False)
        address = allocator.allocate(GRANULE_BYTES)  # in a segment it is still its own
        with pytest.raises(DeviceError, match="MBALL_INVALID"):
            allocator.lend([one])
        with pytest.raises(DeviceError, match="MBALL_INVALID"):
            allocator.offer(1 << 30, one)
        allocator.free(address)
        assert allocator.take_back(GRANULE_BYTES) == [one]
        driver.destroy(one.handle)
        driver.destroy(two.handle)
    allocator.lend([])


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_while_pages_change_owners_leaves_each_with_one(
    allocator: SegmentAllocator, driver: CudaDriver, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    lend = allocator.lend

    def interrupted(pages: list[Page]) -> None:
        if after:
            lend(pages)
        raise KeyboardInterrupt

    with driver.current():
        pool = PagePool(driver, limit_bytes=MEMORY_BYTES)
        pool.give(pool.take([GRANULE_BYTES] * 3))
        monkeypatch.setattr(allocator, "lend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            allocator.lend_from(pool, 2 * GRANULE_BYTES)
        assert allocator.statistics().held_bytes == (2 * GRANULE_BYTES if after else 0)
        assert pool.created_bytes + allocator.statistics().held_bytes == 3 * GRANULE_BYTES
        monkeypatch.undo()
        allocator.return_to(pool, MEMORY_BYTES)
        assert pool.created_bytes == 3 * GRANULE_BYTES
        pool.trim()


# -- donors -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def extents(driver: CudaDriver) -> Iterator[Extents]:
    extents = Extents(driver, 3)
    yield extents
    extents.close()


def test_donors_are_taken_in_turn_when_memory_is_dry_and_no_sooner(
    allocator: SegmentAllocator, extents: Extents, standin: StandIn
) -> None:
    allocator.set_limit(2 * EXTENT_BYTES)
    donors = {allocator.offer(address, page): address for address, page in extents.pages.items()}
    before = allocator.generation
    held = [allocator.allocate(EXTENT_BYTES) for _ in range(2)]
    assert (allocator.generation, allocator.taken()) == (before, [])
    held += [allocator.allocate(EXTENT_BYTES) for _ in range(2)]
    assert allocator.generation == before + 2
    assert allocator.taken() == list(donors)[:2]
    now = allocator.statistics()
    assert (now.num_taken, now.taken_bytes, now.offered_bytes) == (2, 2 * EXTENT_BYTES, EXTENT_BYTES)
    assert now.limit_bytes == now.held_bytes == 4 * EXTENT_BYTES
    assert [allocator.withdraw(donor) for donor in donors] == [False, False, True]
    for address in list(donors.values())[:2]:
        extents.drop(address)
    assert (allocator.taken(), allocator.statistics().num_offered) == ([], 0)
    with pytest.raises(DeviceError, match="cannot withdraw a donor on GPU 0: mball_withdraw said MBALL_UNKNOWN"):
        allocator.withdraw(next(iter(donors)))
    with pytest.raises(DeviceError, match="MBALL_OVER_LIMIT"):
        allocator.allocate(1)
    for address in held:
        fill(address, EXTENT_BYTES, address)
    for address in held:
        assert holds(address, EXTENT_BYTES, address)
        allocator.free(address)


def test_a_donor_makes_room_for_pages_of_another_size(
    allocator: SegmentAllocator, extents: Extents, standin: StandIn
) -> None:
    allocator.set_limit(0)
    first = next(iter(extents.pages))
    donor = allocator.offer(first, extents.pages[first])
    addresses = [allocator.allocate(GRANULE_BYTES) for _ in range(EXTENT_BYTES // GRANULE_BYTES)]
    assert not allocator.withdraw(donor)
    extents.drop(first)
    assert allocator.statistics().held_bytes == allocator.statistics().limit_bytes == EXTENT_BYTES
    for address in addresses:
        allocator.free(address)


def test_no_donor_is_taken_for_what_all_of_them_cannot_give(allocator: SegmentAllocator, extents: Extents) -> None:
    allocator.set_limit(EXTENT_BYTES)
    donors = [allocator.offer(address, page) for address, page in extents.pages.items()]
    with pytest.raises(DeviceError, match="MBALL_OVER_LIMIT"):
        allocator.allocate(4 * EXTENT_BYTES + 1)
    assert all(allocator.withdraw(donor) for donor in donors)


def test_no_donor_is_taken_for_what_is_not_a_lack_of_memory(
    allocator: SegmentAllocator, extents: Extents, standin: StandIn
) -> None:
    donors = [allocator.offer(address, page) for address, page in extents.pages.items()]
    standin.forget()
    standin.fail(1, 99, code=CODES["NOT_SUPPORTED"], function="cuMemCreate")
    with pytest.raises(DriverError, match="cuMemCreate said CUDA_ERROR_NOT_SUPPORTED"):
        allocator.allocate(1)
    assert all(allocator.withdraw(donor) for donor in donors)


def test_a_donor_whose_event_is_not_over_comes_after_others(
    allocator: SegmentAllocator, driver: CudaDriver, extents: Extents, standin: StandIn
) -> None:
    allocator.set_limit(0)
    (late, late_page), (early, early_page), (other, _) = extents.pages.items()
    streams = CudaStreams(driver)
    with busy_stream(standin, driver, late) as stream:
        with driver.current():
            event = streams.create_event()
            streams.record(event, stream)
        donors = [allocator.offer(late, late_page, event), allocator.offer(early, early_page)]
        first = allocator.allocate(EXTENT_BYTES)
        assert allocator.taken() == [donors[1]]
        assert allocator.statistics().num_waits == 0
        second = allocator.allocate(EXTENT_BYTES)  # nothing is left but to wait
        assert allocator.taken() == donors
        assert allocator.statistics().num_waits == 1
        assert not any(allocator.withdraw(donor) for donor in donors)
        with driver.current():
            streams.destroy_event(event)
    extents.drop(late)
    extents.drop(early)
    assert other in extents.pages
    allocator.free(first)
    allocator.free(second)


def test_a_donor_that_cannot_be_taken_stays_the_engines(
    allocator: SegmentAllocator, extents: Extents, standin: StandIn
) -> None:
    allocator.set_limit(0)
    donors = [allocator.offer(address, page) for address, page in extents.pages.items()]
    standin.forget()
    standin.fail(1, code=CODES["NOT_SUPPORTED"], function="cuMemUnmap")
    address = allocator.allocate(EXTENT_BYTES)
    assert allocator.taken() == donors[1:2]
    assert allocator.last_failure().name == "CUDA_ERROR_NOT_SUPPORTED"
    extents.drop(list(extents.pages)[1])
    assert [allocator.withdraw(donor) for donor in donors] == [True, False, True]
    allocator.free(address)


def test_more_donors_than_there_are_buckets(allocator: SegmentAllocator, driver: CudaDriver, standin: StandIn) -> None:
    standin.configure(granule_bytes=GRANULE_BYTES)
    allocator.set_limit(0)
    many = Extents(driver, 1100, size_bytes=GRANULE_BYTES)
    donors = {allocator.offer(address, page): address for address, page in many.pages.items()}
    page = next(iter(many.pages.values()))
    with pytest.raises(DeviceError, match="MBALL_INVALID"):
        allocator.offer(next(iter(many.pages)), page)
    assert not allocator.owns(page.handle)
    addresses = [allocator.allocate(GRANULE_BYTES) for _ in range(100)]
    assert allocator.taken() == list(donors)[:100]
    assert allocator.owns(page.handle)
    source = random.Random(0)
    for donor in source.sample(list(donors), 1100):
        if not allocator.withdraw(donor):
            many.drop(donors[donor])
    assert len(many.pages) == 1000
    assert (allocator.statistics().num_offered, allocator.statistics().offered_bytes) == (0, 0)
    for address in addresses:
        allocator.free(address)
    many.close()


def test_the_arenas_pool_forgets_what_was_taken(
    allocator: SegmentAllocator, driver: CudaDriver, standin: StandIn
) -> None:
    with driver.current():
        pool = PagePool(driver)
        (handle,) = pool.take([EXTENT_BYTES])
        start = driver.reserve(EXTENT_BYTES, EXTENT_BYTES)
        driver.map(start, EXTENT_BYTES, handle)
        driver.allow(start, EXTENT_BYTES)
        allocator.set_limit(0)
        donor = allocator.offer(start, Page(handle, EXTENT_BYTES))
        address = allocator.allocate(EXTENT_BYTES)
        assert not allocator.withdraw(donor)
        pool.disown([handle])
        assert pool.created_bytes + allocator.statistics().held_bytes == standin.handle_bytes == EXTENT_BYTES
        allocator.free(address)
        driver.unreserve(start, EXTENT_BYTES)


# -- what waits for what ----------------------------------------------------------------------------------------------


def test_a_freed_segment_stays_until_its_stream_is_done_with_it(
    allocator: SegmentAllocator, driver: CudaDriver, standin: StandIn
) -> None:
    address = allocator.allocate(EXTENT_BYTES)
    with busy_stream(standin, driver, address) as stream:
        standin.forget()
        allocator.free(address, stream)
        assert standin.calls("cuEventSynchronize") == standin.calls("cuMemUnmap") == 0
        (segment,) = allocator.segments()
        assert (segment.is_leaving, segment.stream) == (True, stream)
        now = allocator.statistics()
        assert (now.leaving_bytes, now.in_use_bytes, now.held_bytes) == (EXTENT_BYTES, 0, EXTENT_BYTES)
        other = allocator.allocate(EXTENT_BYTES)  # there is room beside it, so nobody waits
        assert allocator.statistics().num_waits == 0
        allocator.free(other)
        standin.run()
        allocator.trim(0)
        assert not allocator.segments()
        assert allocator.statistics().pooled_bytes == 2 * EXTENT_BYTES


def test_an_allocation_waits_for_what_leaves_when_nothing_else_is_left(
    allocator: SegmentAllocator, driver: CudaDriver, standin: StandIn
) -> None:
    allocator.set_limit(2 * EXTENT_BYTES)
    kept, freed = allocator.allocate(EXTENT_BYTES), allocator.allocate(EXTENT_BYTES)
    with busy_stream(standin, driver, freed) as stream:
        allocator.free(freed, stream)
        address = allocator.allocate(EXTENT_BYTES)
        assert allocator.statistics().num_waits == 1
    allocator.free(kept)
    allocator.free(address)


def test_closing_waits_for_what_leaves(standin: StandIn) -> None:
    driver = CudaDriver()
    with small_allocator(standin) as allocator:
        address = allocator.allocate(EXTENT_BYTES)
        with busy_stream(standin, driver, address) as stream:
            allocator.free(address, stream)
            allocator.close()
            allocator.close()
            assert standin.is_empty()
        with pytest.raises(DeviceError, match="MBALL_NOT_OPEN"):
            allocator.allocate(1)
        driver.close()


def test_graph_captures_are_not_disturbed(allocator: SegmentAllocator, driver: CudaDriver, standin: StandIn) -> None:
    streams = CudaStreams(driver)
    with driver.current():
        stream = streams.create_stream()
    first, second = allocator.allocate(EXTENT_BYTES, stream), allocator.allocate(EXTENT_BYTES)
    standin.capture(stream, True)
    standin.forget()
    allocator.free(first, stream)  # what is recorded now would be a part of the graph
    assert standin.calls("cuEventRecord") == 0
    allocator.free(second)  # another stream's event may be asked for by a thread that is relaxed
    assert (allocator.statistics().num_leaving, allocator.statistics().pooled_bytes) == (1, EXTENT_BYTES)
    assert not standin.is_relaxed
    with pytest.raises(DeviceError, match="MBALL_BUSY"):
        allocator.close()
    standin.capture(stream, False)
    allocator.trim(0)
    assert allocator.statistics().num_leaving == 0
    assert allocator.last_failure().name in ("", "MBALL_BUSY")
    with driver.current():
        streams.destroy_stream(stream)


def test_a_lost_gpu_is_an_error_with_its_name(allocator: SegmentAllocator, standin: StandIn) -> None:
    address = allocator.allocate(EXTENT_BYTES)
    standin.lose(CODES["LAUNCH_FAILED"])
    with pytest.raises(GpuLostError, match="said CUDA_ERROR_LAUNCH_FAILED"):
        allocator.allocate(EXTENT_BYTES)
    allocator.free(address)  # it cannot be known that nobody uses it
    assert allocator.statistics().leaving_bytes == EXTENT_BYTES == standin.mapped_bytes
    standin.forget()


@pytest.mark.parametrize("call", ["cuCtxPushCurrent", "cuThreadExchangeStreamCaptureMode"])
def test_the_context_that_was_current_is_again(allocator: SegmentAllocator, standin: StandIn, call: str) -> None:
    address = allocator.allocate(EXTENT_BYTES)
    standin.forget()
    standin.fail(1, code=CODES["NOT_SUPPORTED"], function=call)
    with pytest.raises(DriverError, match=f"{call} said CUDA_ERROR_NOT_SUPPORTED"):
        allocator.allocate(EXTENT_BYTES)
    assert standin.num_contexts == 0
    standin.fail(1, code=CODES["NOT_SUPPORTED"], function=call)
    allocator.free(address)
    assert (standin.num_contexts, allocator.statistics().leaving_bytes) == (0, EXTENT_BYTES)


# -- who may, and who may not -----------------------------------------------------------------------------------------


def test_what_is_freed_twice_or_never_was_is_left_alone(allocator: SegmentAllocator) -> None:
    address = allocator.allocate(1)
    for wrong in (address + GRANULE_BYTES, 1):
        allocator.free(wrong)
        assert allocator.last_failure().name == "MBALL_UNKNOWN"
    allocator.free(0)
    allocator.free(address)
    allocator.free(address)
    assert (allocator.statistics().num_frees, allocator.statistics().held_bytes) == (1, GRANULE_BYTES)


def test_one_allocator_a_gpu(allocator: SegmentAllocator, standin: StandIn) -> None:
    for ordinal, name in ((0, "MBALL_BUSY"), (1, "CUDA_ERROR_INVALID_DEVICE"), (-1, "MBALL_INVALID"), (64, "INVALID")):
        with pytest.raises(DeviceError, match=name):
            SegmentAllocator(library(), ordinal, limit_bytes=LIMIT_BYTES)
    standin.configure(granule_bytes=GRANULE_BYTES, num_devices=2)
    other = SegmentAllocator(library(), 1, limit_bytes=LIMIT_BYTES)
    address = other.allocate(1)
    assert (allocator.statistics().num_segments, other.statistics().num_segments) == (0, 1)
    with pytest.raises(DeviceError, match="cannot close the allocator on GPU 1: mball_close said MBALL_BUSY"):
        other.close()
    other.free(address)
    other.close()


def test_a_gpu_without_virtual_memory_is_refused(standin: StandIn) -> None:
    standin.configure(virtual_memory=False)
    with pytest.raises(DeviceError, match="needs virtual memory said MBALL_INVALID"):
        SegmentAllocator(library(), limit_bytes=LIMIT_BYTES)
    assert standin.num_retained == 0


def test_a_forked_child_is_refused_and_takes_nothing_from_its_parent(
    allocator: SegmentAllocator, standin: StandIn
) -> None:
    address = allocator.allocate(1)
    fill(address, GRANULE_BYTES, 7)
    standin.forget()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        said = []
        for call in (
            lambda: allocator.allocate(1),
            lambda: allocator.free(address),
            lambda: allocator.lend([Page(1, GRANULE_BYTES)]),
            lambda: allocator.take_back(1),
            lambda: allocator.statistics(),
            lambda: allocator.close(),
            lambda: SegmentAllocator(library(), limit_bytes=1),
        ):
            try:
                call()
                said.append("nothing")
            except DeviceError as error:
                said.append(str(error).rpartition("MBALL_")[2].partition(",")[0])
        said.append(str(standin.calls()))
        os.write(writing, " ".join(said).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read().decode() == "FORKED nothing FORKED FORKED FORKED FORKED FORKED 0"
    os.waitpid(child, 0)
    assert holds(address, GRANULE_BYTES, 7)
    allocator.free(address)


# -- what is told -----------------------------------------------------------------------------------------------------


def test_history_and_snapshot_open_in_pytorchs_visualiser(
    allocator: SegmentAllocator, driver: CudaDriver, standin: StandIn
) -> None:
    first, second = allocator.allocate(EXTENT_BYTES - 5, 0), allocator.allocate(GRANULE_BYTES)
    gone = allocator.allocate(GRANULE_BYTES)
    allocator.free(gone)
    with pytest.raises(DeviceError):
        allocator.allocate(LIMIT_BYTES)
    with busy_stream(standin, driver, second) as stream:
        allocator.free(second, stream)
        snapshot = allocator.snapshot()
        actions = [entry.action for entry in allocator.history()]
    assert actions == [Action.MADE] * 3 + [Action.FREED, Action.GONE, Action.FAILED, Action.FREED]
    times = [entry.time_us for entry in allocator.history()]
    assert times == sorted(times)
    snapshot = pickle.loads(pickle.dumps(snapshot))
    sizes = {segment["address"]: (segment["allocated_size"], segment["total_size"]) for segment in snapshot["segments"]}
    assert sizes == {first: (EXTENT_BYTES, EXTENT_BYTES), second: (0, GRANULE_BYTES)}

    def as_is(lines: str) -> str:
        return lines

    assert f"stream_0;active_allocated;<non-python> {EXTENT_BYTES - 5}" in _memory_viz.memory(snapshot, as_is)
    assert f"seg_{second};active_awaiting_free" in _memory_viz.segments(snapshot, as_is)
    assert "segments: 2" in _memory_viz.segsum(snapshot)
    trace = _memory_viz.trace(snapshot)
    assert f"cudaMalloc({first}, 16.0KiB)" in trace
    assert "raise OutOfMemoryError # 128.0KiB requested, 112.0KiB free in CUDA" in trace
    assert trace.count("free completed") == 1
    for is_of_segments in (False, True):
        assert "snapshot.pickle" in _memory_viz.trace_plot(snapshot, plot_segments=is_of_segments)
    assert "snapshot.pickle" in _memory_viz.segment_plot(snapshot)
    assert "snapshot.pickle" in _memory_viz.trace_plot(snapshot, filter_freed=True)
    allocator.free(first)


def test_of_a_long_history_the_end_is_kept(allocator: SegmentAllocator) -> None:
    for _ in range(1500):  # three entries each
        allocator.free(allocator.allocate(1))
    last = allocator.allocate(2 * EXTENT_BYTES)
    history = allocator.history()
    assert len(history) == 4096
    assert (history[-1].address, history[-1].size_bytes) == (last, 2 * EXTENT_BYTES)
    allocator.free(last)


def test_many_segments_are_all_listed(allocator: SegmentAllocator, standin: StandIn) -> None:
    standin.configure(granule_bytes=GRANULE_BYTES)
    allocator.set_limit(200 * GRANULE_BYTES)
    addresses = {allocator.allocate(1) for _ in range(200)}
    assert {segment.address for segment in allocator.segments()} == addresses
    for address in addresses:
        allocator.free(address)


def test_torch_without_cuda_has_no_pool(allocator: SegmentAllocator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match=r"torch .* was built without CUDA, so it has no torch.cuda.MemPool"):
        allocator.pool()
