"""Turns a captured graph into a flat driver that hands each step the weights it reads.

The driver is one generated function, made once a graph: before the nodes of each finest step stands a call of
`enter`, which returns the tensors that the step binds. A plan that merges steps changes nothing in it.
The nodes themselves run as Dynamo captured them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from types import MethodType, SimpleNamespace
from typing import Any, Protocol

import torch

from mball.trace.cut import Cut, StepNodes


class StepHooks(Protocol):
    """What the driver calls between the steps of its graph."""

    def enter(self, step: int) -> Sequence[torch.Tensor]:
        """Returns the weights that finest step `step` reads, in the order of its `reads`; blocks until they are there.

        The tensors that an earlier call returned are read no more.
        """

    def expect_rows(self, step: int, place: int, indices: torch.Tensor) -> None:
        """Says which rows step `step`, which was entered, looks up of the weight at `place` of its `reads`."""

    def finish(self) -> None:
        """Says that the last step is over."""


# driver(hooks, *arguments of the graph) -> the graph's results
Driver = Callable[..., Any]


def build_driver(cut: Cut) -> Driver:
    """Returns a function of `StepHooks` and the graph's own arguments, with the graph's own results."""
    flat = torch.fx.Graph()
    hooks = flat.placeholder("mball_hooks")
    env: dict[torch.fx.Node, torch.fx.Node] = {node: flat.node_copy(node) for node in cut.placeholders}
    for number, step in enumerate(cut.steps):
        handed = flat.call_method("enter", (hooks, number))
        places = {weight: place for place, weight in enumerate(step.reads)}
        binder = Binder(cut, flat, env, handed, places)
        indices_of = indices_by_node(step, places)
        for node in step.nodes:
            if node in indices_of:
                place, indices = indices_of[node]
                flat.call_method("expect_rows", (hooks, number, place, binder(indices)))
            env[node] = flat.node_copy(node, binder)
    flat.call_method("finish", (hooks,))
    # A result that is a weight, or a view of one, is the home: it outlives every slot.
    flat.node_copy(cut.module.graph.output_node(), Binder(cut, flat, env, None, {}))
    return compile_driver(cut.module, flat)


def indices_by_node(step: StepNodes, places: Mapping[int, int]) -> dict[torch.fx.Node, tuple[int, torch.fx.Node]]:
    """Returns the nodes of a step that look up rows, each with the place of the weight and the node that names them."""
    return {
        node: (places[weight], lookup.indices)
        for weight, lookups in step.gathers().items()
        for node, lookup in lookups.items()
    }


def compile_driver(root: object, flat: torch.fx.Graph) -> Driver:
    """Returns the function that `flat` describes, without the graphs: only code stays in memory."""
    parts = SimpleNamespace()
    for node in flat.nodes:
        if node.op in ("get_attr", "call_module"):
            part = node.target.partition(".")[0]
            setattr(parts, part, getattr(root, part))
    code = flat.python_code(root_module="self")
    scope = dict(code.globals)
    exec(compile(code.src, "<mball driver>", "exec"), scope)
    driver: Driver = MethodType(scope["forward"], parts)
    return driver


class Binder:
    """Maps a node of the captured graph to the node that stands for it in one step."""

    def __init__(
        self,
        cut: Cut,
        flat: torch.fx.Graph,
        env: dict[torch.fx.Node, torch.fx.Node],
        handed: torch.fx.Node | None,
        position: dict[int, int],
    ) -> None:
        self.cut, self.flat, self.env = cut, flat, env
        self.handed, self.position = handed, position
        self._bound: dict[torch.fx.Node, torch.fx.Node] = {}

    def __call__(self, node: torch.fx.Node) -> torch.fx.Node:
        weight = self.cut.weights.get(node)
        if (weight is None or self.handed is None) and node not in self.cut.views:
            return self.env[node]
        if node not in self._bound:
            if weight is None:
                self._bound[node] = self.flat.node_copy(node, self)
            else:
                assert self.handed is not None
                self._bound[node] = self.flat.call_function(operator.getitem, (self.handed, self.position[weight]))
        return self._bound[node]
