"""CUDA's memory on a real GPU, beside the conformance tests: what only a driver and torch together can show."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from mball.errors import DeviceError
from mball.memory.arena import Arena
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_errors import DriverError
from mball.memory.cuda_region import CudaRegion
from mball.memory.cuda_virtual import EXTENT_BYTES, CudaMemory, open_cuda_memory
from mball.memory.page_pool import PagePool
from mball.units import GIB, MIB

pytestmark = pytest.mark.gpu

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.fixture
def memory() -> Iterator[CudaMemory]:
    torch.zeros(1, device="cuda:0")
    driver = CudaDriver()
    if not driver.has_virtual_memory:
        pytest.skip("GPU 0 has no virtual memory")
    memory = CudaMemory(driver)
    yield memory
    gc.collect()
    assert memory.created_bytes == 0, "memory of the GPU is still taken"
    memory.close()


def arena_of(memory: CudaMemory, reserve_bytes: int) -> Arena:
    return Arena(memory, reserve_bytes, region=partial(CudaRegion, ordinal=0))


def test_this_gpu_is_opened_with_virtual_memory() -> None:
    memory = open_cuda_memory()
    assert memory.page_bytes >= 4096
    assert EXTENT_BYTES % memory.page_bytes == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype(memory: CudaMemory, dtype: torch.dtype) -> None:
    arena = arena_of(memory, 64 * MIB)
    arena.resize(4 * MIB)
    allocated_bytes = torch.cuda.memory_allocated()
    tensor = arena.tensor(256, dtype, (3, 5, 7))
    assert (tensor.data_ptr(), tensor.device) == (arena.address + 256, torch.device("cuda", 0))
    assert (tensor.dtype, tuple(tensor.shape), tensor.is_contiguous()) == (dtype, (3, 5, 7), True)
    assert torch.cuda.memory_allocated() == allocated_bytes, "torch copied it"
    source = torch.arange(105).reshape(3, 5, 7).remainder(2).to(dtype)
    tensor.copy_(source)
    assert torch.equal(tensor.cpu().view(torch.uint8), source.view(torch.uint8))
    assert arena.tensor(0, dtype, (0, 3)).numel() == 0
    del tensor
    arena.close()


def test_an_arena_grows_and_shrinks_beneath_tensors(memory: CudaMemory) -> None:
    arena = arena_of(memory, 512 * MIB)
    arena.resize(100 * MIB)
    kept = arena.tensor(0, torch.int32, (MIB,))
    kept.copy_(torch.arange(MIB, dtype=torch.int32))
    for size in (300 * MIB, 70 * MIB, 71 * MIB, 512 * MIB, 6 * MIB):
        arena.resize(size)
        assert arena.taken_bytes - size < EXTENT_BYTES
        arena.tensor(size - 4, torch.float32, ()).fill_(1.0)
        arena.poison(size - 64, 64)
        assert arena.tensor(size - 64, torch.bfloat16, (32,)).isnan().all()
        assert torch.equal(kept.cpu(), torch.arange(MIB, dtype=torch.int32)), size
        torch.cuda.synchronize()
    arena.close()
    assert memory.created_bytes > 0, "a tensor holds it"
    del kept


def test_the_host_does_not_read_it(memory: CudaMemory) -> None:
    arena = arena_of(memory, 4 * MIB)
    arena.resize(4 * MIB)
    with pytest.raises(DeviceError, match=r"cuda:0.*use a tensor"):
        arena.view(0, 1)
    arena.close()


@pytest.mark.alone
def test_what_is_given_back_is_free_on_the_gpu(memory: CudaMemory) -> None:
    """To a quarter: others may use the GPU too."""
    arena = arena_of(memory, 2 * GIB)
    before_bytes = torch.cuda.mem_get_info()[0]
    arena.resize(2 * GIB)
    backed_bytes = torch.cuda.mem_get_info()[0]
    arena.resize(0)
    memory.trim_pool()
    freed_bytes = torch.cuda.mem_get_info()[0]
    assert before_bytes - backed_bytes > 1.5 * GIB
    assert freed_bytes - backed_bytes > 1.5 * GIB
    arena.close()


@pytest.mark.alone
def test_more_than_the_gpu_has_is_refused_and_nothing_is_taken(memory: CudaMemory) -> None:
    arena = arena_of(memory, 64 * MIB)
    arena.resize(8 * MIB)
    tensor = arena.tensor(0, torch.float32, (MIB,)).fill_(3.0)
    driver = CudaDriver()
    with driver.current():
        total_bytes = driver.free_and_total_bytes()[1]
    # One piece is more than is free, so that nothing is taken before it is refused.
    greedy = CudaMemory(driver, pool=PagePool(driver, limit_bytes=0), extent_bytes=total_bytes)
    whole = arena_of(greedy, total_bytes)
    with pytest.raises(DeviceError, match=r"CUDA_ERROR_OUT_OF_MEMORY.*are free; lower the budget"):
        whole.resize(whole.reserved_bytes)
    assert whole.backed_bytes == greedy.created_bytes == 0
    whole.resize(12 * MIB)
    whole.poison(0, 12 * MIB)
    assert bool(tensor.eq(3.0).all())
    for owner in (whole, arena):
        owner.close()
    greedy.close()


def test_torch_keeps_its_device_and_its_context(memory: CudaMemory) -> None:
    before = torch.cuda.current_device()
    arena = arena_of(memory, 64 * MIB)
    arena.resize(34 * MIB)
    assert torch.cuda.current_device() == before
    assert float((torch.ones(8, device="cuda") + arena.tensor(0, torch.float32, (8,)).fill_(1.0)).sum()) == 16.0
    arena.close()


def test_a_part_of_a_piece_cannot_be_unmapped_and_pieces_side_by_side_can() -> None:
    """What the design stands on: a handle is the unit, one call may take several."""
    driver = CudaDriver()
    size = driver.granularity_bytes
    with driver.current():
        address = driver.reserve(4 * size, 0)
        large, small = driver.create(2 * size), driver.create(size)
        driver.map(address, 2 * size, large)
        driver.map(address + 2 * size, size, small)
        driver.allow(address, 3 * size)
        with pytest.raises(DriverError, match=r"CUDA_ERROR_(INVALID_VALUE|NOT_SUPPORTED)"):
            driver.unmap(address, size)
        driver.unmap(address, 3 * size)
        for handle in (large, small):
            driver.destroy(handle)
        driver.unreserve(address, 4 * size)
    driver.close()


def test_pages_are_shared_by_file_descriptor() -> None:
    try:
        driver = CudaDriver(shareable=True)
    except DeviceError as error:
        pytest.skip(str(error))
    size = driver.granularity_bytes
    with driver.current():
        handle = driver.create(size)
        descriptor = driver.export_handle(handle)
        imported = driver.import_handle(descriptor)
        os.close(descriptor)
        one, two = (driver.reserve(size, 0) for _ in range(2))
        for address, pages in ((one, handle), (two, imported)):
            driver.map(address, size, pages)
            driver.allow(address, size)
        first, second = (
            CudaRegion(address, size, lambda: None, what="test").tensor(0, torch.float32, (64,))
            for address in (one, two)
        )
        first.fill_(5.0)
        torch.cuda.synchronize()
        assert bool(second.eq(5.0).all())
        del first, second
        for address, pages in ((one, handle), (two, imported)):
            driver.unmap(address, size)
            driver.unreserve(address, size)
            driver.destroy(pages)
    driver.close()


def test_a_forked_child_is_refused() -> None:
    """In a process of its own, since a child that is forked beside torch's threads may hang."""
    code = (
        "import os\nfrom mball.memory.cuda_driver import CudaDriver\ndriver = CudaDriver()\nchild = os.fork()\n"
        "if child == 0:\n try:\n  with driver.current(): pass\n except Exception as error: print(error, flush=True)\n"
        " os._exit(0)\nos.waitpid(child, 0)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert "CUDA does not survive a fork" in finished.stdout
