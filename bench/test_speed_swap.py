"""Writing to swap, alone and beside reads, against fio and a bare loop on the same disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.findings import Findings, Heading
from bench.results import Device, Topic
from bench.speed.rounds import Say
from bench.speed.swap import FULL, swap

HEADING = Heading(
    name="speed-swap",
    topic=Topic.SWAP,
    device=Device.CPU,
    headline="{swap_rate} checked, {swap_write} of a bare writer's time, unchecked {swap_unchecked}; with reads beside "
    "{swap_both}",
)


@pytest.mark.timeout(900)
def test_swap(tmp_path: Path, say: Say, benchmark: BenchmarkFixture, findings: Findings) -> None:
    findings.add(*benchmark.pedantic(swap, args=(tmp_path, FULL, say), rounds=1))
