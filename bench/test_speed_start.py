"""From a fresh process to the first tokens of a 2.2 GB Llama, with nothing in the page cache."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.findings import Findings, Heading
from bench.results import Device, Topic
from bench.speed.cold import cold, warm_compile
from bench.speed.model import LARGE, SMALL, make_checkpoint
from bench.speed.rounds import Say
from bench.speed.scale import full
from bench.speed.ways import Mode

HEADING = Heading(
    name="speed-start",
    topic=Topic.START,
    device=Device.CPU,
    headline="first token {eager_cold_50_s} after from_pretrained, {eager_cold_50} of transformers' time",
)
# Each start of compiled steps compiles them, for a minute.
NUM_ROUNDS = {Mode.EAGER: 5, Mode.INDUCTOR: 2}


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("percent", [50, 110])
@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
def test_cold(mode: Mode, percent: int, say: Say, benchmark: BenchmarkFixture, findings: Findings) -> None:
    scale = full(make_checkpoint(LARGE), make_checkpoint(SMALL))
    findings.add(*benchmark.pedantic(cold, args=(scale, mode, percent, NUM_ROUNDS[mode], say), rounds=1))


@pytest.mark.timeout(1500)
def test_warm_compile(say: Say, benchmark: BenchmarkFixture, findings: Findings) -> None:
    scale = full(make_checkpoint(LARGE), make_checkpoint(SMALL))
    findings.add(*benchmark.pedantic(warm_compile, args=(scale, 50, say), rounds=1))
