"""PyTorch's caching allocator on our segments, on a real GPU: what only a driver and torch together can show."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mball.errors import DeviceError
from mball.memory.allocator.library import load_library
from mball.memory.allocator.segment_allocator import SegmentAllocator
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_streams import CudaStreams
from mball.memory.page_pool import Page, PagePool
from mball.units import MIB

pytestmark = pytest.mark.gpu

LIMIT_BYTES = 256 * MIB
EXTENT_BYTES = 32 * MIB


@pytest.fixture
def allocator(tmp_path: Path) -> Iterator[SegmentAllocator]:
    torch.zeros(1, device="cuda:0")
    if not CudaDriver().has_virtual_memory:
        pytest.skip("GPU 0 has no virtual memory")
    try:
        library = load_library(tmp_path)
    except DeviceError as error:
        pytest.skip(str(error))
    allocator = SegmentAllocator(library, limit_bytes=LIMIT_BYTES)
    yield allocator
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    allocator.close()


def test_tensors_lie_in_segments_and_give_them_back(allocator: SegmentAllocator) -> None:
    pool = allocator.pool()
    with torch.cuda.use_mem_pool(pool):
        tensor = torch.arange(16 * MIB, dtype=torch.int32, device="cuda")
    (segment,) = allocator.segments()
    assert segment.address <= tensor.data_ptr() < segment.address + segment.size_bytes
    assert torch.equal(tensor.cpu(), torch.arange(16 * MIB, dtype=torch.int32))
    assert allocator.statistics().in_use_bytes == segment.size_bytes >= 64 * MIB
    del tensor, pool
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    allocator.trim(0)
    now = allocator.statistics()
    assert (now.num_segments, now.num_leaving, now.pooled_bytes) == (0, 0, 64 * MIB)
    assert allocator.trim(LIMIT_BYTES) == 64 * MIB


def test_more_than_the_limit_is_torchs_out_of_memory_error(allocator: SegmentAllocator) -> None:
    pool = allocator.pool()
    with torch.cuda.use_mem_pool(pool), pytest.raises(torch.OutOfMemoryError):
        torch.empty(LIMIT_BYTES + 1, dtype=torch.uint8, device="cuda")
    assert allocator.last_failure().name == "MBALL_OVER_LIMIT"
    with torch.cuda.use_mem_pool(pool):
        tensor = torch.ones(LIMIT_BYTES, dtype=torch.uint8, device="cuda")
    assert int(tensor.sum(dtype=torch.int64)) == LIMIT_BYTES
    del tensor, pool


def test_what_is_freed_while_its_stream_works_leaves_later(allocator: SegmentAllocator) -> None:
    driver, size_bytes = CudaDriver(), 2 * EXTENT_BYTES
    allocator.set_limit(size_bytes)
    stream = torch.cuda.Stream()
    address = allocator.allocate(size_bytes, stream.cuda_stream)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
    source = bytearray(b"late" * 64)
    with driver.current():
        pinned = torch.frombuffer(source, dtype=torch.uint8).pin_memory()
        CudaStreams(driver).copy_in(address, pinned.data_ptr(), len(source), stream.cuda_stream)
    allocator.free(address, stream.cuda_stream)
    assert allocator.statistics().leaving_bytes == size_bytes
    again = allocator.allocate(size_bytes)  # which has to wait
    assert allocator.statistics().num_waits == 1
    stream.synchronize()  # an error if the copy found its memory gone
    allocator.free(again)
    torch.cuda.synchronize()
    driver.close()


def test_pages_and_donors_of_an_arena_become_tensors(allocator: SegmentAllocator) -> None:
    driver = CudaDriver()
    allocator.set_limit(0)
    with driver.current():
        pages = PagePool(driver, limit_bytes=LIMIT_BYTES)
        pages.give(pages.take([EXTENT_BYTES]))
        assert allocator.lend_from(pages, EXTENT_BYTES) == EXTENT_BYTES
        address = driver.reserve(EXTENT_BYTES, EXTENT_BYTES)
        page = Page(driver.create(EXTENT_BYTES), EXTENT_BYTES)
        driver.map(address, EXTENT_BYTES, page.handle)
        driver.allow(address, EXTENT_BYTES)
    event = torch.cuda.Event()
    event.record()
    before = allocator.generation
    donor = allocator.offer(address, page, event.cuda_event)
    pool = allocator.pool()
    with torch.cuda.use_mem_pool(pool):
        tensors = [torch.full((EXTENT_BYTES,), value, dtype=torch.uint8, device="cuda") for value in (1, 2)]
    assert allocator.generation == before + 1
    assert not allocator.withdraw(donor)
    assert [int(tensor.sum(dtype=torch.int64)) for tensor in tensors] == [EXTENT_BYTES, 2 * EXTENT_BYTES]
    with driver.current():
        driver.unreserve(address, EXTENT_BYTES)
    del tensors, pool
    driver.close()


def test_a_graph_is_captured_and_replayed_on_segments(allocator: SegmentAllocator) -> None:
    pool: Any = allocator.pool()
    source = torch.ones(1 << 20, device="cuda")
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    freed = allocator.allocate(EXTENT_BYTES)
    with torch.cuda.graph(graph, pool=pool.id, stream=side):
        allocator.free(freed)  # on another stream, and no reason to break the capture
        result = source * 2
    source.fill_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((result == 6).all())
    assert any(one.address <= result.data_ptr() < one.address + one.size_bytes for one in allocator.segments())
    del result, graph, pool


def test_its_snapshot_is_one_of_torchs(allocator: SegmentAllocator) -> None:
    pool = allocator.pool()
    with torch.cuda.use_mem_pool(pool):
        tensor = torch.ones(8 * MIB, device="cuda")
    ours = pickle.loads(pickle.dumps(allocator.snapshot()))
    theirs = torch.cuda.memory._snapshot()
    segment = next(one for one in theirs["segments"] if one["address"] == ours["segments"][0]["address"])
    assert set(segment) - set(ours["segments"][0]) <= {"is_expandable", "registration_counter"}
    assert set(segment["blocks"][0]) - set(ours["segments"][0]["blocks"][0]) <= {"history"}
    del tensor, pool
