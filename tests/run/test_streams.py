"""Streamed equals unwrapped, bit for bit, whatever order copies and compute run in that the engine's events allow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from tests.run import stream_scenarios as scenarios
from tests.run import training_scenarios as training
from tests.run.adversary import Call, act, begin, chain
from tests.run.harness import assert_streamed
from tests.run.stream_scenarios import ACTS, X, paces
from tests.run.zoo import ZOO, tied_sequential
from tests.streams import Pace

CAPTURES = ("graphs", "operators")
Scenario = Callable[[Path, str], None]


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
    for pace in paces(44):
        adversary.check(pace, acts, expected)
    assert adversary.mode.num_deferred >= len(acts) * len(plan.bundles)
    assert not adversary.mode.synced, "nothing had to be computed early"


@pytest.mark.parametrize(
    ("scenario", "capture"),
    [
        (scenarios.jumps, "graphs"),
        (scenarios.jumps, "operators"),
        (scenarios.budgets, "graphs"),
        (scenarios.budgets, "operators"),
        (scenarios.writes, "graphs"),
        (scenarios.writes, "operators"),
        (scenarios.interrupted_plans, "operators"),
        (scenarios.interrupted_copies, "operators"),
        (scenarios.interrupted_steps, "graphs"),
        (scenarios.unwraps, "operators"),
        (scenarios.failed_reads, "graphs"),
        (scenarios.failed_reads, "operators"),
        (scenarios.hints, "graphs"),
        (scenarios.hints, "operators"),
    ],
)
def test_what_happens_between_passes(scenario: Scenario, capture: str, tmp_path: Path) -> None:
    scenario(tmp_path, capture)


@pytest.mark.parametrize(
    ("name", "capture"),
    [
        ("experts", "operators"),
        ("transformer-encoder", "graphs"),
        ("transformer-encoder", "operators"),
        *(
            pytest.param(name, capture, marks=pytest.mark.slow)
            for name in (
                "llama-fp32",
                "llama-bf16-dynamic-cache",
                "llama-tied-static-cache",
                "breaks",
                "t5",
                "bert-bf16",
            )
            for capture in CAPTURES
        ),
    ],
)
def test_models_of_many_kinds(name: str, capture: str, tmp_path: Path) -> None:
    specimen = ZOO[name]
    runs = list(specimen.runs)[:2]
    adversary, expected = begin(specimen.make, tmp_path, max(specimen.budget, 0.7), runs, capture)
    for pace in paces(2):
        adversary.check(pace, runs, expected)
    assert_streamed(adversary.model)
    assert adversary.mode.num_deferred > 2 * sum(adversary.mode.synced.values())


@pytest.mark.parametrize("capture", CAPTURES)
def test_training(capture: str, tmp_path: Path) -> None:
    """What only waits for the host is computed early: what is written to homes."""
    mode = training.train(tmp_path, capture, paces(0))
    assert mode.num_deferred > 2 * sum(mode.synced.values())


@pytest.mark.parametrize(
    ("checkpoints", "capture"), [("none", "operators"), ("again", "operators"), ("again", "graphs")]
)
def test_backward_in_a_thread_of_its_own(checkpoints: str, capture: str, tmp_path: Path, foreign: ModuleType) -> None:
    mode = training.differentiate(tmp_path, capture, checkpoints, paces(2))
    assert not mode.synced, "nothing had to be computed early"


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


@pytest.mark.slow
@pytest.mark.parametrize("capture", CAPTURES)
def test_a_campaign_of_training(capture: str, tmp_path: Path) -> None:
    training.train(tmp_path, capture, [Pace.any(seed) for seed in range(1000, 1500)])


@pytest.mark.slow
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("checkpoints", ["none", "again", "reentrant"])
def test_a_campaign_of_backward_passes(checkpoints: str, capture: str, tmp_path: Path, foreign: ModuleType) -> None:
    training.differentiate(tmp_path, capture, checkpoints, [Pace.any(seed) for seed in range(1000, 2000)])
