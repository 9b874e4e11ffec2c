"""Streamed equals unwrapped, bit for bit, whatever order copies and compute run in that the engine's events allow."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mball
from tests.deferral import deferred
from tests.run.adversary import Adversary, Call
from tests.run.harness import assert_same, make, run, weight_bytes
from tests.run.zoo import noise, tied_sequential
from tests.streams import CORNERS, Pace

X = tuple(noise(4, 64, seed=seed) for seed in range(4))


def chain() -> nn.Module:
    """Seven bundles of one size; a budget of 3/5 has slots for three, so passes end in the middle of a round."""
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(7)))


def act(x: torch.Tensor) -> Call:
    return lambda model: model(x)


def begin(
    make_model: Call, directory: Path, budget: float, acts: list[Call], capture: str
) -> tuple[Adversary, list[torch.Tensor]]:
    """Returns the wrapped model, after a pass of each kind without surprises, and what its calls should return."""
    plain = make(make_model)  # type: ignore[arg-type]
    model = make(make_model)  # type: ignore[arg-type]
    expected = [run(plain, each) for each in acts]
    adversary = Adversary(model, int(weight_bytes(model) * budget), directory, capture=capture)
    for _ in range(2):
        adversary.check(CORNERS["all at once"], acts, expected)
    return adversary, expected


@pytest.mark.parametrize("pace", CORNERS.values(), ids=CORNERS)
@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_a_pass_that_jumps_over_what_was_on_its_way(capture: str, pace: Pace, tmp_path: Path) -> None:
    """A part of the model is called next: what comes for the whole one is given up, and its place is taken."""
    x = noise(4, 64)
    acts = [act(x), lambda m: m[1](x), lambda m: m[3](x), act(x)]
    adversary, expected = begin(tied_sequential, tmp_path, 0.6, acts, capture)
    for _ in range(3):
        adversary.check(pace, acts, expected)


@pytest.mark.parametrize("pace", CORNERS.values(), ids=CORNERS)
@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_memory_is_given_back_after_its_last_use(capture: str, pace: Pace, tmp_path: Path) -> None:
    """A smaller budget, and a larger one again, while compute and copies of the passes before are not over."""
    acts = [act(x) for x in X]
    adversary, expected = begin(chain, tmp_path, 0.9, acts, capture)
    model, weights = adversary.model, weight_bytes(adversary.model)
    adversary.device.streams.follow(pace)
    got = []
    with deferred(adversary.device):
        for share in (0.6, 2.0, 0.5, 0.8):
            got += [run(model, each) for each in acts]
            mball.set_budget(model, int(weights * share))
    for number, result in enumerate(got):
        assert_same(result, expected[number % len(acts)], f"call {number}")


@pytest.mark.parametrize("pace", CORNERS.values(), ids=CORNERS)
def test_an_interrupted_plan_is_dropped_after_its_last_use(pace: Pace, tmp_path: Path) -> None:
    """Ctrl-C came while a plan was adopted: the next pass begins with an empty arena."""
    acts = [act(x) for x in X]
    adversary, expected = begin(chain, tmp_path, 3.0, acts, "operators")
    adversary.device.streams.follow(pace)
    got = []
    with deferred(adversary.device):
        for each in acts:
            got.append(run(adversary.model, each))
            adversary.engine._active, adversary.engine._unclear = None, True
    for number, result in enumerate(got):
        assert_same(result, expected[number], f"call {number}")


@pytest.mark.parametrize("pace", CORNERS.values(), ids=CORNERS)
@pytest.mark.parametrize("budget", [0.6, 3.0])
def test_unwrapping_waits_for_the_last_use(budget: float, pace: Pace, tmp_path: Path) -> None:
    acts = [act(x) for x in X]
    adversary, expected = begin(chain, tmp_path, budget, acts, "operators")
    adversary.device.streams.follow(pace)
    with deferred(adversary.device):
        got = [run(adversary.model, each) for each in acts]
        mball.unwrap(adversary.model)
        got += [run(adversary.model, each) for each in acts]
    for number, result in enumerate(got):
        assert_same(result, expected[number % len(acts)], f"call {number}")


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


@pytest.mark.parametrize("pace", CORNERS.values(), ids=CORNERS)
def test_what_an_interrupted_step_wrote_is_kept(pace: Pace, tmp_path: Path) -> None:
    """Its compute is queued, and the next pass begins with other weights where it reads."""
    x = noise(4, 64)

    def passes(model: Any) -> list[torch.Tensor]:
        results = []
        for stumbles in (False, True, True):
            kept = torch.zeros(4, 64)
            with contextlib.suppress(KeyboardInterrupt):
                results.append(model(x, kept, stumbles))
            results += [kept, model.rest[3](x)]
        return results

    adversary, expected = begin(Keeps, tmp_path, 0.45, [passes], "graphs")
    for _ in range(3):
        adversary.check(pace, [passes], expected)
