"""What operators write, what their results are aliases of, and how much they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from mball.torch_private.nodes import example_value
from mball.torch_private.symbols import hint_of


def writes_and_aliases(func: Any) -> tuple[frozenset[str | int], bool]:
    """Returns which arguments operator `func` writes (positions and names), and whether it returns an alias of one.

    The facts come from the operator's schema.
    """
    schema = func._schema
    writes: set[str | int] = set()
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            writes.add(argument.name)
            if not argument.kwarg_only:
                writes.add(position)
    return frozenset(writes), any(result.alias_info is not None for result in schema.returns)


def can_run_again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Returns whether a call of operator `func` that failed left everything as it was.

    It writes nothing that it was given, and draws no random numbers (or none, since its `dropout_p` is 0).
    """
    if not isinstance(func, torch._ops.OpOverload) or writes_and_aliases(func)[0]:
        return False
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return True
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(given == 0)
    return False


def count_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Returns the floating point operations of one operator call, 0 when no formula is known."""
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(func._overloadpacket) if hasattr(func, "_overloadpacket") else None
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0


def count_node_flops(node: torch.fx.Node) -> int:
    """Returns the floating point operations of a node of a graph of basic operators, at the sizes that were traced."""

    def sized(value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            value = example_value(value)
        if isinstance(value, torch.Tensor):
            return torch.empty([hint_of(size) for size in value.shape], dtype=value.dtype, device="meta")
        return hint_of(value) if isinstance(value, torch.SymInt) else value

    from torch.utils.flop_counter import flop_registry

    if getattr(node.target, "_overloadpacket", None) not in flop_registry:
        return 0
    args, kwargs, result = tree_map(sized, (node.args, node.kwargs, example_value(node)))
    return count_flops(node.target, args, kwargs, result)
