"""Takes the steps of a cut graph apart, so that each can be compiled by itself.

[Note: what crosses a cut] A piece takes the weights it reads, then tensors and sizes that come from outside, and
returns what later steps and the caller need. Views of weights and arithmetic on sizes never cross: every
piece that needs them makes its own. Names inside are counted, not inherited, so that equal layers become equal pieces.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.node import map_arg

from mball.torch_private.nodes import example_value, takes_part_of_tuple, writes_argument
from mball.torch_private.symbols import is_size, kind_of, known_of, numbered_symbol, symbol_of, symbols_of, unified
from mball.torch_private.tensors import storage_key
from mball.trace.cut import Cut, tensors_of

Node = torch.fx.Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One step as a graph of its own.

    Attributes:
        module: takes the weights of the step in the order of its `reads`, then `inputs`; returns a tuple.
        inputs: nodes of the cut graph.
        outputs: nodes of the cut graph that the module returns, in order.
        key: equal for pieces that compute the same on arguments of the same kind.
    """

    module: torch.fx.GraphModule
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    key: Hashable


def settle(graph: torch.fx.Graph) -> None:
    """Moves nodes of a graph to where a cut cannot part them from what they belong to; the results stay the same.

    A part of a tuple comes right after the tuple, which cannot cross a cut. A write to an argument, which AOTAutograd
    puts at the end of the graph, comes as early as it may: else its source would live until then, and could not be
    made in the argument's own memory.
    """
    readers = _readers_of_memory(graph)
    for node in list(graph.nodes):
        if takes_part_of_tuple(node):
            node.args[0].append(node)
        elif writes_argument(node):
            # Nodes compare by where they are now: a write that was moved is often a reader of what the next one writes.
            last = max(other for other in _what_precedes(node, readers) if other < node)
            if last.op != "placeholder":
                _after_its_parts(last).append(node)
    graph.lint()


def _readers_of_memory(graph: torch.fx.Graph) -> dict[int, list[Node]]:
    """Returns for each storage the nodes that read or write it, directly or through a view."""
    readers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.op != "output":
            tensors = [tensor for argument in node.all_input_nodes for tensor in tensors_of(argument)]
            for key in {storage_key(tensor) for tensor in tensors}:
                readers.setdefault(key, []).append(node)
    return readers


def _what_precedes(write: Node, readers: Mapping[int, Sequence[Node]]) -> Iterator[Node]:
    """Yields what must come before `write`: what it writes, and the users of the memory that it overwrites."""
    yield from write.all_input_nodes
    for tensor in tensors_of(write.all_input_nodes[0]):
        yield from readers.get(storage_key(tensor), ())


def _after_its_parts(node: Node) -> Node:
    """Returns the last of the nodes that `settle` keeps together with `node`."""
    while takes_part_of_tuple(node.next):
        node = node.next
    return node


def take_apart(cut: Cut) -> list[Piece]:
    """Returns a piece for each step of `cut`, whose graph is settled."""
    sizes = _sizes_by_symbol(cut.module.graph)
    step_of = {node: number for number, step in enumerate(cut.steps) for node in step.nodes}
    return [_Builder(cut, step_of, sizes, number).piece() for number in range(len(cut.steps))]


def is_made_again(node: Node) -> bool:
    """Returns whether `node` is made again wherever it is needed: constants, and arithmetic on sizes."""
    return node.op == "get_attr" or (
        node.op == "call_function"
        and not isinstance(node.target, torch._ops.OpOverload)
        and is_size(example_value(node))
        and all(is_size(example_value(argument)) for argument in node.all_input_nodes)
    )


def _sizes_by_symbol(graph: torch.fx.Graph) -> dict[Any, Node]:
    """Returns for each symbol the node that is its value: an argument, or a number that is taken from a tensor."""
    found: dict[Any, Node] = {}
    for node in graph.nodes:
        value = example_value(node)
        if isinstance(value, torch.SymInt) and not is_made_again(node):
            symbol = symbol_of(value)
            if symbol.is_Symbol:
                found.setdefault(symbol, node)
    return found


