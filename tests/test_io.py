"""What `io=` names is what reads, and the report says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mball
from mball.api import _state_of
from mball.config import Io
from mball.errors import ConfigError
from mball.storage import DirectIO
from tests.in_c import needs_a_compiler
from tests.run.harness import make, weight_bytes


@needs_a_compiler
@pytest.mark.parametrize("io", [io for io in Io if io is not Io.GDS])  # which is for GPUs
def test_each_way_reads_the_same(io: Io, tmp_path: Path) -> None:
    model = make(lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    x = torch.randn(2, 64)
    with torch.no_grad():
        expected = model(x)
    mball.wrap(model, weight_bytes(model) // 2, weights=tmp_path / "model.safetensors", swap_dir=tmp_path, io=io.value)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), expected)
    text = str(mball.report(model))
    assert ("threads of Python" in text) == (io is Io.THREADS)
    assert ("buffered (asked for)" in text) == (io is Io.BUFFERED)
    assert ("8 threads of C, 2.00 MiB a request" in text) == (io is not Io.THREADS)
    modes = {Io.BUFFERED: DirectIO.OFF, Io.DIRECT: DirectIO.ALWAYS, Io.CACHED: DirectIO.UNCACHED}
    machinery = _state_of(model).machinery
    assert machinery.files.mode is modes.get(io, DirectIO.AUTO)
    mball.unwrap(model)


def test_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="io is 'uring'; choose one of 'auto', 'direct', 'buffered', 'cached'"):
        mball.Config.of(budget="1MiB", io="uring")
