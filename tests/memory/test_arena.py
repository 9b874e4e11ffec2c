"""The arena over host memory: what it holds, what it gives back, and what outlives it."""

from __future__ import annotations

import gc
import logging
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mball.errors import DeviceError
from mball.memory import Arena, HostMemory, facts, libc
from mball.memory.virtual import Reservation
from mball.units import GIB, KIB, MIB
from tests.memory.residency import is_mapped, resident_bytes

PAGE = 4 * KIB
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.int64, torch.int8, torch.uint8, torch.uint16, torch.bool,
]  # fmt: skip


class BrokenMemory(HostMemory):
    """Backs half of a range and fails, when told so."""

    broken = False

    def back(self, reservation: Reservation, first: int, end: int) -> None:
        if self.broken:
            super().back(reservation, first, first + (end - first) // 2 // PAGE * PAGE)
            raise DeviceError("injected")
        super().back(reservation, first, end)


def resident(arena: Arena) -> int:
    return resident_bytes(arena.address, arena.reserved_bytes)


def test_reserving_takes_addresses_and_no_memory() -> None:
    arena = Arena(HostMemory(), 64 * GIB)
    assert arena.address % (2 * MIB) == 0
    assert (arena.backed_bytes, arena.reserved_bytes, resident(arena)) == (0, 64 * GIB, 0)
    arena.close()


def test_resident_is_what_was_asked_for_to_the_page() -> None:
    arena = Arena(HostMemory(), 64 * MIB)
    sizes = [PAGE, 3 * MIB + PAGE, 9 * MIB + 20 * KIB, 6 * MIB + 4 * KIB, 33 * MIB + 12 * KIB, 2 * MIB, 5, 0, 7 * MIB]
    for size in sizes:
        before = resident(arena)
        arena.resize(size)
        asked = -(-size // PAGE) * PAGE
        assert arena.backed_bytes == asked
        assert resident(arena) <= min(before, asked) + PAGE, f"pages that nobody wrote, at {size}"
        arena.populate()
        assert resident(arena) == asked, f"at {size}"
        if size:
            arena.poison(0, asked)
            assert resident(arena) == asked, f"written, at {size}"
    arena.close()


def test_whole_huge_pages_are_huge_where_the_machine_has_them() -> None:
    if facts.transparent_huge_pages() not in ("always", "madvise"):
        pytest.skip("no transparent huge pages")
    arena = Arena(HostMemory(), 64 * MIB)
    arena.resize(17 * MIB)
    arena.populate()
    huge = resident_bytes(arena.address, arena.reserved_bytes, "AnonHugePages")
    assert huge <= 16 * MIB
    assert huge > 0
    arena.close()


@given(st.lists(st.integers(0, 12 * MIB), min_size=1, max_size=8))
@settings(max_examples=15, deadline=None)
def test_resizing_moves_and_loses_no_byte_that_stays(sizes: list[int]) -> None:
    arena = Arena(HostMemory(), 12 * MIB)
    address, filled = arena.address, 0
    pattern = torch.frombuffer(bytearray(random.Random(0).randbytes(12 * MIB)), dtype=torch.uint8)
    for size in sizes:
        arena.resize(size)
        assert arena.address == address
        kept = min(filled, arena.backed_bytes)
        assert torch.equal(arena.tensor(0, torch.uint8, (kept,)), pattern[:kept])
        arena.tensor(0, torch.uint8, (arena.backed_bytes,)).copy_(pattern[: arena.backed_bytes])
        filled = arena.backed_bytes
        assert resident(arena) == filled
    arena.close()


def test_failing_to_grow_leaves_the_arena_as_it_was() -> None:
    memory = BrokenMemory()
    arena = Arena(memory, 32 * MIB)
    arena.resize(3 * MIB)
    arena.tensor(0, torch.uint8, (3 * MIB,)).fill_(7)
    memory.broken = True
    with pytest.raises(DeviceError, match="injected"):
        arena.resize(20 * MIB)
    assert arena.backed_bytes == resident(arena) == 3 * MIB
    assert arena.tensor(0, torch.uint8, (3 * MIB,)).eq(7).all()
    memory.broken = False
    arena.resize(20 * MIB)
    arena.populate()
    assert resident(arena) == 20 * MIB
    arena.close()


class InterruptedMemory(HostMemory):
    """Ctrl-C comes right after pages were given back, or right after they came."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = ""
        self.backed: set[int] = set()

    def back(self, reservation: Reservation, first: int, end: int) -> None:
        pages = set(range(first, end, PAGE))
        assert not pages & self.backed, "on a device pages are never put under a range that has some"
        super().back(reservation, first, end)
        self.backed |= pages
        self._strike("back")

    def trim(self, reservation: Reservation, first: int, end: int) -> None:
        super().trim(reservation, first, end)
        self.backed -= set(range(first, end, PAGE))
        self._strike("trim")

    def _strike(self, what: str) -> None:
        if self.armed == what:
            self.armed = ""
            raise KeyboardInterrupt


@pytest.mark.parametrize("what", ["trim", "back"])
def test_what_is_said_to_be_backed_is_backed_whenever_ctrl_c_comes(what: str) -> None:
    memory = InterruptedMemory()
    arena = Arena(memory, 32 * MIB)
    arena.resize(8 * MIB)
    arena.tensor(0, torch.uint8, (MIB,)).fill_(7)
    for size in (MIB, 16 * MIB, 2 * MIB, 4 * MIB):
        memory.armed = what
        try:
            arena.resize(size)
        except KeyboardInterrupt:
            assert set(range(0, arena.backed_bytes, PAGE)) <= memory.backed
            memory.armed = ""
            arena.resize(size)
        memory.armed = ""
        assert arena.backed_bytes == size
        assert set(range(0, size, PAGE)) == memory.backed
        assert arena.tensor(0, torch.uint8, (MIB,)).eq(7).all()
    arena.close()


def test_too_much_memory_is_refused_before_any_is_taken() -> None:
    arena = Arena(HostMemory(headroom=lambda: 8 * MIB), 64 * MIB)
    arena.resize(8 * MIB)
    arena.populate()
    with pytest.raises(DeviceError, match=r"8392704 bytes.*8388608 bytes.*lower the budget"):
        arena.resize(16 * MIB + PAGE)
    assert arena.backed_bytes == resident(arena) == 8 * MIB
    arena.close()


def test_an_absurd_reservation_names_errno_bytes_and_way_out() -> None:
    for size in (1 << 60, 1 << 62):
        with pytest.raises(DeviceError, match=rf"{size} bytes.*errno 12.*lower the budget"):
            Arena(HostMemory(), size)
    with pytest.raises(DeviceError, match="more than zero"):
        Arena(HostMemory(), 0)


def test_more_than_reserved_is_refused() -> None:
    arena = Arena(HostMemory(), 4 * MIB)
    with pytest.raises(DeviceError, match=r"4194304 bytes of addresses were reserved"):
        arena.resize(4 * MIB + 1)
    assert arena.backed_bytes == 0
    arena.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3, 4093])
def test_tensors_of_every_dtype_at_any_offset(dtype: torch.dtype, offset: int) -> None:
    arena = Arena(HostMemory(), 2 * MIB)
    arena.resize(2 * PAGE)
    shape = (3, 5)
    size = math.prod(shape) * dtype.itemsize
    source = torch.randint(0, 2, (size,), dtype=torch.uint8)
    arena.view(offset, size)[:] = source.numpy().tobytes()
    tensor = arena.tensor(offset, dtype, shape)
    assert tensor.dtype is dtype
    assert tensor.shape == shape
    assert tensor.is_contiguous()
    assert tensor.data_ptr() == arena.address + offset
    assert torch.equal(tensor.clone().view(torch.uint8).flatten(), source)
    arena.close()


def test_no_elements_and_no_dimensions() -> None:
    arena = Arena(HostMemory(), 2 * MIB)
    assert arena.tensor(0, torch.float32, (0, 3)).shape == (0, 3)
    arena.resize(PAGE)
    assert arena.tensor(PAGE, torch.float32, (0,)).numel() == 0
    scalar = arena.tensor(PAGE - 4, torch.float32, ())
    assert scalar.shape == ()
    scalar.fill_(2.5)
    assert scalar.item() == 2.5
    arena.close()


def test_each_tensor_has_its_own_storage_and_version() -> None:
    arena = Arena(HostMemory(), 2 * MIB)
    arena.resize(PAGE)
    one, two = (arena.tensor(0, torch.float32, (4,)) for _ in range(2))
    one.fill_(3)
    assert two.tolist() == [3, 3, 3, 3]
    assert (one._version, two._version) == (1, 0)
    assert one.untyped_storage()._cdata != two.untyped_storage()._cdata
    assert one.untyped_storage().nbytes() == 16
    with torch.inference_mode():
        assert not arena.tensor(0, torch.float32, (4,)).is_inference()
        assert not arena.tensor(0, torch.float32, (0,)).is_inference()
    with torch.device("meta"):
        assert arena.tensor(0, torch.float32, (4,)).device.type == "cpu"
        assert arena.tensor(0, torch.float32, (0,)).device.type == "cpu"
    arena.close()


def test_memory_that_is_not_backed_cannot_be_used() -> None:
    arena = Arena(HostMemory(), 4 * MIB)
    arena.resize(PAGE)
    for use in (
        lambda: arena.view(PAGE - 1, 2),
        lambda: arena.tensor(PAGE - 4, torch.float32, (2,)),
        lambda: arena.poison(0, PAGE + 1),
        lambda: arena.view(-1, 1),
    ):
        with pytest.raises(DeviceError):
            use()
    assert resident(arena) == PAGE
    arena.close()


@pytest.mark.parametrize("keep", ["tensor", "slice", "numpy", "memoryview"])
def test_what_a_user_keeps_outlives_the_arena(keep: str) -> None:
    memory = HostMemory()
    arena = Arena(memory, 4 * MIB)
    arena.resize(MIB)
    address = arena.address
    kept: Any = arena.tensor(8, torch.int32, (64,)).fill_(5)
    if keep == "slice":
        kept = kept[3:9]
    elif keep == "numpy":
        kept = kept.numpy()[2:]
    elif keep == "memoryview":
        kept = arena.view(8, 256)[4:]
    arena.close()
    arena.close()
    assert arena.closed
    del arena
    gc.collect()
    assert is_mapped(address)
    assert kept[0] == 5
    kept[0] = 6
    del kept
    gc.collect()
    assert not is_mapped(address)


def test_nothing_kept_nothing_left() -> None:
    arena = Arena(HostMemory(), 4 * MIB)
    arena.resize(MIB)
    address = arena.address
    tensor = arena.tensor(0, torch.int32, (64,))
    del tensor
    assert is_mapped(address)
    arena.close()
    assert not is_mapped(address)
    for use in (lambda: arena.view(0, 1), lambda: arena.tensor(0, torch.int8, (1,)), lambda: arena.resize(0)):
        with pytest.raises(DeviceError, match="closed"):
            use()


def test_releasing_twice_spares_the_next_owner_of_the_address() -> None:
    memory = HostMemory()
    first = memory.reserve(2 * MIB)
    memory.release(first)
    second = next(r for r in (memory.reserve(2 * MIB) for _ in range(64)) if r.address == first.address)
    memory.release(first)
    assert is_mapped(second.address)


def test_poison_is_nan_in_every_float_dtype_and_stays_in_its_range() -> None:
    arena = Arena(HostMemory(), 2 * MIB)
    arena.resize(PAGE)
    arena.tensor(0, torch.uint8, (PAGE,)).fill_(1)
    arena.poison(64, 128)
    for dtype in DTYPES:
        if dtype.is_floating_point:
            assert arena.tensor(64, dtype, (128 // dtype.itemsize,)).to(torch.float32).isnan().all(), dtype
    raw = arena.tensor(0, torch.uint8, (PAGE,))
    assert raw[:64].eq(1).all()
    assert raw[192:].eq(1).all()
    arena.close()


def test_old_kernels_fault_pages_by_touching_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libc, "POPULATE_WRITE", 9999)  # EINVAL, as before Linux 5.14
    arena = Arena(HostMemory(), 16 * MIB)
    arena.resize(5 * MIB + PAGE)
    assert resident(arena) == 5 * MIB + PAGE
    arena.close()


def test_a_kernel_without_huge_pages_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(libc, "NOHUGEPAGE", 9999)
    monkeypatch.setattr(libc, "HUGEPAGE", 9999)
    with caplog.at_level(logging.WARNING):
        arena = Arena(HostMemory(), 16 * MIB)
        arena.resize(5 * MIB)
        arena.populate()
        arena.resize(MIB)
    assert resident(arena) == MIB
    assert len([record for record in caplog.records if "huge pages" in record.message]) == 1
    arena.close()
