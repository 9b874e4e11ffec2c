"""Streaming a 2.2 GB Llama: against the roofline, and against the model without mball where it fits.

Which contenders there are and what is compared: `bench/speed`. A target that is missed does not fail the bench.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.findings import Findings, Heading
from bench.results import Device, Topic
from bench.speed.field import Field
from bench.speed.model import LARGE, SMALL, make_checkpoint
from bench.speed.roofline import fits, roofline
from bench.speed.rounds import Say
from bench.speed.scale import full
from bench.speed.ways import Mode

HEADING = Heading(
    name="speed-roofline",
    topic=Topic.SPEED,
    device=Device.CPU,
    headline="decode in half the memory takes {eager_decode_50} of max(compute, read), compiled "
    "{inductor_decode_50}; all resident {eager_decode_fits} of the time without mball",
)


@pytest.fixture(scope="module", params=list(Mode), ids=lambda mode: mode.value)
def field(request: pytest.FixtureRequest, say: Say) -> Iterator[Field]:
    mode: Mode = request.param
    prefill_rounds = request.config.getoption("--prefill-rounds")
    scale = full(make_checkpoint(LARGE), make_checkpoint(SMALL), prefill_rounds=prefill_rounds)
    with Field(scale, mode, say) as contenders:
        yield contenders


@pytest.mark.timeout(3600)
def test_roofline(field: Field, say: Say, benchmark: BenchmarkFixture, findings: Findings) -> None:
    findings.add(*benchmark.pedantic(roofline, args=(field, say), rounds=1))


@pytest.mark.timeout(1500)
def test_fits(field: Field, say: Say, benchmark: BenchmarkFixture, findings: Findings) -> None:
    findings.add(*benchmark.pedantic(fits, args=(field, say), rounds=1))