class _Builder:
    def __init__(self, cut: Cut, step_of: dict[Node, int], sizes: Mapping[Any, Node], number: int) -> None:
        self.cut, self.step_of, self.sizes, self.number = cut, step_of, sizes, number
        self.named = set(sizes.values())
        self.step = cut.steps[number]
        self.graph = torch.fx.Graph()
        self.env: dict[Node, Node] = {}
        self.kinds: list[Hashable] = []
        self.names: dict[Any, Any] = {}  # of the symbols, counted: each layer's cache has symbols of its own

    def piece(self) -> Piece:
        outputs = [node for node in self.step.nodes if not is_made_again(node) and self._is_needed_later(node)]
        inputs = self._inputs()
        placeholder_of = {weight: node for node, weight in self.cut.weights.items()}
        for weight in self.step.reads:
            self._placeholder(placeholder_of[weight])
        for weight, node in ((weight, node) for node, weight in self.cut.weights.items()):
            # Two arguments may stand for one weight.
            if weight in self.step.reads:
                self.env.setdefault(node, self.env[placeholder_of[weight]])
        for node in inputs:
            self._placeholder(node)
        for node in self.step.nodes:
            self._copy(node)
        self._node("output", "output", (tuple(self.env[node] for node in outputs),), {}, {})
        module = torch.fx.GraphModule(self.cut.module, self.graph)
        constants = tuple(id(getattr(self.cut.module, str(n.target))) for n in self.graph.nodes if n.op == "get_attr")
        return Piece(
            module=module,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            key=(module.code, tuple(self.kinds), constants),
        )

    def _is_needed_later(self, node: Node) -> bool:
        """Returns whether `node` is used outside this step, perhaps only by what is made again there, or in a shape."""
        return node in self.named or any(
            self.step_of.get(user) != self.number or (is_made_again(user) and self._is_needed_later(user))
            for user in node.users
        )

    def _inputs(self) -> list[Node]:
        """Returns what comes from outside, in the order of first use, and the sizes that shapes are made of."""
        inputs: dict[Node, None] = {}
        symbols: dict[Any, Any] = {}

        def visit(node: Node) -> None:
            value = example_value(node)
            symbols.update(symbols_of(value))
            if node in self.cut.weights or self.step_of.get(node) == self.number:
                return
            if node in self.cut.views or is_made_again(node):
                for argument in node.all_input_nodes:
                    visit(argument)
            else:
                inputs[node] = None

        for node in self.step.nodes:
            symbols.update(symbols_of(example_value(node)))
            for argument in node.all_input_nodes:
                visit(argument)
        for number, symbol in enumerate(symbols):
            self.names[symbol] = numbered_symbol(number)
            if symbol in self.sizes and self.step_of.get(self.sizes[symbol]) != self.number:
                inputs[self.sizes[symbol]] = None
        self.kinds.append(known_of(symbols, self.names))
        return list(inputs)

    def _placeholder(self, node: Node) -> None:
        meta = {"val": unified(example_value(node))}
        self.env[node] = self._node("placeholder", f"arg{len(self.env)}_1", (), {}, meta)
        self.kinds.append(kind_of(meta["val"], self.names))

    def _copy(self, node: Node) -> Node:
        if node not in self.env:
            args, kwargs = map_arg((node.args, node.kwargs), self._copy)
            self.env[node] = self._node(node.op, node.target, args, kwargs, dict(node.meta))
        return self.env[node]

    def _node(self, op: str, target: Any, args: Any, kwargs: Any, meta: dict[str, Any]) -> Node:
        name = target if op in ("placeholder", "output") else f"n{len(self.graph.nodes)}"
        made = self.graph.create_node(op, target, args, kwargs, name=name)
        made.meta = meta
        return made
