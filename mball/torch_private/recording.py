"""Which graphs of basic operators a device can record and replay: as torch says it of CUDA graphs, and a bit more."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from mball.torch_private.nodes import example_value

_VARIES = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def can_be_recorded(module: torch.fx.GraphModule) -> bool:
    """Returns whether a replay computes what the graph would, given the same memory.

    It does not where random numbers are drawn, where the host has to know a number or takes part, or where memory is
    as large as the data say; nor for operators on functions, whose insides nobody looks at here.
    """
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    if get_first_incompatible_cudagraph_node(module) is not None:
        return False
    nodes = [node for node in module.graph.nodes if node.op != "output"]
    places = {value.device for node in nodes for value in _tensors(example_value(node))}
    return len(places) == 1 and "cpu" not in {place.type for place in places} and not any(map(_varies, nodes))


def _varies(node: torch.fx.Node) -> bool:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    if node.op == "placeholder":
        return False
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        returned: Any = tree_leaves(example_value(node))
        return bool(_VARIES.intersection(node.target.tags)) or any(isinstance(each, torch.SymInt) for each in returned)
    return False


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
