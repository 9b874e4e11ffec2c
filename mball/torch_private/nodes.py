"""The nodes of the graphs that Dynamo and AOTAutograd make."""

from __future__ import annotations

import operator
from typing import Any

import torch


def example_value(node: torch.fx.Node) -> Any:
    """Returns the fake value that Dynamo or AOTAutograd recorded for `node`, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def is_elementwise(node: torch.fx.Node) -> bool:
    """Returns whether Inductor computes the operator element by element, in the loop of whoever reads the result."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_reduction(node: torch.fx.Node) -> bool:
    """Returns whether the operator reduces; Inductor reads its argument in the loop that makes it."""
    reduction = getattr(torch.Tag, "reduction", None)
    return reduction is not None and reduction in getattr(node.target, "tags", ())


def takes_part_of_tuple(node: torch.fx.Node) -> bool:
    """Returns whether `node` takes one of the results of an operator that has several."""
    return node.target is operator.getitem and isinstance(node.args[0], torch.fx.Node)


def writes_argument(node: torch.fx.Node) -> bool:
    """Returns whether `node` is how AOTAutograd writes a result to an argument of the graph."""
    return node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder"  # type: ignore[union-attr]


def begins_autocast(node: torch.fx.Node) -> bool:
    """Returns whether `node` is where a region of the model's own under autocast begins."""
    return node.target is torch.amp.autocast_mode._enter_autocast


def argument_of(placeholder: torch.fx.Node) -> int | None:
    """Returns which argument of Dynamo's graph a placeholder of AOTAutograd's is, None if it is made of others."""
    from torch._functorch._aot_autograd.descriptors import PlainAOTInput

    described = placeholder.meta.get("desc")
    return described.idx if isinstance(described, PlainAOTInput) else None
