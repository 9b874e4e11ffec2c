"""Runs a model wrapped and unwrapped, and says so if anything differs or passes mball by."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

import mball
from mball.api import _states, _wrap
from mball.config import Config
from mball.memory import Device
from mball.observe.report import Report
from tests.adaptors import DelayedDevice, GuardedDevice, PoisonedDevice, adapted


class DifferentError(AssertionError):
    """A result is not the expected one."""


class PoisonReachedResultError(DifferentError):
    """A result has NaN where none belongs: a slot was read that held no weight."""


def make(factory: Callable[[], torch.nn.Module], seed: int = 0) -> torch.nn.Module:
    """Returns the same model for the same seed, in evaluation mode."""
    torch.manual_seed(seed)
    return factory().eval()


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def hostile(seed: int) -> Callable[[Device], Device]:
    """Slots are poisoned before each read and after each release, reads come late, and no copy may leave its slot."""
    return lambda device: GuardedDevice(PoisonedDevice(DelayedDevice(device, seed=seed)))


def wrap_hostile(
    model: torch.nn.Module,
    budget: int,
    weights: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    rename: dict[str, str] | None = None,
    **settings: Any,
) -> torch.nn.Module:
    """Like mball.wrap, on a device that punishes every early read and every late overwrite; captures at once."""
    settings.setdefault("capture", "graphs")
    _wrap((model,), Config.of(budget=budget, **settings), weights, rename or {}, adapted(hostile(seed)))
    return model


def run(model: torch.nn.Module, call: Callable[[Any], Any]) -> Any:
    with torch.no_grad():
        return call(model)


def assert_same(got: Any, expected: Any, where: str = "") -> None:
    """Bit for bit.

    Raises:
        DifferentError: something differs; PoisonReachedResultError where a number became NaN.
    """
    got_leaves, got_spec = tree_flatten(got)
    leaves, spec = tree_flatten(expected)
    _check(got_spec == spec, f"{where} the results have another structure")
    for number, (a, b) in enumerate(zip(got_leaves, leaves, strict=True)):
        result = f"{where} result {number}"
        if not isinstance(b, torch.Tensor):
            _check(a == b, f"{result} is {a!r} instead of {b!r}")
            continue
        _check(isinstance(a, torch.Tensor), f"{result} is {a!r}, not a tensor")
        _check((a.dtype, a.shape) == (b.dtype, b.shape), f"{result} is {a.dtype} {a.shape}, not {b.dtype} {b.shape}")
        assert not b.is_floating_point() or not b.isnan().any(), f"{where}: the expected result {number} is NaN"
        if a.is_floating_point() and a.isnan().any():
            raise PoisonReachedResultError(f"{result} has NaN")
        _check(torch.equal(a, b), f"{result} differs")


def _check(same: bool, message: str) -> None:
    if not same:
        raise DifferentError(message)


def assert_streamed(model: torch.nn.Module) -> Report:
    """The last pass was managed, in steps, and read from disk; otherwise equality would prove nothing."""
    report = mball.report(model)
    assert report.weights_managed == report.weights_owned > 0
    assert report.steps > 1, report
    assert report.bytes_read_last_pass > 0, report
    assert report.in_place_bytes == 0, report
    assert report.peak_bytes <= report.budget_bytes, report
    return report


def engine_of(model: torch.nn.Module) -> Any:
    return _states[model].engine
