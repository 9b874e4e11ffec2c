"""Streamed equals unwrapped, bit for bit, whatever order copies and compute run in that the engine's events allow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mball
from mball.run.homes import Homes
from tests.deferral import deferred
from tests.run.adversary import Call, act, begin, chain
from tests.run.harness import assert_same, assert_streamed, make, run, weight_bytes
from tests.run.zoo import ZOO, noise, tied_sequential
from tests.streams import CORNERS, Pace

X = tuple(noise(4, 64, seed=seed) for seed in range(4))
ACTS = [act(x) for x in X]
CAPTURES = ("graphs", "operators")
# Most that goes wrong does so where everything that may be late is.
LATE = [CORNERS["compute late"], CORNERS["compute late, copies begin at once and end late"], CORNERS["all late"]]


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("budget", [0.5, 0.75])
def test_passes_follow_each_other_in_any_order(budget: float, capture: str, tmp_path: Path) -> None:
    """Compute of one pass runs beside copies for the next, and a pass ends in the middle of a round of the slots."""
    acts = ACTS[:3]
    adversary, expected = begin(chain, tmp_path, budget, acts, capture)
    assert_streamed(adversary.model)
    plan = adversary.engine.plan
    num_slots = plan.arena_bytes // max(bundle.size_bytes for bundle in plan.bundles)
    assert len(plan.bundles) % num_slots
    assert any(transfer.after < 0 for transfer in plan.transfers), "some come before the pass begins"
    for pace in (*CORNERS.values(), *map(Pace.any, range(120))):
        adversary.check(pace, acts, expected)
    assert adversary.mode.num_deferred >= len(acts) * len(plan.bundles)
    assert not adversary.mode.synced, "nothing had to be computed early"


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_pass_that_jumps_over_what_was_on_its_way(capture: str, tmp_path: Path) -> None:
    """A part of the model is called next: what comes for the whole one is given up, and its place is taken."""
    x = noise(4, 64)
    acts = [act(x), lambda m: m[1](x), lambda m: m[3](x), act(x)]
    adversary, expected = begin(tied_sequential, tmp_path, 0.6, acts, capture)
    for pace in (*CORNERS.values(), *map(Pace.any, range(12))):
        adversary.check(pace, acts, expected)


@pytest.mark.parametrize("capture", CAPTURES)
def test_memory_is_given_back_after_its_last_use(capture: str, tmp_path: Path) -> None:
    """A smaller budget, and a larger one again, while compute and copies of the passes before are not over."""
    adversary, expected = begin(chain, tmp_path, 0.9, ACTS, capture)
    model, weights = adversary.model, weight_bytes(adversary.model)
    for pace in (*CORNERS.values(), *map(Pace.any, range(2))):
        adversary.device.streams.follow(pace)
        got = []
        with deferred(adversary.device):
            for share in (0.6, 2.0, 0.5, 0.9):
                got += [run(model, each) for each in ACTS[:2]]
                mball.set_budget(model, int(weights * share))
        for number, result in enumerate(got):
            assert_same(result, expected[number % 2], f"{pace}, call {number}")


@pytest.mark.parametrize("capture", CAPTURES)
def test_written_weights_are_read_anew(capture: str, tmp_path: Path) -> None:
    """What was written is given up, on its way or not."""
    plain = make(chain)
    adversary, _ = begin(chain, tmp_path, 0.6, ACTS, capture)
    for pace in (*CORNERS.values(), *map(Pace.any, range(6))):
        for model in (plain, adversary.model):
            with torch.no_grad():
                for parameter in list(model.parameters())[::3]:
                    parameter.mul_(1.01)
        adversary.check(pace, ACTS[:2], [run(plain, each) for each in ACTS[:2]])


def test_an_interrupted_plan_is_dropped_after_its_last_use(tmp_path: Path) -> None:
    """Ctrl-C came while a plan was adopted: the next pass begins with an empty arena."""
    adversary, expected = begin(chain, tmp_path, 3.0, ACTS, "operators")
    for pace in CORNERS.values():
        adversary.device.streams.follow(pace)
        got = []
        with deferred(adversary.device):
            for each in ACTS[:2]:
                got.append(run(adversary.model, each))
                adversary.engine._active, adversary.engine._unclear = None, True
        for number, result in enumerate(got):
            assert_same(result, expected[number], f"{pace}, call {number}")


@pytest.mark.parametrize("pace", LATE, ids=str)
@pytest.mark.parametrize("budget", [0.6, 3.0])
def test_unwrapping_waits_for_the_last_use(budget: float, pace: Pace, tmp_path: Path) -> None:
    adversary, expected = begin(chain, tmp_path, budget, ACTS, "operators")
    adversary.device.streams.follow(pace)
    with deferred(adversary.device):
        got = [run(adversary.model, each) for each in ACTS]
        mball.unwrap(adversary.model)
        got += [run(adversary.model, each) for each in ACTS]
    for number, result in enumerate(got):
        assert_same(result, expected[number % len(ACTS)], f"call {number}")


@torch.library.custom_op("mball_tests::stumble", mutates_args=())
def stumble(x: torch.Tensor, stumbles: bool) -> torch.Tensor:
    """Raises on the host, as Ctrl-C does, while what was called before it is still queued."""
    if stumbles:
        raise KeyboardInterrupt
    return x.clone()


@stumble.register_fake
def _(x: torch.Tensor, stumbles: bool) -> torch.Tensor:
    return torch.empty_like(x)


class Keeps(nn.Module):
    """Writes to a tensor of the caller's, as to a cache, and may then be interrupted in the middle of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.rest = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))

    def forward(self, x: torch.Tensor, kept: torch.Tensor, stumbles: bool) -> torch.Tensor:
        y = self.first(x)
        kept.copy_(y)
        return self.rest(torch.ops.mball_tests.stumble(y, stumbles))


