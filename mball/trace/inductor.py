"""Has the steps of a graph compiled by Inductor, each by itself, and drives them.

AOTAutograd turns Dynamo's graph into one of basic operators; that is cut, equal pieces are compiled once, and a flat
driver calls them. What AOTAutograd wraps around a compiled graph calls the driver in its place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from mball.torch_private.inductor import compile_piece, compile_through_inductor
from mball.torch_private.nodes import argument_of, example_value, writes_argument
from mball.torch_private.operators import count_node_flops
from mball.torch_private.recording import can_be_recorded
from mball.torch_private.symbols import is_known_late
from mball.trace.cut import Cut, UnsupportedGraphError
from mball.trace.driver import Binder, Driver, StepHooks, compile_driver, indices_by_node
from mball.trace.grouping import Grouping
from mball.trace.pieces import Piece, is_made_again, settle, take_apart
from mball.trace.stage import PLAIN, Recordable, Stage

CutBy = Callable[[Grouping], Cut]


class StagedDriver(Protocol):
    """A `Driver` that says what its steps take and make to whoever stands around them."""

    def __call__(self, hooks: StepHooks, *args: Any, stage: Stage = PLAIN) -> Any:
        """Returns the graph's results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A graph whose steps are compiled.

    Attributes:
        flops: of each step, for the sizes that were traced.
        num_pieces: different pieces, so many were compiled.
        recordable: what of it can be recorded; None if sizes in it depend on data, or nobody asked.
    """

    driver: StagedDriver
    flops: tuple[int, ...]
    num_pieces: int
    recordable: Recordable | None


def compile_steps(
    name: str,
    module: torch.fx.GraphModule,
    inputs: Sequence[Any],
    weight_of: Sequence[int | None],
    is_buffer: Sequence[bool],
    choose_cut: Callable[[CutBy, Sequence[int]], Cut],
    options: Mapping[str, Any],
    *,
    records: bool,
) -> Compiled:
    """Compiles Dynamo's graph `module`, which stays as it is.

    Args:
        name: of the graph, for messages.
        inputs: what Dynamo hands a backend.
        weight_of: for each of them the index of the managed weight it is, or None.
        is_buffer: for each of them whether it is the module's own, always in one place.
        choose_cut: is given a function that cuts the graph of basic operators by a grouping, and for each of that
            graph's placeholders its position among `inputs`; returns the cut to compile.
        options: Inductor's own.
        records: whether to look for what can be recorded.

    Raises:
        UnsupportedGraphError: the graph cannot be cut after AOTAutograd.
        InductorError: a piece cannot be compiled.
    """
    relay = _Relay()
    made: list[Compiled] = []

    def drive(hooks: StepHooks, *args: Any, stage: Stage = PLAIN) -> Any:
        relay.hooks, relay.stage = hooks, stage
        return call(*args)

    def compile_graph(graph: torch.fx.GraphModule, settings: Mapping[str, Any]) -> Callable[[list[Any]], Any]:
        arguments = _arguments(name, graph)
        weights = [weight_of[argument] for argument in arguments]
        settle(graph.graph)
        cut = choose_cut(lambda grouping: Cut(name, graph, weights, grouping), arguments)
        pieces = take_apart(cut)
        buffers = [is_buffer[argument] for argument in arguments]
        recordable = (
            _recordable(cut, pieces, buffers) if records else None
        )  # before Inductor makes other graphs of the pieces
        compiled = _compile_pieces(pieces, cut, settings)
        driver = _build_driver(cut, pieces, compiled)
        made.append(
            Compiled(
                driver=drive,
                flops=tuple(sum(map(count_node_flops, step.nodes)) for step in cut.steps),
                num_pieces=len({piece.key for piece in pieces}),
                recordable=recordable,
            )
        )

        def run(values: list[Any]) -> Any:
            stage = relay.stage
            return stage.results(driver(relay.hooks, stage, *stage.arguments(values)))

        return run

    call = compile_through_inductor(module, inputs, compile_graph, options)
    if len(made) != 1:
        raise UnsupportedGraphError(f"{name}: AOTAutograd made {len(made)} graphs of it instead of one")
    (found,) = made

    return found


class _Relay:
    """Carries what belongs to a run past AOTAutograd, which knows the graph's own arguments only."""

    hooks: StepHooks
    stage: Stage


def _arguments(name: str, graph: torch.fx.GraphModule) -> tuple[int, ...]:
    found = []
    for node in graph.graph.find_nodes(op="placeholder"):
        argument = argument_of(node)
        if argument is None:
            raise UnsupportedGraphError(f"{name}: argument {node.name} of the graph is none of the model's")
        found.append(argument)
    return tuple(found)


def _recordable(cut: Cut, pieces: Sequence[Piece], is_buffer: Sequence[bool]) -> Recordable | None:
    nodes = [node for node in cut.module.graph.nodes if node.op != "output"]
    if any(is_known_late(example_value(node)) for node in nodes):
        return None
    if not all(isinstance(example_value(node), torch.Tensor) for piece in pieces for node in piece.outputs):
        return None
    written = {node.args[0] for node in nodes if writes_argument(node)}
    copied, in_place = [], []
    for position, (node, is_fixed) in enumerate(zip(cut.placeholders, is_buffer, strict=True)):
        value = example_value(node)
        if node in cut.weights:
            continue
        if is_fixed or node in written or not isinstance(value, torch.Tensor):
            in_place.append(position)
        elif value.device.type != "cpu":  # what is the host's only steps read that are not recorded
            copied.append(position)
    steps = tuple(can_be_recorded(piece.module) for piece in pieces)
    return Recordable(copied=tuple(copied), in_place=tuple(in_place), steps=steps)


def _compile_pieces(pieces: Sequence[Piece], cut: Cut, settings: Mapping[str, Any]) -> list[Callable[..., Any]]:
    known: dict[Any, Callable[..., Any]] = {}
    for piece, step in zip(pieces, cut.steps, strict=True):
        if piece.key not in known:
            known[piece.key] = compile_piece(piece.module, len(step.reads), settings)
    return [known[piece.key] for piece in pieces]


def _build_driver(cut: Cut, pieces: Sequence[Piece], compiled: Sequence[Callable[..., Any]]) -> Driver:
    """Returns a function of `StepHooks`, a `Stage` and the arguments of the cut graph."""
    flat = torch.fx.Graph()
    root = SimpleNamespace()
    hooks, stage = flat.placeholder("mball_hooks"), flat.placeholder("mball_stage")
    env: dict[torch.fx.Node, torch.fx.Node] = {node: flat.node_copy(node) for node in cut.placeholders}
    for number, (piece, step) in enumerate(zip(pieces, cut.steps, strict=True)):
        setattr(root, f"piece{number}", compiled[number])
        handed = flat.call_method("enter", (hooks, number))
        for place, indices in indices_by_node(step, {weight: p for p, weight in enumerate(step.reads)}).values():
            if indices in env:  # else the piece itself makes them
                flat.call_method("expect_rows", (hooks, number, place, env[indices]))
        function = flat.get_attr(f"piece{number}")
        results = flat.call_method("compute", (stage, number, function, handed, [env[node] for node in piece.inputs]))
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
