"""Has the steps of a graph compiled by Inductor, each by itself, and drives them.

AOTAutograd turns Dynamo's graph into one of basic operators; that is cut, equal pieces are compiled once, and a flat
driver calls them. What AOTAutograd wraps around a compiled graph calls the driver in its place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from mball.torch_private.inductor import compile_piece, compile_through_inductor
from mball.torch_private.nodes import argument_of
from mball.torch_private.operators import count_node_flops
from mball.trace.cut import Cut, UnsupportedGraphError
from mball.trace.driver import Binder, Driver, StepHooks, compile_driver, indices_by_node
from mball.trace.grouping import Grouping
from mball.trace.pieces import Piece, is_made_again, settle, take_apart

CutBy = Callable[[Grouping], Cut]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A graph whose steps are compiled.

    Attributes:
        flops: of each step, for the sizes that were traced.
        num_pieces: different pieces, so many were compiled.
    """

    driver: Driver
    flops: tuple[int, ...]
    num_pieces: int


def compile_steps(
    name: str,
    module: torch.fx.GraphModule,
    inputs: Sequence[Any],
    weight_of: Sequence[int | None],
    choose_cut: Callable[[CutBy, Sequence[int]], Cut],
    options: Mapping[str, Any],
) -> Compiled:
    """Compiles Dynamo's graph `module`, which stays as it is.

    Args:
        name: of the graph, for messages.
        inputs: what Dynamo hands a backend.
        weight_of: for each of them the index of the managed weight it is, or None.
        choose_cut: is given a function that cuts the graph of basic operators by a grouping, and for each of that
            graph's placeholders its position among `inputs`; returns the cut to compile.
        options: Inductor's own.

    Raises:
        UnsupportedGraphError: the graph cannot be cut after AOTAutograd.
        InductorError: a piece cannot be compiled.
    """
    relay = _Relay()
    made: list[Compiled] = []

    def compile_graph(graph: torch.fx.GraphModule, settings: Mapping[str, Any]) -> Callable[[list[Any]], Any]:
        arguments = _arguments(name, graph)
        weights = [weight_of[argument] for argument in arguments]
        settle(graph.graph)
        cut = choose_cut(lambda grouping: Cut(name, graph, weights, grouping), arguments)
        pieces = take_apart(cut)
        compiled = _compile_pieces(pieces, cut, settings)
        driver = _build_driver(cut, pieces, compiled)
        made.append(
            Compiled(
                driver=driver,
                flops=tuple(sum(map(count_node_flops, step.nodes)) for step in cut.steps),
                num_pieces=len({piece.key for piece in pieces}),
            )
        )
        return lambda values: driver(relay.hooks, *values)

    call = compile_through_inductor(module, inputs, compile_graph, options)
    if len(made) != 1:
        raise UnsupportedGraphError(f"{name}: AOTAutograd made {len(made)} graphs of it instead of one")
    (found,) = made

    def drive(hooks: StepHooks, *args: Any) -> Any:
        relay.hooks = hooks
        return call(*args)

    return replace(found, driver=drive)


class _Relay:
    """Carries the hooks of a run past AOTAutograd, which knows the graph's own arguments only."""

    hooks: StepHooks


def _arguments(name: str, graph: torch.fx.GraphModule) -> tuple[int, ...]:
    found = []
    for node in graph.graph.find_nodes(op="placeholder"):
        argument = argument_of(node)
        if argument is None:
            raise UnsupportedGraphError(f"{name}: argument {node.name} of the graph is none of the model's")
        found.append(argument)
    return tuple(found)


def _compile_pieces(pieces: Sequence[Piece], cut: Cut, settings: Mapping[str, Any]) -> list[Callable[..., Any]]:
    known: dict[Any, Callable[..., Any]] = {}
    for piece, step in zip(pieces, cut.steps, strict=True):
        if piece.key not in known:
            known[piece.key] = compile_piece(piece.module, len(step.reads), settings)
    return [known[piece.key] for piece in pieces]


def _build_driver(cut: Cut, pieces: Sequence[Piece], compiled: Sequence[Callable[..., Any]]) -> Driver:
    """Returns a function of `StepHooks` and the arguments of the cut graph."""
    flat = torch.fx.Graph()
    root = SimpleNamespace()
    hooks = flat.placeholder("mball_hooks")
    env: dict[torch.fx.Node, torch.fx.Node] = {node: flat.node_copy(node) for node in cut.placeholders}
    for number, (piece, step, function) in enumerate(zip(pieces, cut.steps, compiled, strict=True)):
        setattr(root, f"piece{number}", function)
        handed = flat.call_method("enter", (hooks, number))
        for place, indices in indices_by_node(step, {weight: p for p, weight in enumerate(step.reads)}).values():
            if indices in env:  # else the piece itself makes them
                flat.call_method("expect_rows", (hooks, number, place, env[indices]))
        weights = [flat.call_function(operator.getitem, (handed, place)) for place in range(len(step.reads))]
        results = flat.call_module(f"piece{number}", ([*weights, *(env[node] for node in piece.inputs)],))
        for place, node in enumerate(piece.outputs):
            env[node] = flat.call_function(operator.getitem, (results, place))
    flat.call_method("finish", (hooks,))

    def make(node: torch.fx.Node) -> torch.fx.Node:
        if node not in env:
            env[node] = flat.node_copy(node, make)
            if node.op == "get_attr":
                setattr(root, str(node.target), getattr(cut.module, str(node.target)))
        return env[node]

    output = cut.module.graph.output_node()
    needed = list(output.all_input_nodes)
    while needed:
        node = needed.pop()
        if node in cut.views:
            needed += node.all_input_nodes
        elif is_made_again(node):
            make(node)
    flat.node_copy(output, Binder(cut, flat, env, None, {}))
    return compile_driver(root, flat)
