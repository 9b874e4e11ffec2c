"""Every call of the driver fails at every position, alone and with those after it, while segments come and go.

What has to hold: an error, pages that are all accounted for, bytes that are as they were, and a call that works when it
is made again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from mball.errors import DeviceError
from mball.memory.allocator.segment_allocator import SegmentAllocator
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_streams import CudaStreams
from mball.memory.page_pool import Page
from tests.memory.driver.segment_scenes import (
    EXTENT_BYTES,
    GRANULE_BYTES,
    MEMORY_BYTES,
    Extents,
    fill,
    force_closed,
    holds,
    library,
)
from tests.memory.driver.standin import CODES, Order, StandIn


class Scene:
    """Steps that can each be made again, two donors, and what the segments hold."""

    def __init__(self, standin: StandIn) -> None:
        self.standin = standin
        self.driver = CudaDriver()
        self.extents = Extents(self.driver, 2)
        self.streams = CudaStreams(self.driver)
        with self.driver.current():
            self.stream = self.streams.create_stream()
            self.event = self.streams.create_event()
            self.streams.record(self.event, self.stream)
            self.pages = [Page(self.driver.create(GRANULE_BYTES), GRANULE_BYTES) for _ in range(2)]
        self.allocator: SegmentAllocator | None = None
        self.segments: dict[str, tuple[int, int]] = {}
        self.donors: list[int] = []

    def steps(self) -> Iterator[Callable[[], object]]:
        yield self.open
        yield lambda: self.allocate("one", EXTENT_BYTES + 2 * GRANULE_BYTES)
        yield self.lend
        yield lambda: self.allocate("two", 2 * GRANULE_BYTES)
        yield lambda: self.free("one")
        yield lambda: self.allocate("three", GRANULE_BYTES)
        yield lambda: self.allocate("four", EXTENT_BYTES)
        yield self.offer
        yield lambda: self.allocate("five", EXTENT_BYTES)
        yield lambda: self.allocate("six", 2 * GRANULE_BYTES)
        yield lambda: self.free("two")
        yield lambda: self.free("five")
        yield self.take_back
        yield lambda: self.free("four")
        yield lambda: self.allocator and self.allocator.trim(EXTENT_BYTES)
        yield lambda: self.allocate("seven", GRANULE_BYTES)

    def open(self) -> None:
        limit_bytes = EXTENT_BYTES + 3 * GRANULE_BYTES
        self.allocator = SegmentAllocator(library(), limit_bytes=limit_bytes, extent_bytes=EXTENT_BYTES)

    def allocate(self, name: str, size_bytes: int) -> None:
        assert self.allocator
        address = self.allocator.allocate(size_bytes, self.stream)
        self.segments[name] = address, size_bytes
        fill(address, size_bytes, len(name))

    def free(self, name: str) -> None:
        assert self.allocator
        address, _ = self.segments.pop(name)
        self.allocator.free(address, self.stream)

    def lend(self) -> None:
        assert self.allocator
        self.allocator.lend(self.pages)
        self.pages = []

    def take_back(self) -> None:
        assert self.allocator
        self.pages += self.allocator.take_back(2 * GRANULE_BYTES)

    def offer(self) -> None:
        assert self.allocator
        for address, page in list(self.extents.pages.items())[len(self.donors) :]:
            self.donors.append(self.allocator.offer(address, page, self.event))

    def check(self) -> None:
        own_bytes = sum(page.size_bytes for page in self.pages)
        if self.allocator:
            for donor, address in zip(self.donors, list(self.extents.pages), strict=False):
                if donor in self.allocator.taken():
                    assert not self.allocator.withdraw(donor)
                    self.donors.remove(donor)
                    self.extents.drop(address)
            now = self.allocator.statistics()
            assert now.held_bytes == now.pooled_bytes + now.in_use_bytes + now.leaving_bytes <= now.limit_bytes
            assert now.in_use_bytes == sum(size_bytes for _, size_bytes in self.segments.values())
            own_bytes += now.held_bytes
        own_bytes += sum(page.size_bytes for page in self.extents.pages.values())
        assert self.standin.handle_bytes == self.standin.taken_bytes == own_bytes
        for name, (address, size_bytes) in self.segments.items():
            assert holds(address, size_bytes, len(name))

    def close(self) -> None:
        """Gives all back, with nothing failing."""
        self.standin.forget()
        if self.allocator:
            for name in list(self.segments):
                self.free(name)
            for donor in self.donors:
                assert self.allocator.withdraw(donor)
            self.allocator.close()
            self.allocator.close()
        with self.driver.current():
            for page in self.pages:
                self.driver.destroy(page.handle)
            self.streams.destroy_event(self.event)
            self.streams.destroy_stream(self.stream)
        self.extents.close()
        self.driver.close()
        assert self.standin.is_empty()
        self.standin.run()
        assert self.standin.is_idle()
        assert self.standin.num_retained == 0


@pytest.mark.parametrize("order", [Order.EARLIEST, Order.LATEST])
@pytest.mark.parametrize("code", ["OUT_OF_MEMORY", "NOT_SUPPORTED"])
@pytest.mark.parametrize("num_failing", [1, 2, 4, 1000])
def test_every_call_fails_at_every_position(standin: StandIn, num_failing: int, code: str, order: Order) -> None:
    position = 0
    met = True
    while met:
        position += 1
        standin.forget()
        standin.configure(granule_bytes=GRANULE_BYTES, memory_bytes=MEMORY_BYTES)
        standin.run_in(order, position)
        scene = Scene(standin)
        try:
            met = play(scene, position, num_failing, CODES[code])
            scene.close()
        except BaseException:
            if scene.allocator:
                force_closed(standin, scene.allocator)
            raise
        finally:
            standin.forget()
            standin.pop_contexts()
    assert position > 60


def play(scene: Scene, position: int, num_failing: int, code: int) -> bool:
    """Makes the calls from `position` on fail, as the allocator makes them; returns whether one did."""
    standin = scene.standin
    seen = 0
    failed = False
    for step in scene.steps():
        standin.forget()
        first = position - seen
        if -num_failing < first - 1:
            standin.fail(max(first, 1), max(first, 1) + num_failing - 1, code=code)
        try:
            step()
        except DeviceError:
            failed = True
            seen += standin.calls()
            standin.forget()
            standin.pop_contexts()
            scene.check()
            with contextlib.suppress(DeviceError):  # what was given back may have lost its room to something else
                step()
            scene.check()
            return True
        seen += standin.calls()
        failed = failed or seen >= position
        standin.forget()
        standin.pop_contexts()
        scene.check()
    return failed


def test_what_the_driver_does_not_take_back_is_tried_again(standin: StandIn) -> None:
    """A segment whose parts are refused one after the other is gone in the end, and its pages are used meanwhile."""
    standin.configure(granule_bytes=GRANULE_BYTES)
    allocator = SegmentAllocator(library(), limit_bytes=EXTENT_BYTES, extent_bytes=EXTENT_BYTES)
    address = allocator.allocate(EXTENT_BYTES)
    for call, pooled_bytes in (("cuMemUnmap", 0), ("cuMemAddressFree", EXTENT_BYTES), ("cuEventDestroy", EXTENT_BYTES)):
        standin.forget()
        standin.fail(1, code=CODES["NOT_SUPPORTED"], function=call)
        if call == "cuMemUnmap":
            allocator.free(address)
        else:
            allocator.trim(0)
        assert (allocator.last_failure().call, allocator.last_failure().code) == (call, CODES["NOT_SUPPORTED"])
        assert (allocator.statistics().num_leaving, allocator.statistics().pooled_bytes) == (1, pooled_bytes)
    allocator.trim(0)
    assert allocator.statistics().num_leaving == 0
    standin.forget()
    standin.fail(1, code=CODES["NOT_SUPPORTED"], function="cuMemRelease")
    with pytest.raises(DeviceError, match="cannot close the allocator on GPU 0: cuMemRelease said CUDA_ERROR_NOT"):
        allocator.close()
    standin.forget()
    standin.fail(1, code=CODES["NOT_SUPPORTED"], function="cuMemRelease")
    with pytest.raises(DeviceError, match=r"cannot give back .* cuMemRelease said CUDA_ERROR_NOT_SUPPORTED"):
        allocator.trim(1)
    allocator.close()
    assert standin.is_empty()
