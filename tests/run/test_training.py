"""What is differentiated within a pass has the gradients of the unwrapped model, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.run.harness import assert_same, assert_streamed, engine_of, make, run, weight_bytes, wrap_hostile
from tests.run.test_elsewhere import wrap_there
from tests.run.there import PLACE, There
from tests.run.trainer import Forces, Layers, Trainer, on, trained
from tests.run.zoo import ZOO, Run, noise

OPERATORS = {"capture": "operators"}
GRAPHS = {"capture": "graphs"}
COMPILED = {"capture": "graphs", "compile": "inductor"}
X = on(4, 64)


def check(factory: Callable[[], nn.Module], budget: float, calls: list[Run], directory: Path, **settings: Any) -> None:
    """Trains a wrapped model and another one side by side."""
    plain, model = (Trainer(make(factory).train()) for _ in range(2))
    wrap_hostile(model, int(weight_bytes(model) * budget), swap_dir=directory, **settings)
    ours, theirs = (torch.optim.SGD(each.parameters(), lr=0.01, momentum=0.9) for each in (model, plain))
    for attempt in range(3):
        expected = trained(plain, theirs, calls)
        assert any(each is not None and each.any() for each in expected[1])
        assert_same(trained(model, ours, calls), expected, f"step {attempt}")
        assert_streamed(model)


@pytest.mark.parametrize(
    ("checkpoints", "frozen", "settings"),
    [
        ("none", (), OPERATORS),
        ("again", (0, 2, 3), OPERATORS),
        ("reentrant", (0, 2, 3), OPERATORS),
        ("none", (), GRAPHS),
        ("again", (0, 2, 3), GRAPHS),
        ("reentrant", (0, 2, 3), GRAPHS),
        ("none", (0, 2, 3), COMPILED),
    ],
)
def test_gradients_and_optimizer_steps(
    checkpoints: str, frozen: tuple[int, ...], settings: dict[str, Any], tmp_path: Path, new_dynamo: None
) -> None:
    """Two passes add up their gradients; what the optimizer wrote is what the next ones read."""
    factory = partial(Layers, frozen=frozen, checkpoints=checkpoints)
    check(factory, 1.2 if frozen else 1.75, [on(4, 64, seed=seed) for seed in range(2)], tmp_path, **settings)


@pytest.mark.parametrize(
    ("name", "budget", "settings"),
    [
        ("breaks", 2.5, OPERATORS),
        ("convolutions", 3.9, OPERATORS),
        ("transformer-encoder", 3.0, OPERATORS),
        ("experts", 2.0, OPERATORS),
        ("transformer-encoder", 3.0, GRAPHS),
        *(
            pytest.param(name, budget, settings, marks=pytest.mark.slow)
            for name, budget, settings in (
                ("breaks", 2.5, GRAPHS),
                ("convolutions", 3.9, GRAPHS),
                ("experts", 2.0, GRAPHS),
                ("llama-fp32", 1.9, OPERATORS),
                ("llama-fp32", 1.9, GRAPHS),
            )
        ),
    ],
)
def test_models_of_many_kinds(
    name: str, budget: float, settings: dict[str, Any], tmp_path: Path, new_dynamo: None
) -> None:
    """In training mode: what draws random numbers or writes to buffers does so once."""
    check(ZOO[name].make, budget, list(ZOO[name].runs[:2]), tmp_path, **settings)


@pytest.mark.parametrize("settings", [OPERATORS, GRAPHS], ids=["operators", "graphs"])
@pytest.mark.parametrize("checkpoints", ["none", "again", "reentrant"])
def test_on_a_device_backward_has_a_thread_of_its_own(
    checkpoints: str, settings: dict[str, Any], tmp_path: Path, foreign: Any, new_dynamo: None
) -> None:
    """It belongs to the pass that waits for it, and calls layers of the model again where there are checkpoints."""
    plain, model = (make(lambda: Forces(checkpoints)).requires_grad_(False) for _ in range(2))
    plain.to(PLACE)
    wrap_there(model, int(weight_bytes(model) * 0.9), swap_dir=tmp_path, **settings)
    for _ in range(3):
        assert_same(run(There(model, engine_of(model).homes), X), run(There(plain), X))
        assert_streamed(model)
    assert model.threads
    assert threading.get_ident() not in model.threads


def test_gradients_of_weights_are_refused_on_another_device(tmp_path: Path, foreign: Any) -> None:
    """Homes are the host's, and what a step makes is on the device: autograd says so before anything is lost."""
    model = Trainer(make(Layers))
    wrap_there(model, int(weight_bytes(model) * 2), swap_dir=tmp_path, capture="operators")
    x = noise(4, 64).to(PLACE)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="invalid gradient at index 0 - expected device cpu but got foreign:0"):
            run(model, lambda m: m(lambda layers: layers(x)))
    assert all(parameter.grad is None for parameter in model.parameters())
