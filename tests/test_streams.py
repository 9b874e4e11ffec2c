"""Adversarial streams themselves: they find what is not ordered, and nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mball.errors import StorageError
from mball.memory import Arena, CpuDevice, Event
from mball.torch_private.dispatch import TorchDispatchMode
from tests.adversarial import AdversarialDevice
from tests.deferral import deferred
from tests.memory.test_device import PAGE, FakeRead, FakeSource
from tests.streams import CORNERS, Pace, StreamError

SLOT = PAGE // 4  # in numbers
LATE = CORNERS["all late"]


@dataclass
class Bench:
    """A device with an arena of two pages, and the order in which a test leaves things."""

    device: AdversarialDevice
    arena: Arena
    source: FakeSource

    @classmethod
    def of(cls, pace: Pace) -> Bench:
        source = FakeSource()
        device = AdversarialDevice(CpuDevice(source), pace)
        arena = device.arena(2 * PAGE)
        arena.resize(2 * PAGE)
        return cls(device, arena, source)

    def bring(self, value: int, after: Event | None = None, page: int = 0) -> Event:
        return self.device.copy([FakeRead(self.arena, page * PAGE, PAGE, value)], after)

    def slot(self) -> torch.Tensor:
        return self.arena.tensor(0, torch.float32, (SLOT,))


def number(byte: int) -> float:
    return float(torch.full((4,), byte, dtype=torch.uint8).view(torch.float32))


def two_rounds(bench: Bench, *, wait: bool = True, after: bool = True) -> list[torch.Tensor]:
    """Reads what two copies bring to the same place one after the other."""
    found, event = [], None
    with deferred(bench.device), torch.no_grad():
        for value in (1, 2):
            landed = bench.bring(value, event if after else None)
            if wait:
                bench.device.wait(landed)
            found.append(bench.slot() * 1)
            event = bench.device.record()
    return found


def is_right(found: list[torch.Tensor]) -> bool:
    return all(bool((each == number(value)).all()) for value, each in zip((1, 2), found, strict=True))


@pytest.mark.parametrize("pace", CORNERS.values(), ids=CORNERS)
def test_what_is_ordered_is_right(pace: Pace) -> None:
    assert is_right(two_rounds(Bench.of(pace)))


def test_what_is_ordered_is_right_in_any_order() -> None:
    orders = [Pace.any(seed) for seed in range(200)]
    assert len({(pace.compute, pace.begins, pace.ends) for pace in orders}) > 60
    assert all(is_right(two_rounds(Bench.of(pace))) for pace in orders)


def test_a_missing_wait_is_found_where_copies_are_late() -> None:
    wrong = {name for name, pace in CORNERS.items() if not is_right(two_rounds(Bench.of(pace), wait=False))}
    assert {"copies late", "copies begin at once and end late"} <= wrong
    assert "all at once" not in wrong, "a CPU would never show it"


def test_a_missing_after_is_found_where_compute_is_late() -> None:
    wrong = {name for name, pace in CORNERS.items() if not is_right(two_rounds(Bench.of(pace), after=False))}
    assert "compute late" in wrong
    assert "all at once" not in wrong, "a CPU would never show it"


def test_a_copy_is_nan_from_its_begin_to_its_end() -> None:
    bench = Bench.of(Pace(compute=1, begins=1, ends=0))
    event = bench.bring(3)
    assert bench.slot().isnan().all()
    assert not event.done()
    event.wait()
    assert (bench.slot() == number(3)).all()
    bench.device.streams.follow(LATE)
    later = bench.bring(4)
    assert (bench.slot() == number(3)).all(), "it has not begun"
    later.wait()
    assert (bench.slot() == number(4)).all()


def test_blocking_runs_what_is_needed_and_no_more() -> None:
    bench = Bench.of(LATE)
    first, second = bench.bring(1), bench.bring(2, page=1)
    second.wait()
    assert (second.done(), first.done()) == (True, False)
    with deferred(bench.device):
        bench.device.wait(first)
        reached = bench.device.record()
        last = bench.device.record()
        reached.wait()
        assert first.done(), "compute waits for it"
        assert not last.done()
    assert last.done()


def test_a_discard_is_late_but_spares_what_comes_after_it() -> None:
    for seed in range(100):
        bench = Bench.of(Pace.any(seed))
        with deferred(bench.device):
            bench.device.wait(bench.bring(1))
            bench.device.discard(0, 2 * PAGE)
            bench.device.wait(bench.bring(2, bench.device.record()))
        assert (bench.slot() == number(2)).all()
        assert bench.arena.tensor(PAGE, torch.float32, (SLOT,)).isnan().all()


def test_a_copy_to_memory_that_was_given_back_is_an_error() -> None:
    bench = Bench.of(LATE)
    bench.bring(1, page=1)
    with deferred(bench.device):
        bench.arena.resize(PAGE)
        bench.device.synchronize()
        with pytest.raises(StreamError, match="given back"):
            bench.device.streams.check()


def test_an_error_of_a_copy_stays_with_its_event() -> None:
    bench = Bench.of(LATE)
    bench.source.fail_next = True
    event = bench.bring(1)
    bench.device.synchronize()
    for _ in range(2):
        with pytest.raises(StorageError, match="injected"):
            event.wait()


class Everything(nn.Module):
    """Views, writes in place, several results, results that lie unlike their arguments, masks, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 24)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.table = nn.Embedding(16, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = self.linear(x).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 6, 8)
        y = y.add_(x).mul_(2)
        values, places = y.topk(3, dim=-1)
        y = self.table(places.sum(-1) % 16) + self.convolution(y.transpose(1, 2)).transpose(1, 2)
        z = torch.zeros_like(y)
        z[:, 1::2] = y[:, ::2]
        z[y > 0] = values.max()
        z, last = self.rnn(z.contiguous())
        parts = z.split(3, dim=-1)
        some = y[y > 0.5]
        return (*parts, last, some, some.sum().to(torch.bfloat16), places.unique(), z.std(), torch.cat([y, z], -1))


