"""Compiled steps: streamed equals resident, bit for bit, whatever order copies and steps run in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.run.adversary import chain
from tests.run.compiled_scenarios import compute, computes
from tests.run.harness import DifferentError
from tests.run.stream_scenarios import ACTS, paces
from tests.run.test_inductor import SPECIMENS, Remembers
from tests.run.test_stream_mutants import MUTANTS
from tests.run.zoo import noise
from tests.streams import Pace, StreamError


def test_passes_follow_each_other(tmp_path: Path) -> None:
    mode = compute(chain, 0.6, ACTS[:3], tmp_path, paces(24))
    assert mode.num_steps == 3 * 7
    assert not mode.synced, "nothing had to be computed early"


class Notes(nn.Module):
    """Each layer adds to what the caller has, and reads that."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor, notes: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).sin()
            notes.add_(x.mean(0))
            x = x + notes
        return x


def keeps_notes(model: Any) -> list[torch.Tensor]:
    notes = torch.zeros(64)
    return [model(noise(3, 64, seed=seed), notes) for seed in range(2)] + [notes]


def test_steps_that_write(tmp_path: Path) -> None:
    """What was made under the mode is written late, too."""
    mode = compute(Notes, 0.9, [keeps_notes] * 2, tmp_path, paces(12))
    assert mode.num_steps >= 2 * 2 * 4
    assert not mode.synced


@pytest.mark.slow
def test_what_is_the_callers_is_written_in_time(tmp_path: Path) -> None:
    """Buffers are read by whoever likes, so a step that writes one is computed when it is called."""
    places = torch.tensor([1, 4, 6])
    mode = compute(Remembers, 0.9, [lambda m: m(noise(3, 64), places)] * 2, tmp_path, paces(0))
    assert mode.num_steps
    assert set(mode.synced) == {"a compiled step"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama-generates", "sequential", "breaks", "bert"])
def test_models_of_many_kinds(name: str, tmp_path: Path) -> None:
    specimen = SPECIMENS[name]
    mode = compute(specimen.make, max(specimen.budget, 0.7), list(specimen.runs[1::-1]), tmp_path, paces(4))
    assert mode.num_steps > 2 * sum(mode.synced.values())


@pytest.mark.slow
def test_a_campaign_of_orders(tmp_path: Path) -> None:
    compute(chain, 0.6, ACTS[:3], tmp_path, [Pace.any(seed) for seed in range(1000, 2500)])


# What stands around each step; the others are of plans, budgets and ends, which do not know what a step is.
AROUND = {mutant.method.__name__: mutant for mutant in MUTANTS}


@pytest.mark.parametrize(
    "method", ["_bring", "_land", *(pytest.param(each, marks=pytest.mark.slow) for each in ("_stall", "_release"))]
)
def test_what_is_left_out_is_missed(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AROUND[method].apply(monkeypatch)
    with pytest.raises((DifferentError, StreamError)):
        computes(tmp_path)
