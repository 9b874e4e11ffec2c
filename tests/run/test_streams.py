"""Streamed equals unwrapped, bit for bit, whatever order copies and compute run in that the engine's events allow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.run.adversary import Adversary, Call
from tests.run.harness import make, run, weight_bytes
from tests.run.zoo import noise, tied_sequential
from tests.streams import CORNERS, Pace


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
