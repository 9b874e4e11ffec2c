"""What is known to look up rows of a table, and what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mball.lookups import LARGEST_SHARE, SMALLEST_TABLE_BYTES, gathered_bytes, is_index, is_table, lookup_of
from mball.units import MIB

TABLE = torch.randn(50, 4)
ROWS = torch.tensor([[3, 7, 3]])
functional, aten = torch.nn.functional, torch.ops.aten

Call = tuple[object, tuple[object, ...], dict[str, object]]
LOOKUPS: dict[str, Call] = {
    "embedding": (functional.embedding, (ROWS, TABLE), {}),
    "embedding by names": (functional.embedding, (), {"input": ROWS, "weight": TABLE, "padding_idx": 3}),
    "embedding bag": (functional.embedding_bag, (ROWS, TABLE), {"mode": "sum"}),
    "index_select": (torch.index_select, (TABLE, 0, ROWS[0]), {}),
    "index_select as a method": ("index_select", (TABLE, 0), {"index": ROWS[0]}),
    "the operator embedding": (aten.embedding.default, (TABLE, ROWS, 3), {}),
    "the operator index": (aten.index.Tensor, (TABLE, [ROWS]), {}),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_lookup_reads_the_rows_that_it_says_and_no_others(name: str) -> None:
    target, args, kwargs = LOOKUPS[name]
    found = lookup_of(target, args, kwargs)
    assert found is not None
    assert found.table is TABLE
    call: Callable[..., torch.Tensor] = getattr(torch.Tensor, target) if isinstance(target, str) else target  # type: ignore[assignment]
    expected = call(*args, **kwargs)
    others = TABLE.clone()
    mask = torch.ones(50, dtype=torch.bool)
    mask[found.indices.flatten()] = False
    others[mask] = torch.nan
    swapped = [others if value is TABLE else value for value in args]
    result = call(*swapped, **{key: others if value is TABLE else value for key, value in kwargs.items()})
    assert torch.equal(result, expected)


def test_what_may_read_or_write_more_is_no_lookup() -> None:
    assert lookup_of(functional.embedding, (ROWS, TABLE, None, 1.0), {}) is None, "it writes the rows that are too long"
    assert lookup_of(functional.embedding_bag, (ROWS, TABLE), {"max_norm": 2.0}) is None
    assert lookup_of(torch.index_select, (TABLE, 1, ROWS[0]), {}) is None
    assert lookup_of(aten.index.Tensor, (TABLE, [None, ROWS]), {}) is None
    assert lookup_of(aten.index.Tensor, (TABLE, [ROWS, ROWS]), {}) is None
    assert lookup_of(functional.linear, (ROWS, TABLE), {}) is None
    assert lookup_of(functional.embedding, (), {}) is None
    assert not is_index(torch.ones(50, dtype=torch.bool)), "a mask may name all rows"
    assert not is_table(TABLE.t())
    assert not is_table(torch.tensor(1.0))


def test_few_rows_of_a_large_table_are_gathered() -> None:
    assert gathered_bytes(10, 4096, 64 * MIB) == 10 * 2 * 4096
    assert gathered_bytes(0, 4096, 64 * MIB) == 0
    most = int(64 * MIB * LARGEST_SHARE) // (2 * 4096)
    assert gathered_bytes(most, 4096, 64 * MIB) == 64 * MIB * LARGEST_SHARE
    assert gathered_bytes(most + 1, 4096, 64 * MIB) is None
    assert gathered_bytes(1, 16, SMALLEST_TABLE_BYTES - 1) is None
