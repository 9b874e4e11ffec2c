"""Symbolic sizes: their expressions, what is known of them, and the values that they had while tracing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def symbol_of(value: Any) -> Any:
    """Returns the sympy expression of a symbolic int, or the int itself."""
    return value.node.expr if isinstance(value, torch.SymInt) else value


def unified(value: Any) -> Any:
    """Returns a symbolic int under the name that sizes have which turned out to be equal; other values as they are.

    Shapes are written in these names, and Inductor looks for them among the arguments.
    """
    if not isinstance(value, torch.SymInt):
        return value
    return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)


def is_size(value: Any) -> bool:
    """Returns whether this fake value is a number, symbolic or not."""
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def hint_of(value: Any) -> int:
    """Returns the value that a symbolic int had while tracing, 0 if that depended on data; or the int itself."""
    if isinstance(value, torch.SymInt):
        return int(value.node.hint) if value.node.hint is not None else 0
    return int(value)


def symbols_of(value: Any) -> dict[Any, Any]:
    """Returns the symbols that this fake value is made of, in order, each with the ShapeEnv that knows it."""
    found: dict[Any, Any] = {}
    for size in _sizes_of(value):
        if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            for symbol in sorted(size.node.expr.free_symbols, key=str):
                found[symbol] = size.node.shape_env
    return found


def is_known_late(value: Any) -> bool:
    """Returns whether this fake value, or a size of it, depends on data, so that nobody knows it before it is there."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return any(free_unbacked_symbols(size) for size in _sizes_of(value) if isinstance(size, torch.SymInt))


def known_of(symbols: Mapping[Any, Any], names: Mapping[Any, Any]) -> Hashable:
    """Returns what a compiler may take for granted of symbols, in order, under these names: ranges and relations.

    Args:
        symbols: as `symbols_of` returns them.
        names: for each of them the one to use.
    """
    ranges = tuple(str(shape_env.var_to_range.get(symbol)) for symbol, shape_env in symbols.items())
    relations = {
        str(relation.xreplace(names))
        for shape_env in {id(shape_env): shape_env for shape_env in symbols.values()}.values()
        for relation in shape_env.get_axioms()
        if relation.free_symbols and relation.free_symbols <= names.keys()
    }
    return ranges, tuple(sorted(relations))


def numbered_symbol(number: int) -> Any:
    """Returns a symbol that stands for the same place in every graph."""
    import sympy

    return sympy.Symbol(f"size{number}", integer=True)


def kind_of(value: Any, names: Mapping[Any, Any]) -> Hashable:
    """Returns what code that is compiled for this fake value depends on, with its symbols under these names."""

    def named(size: Any) -> str:
        return str(size.node.expr.xreplace(names) if isinstance(size, torch.SymInt) else size)

    sizes = tuple(named(size) for size in _sizes_of(value))
    if not isinstance(value, torch.Tensor):
        return sizes
    return value.dtype, value.device, value.is_inference(), sizes


def _sizes_of(value: Any) -> list[Any]:
    found: list[Any] = []
    for leaf in tree_leaves(value):
        found += (*leaf.shape, *leaf.stride(), leaf.storage_offset()) if isinstance(leaf, torch.Tensor) else (leaf,)
    return found
