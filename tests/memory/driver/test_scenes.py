"""The scenes that a real GPU plays, over the stand-in for the driver: they work, and are no news to a GPU."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mball.trace import inductor
from mball.units import GIB, KIB, MIB
from tests.foreign import device as foreign
from tests.foreign.pieces import as_it_is
from tests.memory.driver.models import wrapped_over_the_driver
from tests.memory.driver.standin import EXTENT_BYTES, GRANULE_BYTES, Order, StandIn
from tests.run import scenes
from tests.run.gpu_child import STORIES
from tests.run.gpu_place import hostile
from tests.run.scenes import Hostility, Place
from tests.run.test_on_a_gpu import check_budgets
from tests.run.there import PLACE
from tests.run.wide import WIDE, wide_llama
from tests.run.zoo import ZOO

pytestmark = pytest.mark.usefixtures("foreign", "new_dynamo")


@contextmanager
def wrapped_for_the_stand_in(
    model: nn.Module,
    budget_bytes: int,
    *,
    swap_dir: Path,
    hostility: Hostility = Hostility.POISONED,
    weights: Path | None = None,
    extent_bytes: int = EXTENT_BYTES,
    **settings: Any,
) -> Iterator[Any]:
    """As `wrapped_for_gpu`, with the same hostile devices; how late things are the stand-in's order says."""
    around = partial(hostile, hostility=hostility)
    with wrapped_over_the_driver(
        model, budget_bytes, around, swap_dir=swap_dir, weights=weights, extent_bytes=extent_bytes, **settings
    ):
        yield model


@pytest.fixture(autouse=True)
def spins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kernels that spin are noted, in cycles: there is nothing here to run them."""
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "_sleep", asked.append)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle: handle)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    return asked


# As a real GPU has them.
LARGE_GRANULE_BYTES, LARGE_EXTENT_BYTES = 2 * MIB, 32 * MIB


@pytest.fixture
def large_place(standin: StandIn) -> Place:
    """What a GPU plays, with its models and sizes."""
    foreign.load()
    standin.configure(granule_bytes=LARGE_GRANULE_BYTES, memory_bytes=2 * GIB)
    standin.run_in(Order.RANDOM, 3)
    return Place(
        name=PLACE,
        page_bytes=LARGE_GRANULE_BYTES,
        width=1024,
        specimens=WIDE,
        llama=lambda: wide_llama(torch.float32),
        wrapped=partial(wrapped_for_the_stand_in, extent_bytes=LARGE_EXTENT_BYTES),
        other_stream=scenes.same_stream,
        finish=lambda: None,
        activation_bytes=4 * MIB,
    )


@pytest.fixture
def place(standin: StandIn) -> Place:
    foreign.load()
    standin.run_in(Order.RANDOM, 3)
    return Place(
        name=PLACE,
        page_bytes=GRANULE_BYTES,
        width=128,
        specimens=ZOO,
        llama=scenes.small_llama,
        wrapped=wrapped_for_the_stand_in,
        other_stream=scenes.same_stream,
        finish=lambda: None,
        activation_bytes=128 * KIB,
    )


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_streams_as_resident(capture: str, place: Place, tmp_path: Path) -> None:
    scenes.streams_as_resident(place, "llama-fp32", capture=capture, swap_dir=tmp_path)


@pytest.mark.parametrize("kind", ["sequential", "breaks"])
def test_streams_as_resident_in_a_gpus_sizes(kind: str, large_place: Place, tmp_path: Path) -> None:
    scenes.streams_as_resident(large_place, kind, capture="graphs", swap_dir=tmp_path)


@pytest.mark.parametrize(("kind", "capture"), [("llama-fp32", "operators"), ("convolutions", "graphs")])
def test_casts_as_resident(kind: str, capture: str, place: Place, tmp_path: Path) -> None:
    scenes.casts_as_resident(place, kind, capture=capture, swap_dir=tmp_path)


@pytest.mark.parametrize("hostility", list(Hostility), ids=lambda hostility: hostility.value)
@pytest.mark.parametrize("num_slots", [2, 3, 5])
def test_passes_follow_each_other(
    num_slots: int, hostility: Hostility, place: Place, spins: list[int], tmp_path: Path
) -> None:
    capture = "operators" if num_slots == 3 else "graphs"
    scenes.passes_follow_each_other(place, num_slots, capture=capture, swap_dir=tmp_path, hostility=hostility)
    assert bool(spins) == (hostility is not Hostility.NONE)


def test_steps_are_recorded(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inductor, "compile_piece", as_it_is)
    scenes.steps_are_recorded(place, swap_dir=tmp_path, hostility=Hostility.POISONED)


@pytest.mark.parametrize("ordered", [True, False])
def test_streams_take_turns(ordered: bool, place: Place, tmp_path: Path) -> None:
    scenes.streams_take_turns(place, ordered=ordered, swap_dir=tmp_path, hostility=Hostility.NONE)


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_writes_are_noticed(capture: str, place: Place, tmp_path: Path) -> None:
    scenes.writes_are_noticed(place, capture=capture, swap_dir=tmp_path)


def test_a_table_that_is_written_lies_elsewhere(large_place: Place, tmp_path: Path) -> None:
    """It is large enough that what was given back is no memory any more."""
    scenes.writes_are_noticed(large_place, capture="operators", swap_dir=tmp_path)


def test_budgets_follow_each_other(place: Place, tmp_path: Path) -> None:
    scenes.budgets_follow_each_other(place, swap_dir=tmp_path)


@pytest.mark.parametrize("allocator", ["torch", "mball"])
def test_residents_yield(allocator: str, large_place: Place, tmp_path: Path) -> None:
    foreign.round_sizes_to(512)
    try:
        scenes.residents_yield(large_place, swap_dir=tmp_path, allocator=allocator)
    finally:
        foreign.round_sizes_to(1)


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_after_an_error(capture: str, place: Place, tmp_path: Path) -> None:
    scenes.after_an_error(place, capture=capture, swap_dir=tmp_path)


@pytest.mark.parametrize("capture", ["auto", "graphs"])
def test_generates(capture: str, place: Place, tmp_path: Path) -> None:
    scenes.generates(place, capture=capture, swap_dir=tmp_path, num_calls=2)


@pytest.mark.parametrize("shift_bytes", [0, 8, 40])
def test_a_checkpoint_is_read_in_place(shift_bytes: int, place: Place, tmp_path: Path) -> None:
    scenes.a_checkpoint_is_read_in_place(place, shift_bytes, swap_dir=tmp_path)


def test_unwrapped_it_is_as_before(place: Place, standin: StandIn, tmp_path: Path) -> None:
    def used_bytes() -> int:
        gc.collect()
        return standin.taken_bytes

    used = scenes.unwrapped_it_is_as_before(place, swap_dir=tmp_path, used_bytes=used_bytes)
    assert used["before"] == used["after"] < used["wrapped"], used


@pytest.mark.parametrize("story", ["budgets", "unwrapped", "small"])
def test_stories_of_a_process(story: str, place: Place, standin: StandIn, tmp_path: Path) -> None:
    def used_bytes() -> int:
        return standin.taken_bytes + foreign.memory_allocated()

    answer = STORIES[story](place, used_bytes, tmp_path)
    assert json.loads(json.dumps(answer)) == answer
    if story == "budgets":
        for each in answer["budgets"]:
            assert each["above_baseline_bytes"] <= each["budget_bytes"], answer
        check_budgets(answer)
    elif story == "unwrapped":
        assert answer["before"] == answer["after"] < answer["wrapped"], answer
    else:
        assert answer["read_bytes"] > 0, answer
