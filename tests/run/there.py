"""Models whose inputs are on the foreign device, as callers use them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from tests.run.harness import assert_same, engine_of, run

PLACE = "foreign:0"


class There:
    """A model as callers use it whose inputs are on its device: what tests give it is moved there, and back."""

    def __init__(self, model: Any, homes: Any = None) -> None:
        self.model = model
        self.homes = homes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self.model, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._there(getattr(self.model, name))

    def __getitem__(self, number: int) -> Any:
        return self._there(self.model[number])

    def _there(self, found: Any) -> Any:
        if isinstance(found, nn.Module):
            return There(found, self.homes)
        return functools.partial(self._call, found) if callable(found) else found

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(lambda value: moved(value, PLACE), (args, kwargs))
        result = function(*args, **kwargs)
        for tensor in tensors_in(result):
            at_home = self.homes is not None and self.homes.has(tensor)
            assert tensor.device.type == "foreign" or at_home, "it was computed elsewhere"
        return tree_map(lambda value: moved(value, "cpu"), result)


def compare(model: Any, plain: Any, call: Callable[[Any], Any], where: str = "") -> None:
    """Has both compute there; `plain` is moved there whole."""
    there = There(model, engine_of(model).homes)
    assert_same(run(there, call), run(There(plain.to(PLACE)), call), where)


def moved(value: Any, place: str) -> Any:
    return value.to(place) if isinstance(value, torch.Tensor) else value


def tensors_in(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, torch.Tensor) else None, value)
    return found
