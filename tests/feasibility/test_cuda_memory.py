"""CUDA's virtual memory calls, pinned host memory and the link, as the arena and its copies will use them."""

from __future__ import annotations

import itertools
import mmap
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

driver = pytest.importorskip("cuda.bindings.driver", reason="needs the package cuda-bindings")

pytestmark = pytest.mark.gpu

MIB = 1 << 20
READ_WRITE = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
REFUSED = "the CUDA driver answered CUDA_ERROR_(INVALID_VALUE|NOT_SUPPORTED)"
# About half a second: `_sleep` counts clock cycles, and no GPU of today runs far from 2 GHz.
LONG_KERNEL_CYCLES = 1_000_000_000


def check(result: tuple[Any, ...]) -> Any:
    """Returns what a driver call returned beside its code, or None. Raises RuntimeError on an error's code."""
    code, *values = result
    if code != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver answered {code.name} ({int(code)})")
    return values[0] if values else None


class Pages:
    """Physical pages of device 0 and the addresses that they are mapped at; `close` gives all of it back."""

    def __init__(self) -> None:
        self._place = driver.CUmemAllocationProp()
        self._place.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._place.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._place.location.id = 0
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._place.location
        self._access.flags = READ_WRITE
        self._handles: list[Any] = []
        self._reserved: dict[int, int] = {}
        self._mapped: dict[int, int] = {}
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity_bytes: int = check(driver.cuMemGetAllocationGranularity(self._place, minimum))

    def reserve(self, size_bytes: int) -> int:
        address = int(check(driver.cuMemAddressReserve(size_bytes, 0, driver.CUdeviceptr(0), 0)))
        self._reserved[address] = size_bytes
        return address

    def create(self, size_bytes: int) -> Any:
        handle = check(driver.cuMemCreate(size_bytes, self._place, 0))
        self._handles.append(handle)
        return handle

    def release(self, handle: Any) -> None:
        """Gives the handle up; its pages live on while they are mapped."""
        self._handles.remove(handle)
        check(driver.cuMemRelease(handle))

    def map(self, address: int, size_bytes: int, handle: Any, offset_bytes: int = 0) -> None:
        check(driver.cuMemMap(driver.CUdeviceptr(address), size_bytes, offset_bytes, handle, 0))
        self._mapped[address] = size_bytes

    def allow(self, address: int, size_bytes: int) -> None:
        """Makes mapped pages readable and writable from the device."""
        check(driver.cuMemSetAccess(driver.CUdeviceptr(address), size_bytes, [self._access], 1))

    def back(self, address: int, size_bytes: int) -> Any:
        """Puts new pages at the address; returns their handle."""
        handle = self.create(size_bytes)
        self.map(address, size_bytes, handle)
        self.allow(address, size_bytes)
        return handle

    def unmap(self, address: int, size_bytes: int) -> None:
        check(driver.cuMemUnmap(driver.CUdeviceptr(address), size_bytes))
        del self._mapped[address]

    def close(self) -> None:
        """Waits for the device, then unmaps, releases and frees all, and says at the end what was refused."""
        torch.cuda.synchronize()
        codes = [driver.cuMemUnmap(driver.CUdeviceptr(at), size)[0] for at, size in self._mapped.items()]
        codes += [driver.cuMemRelease(handle)[0] for handle in self._handles]
        codes += [driver.cuMemAddressFree(driver.CUdeviceptr(at), size)[0] for at, size in self._reserved.items()]
        self._mapped.clear()
        self._handles.clear()
        self._reserved.clear()
        for code in codes:
            check((code,))


class DeviceRange:
    """What torch needs to know to make a tensor over memory that it did not allocate."""

    def __init__(self, address: int, num_floats: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_floats,),
            "typestr": "<f4",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def floats_at(address: int, size_bytes: int) -> torch.Tensor:
    """A float32 tensor over mapped memory of device 0; it owns nothing."""
    tensor = torch.as_tensor(DeviceRange(address, size_bytes // 4), device="cuda:0")
    assert tensor.data_ptr() == address, "torch copied the memory instead of taking it"
    return tensor


@pytest.fixture
def pages() -> Iterator[Pages]:
    """Pages on device 0, whose context torch has made current in this thread."""
    torch.cuda.set_device(0)
    torch.zeros(1, device="cuda:0")
    torch.cuda.synchronize()
    owner = Pages()
    try:
        yield owner
    finally:
        owner.close()


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints past pytest's capture: a measurement is wanted from tests that pass as well."""

    def print_line(line: str) -> None:
        with capsys.disabled():
            print(f"\n  {line}", end="", flush=True)

    return print_line


def test_a_tensor_over_mapped_pages(pages: Pages) -> None:
    """Pages come in units of a granularity; reserved, created, mapped and made accessible, they carry an ordinary
    torch tensor, which torch's allocator does not know of."""
    size_bytes = 4 * pages.granularity_bytes
    assert pages.granularity_bytes >= 4096
    assert pages.granularity_bytes & (pages.granularity_bytes - 1) == 0
    allocated_bytes = torch.cuda.memory_allocated(0)
    address = pages.reserve(size_bytes)
    pages.back(address, size_bytes)
    tensor = floats_at(address, size_bytes)
    tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float32))
    assert torch.cuda.memory_allocated(0) == allocated_bytes
    assert torch.equal((tensor * 2).cpu(), 2 * torch.arange(tensor.numel(), dtype=torch.float32))


