"""Cuts a captured graph, before or after AOTAutograd, wherever it begins to read other weights.

[Note: steps of a graph]
The nodes are cut wherever a node reads a weight that the current stretch does not read yet and may not join: that is
the finest step there is, and what a Trace records. A plan merges neighbouring steps. A node whose result is a
view of a weight reads nothing; it is run again in every step that uses the view, because the
weight may lie elsewhere by then.

A step that only looks up rows of a weight (an embedding) need not find it on the device. Which steps do is said here;
whether it pays depends on how many rows they look up, see `CapturedGraph.schema_steps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from mball.lookups import Lookup, is_index, is_table, lookup_of
from mball.torch_private.nodes import example_value
from mball.torch_private.tensors import storage_key
from mball.trace.grouping import Grouping


class UnsupportedGraphError(Exception):
    """The graph does something with a weight that steps cannot express; it must run as it is."""


@dataclass(slots=True)
class StepNodes:
    """One finest step: its nodes in order, and the weights they read.

    Attributes:
        lookups: for each weight the nodes that look up rows of it.
        whole: the weights that are read in another way too.
    """

    nodes: list[torch.fx.Node] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    lookups: dict[int, dict[torch.fx.Node, Lookup]] = field(default_factory=dict)
    whole: set[int] = field(default_factory=set)

    def gathers(self) -> dict[int, dict[torch.fx.Node, Lookup]]:
        """Returns `lookups` of the weights of which only rows are read."""
        return {weight: nodes for weight, nodes in self.lookups.items() if weight not in self.whole}

    def read_whole(self) -> tuple[int, ...]:
        """Returns the weights of which more than rows is read."""
        return tuple(weight for weight in self.reads if weight in self.whole)


class Cut:
    """The nodes of a captured graph, by finest step.

    Args:
        name: of the graph, for messages.
        module: the graph; weights are placeholders.
        weight_of: for each placeholder the index of the managed weight it stands for, or None.
        grouping: says which weights one step may read.

    Attributes:
        weights: the placeholders that stand for weights.
        views: nodes whose result is a view of a weight; they belong to no step.
        steps: all other nodes.
        has_higher_order: whether a node is an operator on functions, such as `torch.cond`.

    Raises:
        UnsupportedGraphError: the graph writes to a weight, mixes a weight's memory into a result, or has autograd
            record what reads one: it would keep the slot for the backward pass, and give the slot the gradient.
    """

    def __init__(
        self, name: str, module: torch.fx.GraphModule, weight_of: Sequence[int | None], grouping: Grouping
    ) -> None:
        self.name = name
        self._grouping = grouping
        self.module = module
        self.placeholders = module.graph.find_nodes(op="placeholder")
        self.has_higher_order = any(
            isinstance(node.target, torch._ops.HigherOrderOperator) for node in module.graph.nodes
        )
        self.weights: dict[torch.fx.Node, int] = {
            node: weight for node, weight in zip(self.placeholders, weight_of, strict=True) if weight is not None
        }
        self._owner: dict[int, int] = {}
        for node, weight in self.weights.items():
            for tensor in tensors_of(node):
                if tensor._version > 0:
                    raise UnsupportedGraphError(f"{name} writes to weight {node.name}")
                self._owner[storage_of(tensor)] = weight
        self.views: set[torch.fx.Node] = set()
        self.steps = [StepNodes()]
        for node in module.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self._place(node)

    def owns(self, tensor: torch.Tensor) -> bool:
        """Returns whether this fake tensor lies in the memory of a weight."""
        return storage_of(tensor) in self._owner

    def _place(self, node: torch.fx.Node) -> None:
        reads = self._weights_read(node)
        if reads and self._is_view(node):
            self.views.add(node)
            return
        if reads and any(tensor.requires_grad for tensor in tensors_of(node)):
            raise UnsupportedGraphError(f"{self.name}: autograd records {node.name}, which reads a weight")
        current = self.steps[-1]
        new = [weight for weight in reads if weight not in current.reads]
        if new and current.reads and not self._grouping.joins(new, current.reads):
            current = StepNodes()
            self.steps.append(current)
            new = reads
        current.nodes.append(node)
        current.reads += new
        lookup = self._lookup(node)
        for weight in reads:
            if lookup is not None and self.weights[lookup.table] == weight:
                current.lookups.setdefault(weight, {})[node] = lookup
            else:
                current.whole.add(weight)

    def _lookup(self, node: torch.fx.Node) -> Lookup | None:
        """Returns what `node` looks up if it reads rows of a weight, and nothing else of it."""
        lookup = lookup_of(node.target, node.args, node.kwargs)
        if lookup is None or not all(isinstance(each, torch.fx.Node) for each in lookup):
            return None
        if lookup.table not in self.weights:
            return None
        table, indices = (example_value(each) for each in lookup)
        if not isinstance(indices, torch.Tensor) or not is_index(indices) or not is_table(table):
            return None
        arguments = [each for each in tree_leaves((node.args, node.kwargs)) if isinstance(each, torch.fx.Node)]
        arguments.remove(lookup.table)
        weight = self.weights[lookup.table]
        is_all = not any(
            self._owner.get(storage_of(tensor)) == weight for argument in arguments for tensor in tensors_of(argument)
        )
        return lookup if is_all else None

    def _weights_read(self, node: torch.fx.Node) -> list[int]:
        """Returns the weights whose bytes `node` reads, in argument order."""
        found: dict[int, None] = {}
        for argument in node.all_input_nodes:
            for tensor in tensors_of(argument):
                weight = self._owner.get(storage_of(tensor))
                if weight is not None:
                    found[weight] = None
        return list(found)

    def _is_view(self, node: torch.fx.Node) -> bool:
        owned = [self.owns(tensor) for tensor in tensors_of(node)]
        if any(owned) and not all(owned):
            raise UnsupportedGraphError(f"{self.name}: {node.name} returns a weight's memory beside its own")
        return any(owned)


def storage_of(tensor: torch.Tensor) -> int:
    """Returns a number that all tensors over the same storage share.

    Raises:
        UnsupportedGraphError: the tensor has none of its own, such as one that `torch.vmap` batches.
    """
    try:
        return storage_key(tensor)
    except NotImplementedError as error:
        raise UnsupportedGraphError(f"the memory of a tensor in the graph is not known ({error})") from error


def tensors_of(node: torch.fx.Node) -> list[torch.Tensor]:
    """Returns the fake tensors that were recorded as the result of `node`."""
    value: Any = example_value(node)
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list, dict)):
        return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return []
