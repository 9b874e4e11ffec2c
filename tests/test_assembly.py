"""What runs a model is put together whole, or not at all."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from mball.assembly import Machinery, Storage
from mball.compute import open_compute
from mball.config import Config
from mball.memory import Arena, CpuDevice
from mball.run.homes import Homes
from mball.run.segments import OperatorReads


def test_nothing_is_left_of_an_engine_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arenas: list[Arena] = []
    make_arena = CpuDevice.arena

    def arena(self: CpuDevice, reserve_bytes: int) -> Any:
        arenas.append(make_arena(self, reserve_bytes))
        return arenas[-1]

    monkeypatch.setattr(CpuDevice, "arena", arena)
    config = Config.of(budget="1MiB", swap_dir=tmp_path)
    storage = Storage.open(config)
    threads = set(threading.enumerate())  # some of them may be ending
    homes = Homes([], [], storage.swap)
    compute = open_compute(config, storage.files)
    with pytest.raises(IndexError):  # no home is weight 7
        Machinery.start(
            config, storage, homes, compute, lambda: pytest.fail("not asked"), expected=[OperatorReads((7,))]
        )
    compute.close()
    assert [each.closed for each in arenas] == [True]
    assert set(threading.enumerate()) <= threads
    storage.close()
