"""Passes under the cap that the budget is to an allocator: what they keep, what they do where they find no memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mball
from mball.errors import DeviceError
from mball.memory import Kind
from mball.snapshot import KEPT_BLOCKS, not_counted
from mball.units import KIB, MIB, format_bytes
from tests.adaptors import DeviceAdaptor
from tests.foreign import device as foreign
from tests.foreign.compute import ForeignCap, ForeignDevice
from tests.run.harness import assert_same, engine_of, make, run
from tests.run.scenes import Row
from tests.run.test_elsewhere import wrap_there
from tests.run.there import PLACE
from tests.run.zoo import noise

pytestmark = pytest.mark.usefixtures("foreign")

WIDTH = 256
LAYER_BYTES = 4 * WIDTH**2
SETTLED = 5  # passes after which one is capped, captured or not


@pytest.fixture(autouse=True)
def allocator() -> Iterator[None]:
    """Sizes are rounded to 16 KiB, as allocators do."""
    foreign.load()
    foreign.empty_cache()
    foreign.round_sizes_to(16 * KIB)
    yield
    foreign.round_sizes_to(1)
    foreign.cap_memory(None)


class Wide(Row):
    """Does something beside the layers that takes memory when it is told to."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.extra = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        if self.extra == "random":
            x = x + torch.rand(len(x) * 64, WIDTH, device=x.device).sum() * 0
        elif self.extra == "middling":
            x = x + x.repeat(64, 1).sum() * 0
        elif self.extra == "in a weight":
            x = x + self.layers[3](x.expand(40, *x.shape)).sum() * 0
        elif self.extra == "large":
            x = x + x.repeat(1024, 1).sum() * 0
        elif self.extra == "fails":
            x = x @ x.new_ones(3, 3)
        return x


def cap_of(model: Any) -> ForeignCap:
    device = engine_of(model).execution.device
    while isinstance(device, DeviceAdaptor):
        device = device.device
    assert isinstance(device, ForeignDevice)
    return device.allocator


def wrapped(tmp_path: Path, num_layers: float, **settings: Any) -> Any:
    """A model with room for so many of its 7 layers, after passes of 8 rows until they are capped."""
    model = wrap_there(make(Wide), int(num_layers * LAYER_BYTES), swap_dir=tmp_path, **settings)
    for _ in range(SETTLED):
        forward(model, 8)
    assert cap_of(model).num_passes, "no pass was capped"
    return model


def forward(model: Any, rows: int, seed: int = 1) -> torch.Tensor:
    with torch.no_grad():
        return model(noise(rows, WIDTH, seed=seed).to(PLACE)).cpu()


def expected(rows: int, seed: int = 1) -> torch.Tensor:
    return forward(make(Wide).to(PLACE), rows, seed)


@pytest.mark.parametrize("capture", ["graphs", "operators"])
@pytest.mark.parametrize("num_layers", [4.4, 20.0])
def test_what_is_held_is_within_the_budget(capture: str, num_layers: float, tmp_path: Path) -> None:
    foreign.round_sizes_to(64 * KIB)
    model = wrapped(tmp_path, num_layers, capture=capture)
    device, ledger = engine_of(model).execution.device, engine_of(model).ledger
    assert_same(forward(model, 8), expected(8))
    device.make_room()
    num_passes, x = cap_of(model).num_passes, noise(8, WIDTH).to(PLACE)
    before = foreign.memory_held()
    run(model, lambda m: m(x))
    assert cap_of(model).num_passes > num_passes
    held = foreign.memory_reserved() - before
    assert held + engine_of(model).execution.arena.taken_bytes <= ledger.budget_bytes
    report = mball.report(model)
    assert report.scratch_bytes == ledger.account(Kind.SCRATCH).current_bytes
    assert (report.scratch_bytes > 0) == (num_layers < 7)
    assert f"scratch {format_bytes(report.scratch_bytes)}" in str(report)
    assert KEPT_BLOCKS not in not_counted(engine_of(model)), "they are in the budget"


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_no_pass_fails_for_what_nobody_could_know(capture: str, tmp_path: Path) -> None:
    """However much an allocator keeps: what does not fit is on top."""
    foreign.round_sizes_to(4 * MIB)
    model = wrap_there(make(Wide), 3 * LAYER_BYTES, swap_dir=tmp_path, capture=capture)
    for rows in (8, 8, 8, 64, 8, 64, 8):
        assert_same(forward(model, rows), expected(rows))
    assert engine_of(model).allocator.kept_bytes > engine_of(model).budget_bytes
    assert KEPT_BLOCKS in not_counted(engine_of(model))


