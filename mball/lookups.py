"""Which calls look up rows of a table and read nothing else of it, and what that reads.

Known are those that say so by what they are; every other read of a weight is one of the whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mball.units import KIB, PAGE_BYTES

# Below this a table is brought whole: that costs little more than its rows, and each page that is read at home is
# waited for.
SMALLEST_TABLE_BYTES = 64 * KIB
# And where so much of it is asked for: large reads are faster.
LARGEST_SHARE = 1 / 4


class Lookup(NamedTuple):
    """A call that reads some rows of `table`, those that `indices` names along its first dimension."""

    table: Any
    indices: Any


def lookup_of(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Lookup | None:
    """Returns the lookup that a call is, None if it is not known to be one.

    Args:
        target: what is called: a function of torch, an operator, or the name of a method of the first argument.
        args, kwargs: its arguments, as tensors or as nodes of a graph. Whether they have the right kinds is for the
            caller to see: `indices` must be a tensor of integers, and `table` one with all its rows one after another.
    """
    find = _LOOKUPS.get(target)
    if find is None:
        return None
    try:
        return find(*args, **kwargs)
    except TypeError:  # called in a way that is not known
        return None


def gathered_bytes(num_rows: int, row_bytes: int, table_bytes: int) -> int | None:
    """Returns about how much looking up rows reads; None where the table is better read as a whole."""
    # Storage is read by pages: a row that begins anywhere touches about one more than it fills.
    size_bytes = num_rows * (row_bytes + PAGE_BYTES)
    if table_bytes < SMALLEST_TABLE_BYTES or size_bytes > LARGEST_SHARE * table_bytes:
        return None
    return size_bytes


def is_index(tensor: torch.Tensor) -> bool:
    """Returns whether the tensor's elements are numbers of rows (and no mask, which may name all of them)."""
    return tensor.dtype in (torch.int32, torch.int64)


def is_table(tensor: torch.Tensor) -> bool:
    """Returns whether the rows of the tensor, along its first dimension, lie one after another."""
    return tensor.dim() > 0 and tensor.is_contiguous()


# With `max_norm` these write the rows they look up, so the weight is read and written.


def _embedding(input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any) -> Any:
    return Lookup(weight, input) if max_norm is None else None


def _embedding_bag(input: Any, weight: Any, offsets: Any = None, max_norm: Any = None, *_: Any, **__: Any) -> Any:
    return Lookup(weight, input) if max_norm is None else None


def _table_first(weight: Any, indices: Any, *_: Any, **__: Any) -> Any:
    return Lookup(weight, indices)


def _select(input: Any, dim: Any, index: Any) -> Any:
    return Lookup(input, index) if dim == 0 else None


def _index(input: Any, indices: Any) -> Any:
    return Lookup(input, indices[0]) if isinstance(indices, (list, tuple)) and len(indices) == 1 else None


def _get_item(input: Any, index: Any) -> Any:
    return Lookup(input, index) if isinstance(index, (torch.Tensor, torch.fx.Node)) else None


_aten = torch.ops.aten
_LOOKUPS: dict[Any, Callable[..., Lookup | None]] = {
    torch.nn.functional.embedding: _embedding,
    torch.nn.functional.embedding_bag: _embedding_bag,
    torch.embedding: _table_first,
    torch.index_select: _select,
    operator.getitem: _get_item,
    "index_select": _select,
    "__getitem__": _get_item,
    _aten.embedding.default: _table_first,
    _aten._embedding_bag.default: _table_first,
    _aten._embedding_bag_forward_only.default: _table_first,
    _aten.index_select.default: _select,
    _aten.index.Tensor: _index,
}
