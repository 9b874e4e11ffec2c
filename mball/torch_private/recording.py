"""Which graphs of basic operators a device can record and replay: as torch says it of CUDA graphs, and a bit more."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_leaves

from mball.torch_private.nodes import example_value

_VARIES = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

# What copies from the host's memory, which may be another's by the time of a replay.
_BRINGS = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.prims.device_put.default}


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
    if len({place for place in places if place.type != "cpu"}) != 1 or any(map(_varies, nodes)):
        return False
    of_host = [node for node in nodes if any(value.device.type == "cpu" for value in _tensors(example_value(node)))]
    return all(map(_is_constant, of_host))


def _is_constant(node: torch.fx.Node) -> bool:
    """Returns whether the host's tensor is a number that kernels are given, the same each time."""
    return (
        node.op == "call_function"
        and not node.all_input_nodes
        and all(value.dim() == 0 for value in _tensors(example_value(node)))
        and not any(user.target in _BRINGS for user in node.users)
    )


def _varies(node: torch.fx.Node) -> bool:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if any(isinstance(each, torch.SymInt) for each in tree_leaves(example_value(node))):
        return True
    return bool(_VARIES.intersection(node.target.tags)) and not _drops_nothing(node)


def _drops_nothing(node: torch.fx.Node) -> bool:
    """Returns whether random numbers are only for what attention drops, and it drops nothing."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[position] if position < len(node.args) else argument.default_value
            return bool(node.kwargs.get("dropout_p", given) == 0)
    return False


def _tensors(value: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