def test_the_cap_ends_with_the_pass(tmp_path: Path) -> None:
    model = wrapped(tmp_path, 3, capture="operators")
    assert cap_of(model).left_bytes is None
    theirs = torch.empty(100 * MIB, dtype=torch.uint8, device=PLACE)  # what the caller allocates is the caller's
    num_passes = cap_of(model).num_passes
    assert_same(forward(model, 8), expected(8))
    assert cap_of(model).num_passes > num_passes, "it was not capped"
    del theirs
    model.extra = "fails"
    with pytest.raises(RuntimeError, match="shape"):
        forward(model, 8)
    assert cap_of(model).left_bytes is None
    model.extra = ""
    assert_same(forward(model, 8), expected(8))


@pytest.mark.parametrize("extra", ["middling", "in a weight"])
def test_residents_yield_to_an_operator(extra: str, tmp_path: Path) -> None:
    """Nobody knew before that this call takes more, and nothing fails."""
    model = wrapped(tmp_path, 6, capture="operators")
    arena = engine_of(model).execution.arena
    before, num_passes = arena.backed_bytes, cap_of(model).num_passes
    model.extra = extra
    assert_same(forward(model, 8), expected(8))
    assert cap_of(model).num_passes > num_passes + 1, "nothing yielded"
    assert arena.backed_bytes < before
    for _ in range(4):
        assert_same(forward(model, 8), expected(8))
        num_passes = cap_of(model).num_passes
    foreign.empty_cache()
    held = foreign.memory_held()
    assert_same(forward(model, 8), expected_of_before := expected(8))
    assert cap_of(model).num_passes == num_passes + 1, "it still finds no memory at first"
    del expected_of_before
    foreign.empty_cache()
    forward(model, 8)
    assert arena.backed_bytes + foreign.memory_reserved() - held <= engine_of(model).budget_bytes


def test_what_may_have_begun_is_not_run_again(tmp_path: Path) -> None:
    model = wrapped(tmp_path, 6, capture="operators")
    model.extra = "random"
    torch.manual_seed(3)
    with pytest.raises(DeviceError, match=r"found no memory under a budget of .* call it again, or raise the budget"):
        forward(model, 16)
    assert cap_of(model).left_bytes is None
    for _ in range(8):
        try:
            found = forward(model, 16)
        except DeviceError:
            continue
        assert_same(found, expected(16))
        break
    else:
        pytest.fail("no later pass had more room")


def test_after_a_graph_that_found_no_memory_plans_leave_more(tmp_path: Path) -> None:
    model = wrapped(tmp_path, 5, capture="graphs")
    before = engine_of(model).execution.arena.backed_bytes
    foreign.round_sizes_to(96 * KIB)
    with pytest.raises(DeviceError, match="the next call leaves more room"):
        forward(model, 8)
    for _ in range(8):
        try:
            found = forward(model, 8)
        except DeviceError:
            continue
        assert_same(found, expected(8))
        break
    else:
        pytest.fail("no later pass had more room")
    assert engine_of(model).execution.arena.backed_bytes < before


def test_where_no_plan_leaves_more_it_says_so(tmp_path: Path) -> None:
    model = wrapped(tmp_path, 3, capture="operators")
    model.extra = "large"
    with pytest.raises(DeviceError, match=r"no plan leaves more: raise the budget \(mball.set_budget\)"):
        forward(model, 8)
    mball.set_budget(model, 60 * LAYER_BYTES)
    assert_same(forward(model, 8), expected(8))