def test_sizes_must_be_whole_pages(pages: Pages) -> None:
    """A size that is no multiple of the granularity is refused."""
    with pytest.raises(RuntimeError, match=REFUSED):
        pages.create(pages.granularity_bytes + 4096)


def test_one_handle_at_two_addresses(pages: Pages) -> None:
    """One handle mapped at two addresses is one memory: what is written at either is read at the other."""
    size_bytes = pages.granularity_bytes
    first, second = pages.reserve(size_bytes), pages.reserve(size_bytes)
    handle = pages.create(size_bytes)
    for address in (first, second):
        pages.map(address, size_bytes, handle)
        pages.allow(address, size_bytes)
    floats_at(first, size_bytes).fill_(3.0)
    torch.cuda.synchronize()
    assert bool((floats_at(second, size_bytes) == 3.0).all())
    floats_at(second, size_bytes).fill_(5.0)
    torch.cuda.synchronize()
    assert bool((floats_at(first, size_bytes) == 5.0).all())


def test_pages_outlive_their_handle_and_a_range_its_pages(pages: Pages) -> None:
    """A released handle's pages stay until they are unmapped; then they are free at once, and the address can be
    backed by other pages: an arena shrinks and grows without moving."""
    size_bytes = 256 * MIB
    address = pages.reserve(size_bytes)
    before_bytes = torch.cuda.mem_get_info(0)[0]
    pages.release(pages.back(address, size_bytes))
    floats_at(address, size_bytes).fill_(1.0)
    torch.cuda.synchronize()
    backed_bytes = torch.cuda.mem_get_info(0)[0]
    pages.unmap(address, size_bytes)
    freed_bytes = torch.cuda.mem_get_info(0)[0]
    # Others may use the GPU too, so a little may come or go.
    assert before_bytes - backed_bytes > size_bytes // 2
    assert freed_bytes - backed_bytes > size_bytes // 2
    pages.back(address, size_bytes)
    floats_at(address, size_bytes).fill_(2.0)
    assert bool((floats_at(address, size_bytes) == 2.0).all())


def test_the_wait_before_an_unmap_is_for_an_event(pages: Pages, show: Callable[[str], None]) -> None:
    """Pages may go when their last reader's event has come: the wait ends while another stream still computes, and
    what was read is right. Whether cuMemUnmap itself waits for the other stream is printed, for drivers differ."""
    size_bytes = 16 * pages.granularity_bytes
    address = pages.reserve(size_bytes)
    pages.release(pages.back(address, size_bytes))
    weights = floats_at(address, size_bytes)
    weights.fill_(7.0)
    reader, other = torch.cuda.Stream(), torch.cuda.Stream()
    # Memory, kernels and events are made before the race, so that none of them has to wait for the device in it.
    result = torch.empty_like(weights)
    read, busy = torch.cuda.Event(), torch.cuda.Event()
    with torch.cuda.stream(reader):
        torch.mul(weights, 2.0, out=result)
    with torch.cuda.stream(other):
        torch.cuda._sleep(1000)
    result.zero_()
    torch.cuda.synchronize()

    with torch.cuda.stream(other):
        torch.cuda._sleep(LONG_KERNEL_CYCLES)
        busy.record()
    with torch.cuda.stream(reader):
        torch.mul(weights, 2.0, out=result)
        read.record()
    read.synchronize()
    still_busy_after_wait = not busy.query()
    del weights
    start_s = time.perf_counter()
    pages.unmap(address, size_bytes)
    unmap_s = time.perf_counter() - start_s
    still_busy_after_unmap = not busy.query()
    pages.back(address, size_bytes)
    floats_at(address, size_bytes).fill_(float("nan"))
    torch.cuda.synchronize()

    assert still_busy_after_wait, "the wait for one stream's event lasted until the other stream was done"
    assert bool((result == 14.0).all())
    waited = "did not wait" if still_busy_after_unmap else "WAITED"
    show(f"cuMemUnmap of {size_bytes // MIB} MiB took {unmap_s * 1e6:.0f} µs and {waited} for another busy stream")


def test_a_handle_is_mapped_from_its_start(pages: Pages) -> None:
    """cuMemMap refuses an offset into a handle; so the arena's unit of backing is one handle."""
    unit_bytes = pages.granularity_bytes
    address, handle = pages.reserve(2 * unit_bytes), pages.create(2 * unit_bytes)
    with pytest.raises(RuntimeError, match=REFUSED):
        pages.map(address, unit_bytes, handle, offset_bytes=unit_bytes)
    pages.map(address, 2 * unit_bytes, handle)


