"""The same model by other ways of running it in half its memory, all under the same kernel's cap."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.findings import Findings, Heading
from bench.results import Device, Topic
from bench.speed.model import LARGE, SMALL, make_checkpoint
from bench.speed.peers import peers, why_no_cap
from bench.speed.rounds import Say
from bench.speed.scale import full
from bench.speed.ways import Mode

HEADING = Heading(
    name="speed-peers",
    topic=Topic.PEERS,
    device=Device.CPU,
    headline="decode in half the memory: memory-mapped transformers take {eager_decode_mapped} mball's time, "
    "accelerate's disk offload {eager_decode_accelerate}",
)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
def test_peers(mode: Mode, say: Say, benchmark: BenchmarkFixture, findings: Findings) -> None:
    if why := why_no_cap():
        pytest.skip(why)
    scale = full(make_checkpoint(LARGE), make_checkpoint(SMALL))
    findings.add(*benchmark.pedantic(peers, args=(scale, mode, say), rounds=1))
