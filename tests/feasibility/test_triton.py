"""Triton kernels: compiled ahead for real targets on any machine, and run where there is a GPU."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="this torch came without triton")
tl = pytest.importorskip("triton.language")

COLUMNS_PER_BLOCK = 128


@triton.jit
def gather_rows(table, index, out, num_columns, block: tl.constexpr):
    """Copies `table[index[i], :]` to `out[i, :]`; program (i, j) copies the j-th block of columns of row i.

    table: [R, num_columns], contiguous. index: [N], int64, each in [0, R). out: [N, num_columns], contiguous.
    """
    to_row = tl.program_id(0).to(tl.int64)
    from_row = tl.load(index + to_row)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < num_columns
    values = tl.load(table + from_row * num_columns + column, mask=inside)
    tl.store(out + to_row * num_columns + column, values, mask=inside)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiles_ahead_of_time(capability: int, dtype: str) -> None:
    """A kernel becomes PTX and a cubin for a target that this machine does not have; no driver is asked."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=gather_rows,
        signature={
            "table": f"*{dtype}",
            "index": "*i64",
            "out": f"*{dtype}",
            "num_columns": "i32",
            "block": "constexpr",
        },
        constexprs={"block": COLUMNS_PER_BLOCK},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert f".target sm_{capability}" in built.asm["ptx"]
    assert built.asm["cubin"].startswith(b"\x7fELF")
    assert built.metadata.name == "gather_rows"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathers_what_torch_gathers(dtype: torch.dtype) -> None:
    """On a GPU the kernel's rows equal `index_select`'s, bit for bit, with a last block that is not full."""
    table = torch.randn(57, 3 * COLUMNS_PER_BLOCK - 5, device="cuda").to(dtype)
    index = torch.randint(0, 57, (40,), device="cuda")
    out = torch.full((40, table.shape[1]), float("nan"), device="cuda", dtype=dtype)
    grid = (40, triton.cdiv(table.shape[1], COLUMNS_PER_BLOCK))
    gather_rows[grid](table, index, out, table.shape[1], block=COLUMNS_PER_BLOCK)
    assert torch.equal(out, table.index_select(0, index))