def test_a_mapping_is_unmapped_whole(pages: Pages) -> None:
    """cuMemUnmap refuses a part of a mapping, and the refused call leaves the memory as it was."""
    unit_bytes = pages.granularity_bytes
    address = pages.reserve(2 * unit_bytes)
    pages.back(address, 2 * unit_bytes)
    floats_at(address, 2 * unit_bytes).fill_(1.0)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=REFUSED):
        # Past Pages, which would otherwise take the mapping for gone if the driver agreed.
        check(driver.cuMemUnmap(driver.CUdeviceptr(address), unit_bytes))
    assert bool((floats_at(address, 2 * unit_bytes) == 1.0).all())
    pages.unmap(address, 2 * unit_bytes)


def test_the_cost_of_each_call(pages: Pages, show: Callable[[str], None]) -> None:
    """Growing and shrinking the arena takes driver calls of this many microseconds (printed, not judged)."""
    num_rounds = 20
    show(f"granularity {pages.granularity_bytes // 1024} KiB; median µs a call:")
    show(f"{'size':>8} {'create':>8} {'map':>8} {'access':>8} {'unmap':>8} {'release':>8}")
    for size_bytes in (2 * MIB, 32 * MIB):
        assert size_bytes % pages.granularity_bytes == 0
        address = pages.reserve(size_bytes)
        rounds: list[list[float]] = []
        for _ in range(num_rounds):
            clock = [time.perf_counter()]
            handle = pages.create(size_bytes)
            clock.append(time.perf_counter())
            pages.map(address, size_bytes, handle)
            clock.append(time.perf_counter())
            pages.allow(address, size_bytes)
            clock.append(time.perf_counter())
            pages.unmap(address, size_bytes)
            clock.append(time.perf_counter())
            pages.release(handle)
            clock.append(time.perf_counter())
            rounds.append([(after - before) * 1e6 for before, after in itertools.pairwise(clock)])
        medians = [sorted(column)[num_rounds // 2] for column in zip(*rounds, strict=True)]
        assert all(median > 0 for median in medians)
        show(f"{size_bytes // MIB:>4} MiB " + " ".join(f"{median:>8.1f}" for median in medians))


def test_torch_rounds_pinned_memory_up() -> None:
    """torch's pin_memory takes a power of two from the host: 33 MiB cost 64. Budgets cannot be kept with it."""
    torch.zeros(1, device="cuda:0")
    torch.cuda.synchronize()
    torch._C._host_emptyCache()
    before_bytes = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    pinned = torch.empty(33 * MIB, dtype=torch.uint8, pin_memory=True)
    taken_bytes = torch.cuda.host_memory_stats()["allocated_bytes.current"] - before_bytes
    assert pinned.is_pinned()
    assert taken_bytes == 64 * MIB
    del pinned
    torch._C._host_emptyCache()


def test_registered_memory_is_pinned_exactly() -> None:
    """Registering host memory with the driver pins the very pages that were named, and can be undone."""
    torch.zeros(1, device="cuda:0")
    size_bytes, behind_bytes = 33 * MIB, MIB
    memory = torch.frombuffer(mmap.mmap(-1, size_bytes + behind_bytes), dtype=torch.uint8)
    memory.fill_(9)
    check(driver.cuMemHostRegister(memory.data_ptr(), size_bytes, 0))
    try:
        assert memory[:1].is_pinned()
        assert memory[size_bytes - 1 : size_bytes].is_pinned()
        assert not memory[size_bytes : size_bytes + 1].is_pinned()
        arrived = memory[:size_bytes].to("cuda:0", non_blocking=True)
        torch.cuda.synchronize()
        assert bool((arrived == 9).all())
    finally:
        check(driver.cuMemHostUnregister(memory.data_ptr()))
    assert not memory[:1].is_pinned()


def test_bandwidth_by_block_size(show: Callable[[str], None]) -> None:
    """Copies from pinned memory reach the link's rate in large blocks and not in small ones (printed); so bundles
    are moved whole."""
    total_bytes = 256 * MIB
    source = torch.randint(0, 255, (64 * MIB,), dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda:0")
    assert source.is_pinned()
    rates: dict[int, float] = {}
    for block_bytes in (64 * 1024, 256 * 1024, MIB, 4 * MIB, 16 * MIB, 64 * MIB):
        target.zero_()
        blocks = list(zip(target.split(block_bytes), source.split(block_bytes), strict=True))
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(total_bytes // source.nbytes):
            for to, of in blocks:
                to.copy_(of, non_blocking=True)
        end.record()
        torch.cuda.synchronize()
        rates[block_bytes] = total_bytes / (start.elapsed_time(end) / 1e3)
        assert torch.equal(target.cpu(), source)
    show("host to device, GB/s by block: " + ", ".join(f"{b // 1024} KiB {r / 1e9:.1f}" for b, r in rates.items()))
    assert rates[64 * MIB] > rates[64 * 1024]
