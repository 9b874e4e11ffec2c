"""The private parts of torch cost nothing until they are used."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mball import torch_private
from mball.torch_private.dispatch import no_autocast_cache


def test_importing_them_imports_no_compiler() -> None:
    modules = [f"mball.torch_private.{module.name}" for module in pkgutil.iter_modules(torch_private.__path__)]
    assert "mball.torch_private.inductor" in modules
    code = f"import sys, {', '.join(modules)}\nassert 'torch._inductor.compile_fx' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast_keeps_no_casts_of_slots(device: str) -> None:
    before = torch.is_autocast_enabled(device)
    with no_autocast_cache():
        assert torch.is_autocast_cache_enabled(), "nobody casts"
    torch.set_autocast_enabled(device, True)
    try:
        with no_autocast_cache():
            assert not torch.is_autocast_cache_enabled()
        assert torch.is_autocast_cache_enabled()
    finally:
        torch.set_autocast_enabled(device, before)
