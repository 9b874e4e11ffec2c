"""The bench of copies from disk, over the stand-in: both ways bring the file, and one that cannot is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.gpu import disk
from bench.gpu.limit import Limit
from mball.compute import Compute, cuda_compute
from mball.config import Config
from mball.memory import cufile
from mball.memory.region import Region
from mball.storage import CheckedReader, FileTable, ThreadedReader
from mball.units import KIB, MIB
from tests.memory.driver.standin import EXTENT_BYTES, StandIn


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody tried to open cuFile yet."""
    monkeypatch.setattr(cufile, "_session", cufile._Session())


def opened(config: Config, files: FileTable) -> Compute:
    reader = CheckedReader(ThreadedReader(files, num_threads=2), files)
    return cuda_compute(
        reader, 0, lambda: 0, measured_bytes=MIB, extent_bytes=EXTENT_BYTES, region=Region, buffer_bytes=64 * KIB
    )


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(disk, "PIECE_BYTES", MIB)
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({f"w{number}": torch.randn(700, 333) for number in range(3)}, folder / "model.safetensors")
    return folder / "model.safetensors"


def test_bare_copies(standin: StandIn, path: Path) -> None:
    said: list[str] = []
    found = disk.cold_loads(path, "cpu", Limit(60), said.append, open_device=opened, num_rounds=2)
    names = {measurement.name for measurement in found}
    assert {f"disk_{name}" for name in disk.TITLES} <= names
    assert standin.calls("cuFileRead") > 0
    assert not said


def test_without_gds_the_rest_is_measured(standin: StandIn, path: Path) -> None:
    standin.set_files(straight=False)
    said: list[str] = []
    found = disk.cold_loads(path, "cpu", Limit(60), said.append, open_device=opened, num_rounds=2)
    names = {measurement.name for measurement in found}
    assert "disk_ring" in names
    assert "disk_straight" not in names
    assert len(said) == 1
    assert "GPUDirect Storage: left out, io='gds' cannot be had: cuFile's driver_open failed" in said[0]


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (1, "io='gds' cannot be had: cuFile takes "),
        (5, "it did not come straight after all"),
        (80, "it did not come straight after all"),
    ],
    ids=["at the first page", "before the rounds", "in a round"],
)
def test_a_read_that_came_another_way_is_no_figure_of_gds(first: int, why: str, standin: StandIn, path: Path) -> None:
    standin.fail(first, 999, code=5008, function="cuFileRead")
    said: list[str] = []
    found = disk.cold_loads(path, "cpu", Limit(60), said.append, open_device=opened, num_rounds=2)
    names = {measurement.name for measurement in found}
    assert "disk_ring" in names
    assert "disk_straight" not in names
    assert len(said) == 1
    assert said[0].startswith(f"the bytes alone, by GPUDirect Storage: left out, {why}")
    assert standin.calls("cuFileRead") >= first


def test_copies_of_something_else_give_no_figure(standin: StandIn, path: Path) -> None:
    with disk.BareCopies(path, disk.Io.GDS, open_device=opened) as copies:
        copies.run()
        copies.check()
        with path.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"!")
        with pytest.raises(disk.WrongError, match="what was copied is not"):
            copies.check()
