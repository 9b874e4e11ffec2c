"""2.2 GB from a cold file to a GPU: mball beside safetensors, and GPUDirect Storage where it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.gpu import disk
from bench.gpu.keep import DISK, Book
from bench.gpu.limit import Limit
from bench.results import Measurement
from bench.speed.model import LARGE, make_checkpoint, weight_file
from bench.speed.rounds import Say

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(150)]

Keep = Callable[[Book, Sequence[Measurement]], None]
Allot = Callable[[float], Limit]


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, say: Say) -> Path:
    folder = request.config.getoption("--model-dir")
    say("the file of 2.2 GB is written unless it is there")
    return weight_file(make_checkpoint(LARGE, Path(folder) if folder else None))


def test_from_disk(checkpoint: Path, say: Say, gpu_time: Allot, benchmark: BenchmarkFixture, kept: Keep) -> None:
    limit = gpu_time(60)
    found = benchmark.pedantic(disk.cold_loads, args=(checkpoint, "cuda:0", limit, say), rounds=1)
    kept(DISK, found)
    for measurement in found:
        say(f"{measurement.description}: {measurement.figure()}")
