"""Well-known policies, executed by the engine: other plans, the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mball
from mball.backend_door import mball_backend
from mball.config import Policy
from mball.errors import ConfigError
from mball.plan.baselines import BASELINES
from mball.schema import Plan
from tests.run.door import compiled
from tests.run.harness import assert_same, assert_streamed, engine_of, make, run, weight_bytes, wrap_hostile
from tests.run.zoo import Run, llama, logits, noise

OTHERS = [policy.value for policy in Policy if policy is not Policy.MBALL]
PASSES = 4
call = logits(1, 5)


@pytest.fixture
def planned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """What the policy of the test's name has planned so far."""
    name = request.getfixturevalue("policy")
    plan, plans = BASELINES[name], []

    def watched(*args: Any, **kwargs: Any) -> Plan:
        plans.append(plan(*args, **kwargs))
        return plans[-1]

    monkeypatch.setitem(BASELINES, name, watched)
    return plans


class Blocks(nn.Module):
    """Layers that are named as those of transformers are, and captured in a tenth of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)) for _ in range(6)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


# Of llama's graphs under a policy the backend's test runs some.
MODELS: dict[str, tuple[Callable[[], nn.Module], Run]] = {
    "graphs": (Blocks, lambda model: model(noise(4, 128))),
    "operators": (llama, call),
}


@pytest.mark.parametrize("capture", MODELS)
@pytest.mark.parametrize("policy", OTHERS)
def test_each_policy_streams_the_same_numbers_as_it_planned(
    policy: str, capture: str, planned: list[Plan], tmp_path: Path
) -> None:
    make_model, act = MODELS[capture]
    plain, model = make(make_model), make(make_model)
    expected = run(plain, act)
    wrap_hostile(model, weight_bytes(model) // 2, swap_dir=tmp_path, capture=capture, policy=policy)
    for number in range(PASSES):
        assert_same(run(model, act), expected, f"{policy}, pass {number}")
    report = assert_streamed(model)
    assert report.unplanned_fetches == 0
    assert engine_of(model).plan in planned
    assert report.policy == policy
    assert f"policy  {policy}\n" in str(report)


@pytest.mark.parametrize("policy", ["prefix"])
def test_a_backend_of_torch_compile_takes_a_policy(policy: str, planned: list[Plan], tmp_path: Path) -> None:
    plain, model = compiled(llama, 0.5, tmp_path, policy=policy)
    for _ in range(PASSES):
        assert_same(run(model, call), run(plain, call))
    report = assert_streamed(model)
    assert report.unplanned_fetches == 0
    assert report.policy == policy
    assert engine_of_door(model).plan in planned


def engine_of_door(model: Any) -> Any:
    from mball.api import _state_of

    return _state_of(model).engine


def test_mball_plans_unless_another_policy_is_named(tmp_path: Path) -> None:
    model = make(llama)
    wrap_hostile(model, weight_bytes(model) // 2, swap_dir=tmp_path)
    run(model, call)
    report = mball.report(model)
    assert report.policy == "mball"
    assert "policy" not in str(report)


def test_a_policy_that_is_not_known_is_refused_with_those_that_are(tmp_path: Path) -> None:
    message = "policy is 'belady'; choose one of 'mball', 'prefix', 'prefetch', 'lru', 'swapadvisor', 'flexgen'"
    model = make(llama)
    with pytest.raises(ConfigError, match=message):
        mball.wrap(model, "1MiB", swap_dir=tmp_path, policy="belady")
    chosen = {"budget": "1MiB", "swap_dir": str(tmp_path), "policy": "belady"}
    with pytest.raises(ConfigError, match=message):
        run(torch.compile(model, backend=mball_backend, options=chosen), call)


def test_every_policy_that_can_be_named_has_a_planner() -> None:
    assert set(OTHERS) <= BASELINES.keys()
