"""A foreign region is to an arena what `CudaRegion` is: the mirror of that one's tests, on memory of the host."""

from __future__ import annotations

import ctypes
import gc
import math
import threading

import pytest
import torch

from mball.errors import DeviceError
from mball.memory import Arena, HostMemory
from mball.units import KIB, MIB
from tests.foreign.region import ForeignRegion
from tests.memory.residency import is_mapped, resident_bytes

pytestmark = pytest.mark.usefixtures("foreign")

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.int64, torch.int8, torch.uint8, torch.uint16, torch.bool,
]  # fmt: skip


def arena_of(reserve_bytes: int) -> Arena:
    return Arena(HostMemory(), reserve_bytes, region=ForeignRegion)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 3, 4093])
def test_tensors_of_every_dtype_at_any_offset(dtype: torch.dtype, offset: int) -> None:
    arena = arena_of(2 * MIB)
    arena.resize(8 * KIB)
    allocated_bytes = torch.foreign.memory_allocated()  # type: ignore[attr-defined]
    tensor = arena.tensor(offset, dtype, (3, 5))
    assert (tensor.data_ptr(), tensor.device) == (arena.address + offset, torch.device("foreign", 0))
    assert (tensor.dtype, tuple(tensor.shape), tensor.is_contiguous()) == (dtype, (3, 5), True)
    source = torch.arange(15).reshape(3, 5).remainder(2).to(dtype)
    tensor.copy_(source)
    assert torch.foreign.memory_allocated() == allocated_bytes, "torch copied it"  # type: ignore[attr-defined]
    assert torch.equal(tensor.cpu().view(torch.uint8), source.view(torch.uint8))
    assert ctypes.string_at(arena.address + offset, math.prod((3, 5)) * dtype.itemsize) == bytes(
        source.view(torch.uint8).flatten().tolist()
    )
    assert arena.tensor(0, dtype, (0, 3)).numel() == 0
    arena.close()


def test_an_arena_grows_and_shrinks_beneath_tensors() -> None:
    arena = arena_of(32 * MIB)
    arena.resize(8 * MIB)
    kept = arena.tensor(0, torch.int32, (MIB,))
    kept.copy_(torch.arange(MIB, dtype=torch.int32))
    for size in (30 * MIB, 5 * MIB, 32 * MIB, 6 * MIB):
        arena.resize(size)
        arena.tensor(size - 4, torch.float32, ()).fill_(1.0)
        arena.poison(size - 64, 64)
        assert arena.tensor(size - 64, torch.bfloat16, (32,)).isnan().all()
        assert torch.equal(kept.cpu(), torch.arange(MIB, dtype=torch.int32)), size
    assert resident_bytes(arena.address, arena.reserved_bytes) <= 6 * MIB
    arena.close()


def test_the_host_does_not_read_it() -> None:
    arena = arena_of(MIB)
    arena.resize(MIB)
    with pytest.raises(DeviceError, match=r"foreign:0.*use a tensor"):
        arena.view(0, 1)
    arena.close()


def test_tensors_are_normal_under_inference_mode() -> None:
    arena = arena_of(MIB)
    arena.resize(MIB)
    with torch.inference_mode():
        tensor, empty = arena.tensor(0, torch.float32, (4,)), arena.tensor(0, torch.float32, (0,))
        arena.poison(0, 16)
        assert not tensor.is_inference()
        assert not empty.is_inference()
        assert torch.ones(4, device="foreign").is_inference(), "as others are"
        doubled = tensor.fill_(2.0) * 2
    assert doubled.tolist() == [4.0] * 4
    weight = torch.ones(4, device="foreign", requires_grad=True)
    (weight * tensor).sum().backward()  # what autograd keeps may not be an inference tensor
    assert weight.grad.tolist() == [2.0] * 4  # type: ignore[union-attr]
    arena.close()


def test_each_tensor_has_versions_of_its_own() -> None:
    arena = arena_of(MIB)
    arena.resize(MIB)
    first, second = (arena.tensor(0, torch.float32, (4,)) for _ in range(2))
    version = second._version
    first.fill_(1.0)
    assert (second._version, second.tolist()) == (version, [1.0] * 4)
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
    arena.close()


def test_bad_ranges_and_closed_regions_are_refused() -> None:
    arena = arena_of(MIB)
    region = ForeignRegion(arena.address, KIB, lambda: None, what="test")
    for offset, size in ((-1, 4), (0, KIB + 1), (KIB, 1)):
        with pytest.raises(DeviceError, match=r"lie outside the test of 1024 bytes"):
            region.tensor(offset, torch.uint8, (size,))
        with pytest.raises(DeviceError, match=r"lie outside the test of 1024 bytes"):
            region.fill(offset, size, 0)
    region.close()
    with pytest.raises(DeviceError, match=r"the test is closed"):
        region.tensor(0, torch.uint8, (1,))
    arena.close()


def test_tensors_keep_the_memory_alive() -> None:
    arena = arena_of(MIB)
    arena.resize(8 * KIB)
    address = arena.address
    tensor = arena.tensor(0, torch.float32, (16,)).fill_(1.0)
    view = tensor.view(4, 4)[1]
    arena.close()
    del arena, tensor
    gc.collect()
    assert view.tolist() == [1.0] * 4
    assert is_mapped(address)
    del view
    gc.collect()
    assert not is_mapped(address)


def test_release_runs_once_after_the_last_tensor_on_whichever_thread() -> None:
    memory = ctypes.create_string_buffer(256)
    released: list[int] = []
    region = ForeignRegion(ctypes.addressof(memory), 256, lambda: released.append(threading.get_ident()), what="test")
    tensors = [region.tensor(0, torch.uint8, (8,)), region.tensor(64, torch.int64, (2,))]
    region.close()
    region.close()
    del tensors[0]
    assert released == []
    thread = threading.Thread(target=tensors.clear)
    thread.start()
    thread.join()
    assert released == [thread.ident]
