"""Reads a graph captured by Dynamo: which weights each stretch reads, and what lives in between.

[Note: steps of a graph]
The nodes are cut wherever a node reads a weight that the current stretch does not read yet: that is the
finest step there is, and what a Trace records. A plan merges neighbouring steps. A node whose result is a
view of a weight reads nothing; it is run again in every step that uses the view, because the
weight may lie elsewhere by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from mball import torch_private
from mball.schema import Activation, LiveRange, Step

# A step that never ran is assumed to be bound by reading its weights from memory.
ASSUMED_MEMORY_BYTES_PER_S = 8e9


class UnsupportedGraphError(Exception):
    """The graph does something with a weight that steps cannot express; it must run as it is."""


@dataclass(slots=True, kw_only=True)
class StepNodes:
    """One finest step: its nodes in order, the weights they read, and what running it cost."""

    nodes: list[torch.fx.Node] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    flops: int = 0
    time_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """Storage of one or more nodes: where it is born and last used, as (step, node position)."""

    name: str
    size_bytes: Any  # int or sympy expression
    first: tuple[int, int]
    last: tuple[int, int]


class CapturedGraph:
    """A graph as Dynamo captured it, cut into finest steps.

    Args:
        name: unique within the wrapped model.
        module: Dynamo's graph; weights are placeholders.
        weight_of: for each placeholder the index of the managed weight it stands for, or None.
        is_buffer: for each placeholder whether it is a buffer, which is accounted elsewhere.

    Raises:
        UnsupportedGraphError: the graph writes to a weight, or mixes a weight's memory into a result.
    """

    def __init__(
        self,
        name: str,
        module: torch.fx.GraphModule,
        weight_of: Sequence[int | None],
        is_buffer: Sequence[bool],
    ) -> None:
        self.name = name
        self.module = module
        self.placeholders = module.graph.find_nodes(op="placeholder")
        self.weights: dict[torch.fx.Node, int] = {
            node: weight for node, weight in zip(self.placeholders, weight_of, strict=True) if weight is not None
        }
        self._owner: dict[int, int] = {}
        for node, weight in self.weights.items():
            for tensor in _tensors(node):
                if tensor._version > 0:
                    raise UnsupportedGraphError(f"{name} writes to weight {node.name}")
                self._owner[torch_private.storage_key(tensor)] = weight
        self.views: set[torch.fx.Node] = set()
        self.steps = self._cut()
        self.step_of = {node: index for index, step in enumerate(self.steps) for node in step.nodes}
        buffers = {node for node, flag in zip(self.placeholders, is_buffer, strict=True) if flag}
        self._lives = self._find_lives(buffers)
        self._symbols = self._find_symbols()
        # A dtype cast of a weight under autocast is a temporary that the graph does not show.
        self._autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")

    def weights_read(self, node: torch.fx.Node) -> list[int]:
        """Returns the weights whose bytes `node` reads, in argument order."""
        found: dict[int, None] = {}
        for argument in node.all_input_nodes:
            for tensor in _tensors(argument):
                weight = self._owner.get(torch_private.storage_key(tensor))
                if weight is not None:
                    found[weight] = None
        return list(found)

    def _cut(self) -> list[StepNodes]:
        steps = [StepNodes()]
        for node in self.module.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            reads = self.weights_read(node)
            if reads and self._is_view(node):
                self.views.add(node)
                continue
            current = steps[-1]
            if current.reads and any(weight not in current.reads for weight in reads):
                current = StepNodes()
                steps.append(current)
            current.nodes.append(node)
            current.reads += [weight for weight in reads if weight not in current.reads]
        return steps

    def _is_view(self, node: torch.fx.Node) -> bool:
        owners = [self._owner.get(torch_private.storage_key(tensor)) for tensor in _tensors(node)]
        if all(owner is None for owner in owners):
            return False
        if any(owner is None for owner in owners):
            raise UnsupportedGraphError(f"{self.name}: {node.name} returns a weight's memory beside its own")
        return True

    def _find_lives(self, buffers: set[torch.fx.Node]) -> list[_Tensor]:
        end = len(self.steps)
        size: dict[int, Any] = {}
        name: dict[int, str] = {}
        first: dict[int, tuple[int, int]] = {}
        last: dict[int, tuple[int, int]] = {}
        excluded = set(self._owner)
        for node in buffers:
            excluded.update(torch_private.storage_key(tensor) for tensor in _tensors(node))
        for position, node in enumerate(self.module.graph.nodes):
            # Inputs are held by the caller, results by whoever gets them: both live to the end.
            step = 0 if node.op == "placeholder" else self.step_of.get(node, end - 1)
            here = (step, position)
            for tensor in _tensors(node):
                key = torch_private.storage_key(tensor)
                if key in excluded:
                    continue
                if key not in first:
                    first[key] = (0, -1) if node.op == "placeholder" else here
                    name[key] = node.name
                    size[key] = torch_private.symbol_of(tensor.untyped_storage().nbytes())
                last[key] = (end, position) if node.op == "placeholder" else max(last.get(key, here), here)
            for argument in node.all_input_nodes:
                for tensor in _tensors(argument):
                    key = torch_private.storage_key(tensor)
                    if key in last:
                        last[key] = max(last[key], (end, position) if node.op == "output" else here)
        return [_Tensor(name=name[key], size_bytes=size[key], first=first[key], last=last[key]) for key in first]

    def _find_symbols(self) -> dict[Any, tuple[int, int | None, int]]:
        """Returns for each symbol the argument that tells it, the dimension (None: the argument itself), a hint."""
        found: dict[Any, tuple[int, int | None, int]] = {}
        for index, node in enumerate(self.placeholders):
            value = torch_private.example_value(node)
            sizes: list[tuple[int | None, Any]] = [(None, value)]
            if isinstance(value, torch.Tensor):
                sizes = list(enumerate(value.shape))
            for dimension, size in sizes:
                if isinstance(size, torch.SymInt) and (symbol := torch_private.symbol_of(size)).is_Symbol:
                    found.setdefault(symbol, (index, dimension, torch_private.hint_of(size)))
        return found

    def symbol_values(self, args: Sequence[Any]) -> dict[Any, int]:
        """Returns the value of each symbolic size in one call."""
        return {
            symbol: int(args[index] if dimension is None else args[index].shape[dimension])
            for symbol, (index, dimension, _) in self._symbols.items()
        }

    def schema_steps(
        self, weight_bytes: Sequence[int], values: Mapping[Any, int] | None = None
    ) -> tuple[list[Step], list[Activation]]:
        """Returns the graph's part of a trace, with its steps numbered from 0.

        Args:
            weight_bytes: size of every managed weight, in bytes.
            values: sizes to assume for the symbols of a dynamic graph; the traced ones by default.
        """
        assumed = {symbol: hint for symbol, (_, _, hint) in self._symbols.items()} | dict(values or {})
        sizes: dict[Any, int] = {}
        num_steps = len(self.steps)
        activations: list[Activation] = []
        inside: list[list[tuple[int, int, int]]] = [[] for _ in self.steps]
        for tensor in self._lives:
            if tensor.size_bytes not in sizes:
                sizes[tensor.size_bytes] = _evaluate(tensor.size_bytes, assumed)
            size_bytes = sizes[tensor.size_bytes]
            if size_bytes == 0:
                continue
            first, last = tensor.first[0], min(tensor.last[0], num_steps - 1)
            if tensor.first[0] == tensor.last[0] and tensor.first[1] >= 0:
                inside[first].append((tensor.first[1], tensor.last[1], size_bytes))
            else:
                live = LiveRange(first=first, end=last + 1)
                activations.append(Activation(name=f"{self.name}/{tensor.name}", size_bytes=size_bytes, live=live))
        steps = []
        for index, step in enumerate(self.steps):
            read_bytes = sum(weight_bytes[weight] for weight in step.reads)
            cast_bytes = max((weight_bytes[weight] for weight in step.reads), default=0) // 2 if self._autocast else 0
            time_s = step.time_s if step.time_s is not None else read_bytes / ASSUMED_MEMORY_BYTES_PER_S
            steps.append(
                Step(
                    name=f"{self.name}/{index} {step.nodes[0].name if step.nodes else 'empty'}",
                    graph=self.name,
                    reads=tuple(step.reads),
                    scratch_bytes=_peak(inside[index]) + cast_bytes,
                    flops=step.flops,
                    time_s=time_s,
                )
            )
        return steps, activations


def _tensors(node: torch.fx.Node) -> list[torch.Tensor]:
    value = torch_private.example_value(node)
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list, dict)):
        return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return []


def _evaluate(size: Any, values: Mapping[Any, int]) -> int:
    """Returns a size in bytes; a symbol that no argument tells (a data-dependent size) counts as zero."""
    if isinstance(size, int):
        return size
    known = size.xreplace(dict(values))
    return int(known.xreplace(dict.fromkeys(known.free_symbols, 0)))


def _peak(intervals: Sequence[tuple[int, int, int]]) -> int:
    """Returns the largest sum of sizes over closed position intervals (first, last, size)."""
    events = [(first, 0, size) for first, _, size in intervals] + [(last, 1, size) for _, last, size in intervals]
    live = peak = 0
    for _, dies, size in sorted(events):
        live += -size if dies else size
        peak = max(peak, live)
    return peak
