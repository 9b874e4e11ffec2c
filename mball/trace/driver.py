"""Turns a captured graph into a flat driver that hands each step the weights it reads.

The driver is one generated function. Between the nodes of two plan steps stand calls of `leave` and `enter`;
`enter` returns the tensors that the step binds. The nodes themselves run as Dynamo captured them.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from mball import torch_private
from mball.trace.graph import CapturedGraph, StepNodes

Driver = Callable[..., Any]


class StepHooks(Protocol):
    """What the driver calls around each plan step of its graph."""

    def enter(self, step: int) -> Sequence[torch.Tensor]:
        """Returns the weights of plan step `step` in the order given to `build_driver`; blocks until they are there."""

    def leave(self, step: int) -> None:
        """Says that plan step `step` reads its weights no more."""


def build_driver(
    graph: CapturedGraph,
    cuts: Sequence[tuple[int, int]],
    bound: Sequence[Sequence[int]],
    hooks: StepHooks,
    *,
    profile: bool = False,
) -> Driver:
    """Returns a function with the graph's own arguments and results.

    Args:
        graph: the captured graph.
        cuts: for each plan step the trace steps `[first, end)` it runs; they cover the graph in order.
        bound: for each plan step the weights that `hooks.enter` returns, in that order.
        hooks: called around each plan step.
        profile: measure time and FLOPs of every finest step while running, and store them in the graph.
    """
    flat = torch.fx.Graph()
    env: dict[torch.fx.Node, torch.fx.Node] = {node: flat.node_copy(node) for node in graph.placeholders}
    stopwatch = _Stopwatch(graph.steps)

    for index, (first, end) in enumerate(cuts):
        handed = flat.call_function(hooks.enter, (index,))
        step_env: dict[torch.fx.Node, torch.fx.Node] = {}
        position = {weight: place for place, weight in enumerate(bound[index])}
        for number in range(first, end):
            if profile:
                flat.call_function(stopwatch.start, (number,))
            for node in graph.steps[number].nodes:
                env[node] = flat.node_copy(node, _Binder(graph, flat, env, step_env, handed, position))
        if profile:
            flat.call_function(stopwatch.stop)
        flat.call_function(hooks.leave, (index,))
    # A result that is a weight, or a view of one, is the home: it outlives every slot.
    home_env: dict[torch.fx.Node, torch.fx.Node] = {}
    output = graph.module.graph.output_node()
    flat.node_copy(output, _Binder(graph, flat, env, home_env, None, {}))
    module = torch.fx.GraphModule(graph.module, flat)
    if not profile:
        return module.forward

    def profiled(*args: Any) -> Any:
        with stopwatch.counting():
            return module.forward(*args)

    return profiled


class _Binder:
    """Maps a node of the captured graph to the node that stands for it in the current step."""

    def __init__(
        self,
        graph: CapturedGraph,
        flat: torch.fx.Graph,
        env: dict[torch.fx.Node, torch.fx.Node],
        step_env: dict[torch.fx.Node, torch.fx.Node],
        handed: torch.fx.Node | None,
        position: dict[int, int],
    ) -> None:
        self.graph, self.flat, self.env, self.step_env = graph, flat, env, step_env
        self.handed, self.position = handed, position

    def __call__(self, node: torch.fx.Node) -> torch.fx.Node:
        weight = self.graph.weights.get(node)
        if (weight is None or self.handed is None) and node not in self.graph.views:
            return self.env[node]
        if node not in self.step_env:
            if weight is None:
                self.step_env[node] = self.flat.node_copy(node, self)
            else:
                assert self.handed is not None
                self.step_env[node] = self.flat.call_function(operator.getitem, (self.handed, self.position[weight]))
        return self.step_env[node]


class _Stopwatch:
    """Times finest steps, without the waits between plan steps, and counts their FLOPs."""

    def __init__(self, steps: Sequence[StepNodes]) -> None:
        self.steps = steps
        self.current: int | None = None
        self.began_s = 0.0

    def start(self, step: int) -> None:
        self.stop()
        self.current = step
        self.steps[step].flops = 0
        self.began_s = time.perf_counter()

    def stop(self) -> None:
        if self.current is not None:
            self.steps[self.current].time_s = time.perf_counter() - self.began_s
        self.current = None

    def count(self, flops: int) -> None:
        if self.current is not None:
            self.steps[self.current].flops += flops

    def counting(self) -> torch_private.TorchDispatchMode:
        return _FlopMode(self)


class _FlopMode(torch_private.TorchDispatchMode):
    """Counts operators as they run, unchanged."""

    supports_higher_order_operators = True

    def __init__(self, stopwatch: _Stopwatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not type its modes
        self.stopwatch = stopwatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.stopwatch.count(torch_private.count_flops(func, args, kwargs or {}, result))
        return result
