"""Models that torch.compile takes to mball's door, on a device that is hard to please."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mball.backend_door import mball_backend
from tests.adaptors import adapted
from tests.run.harness import hostile, make, weight_bytes
from tests.run.zoo import llama, noise, tied_sequential

X = noise(4, 64)


def call(model: Any) -> Any:
    return model(X)


class Tied(nn.Module):
    """Not a module of torch's own: Dynamo does not look into those when they are compiled in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tied_sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def three_layers() -> nn.Module:
    return llama(layers=3)


def backend(seed: int = 0) -> Any:
    """The backend, on a device that punishes every early read and every late overwrite."""
    return functools.partial(mball_backend, open_compute=adapted(hostile(seed)))


def options(model: nn.Module, budget: float, directory: Path, **settings: Any) -> dict[str, Any]:
    return {"budget": int(weight_bytes(model) * budget), "swap_dir": str(directory), **settings}


def compiled(factory: Callable[[], nn.Module], budget: float, directory: Path, **settings: Any) -> tuple[Any, Any]:
    """Returns the model compiled in place by torch's backend "eager", and by ours."""
    plain, model = make(factory), make(factory)
    plain.compile(backend="eager")
    model.compile(backend=backend(), options=options(model, budget, directory, **settings))
    return plain, model


def is_installed() -> bool:
    return any(point.name == "mball" for point in importlib.metadata.entry_points(group="torch_dynamo_backends"))
