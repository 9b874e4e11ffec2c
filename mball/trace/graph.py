"""What mball knows of a captured graph: which weights each step reads, what lives in between, what it costs.

None of it refers to the graph's nodes, which are large: once the driver is built they can go.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mball.lookups import gathered_bytes
from mball.schema import Gather, LiveRange, Step, Tensor
from mball.torch_private.dispatch import is_any_autocast_on
from mball.torch_private.nodes import begins_autocast, example_value, is_elementwise, is_reduction
from mball.torch_private.symbols import hint_of, symbol_of
from mball.trace.cut import Cut, StepNodes, storage_of, tensors_of
from mball.trace.workspace import assumed_workspace_bytes
from mball.units import MIB

# A step that never ran is assumed to be bound by reading its weights from memory.
ASSUMED_MEMORY_BYTES_PER_S = 8e9
# Less than this is noise: a heap that grows by pages, a library that keeps what it allocated first.
SMALLEST_WORKSPACE_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A step looks up rows of a weight, and reads nothing else of it.

    Attributes:
        num_rows: how many, equal ones counted each: an int or a sympy expression.
    """

    weight: int
    num_rows: Any
    row_bytes: int


@dataclass(slots=True, kw_only=True)
class StepFacts:
    """One finest step: what it reads, and what running it costs.

    Attributes:
        reads: the weights, in the order in which the step is handed them.
        rows: of those, what only rows are read of.
        time_s: None before it was timed.
        workspace_bytes: what its operators allocate besides their results: assumed, then measured where that is more.
        rise_bytes: by how much memory rose while it ran, None before it was measured.
    """

    name: str
    reads: tuple[int, ...]
    rows: tuple[Rows, ...] = ()
    flops: int = 0
    time_s: float | None = None
    workspace_bytes: int = 0
    rise_bytes: int | None = None

    def read_whole(self) -> tuple[int, ...]:
        """Returns the weights of which more than rows is read."""
        by_rows = {rows.weight for rows in self.rows}
        return tuple(weight for weight in self.reads if weight not in by_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """Storage of one or more nodes: where it is born and last used, as (step, node position).

    An input, which the caller holds, is born before position 0.
    """

    name: str
    size_bytes: Any  # int or sympy expression
    first: tuple[int, int]
    last: tuple[int, int]

    @property
    def is_input(self) -> bool:
        return self.first[1] < 0


class CapturedGraph:
    """The facts of one graph.

    Args:
        cut: the graph's nodes.
        is_buffer: for each placeholder whether it is a buffer, which is accounted elsewhere.
        compiled_from: the graph that is called, where its steps are compiled: `cut` was made of it by AOTAutograd.

    Attributes:
        steps: the finest steps, in order.
        has_higher_order: see Cut.
    """

    def __init__(self, cut: Cut, is_buffer: Sequence[bool], compiled_from: Cut | None = None) -> None:
        called_as = compiled_from or cut
        self.name = cut.name
        self.has_higher_order = cut.has_higher_order
        self.steps = [
            StepFacts(
                name=f"{cut.name}/{number} {step.nodes[0].name if step.nodes else 'empty'}",
                reads=tuple(step.reads),
                rows=tuple(_find_rows(step)),
                workspace_bytes=max((assumed_workspace_bytes(node) for node in step.nodes), default=0),
            )
            for number, step in enumerate(cut.steps)
        ]
        buffers = {node for node, flag in zip(cut.placeholders, is_buffer, strict=True) if flag}
        self._lives = _find_lives(cut, buffers, fused=_find_fused(cut) if compiled_from else set())
        self._symbols = _find_symbols(called_as.placeholders)
        # A dtype cast of a weight under autocast is a temporary that the graph does not show.
        self._autocast = is_any_autocast_on() or any(map(begins_autocast, cut.module.graph.nodes))

    def renumbered(self, name: str, weights: Mapping[int, int]) -> CapturedGraph:
        """Returns the same graph under another name, with other weights in the place of its own."""
        other = copy.copy(self)
        other.name = name
        other.steps = [
            replace(
                step,
                name=name + step.name.removeprefix(self.name),
                reads=tuple(weights[weight] for weight in step.reads),
                rows=tuple(replace(rows, weight=weights[rows.weight]) for rows in step.rows),
            )
            for step in self.steps
        ]
        return other

    def traced_values(self) -> dict[Any, int]:
        """Returns the value that each symbolic size had while tracing."""
        return {symbol: hint for symbol, (_, _, hint) in self._symbols.items()}

    def symbol_values(self, args: Sequence[Any]) -> dict[Any, int]:
        """Returns the value of each symbolic size in one call."""
        return {
            symbol: int(args[index] if dimension is None else args[index].shape[dimension])
            for symbol, (index, dimension, _) in self._symbols.items()
        }

    def schema_steps(
        self, weight_bytes: Sequence[int], values: Mapping[Any, int] | None = None, *, workspace: bool = True
    ) -> tuple[list[Step], list[Tensor]]:
        """Returns the graph's part of a trace, with its steps numbered from 0.

        Args:
            weight_bytes: size of every managed weight, in bytes.
            values: sizes to assume for the symbols of a dynamic graph; the traced ones by default.
            workspace: count what operators allocate besides their results.
        """
        activations, scratch = self._memory(values or {})
        assumed = self.traced_values() | dict(values or {})
        steps = []
        for step, scratch_bytes in zip(self.steps, scratch, strict=True):
            gathers = _gathers(step, weight_bytes, assumed)
            reads = tuple(weight for weight in step.reads if weight not in gathers)
            read_bytes = sum(weight_bytes[weight] for weight in reads) + sum(gathers.values())
            cast_bytes = max((weight_bytes[weight] for weight in reads), default=0) // 2 if self._autocast else 0
            steps.append(
                Step(
                    name=step.name,
                    graph=self.name,
                    reads=reads,
                    gathers=tuple(Gather(tensor=weight, size_bytes=size) for weight, size in gathers.items()),
                    scratch_bytes=scratch_bytes + max(cast_bytes, step.workspace_bytes if workspace else 0),
                    flops=step.flops,
                    time_s=step.time_s if step.time_s is not None else read_bytes / ASSUMED_MEMORY_BYTES_PER_S,
                )
            )
        return steps, activations

    def learn_workspace(self, values: Mapping[Any, int]) -> bool:
        """Takes over what a run with these sizes measured; returns whether a step took more than was known."""
        activations, scratch = self._memory(values)
        inputs = {f"{self.name}/{tensor.name}" for tensor in self._lives if tensor.is_input}
        born = [0] * len(self.steps)
        for activation in activations:
            # Inputs, such as caches, were there before the first step.
            if activation.live is not None and activation.name not in inputs:
                born[activation.live.first] += activation.size_bytes
        more = False
        for number, step in enumerate(self.steps):
            workspace_bytes = (step.rise_bytes or 0) - born[number] - scratch[number]
            if workspace_bytes > max(SMALLEST_WORKSPACE_BYTES, step.workspace_bytes):
                step.workspace_bytes = workspace_bytes
                more = True
        return more

    def _memory(self, values: Mapping[Any, int]) -> tuple[list[Tensor], list[int]]:
        """Returns the tensors that live beyond a step, and for each step the peak of those that do not."""
        assumed = self.traced_values() | dict(values)
        sizes: dict[Any, int] = {}
        num_steps = len(self.steps)
        activations: list[Tensor] = []
        inside: list[list[tuple[int, int, int]]] = [[] for _ in self.steps]
        for tensor in self._lives:
            if tensor.size_bytes not in sizes:
                sizes[tensor.size_bytes] = _evaluate(tensor.size_bytes, assumed)
            size_bytes = sizes[tensor.size_bytes]
            if size_bytes == 0:
                continue
            first, last = tensor.first[0], min(tensor.last[0], num_steps - 1)
            if tensor.first[0] == tensor.last[0] and not tensor.is_input:
                inside[first].append((tensor.first[1], tensor.last[1], size_bytes))
            else:
                live = LiveRange(first=first, end=last + 1)
                activations.append(Tensor.activation(f"{self.name}/{tensor.name}", size_bytes=size_bytes, live=live))
        return activations, [_peak(intervals) for intervals in inside]


def _find_rows(step: StepNodes) -> Iterator[Rows]:
    for weight, lookups in step.gathers().items():
        table = example_value(next(iter(lookups.values())).table)
        named = [example_value(lookup.indices).numel() for lookup in lookups.values()]
        row_bytes = math.prod(table.shape[1:]) * table.element_size()
        yield Rows(weight=weight, num_rows=sum(map(symbol_of, named)), row_bytes=row_bytes)


def _gathers(step: StepFacts, weight_bytes: Sequence[int], values: Mapping[Any, int]) -> dict[int, int]:
    """Returns the weights of which the step reads rows only, and so few that it pays, each with the bytes of those."""
    found = {}
    for rows in step.rows:
        num_rows = rows.num_rows if isinstance(rows.num_rows, int) else rows.num_rows.xreplace(dict(values))
        if getattr(num_rows, "free_symbols", None):
            continue  # it depends on data: it may be many
        size_bytes = gathered_bytes(int(num_rows), rows.row_bytes, weight_bytes[rows.weight])
        if size_bytes is not None:
            found[rows.weight] = size_bytes
    return found


def _find_fused(cut: Cut) -> set[int]:
    """Returns the storages that exist in registers only once steps are compiled.

    Those are results of elementwise operators that only such operators and reductions of the same step read.
    """
    step_of = {node: number for number, step in enumerate(cut.steps) for node in step.nodes}
    made_in: dict[int, int | None] = {}
    kept: set[int] = set()
    for node in cut.module.graph.nodes:
        here = step_of.get(node)
        results = {storage_of(tensor) for tensor in tensors_of(node)}
        for key in results - made_in.keys():
            made_in[key] = here
            if here is None or not is_elementwise(node):
                kept.add(key)
        read = {storage_of(tensor) for argument in node.all_input_nodes for tensor in tensors_of(argument)}
        reads_fused = is_elementwise(node) or is_reduction(node)
        # A view of what it reads is no reader of its own.
        kept |= {key for key in read - results if made_in.get(key) != here or not reads_fused}
        if node.op == "output":
            kept |= read
    return made_in.keys() - kept


def _find_lives(cut: Cut, buffers: set[torch.fx.Node], fused: set[int]) -> list[_Tensor]:
    end = len(cut.steps)
    step_of = {node: number for number, step in enumerate(cut.steps) for node in step.nodes}
    size: dict[int, Any] = {}
    name: dict[int, str] = {}
    first: dict[int, tuple[int, int]] = {}
    last: dict[int, tuple[int, int]] = {}
    buffer_keys = {storage_of(tensor) for node in buffers for tensor in tensors_of(node)}
    for position, node in enumerate(cut.module.graph.nodes):
        # Inputs are held by the caller, results by whoever gets them: both live to the end.
        step = 0 if node.op == "placeholder" else step_of.get(node, end - 1)
        here = (step, position)
        for tensor in tensors_of(node):
            key = storage_of(tensor)
            if key in buffer_keys or key in fused or cut.owns(tensor):
                continue
            if key not in first:
                first[key] = (0, -1) if node.op == "placeholder" else here
                name[key] = node.name
                size[key] = symbol_of(tensor.untyped_storage().nbytes())
            last[key] = (end, position) if node.op == "placeholder" else max(last.get(key, here), here)
        for argument in node.all_input_nodes:
            for tensor in tensors_of(argument):
                key = storage_of(tensor)
                if key in last:
                    last[key] = max(last[key], (end, position) if node.op == "output" else here)
    return [_Tensor(name=name[key], size_bytes=size[key], first=first[key], last=last[key]) for key in first]


def _find_symbols(placeholders: Sequence[torch.fx.Node]) -> dict[Any, tuple[int, int | None, int]]:
    """Returns for each symbol the argument that tells it, the dimension (None: the argument itself), a hint."""
    found: dict[Any, tuple[int, int | None, int]] = {}
    for index, node in enumerate(placeholders):
        value = example_value(node)
        sizes: list[tuple[int | None, Any]] = [(None, value)]
        if isinstance(value, torch.Tensor):
            sizes = list(enumerate(value.shape))
        for dimension, size in sizes:
            if isinstance(size, torch.SymInt) and (symbol := symbol_of(size)).is_Symbol:
                found.setdefault(symbol, (index, dimension, hint_of(size)))
    return found


def _evaluate(size: Any, values: Mapping[Any, int]) -> int:
    """Returns a size in bytes; a symbol that no argument tells (a data-dependent size) counts as zero."""
    if isinstance(size, int):
        return size
    known = size.xreplace(dict(values))
    if isinstance(known, int):  # torch's own functions of sizes evaluate to numbers of Python
        return known
    return int(known.xreplace(dict.fromkeys(known.free_symbols, 0)))


def _peak(intervals: Sequence[tuple[int, int, int]]) -> int:
    """Returns the largest sum of sizes over closed position intervals (first, last, size)."""
    events = [(first, 0, size) for first, _, size in intervals] + [(last, 1, size) for _, last, size in intervals]
    live = peak = 0
    for _, dies, size in sorted(events):
        live += -size if dies else size
        peak = max(peak, live)
    return peak
