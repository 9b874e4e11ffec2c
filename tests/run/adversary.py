"""Runs wrapped models on adversarial streams, pass after pass, while compute and copies are late."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mball.api import _wrap
from mball.compute import OpenCompute, open_compute
from mball.config import Config
from mball.memory import Device
from tests.adaptors import adapted
from tests.adversarial import AdversarialDevice
from tests.deferral import DeferringMode, deferred
from tests.run.harness import assert_same, engine_of, make, run, weight_bytes
from tests.streams import CORNERS, Pace

Call = Callable[[Any], Any]


class Adversary:
    """A model on adversarial streams.

    Args:
        model: is wrapped.
        budget: in bytes.
        directory: for the swap file.
        open_compute: opens the device that is made adversarial.
        settings: as for `mball.wrap`.

    Attributes:
        device: which runs it.
        mode: which deferred the operators last.
    """

    mode: DeferringMode

    def __init__(
        self,
        model: nn.Module,
        budget: int,
        directory: Path,
        *,
        open_compute: OpenCompute = open_compute,
        **settings: Any,
    ) -> None:
        self.model = model
        opened = adapted(self._adapt, open_compute)
        _wrap((model,), Config.of(budget=budget, swap_dir=directory, **settings), None, {}, opened)

    def _adapt(self, device: Device) -> Device:
        self.device = AdversarialDevice(device, CORNERS["all at once"])
        return self.device

    @property
    def engine(self) -> Any:
        return engine_of(self.model)

    def play(self, pace: Pace, acts: Sequence[Call]) -> list[Any]:
        """Returns what each of `acts` returns of the model; nothing is waited for between them."""
        self.device.streams.follow(pace)
        with deferred(self.device) as self.mode:
            return [run(self.model, act) for act in acts]

    def check(self, pace: Pace, acts: Sequence[Call], expected: Sequence[Any]) -> None:
        """Plays, and compares. Raises DifferentError or StreamError."""
        for number, (got, wanted) in enumerate(zip(self.play(pace, acts), expected, strict=True)):
            assert_same(got, wanted, f"{pace}, call {number}")


def chain() -> nn.Module:
    """Seven bundles of one size, for passes that end in the middle of a round through the slots."""
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(7)))


def act(x: torch.Tensor) -> Call:
    """Returns the call of a model with `x`."""
    return lambda model: model(x)


def begin(
    factory: Callable[[], nn.Module], directory: Path, budget: float, acts: Sequence[Call], capture: str
) -> tuple[Adversary, list[Any]]:
    """Returns the model on adversarial streams, and what its calls return unwrapped.

    It has done each of them twice, without surprises, so that it is captured and planned.

    Args:
        budget: of its weights' bytes.
    """
    plain, model = make(factory), make(factory)
    expected = [run(plain, each) for each in acts]
    adversary = Adversary(model, int(weight_bytes(model) * budget), directory, capture=capture)
    for _ in range(2):
        adversary.check(CORNERS["all at once"], acts, expected)
    return adversary, expected
