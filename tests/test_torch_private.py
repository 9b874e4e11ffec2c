"""The private parts of torch cost nothing until they are used."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mball import torch_private
from mball.torch_private.dispatch import no_autocast_cache
from mball.torch_private.recording import can_be_recorded


def test_importing_them_imports_no_compiler() -> None:
    modules = [f"mball.torch_private.{module.name}" for module in pkgutil.iter_modules(torch_private.__path__)]
    assert "mball.torch_private.inductor" in modules
    _run(f"import sys, {', '.join(modules)}\nassert 'torch._inductor.compile_fx' not in sys.modules")


def test_a_model_that_is_not_captured_yet_imports_no_compiler_either(tmp_path: Path) -> None:
    _run(
        f"""
import sys, mball, torch
model = torch.nn.Linear(64, 64)
mball.wrap(model, budget="1MiB", swap_dir={str(tmp_path)!r})
with torch.no_grad():
    model(torch.ones(1, 64))
assert "torch._functorch.aot_autograd" not in sys.modules, "the first token would wait for it"
"""
    )


def _run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_autocast_keeps_no_casts_of_slots() -> None:
    for before in (True, False):
        torch.set_autocast_cache_enabled(before)
        try:
            with no_autocast_cache():
                with torch.autocast("cpu"):
                    assert not torch.is_autocast_cache_enabled()
                assert not torch.is_autocast_cache_enabled()
            assert torch.is_autocast_cache_enabled() == before
        finally:
            torch.set_autocast_cache_enabled(True)


def _attends(dropout: float) -> Any:
    def attends(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(x, x, x, dropout)[0] + 1

    return attends


@pytest.mark.parametrize(
    ("function", "can"),
    [
        (lambda x: (x @ x.mT).softmax(-1), True),
        (_attends(0.0), True),
        (_attends(0.5), False),
        (lambda x: x + torch.rand_like(x), False),
        (lambda x: x[x > 0], False),
        (lambda x: x * x.sum().cpu(), False),
        (lambda x: x.to("cpu"), False),
        (lambda x: torch.where(x > 0, x, torch.full((), -1.0)), True),
        (lambda x: x + torch.full((), 1.0).to("meta"), False),
    ],
)
def test_what_can_be_recorded(function: Any, can: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()):
        x = torch.empty(2, 4, 8, 64, device="meta", dtype=torch.bfloat16)
        graph = make_fx(function)(x)
    assert can_be_recorded(graph) is can
