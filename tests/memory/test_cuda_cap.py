"""What torch is told where several models share its allocator: it is asked for fractions here, and gives nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mball.memory import cuda_cap
from mball.memory.cuda_cap import AllocatorCap
from mball.memory.device import Held
from mball.units import GIB, MIB

TOTAL_BYTES = 80 * GIB


class Allocator:
    """Torch's, as far as it tells and is told of bytes."""

    def __init__(self) -> None:
        self.fraction = 1.0
        self.active_bytes = self.between_bytes = self.free_bytes = self.peak_bytes = 0

    def told(self, ordinal: int) -> dict[str, Any]:
        told = {"active_bytes": self.active_bytes, "inactive_split_bytes": self.between_bytes}
        return {name: {"all": {"current": size}} for name, size in told.items()}

    def set(self, fraction: float, ordinal: int) -> None:
        assert 0 <= fraction <= 1
        self.fraction = fraction

    @property
    def allowed_bytes(self) -> int:
        return int(self.fraction * TOTAL_BYTES)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    found = Allocator()
    monkeypatch.setattr(cuda_cap, "_gpus", {})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", found.told)
    monkeypatch.setattr(
        torch.cuda, "memory_reserved", lambda _: found.active_bytes + found.between_bytes + found.free_bytes
    )
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: found.active_bytes)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: found.peak_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=TOTAL_BYTES))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: found.fraction)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", found.set)
    return found


def test_what_was_there_before_is_beside_it(allocator: Allocator) -> None:
    allocator.active_bytes, allocator.between_bytes, allocator.free_bytes = 3 * GIB, 5 * MIB, 7 * GIB
    cap = AllocatorCap(0)
    cap.begin()
    cap.set(100 * MIB)
    assert allocator.allowed_bytes == 3 * GIB + 105 * MIB, "free blocks can be given back"
    allocator.active_bytes += 60 * MIB
    allocator.free_bytes, allocator.peak_bytes = 20 * MIB, 3 * GIB + 65 * MIB
    cap.set(50 * MIB)
    assert allocator.allowed_bytes == 3 * GIB + 55 * MIB, "the pass's own are not beside it"
    assert cap.set(None) == Held(tensor_bytes=65 * MIB, kept_bytes=15 * MIB)
    assert allocator.fraction == 1.0


def test_caps_of_passes_at_one_time_add_up(allocator: Allocator) -> None:
    one, other = AllocatorCap(0), AllocatorCap(0)
    allocator.active_bytes = GIB
    one.begin()
    one.set(100 * MIB)
    other.begin()
    other.set(30 * MIB)
    assert allocator.allowed_bytes == GIB + 130 * MIB
    one.set(None)
    assert allocator.allowed_bytes == GIB + 30 * MIB
    other.set(None)
    other.set(None)
    assert allocator.fraction == 1.0


def test_what_one_pass_holds_is_no_base_of_another(allocator: Allocator) -> None:
    one, other = AllocatorCap(0), AllocatorCap(0)
    allocator.active_bytes = GIB
    one.begin()
    one.set(100 * MIB)
    allocator.active_bytes += 80 * MIB
    other.begin()
    other.set(30 * MIB)
    assert allocator.allowed_bytes == GIB + 130 * MIB
    one.set(None)
    allocator.active_bytes -= 80 * MIB
    other.set(20 * MIB)
    assert allocator.allowed_bytes == GIB + 20 * MIB
    other.set(None)


def test_the_users_own_cap_stays(allocator: Allocator) -> None:
    allocator.fraction = 1 / 80
    cap = AllocatorCap(0)
    cap.set(2 * GIB)
    assert allocator.allowed_bytes == GIB
    cap.set(None)
    cap.set(100 * MIB)
    assert allocator.allowed_bytes == 100 * MIB
    cap.set(None)
    assert allocator.fraction == 1 / 80
