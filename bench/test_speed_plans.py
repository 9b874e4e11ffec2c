"""Plans executed: predicted against measured at four budgets, down to the smallest that works.

`--before CHECKOUT` runs another checkout of mball in the same rounds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.findings import Findings, Heading
from bench.results import Device, Topic
from bench.speed.model import LARGE, SMALL, make_checkpoint
from bench.speed.plans import plans
from bench.speed.rounds import Say
from bench.speed.scale import full

HEADING = Heading(
    name="speed-plans",
    topic=Topic.PLANS,
    device=Device.CPU,
    headline="a decode step takes {smallest_predicted} of its prediction at the smallest budget for 2.2 GB, "
    "{smallest}, and  {budget_50_predicted} in half the memory",
)


@pytest.mark.timeout(3000)
def test_plans(request: pytest.FixtureRequest, say: Say, benchmark: BenchmarkFixture, findings: Findings) -> None:
    before = request.config.getoption("--before")
    scale = full(make_checkpoint(LARGE), make_checkpoint(SMALL), prefill_rounds=0)
    findings.add(*benchmark.pedantic(plans, args=(scale, say, Path(before) if before else None), rounds=1))
