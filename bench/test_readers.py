"""Reading by threads of C and of Python: from disk, page cache and memory; beside nothing, busy Python and compute."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.findings import Findings, Heading
from bench.readers.compared import Scale, compare
from bench.results import Device, Topic
from bench.speed.rounds import Say
from mball.config import cache_directory
from mball.errors import DeviceError
from mball.storage import load_read_pool

HEADING = Heading(
    name="readers",
    topic=Topic.READERS,
    device=Device.CPU,
    headline="threads of C read {disk_idle_8x2048k_c} from disk, {disk_idle_8x2048k_ratio} the speed of Python's, and "
    "{disk_busy_8x2048k_ratio} beside a main thread that is busy in Python",
)


@pytest.mark.timeout(600)
def test_readers(tmp_path: Path, say: Say, benchmark: BenchmarkFixture, findings: Findings) -> None:
    try:
        library = load_read_pool(cache_directory())
    except DeviceError as error:
        pytest.skip(str(error))
    findings.add(*benchmark.pedantic(compare, args=(Scale(), library, tmp_path, say), rounds=1))