class Watching(TorchDispatchMode):
    """Does nothing. torch takes other kernels for a GRU under inference mode as soon as anybody looks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pace", [*CORNERS.values(), *map(Pace.any, range(20))], ids=str)
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_deferred_operators_compute_the_same_bits(grad: Callable[[], torch.no_grad], pace: Pace) -> None:
    torch.manual_seed(0)
    model, x = Everything().eval(), torch.randn(2, 6, 8)
    device = Bench.of(pace).device
    with grad():
        with Watching():
            expected = model(x)
        with deferred(device) as mode:
            found = model(x)
    for got, wanted in zip(found, expected, strict=True):
        assert (got.dtype, got.stride(), got.is_inference()) == (wanted.dtype, wanted.stride(), wanted.is_inference())
        assert torch.equal(got, wanted)
    assert mode.num_deferred >= 15
    assert sum(mode.synced.values()) <= 4, mode.synced


def test_nothing_is_computed_before_its_turn() -> None:
    device = Bench.of(LATE).device
    x = torch.ones(3)
    with torch.no_grad():
        with deferred(device):
            y = x + 1
            assert np.isnan(y.numpy()).all(), "numpy does not ask"
            x.data.numpy()[:] = 5
        assert (y == 6).all()


def test_what_decides_by_values_waits_for_them() -> None:
    device = Bench.of(LATE).device
    with deferred(device) as mode:
        assert (torch.ones(3) + 1).sum().item() == 6
    assert sum(mode.synced.values()) == 1


def test_an_error_of_compute_is_raised_when_all_is_over() -> None:
    device = Bench.of(LATE).device
    table, rows = torch.ones(4, 2), torch.tensor([7])
    with pytest.raises(IndexError), deferred(device):
        nn.functional.embedding(rows + 1, table)


def test_tensors_die_as_they_do_elsewhere() -> None:
    device = Bench.of(LATE).device
    with deferred(device), torch.no_grad():
        x = torch.ones(8) * 2
        storage = weakref.ref(x.untyped_storage())
        y = x + 1
        del x
        assert storage() is None, "the queue keeps the bytes, not the tensor"
    assert (y == 3).all()
