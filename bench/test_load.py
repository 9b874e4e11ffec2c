"""2.2 GB of safetensors into memory: mball beside the bare disk, safetensors, fastsafetensors and Run:ai's streamer."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.findings import Findings, Heading
from bench.load.loaders import THERE, Way
from bench.load.peers import install_peers
from bench.load.session import cold, warm
from bench.results import Device, Topic
from bench.speed.model import LARGE, make_checkpoint, weight_file
from bench.speed.rounds import Say

HEADING = Heading(
    name="load",
    topic=Topic.LOAD,
    device=Device.CPU,
    headline="{size} into memory at {cold_disk_prefaulted} the speed of a bare read; cold, safetensors takes "
    "{cold_safetensors_mmap} mball's time, fastsafetensors {cold_fastsafetensors}, Run:ai's streamer {cold_runai}",
)
NUM_ROUNDS = 5


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("state", ["cold", "warm"])
def test_load(state: str, say: Say, benchmark: BenchmarkFixture, findings: Findings) -> None:
    path = weight_file(make_checkpoint(LARGE))
    run = cold if state == "cold" else warm
    # Of a cold file a copy is made anyway, and a warm one is not held against a disk.
    ways = [way for way in Way if way not in ((Way.COPY,) if state == "cold" else THERE)]
    arguments = (path, ways, NUM_ROUNDS, install_peers(), say)
    findings.add(*benchmark.pedantic(run, args=arguments, rounds=1))