def stumbling(model: Any) -> list[torch.Tensor]:
    """Passes that are interrupted, and one that begins with other weights."""
    results = []
    for stumbles in (False, True, True):
        kept = torch.zeros(4, 64)
        with contextlib.suppress(KeyboardInterrupt):
            results.append(model(X[0], kept, stumbles))
        results += [kept, model.rest[3](X[0])]
    return results


def test_what_an_interrupted_step_wrote_is_kept(tmp_path: Path) -> None:
    """Its compute is queued, and the next pass begins with other weights where it reads."""
    adversary, expected = begin(Keeps, tmp_path, 0.45, [stumbling], "graphs")
    for pace in (*CORNERS.values(), *map(Pace.any, range(10))):
        adversary.check(pace, [stumbling], expected)


class Shifted(nn.Module):
    """Looks up rows whose numbers are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4096, 64)
        self.head = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x * 7 + 5))


@pytest.mark.parametrize("capture", CAPTURES)
def test_rows_are_hinted_at_once_their_numbers_are_known(
    capture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host reads numbers that compute makes: only when that is over."""
    hinted: list[list[int]] = []
    prefetch = Homes.prefetch_rows

    def noted(self: Homes, weight: int, indices: torch.Tensor) -> int:
        hinted.append(indices.reshape(-1).tolist())
        return prefetch(self, weight, indices)

    monkeypatch.setattr(Homes, "prefetch_rows", noted)
    rows = torch.tensor([3, 500])
    adversary, expected = begin(Shifted, tmp_path, 0.2, [act(rows)], capture)
    assert hinted
    hinted.clear()
    for pace in (*CORNERS.values(), *map(Pace.any, range(20))):
        adversary.check(pace, [act(rows)] * 2, expected * 2)
    assert hinted
    assert all(each == (rows * 7 + 5).tolist() for each in hinted)


SLOWLY = pytest.mark.slow  # to capture


@pytest.mark.parametrize(
    ("name", "capture"),
    [
        ("llama-fp32", "operators"),
        ("bert-bf16", "graphs"),
        ("experts", "operators"),
        ("transformer-encoder", "graphs"),
        ("transformer-encoder", "operators"),
        *(
            pytest.param(name, "graphs", marks=SLOWLY)
            for name in ("llama-fp32", "llama-bf16-dynamic-cache", "llama-tied-static-cache", "breaks", "t5", "mixtral")
        ),
    ],
)
def test_models_of_many_kinds(name: str, capture: str, tmp_path: Path) -> None:
    specimen = ZOO[name]
    runs = list(specimen.runs)[:2]
    adversary, expected = begin(specimen.make, tmp_path, max(specimen.budget, 0.7), runs, capture)
    for pace in (*CORNERS.values(), *map(Pace.any, range(2))):
        adversary.check(pace, runs, expected)
    assert_streamed(adversary.model)
    assert adversary.mode.num_deferred > 2 * sum(adversary.mode.synced.values())


Make = Callable[[], nn.Module]
CAMPAIGN: tuple[tuple[str, Make, list[Call], float], ...] = (
    ("chain", chain, ACTS[:3], 0.5),
    ("chain", chain, ACTS[:3], 0.6),
    ("chain", chain, ACTS[:3], 0.75),
    ("sequential", tied_sequential, [act(X[0]), lambda m: m[1](X[0]), act(X[1])], 0.6),
)


@pytest.mark.slow
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize(("name", "factory", "acts", "budget"), CAMPAIGN)
def test_a_campaign_of_orders(
    name: str, factory: Make, acts: list[Call], budget: float, capture: str, tmp_path: Path
) -> None:
    adversary, expected = begin(factory, tmp_path, budget, acts, capture)
    for seed in range(1000, 2500):
        adversary.check(Pace.any(seed), acts, expected)
