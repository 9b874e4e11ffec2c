"""What is known of the machine before anything ran."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mball
from mball.backend_door import mball_backend
from mball.schema import Link
from tests.calibrations import keep_calibration
from tests.run.harness import engine_of, make, weight_bytes

LINK = Link(bandwidth_bytes_per_s=3.5e9, latency_s=2e-4, window_bytes=1 << 24)


def layers() -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))


def measuring_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mball.forecast.measure_link", lambda *_, **__: pytest.fail("the link is known"))


def planned_for(model: nn.Module) -> Link:
    return engine_of(model).plans._plan.keywords["machine"]().link


@pytest.mark.parametrize("where", ["the swap file", "a checkpoint"])
def test_a_wrapped_model_is_planned_for_the_calibrated_link(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calibration = keep_calibration(tmp_path, LINK, monkeypatch)
    measuring_fails(monkeypatch)
    model = make(layers)
    source: dict[str, Any] = {"swap_dir": tmp_path}
    if where == "a checkpoint":
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        source = {"swap_dir": "/dev/shm", "weights": tmp_path / "model.safetensors"}
    with caplog.at_level(logging.INFO, logger="mball"):
        mball.wrap(model, weight_bytes(model) // 2, **source)
    with torch.no_grad():
        model(torch.zeros(1, 64))
    assert planned_for(model) == LINK
    assert mball.report(model).link_bytes_per_s == LINK.bandwidth_bytes_per_s
    assert f"at 3.50 GB/s, as calibrated on {calibration.day}" in caplog.text
    mball.unwrap(model)


def test_so_is_a_model_that_torch_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_calibration(tmp_path, LINK, monkeypatch)
    measuring_fails(monkeypatch)
    torch._dynamo.reset()
    model = make(layers)
    options = {"budget": weight_bytes(model) // 2, "swap_dir": str(tmp_path)}
    compiled = torch.compile(model, backend=mball_backend, options=options)
    with torch.no_grad():
        compiled(torch.zeros(1, 64))
    assert mball.report(compiled).link_bytes_per_s == LINK.bandwidth_bytes_per_s
    mball.unwrap(compiled)
    torch._dynamo.reset()


@pytest.mark.parametrize("settings", [{"io_threads": 3}, {"swap_dir": "/dev/shm"}], ids=["threads", "file system"])
def test_what_was_not_calibrated_is_measured(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_calibration(tmp_path, LINK, monkeypatch)
    model = make(layers)
    mball.wrap(model, weight_bytes(model) // 2, **{"swap_dir": tmp_path, **settings})
    assert mball.report(model).link_bytes_per_s != LINK.bandwidth_bytes_per_s
    mball.unwrap(model)


def test_a_broken_calibration_is_measured_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep_calibration(tmp_path, LINK, monkeypatch)
    (path,) = (tmp_path / "cache" / "mball" / "calibration").iterdir()
    path.write_text("{")
    model = make(layers)
    mball.wrap(model, weight_bytes(model) // 2, swap_dir=tmp_path)
    assert mball.report(model).link_bytes_per_s != LINK.bandwidth_bytes_per_s
    assert [str(path) in record.getMessage() for record in caplog.records].count(True) == 1
    mball.unwrap(model)
