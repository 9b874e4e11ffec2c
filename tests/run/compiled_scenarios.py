"""Models whose steps are compiled, on adversarial streams: each raises if a result differs from the resident one's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

from torch import nn

import mball
from mball.trace import inductor
from tests.compiled_deferral import compile_deferred
from tests.deferral import DeferringMode
from tests.run.adversary import Adversary, Call, chain
from tests.run.harness import assert_streamed, make, run, weight_bytes
from tests.run.stream_scenarios import ACTS, paces
from tests.streams import CORNERS, Pace


def compute(
    factory: Callable[[], nn.Module], budget: float, acts: Sequence[Call], directory: Path, orders: Sequence[Pace]
) -> DeferringMode:
    """Runs compiled steps in each order, with as many bytes of weights as `budget` says, times those of all.

    What is expected comes from the same steps with all weights resident. Returns the mode of the last order.
    """
    model, resident = make(factory), make(factory)
    size = weight_bytes(model)
    settings = {"capture": "graphs", "compile": "inductor", "step_bytes": int(size * budget / 3)}
    with patch.object(inductor, "compile_piece", compile_deferred):
        mball.wrap(resident, budget=size * 4 + (64 << 20), swap_dir=directory, **settings)
        adversary = Adversary(model, int(size * budget), directory, **settings)
        for pace in (CORNERS["all at once"], CORNERS["all at once"], *orders):
            adversary.check(pace, acts, [run(resident, each) for each in acts])
            assert_streamed(model)
    return adversary.mode


def computes(directory: Path, _: str = "") -> None:
    compute(chain, 0.6, ACTS[:3], directory, paces(2))
