"""Learns what the steps of a graph cost, from its first two runs.

The first run counts operations and sees how far memory rises within each step; it is slow, and the libraries
under torch warm up in it. The second one takes times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from mball.torch_private.dispatch import TorchDispatchMode
from mball.torch_private.operators import count_flops
from mball.trace.driver import StepHooks
from mball.trace.graph import StepFacts


class Gauge(Protocol):
    """Measures by how much memory rose at most.

    The part of a device's gauge that is used here: traces know nothing of devices, so it has its own name for it.
    """

    def reset(self) -> None:
        """Begins a measurement."""

    def rise_bytes(self) -> int:
        """Returns the highest use since `reset` less the use at `reset`; 0 where it cannot be measured."""


class _Profile:
    """Stands between driver and hooks, and knows when a step begins and ends."""

    def __init__(self, steps: Sequence[StepFacts], hooks: StepHooks) -> None:
        self.steps = steps
        self.hooks = hooks
        self.current: StepFacts | None = None

    def enter(self, step: int) -> Sequence[torch.Tensor]:
        if self.current is not None:
            self.ended(self.current)
            self.current = None
        weights = self.hooks.enter(step)
        self.current = self.steps[step]
        self.began(self.current)
        return weights

    def expect_rows(self, step: int, place: int, indices: torch.Tensor) -> None:
        self.hooks.expect_rows(step, place, indices)

    def finish(self) -> None:
        if self.current is not None:
            self.ended(self.current)
            self.current = None
        self.hooks.finish()

    def began(self, step: StepFacts) -> None:
        raise NotImplementedError

    def ended(self, step: StepFacts) -> None:
        raise NotImplementedError


class Moment(Protocol):
    """A point in what is computed.

    The part of a device's moment that is used here, under a name of its own; see `Gauge`.
    """

    def since(self, earlier: Any) -> float:
        """Returns the seconds from an earlier one; blocks until this one is reached."""


class TimeProfile(_Profile):
    """Times each step, without the waits between steps: by `moment`, which tells when what was issued so far is over.

    Nobody waits between steps, where a host that runs ahead would let the device stand idle, and for itself in the end.
    """

    def __init__(self, steps: Sequence[StepFacts], hooks: StepHooks, moment: Callable[[], Moment]) -> None:
        super().__init__(steps, hooks)
        self._moment = moment
        self._began: Moment | None = None  # of the current step
        self._timed: list[tuple[StepFacts, Moment, Moment]] = []

    def began(self, step: StepFacts) -> None:
        self._began = self._moment()

    def ended(self, step: StepFacts) -> None:
        assert self._began is not None
        self._timed.append((step, self._began, self._moment()))

    def finish(self) -> None:
        super().finish()
        for step, began, ended in self._timed:
            step.time_s = ended.since(began)


class CostProfile(_Profile):
    """Measures by how much memory rises within each step, and counts its operations under `counting`."""

    def __init__(self, steps: Sequence[StepFacts], hooks: StepHooks, gauge: Gauge) -> None:
        super().__init__(steps, hooks)
        self._gauge = gauge

    def began(self, step: StepFacts) -> None:
        self._gauge.reset()

    def ended(self, step: StepFacts) -> None:
        step.rise_bytes = self._gauge.rise_bytes()

    def counting(self) -> TorchDispatchMode:
        """Returns the mode under which the run's operators must be dispatched; without it counts stay as they are."""
        for step in self.steps:
            step.flops = 0
        return _FlopMode(self)


class _FlopMode(TorchDispatchMode):
    """Counts operators as they run, unchanged."""

    supports_higher_order_operators = True

    def __init__(self, profile: CostProfile) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not type its modes
        self.profile = profile

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        step = self.profile.current
        if step is not None:
            step.flops += count_flops(func, args, kwargs or {}, result)
        return result
