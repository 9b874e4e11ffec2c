"""What planning takes as passes grow: the first plan of a long chain, and the next one for a little more budget."""

from __future__ import annotations

import time

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.findings import Findings, Heading
from bench.planner.growth import MACHINE, NUM_BUNDLES, budgets, chain
from bench.results import Device, Measurement, Topic
from bench.traces.compare import bound_s
from mball.plan import make_plan, validate

HEADING = Heading(
    name="planner",
    topic=Topic.PLANNER,
    device=Device.CPU,
    headline="1,000 bundles in {first_1000}, again in {again_1000}",
)


@pytest.mark.parametrize("num_bundles", NUM_BUNDLES)
def test_planning_time(num_bundles: int, benchmark: BenchmarkFixture, findings: Findings) -> None:
    """CPU time; both plans are right, and hold each weight in a bundle of its own."""
    trace = chain(num_bundles)
    budget, more = budgets(trace)
    began_s = time.process_time()
    plan = benchmark.pedantic(make_plan, args=(trace, MACHINE, budget), rounds=1)
    first_s = time.process_time() - began_s
    began_s = time.process_time()
    again = make_plan(trace, MACHINE, more, previous=plan)
    again_s = time.process_time() - began_s
    validate(trace, plan, MACHINE)
    validate(trace, again, MACHINE)
    assert len(plan.bundles) == num_bundles
    gap = plan.prediction.pass_s / bound_s(trace, MACHINE, budget)
    for name, value, unit, description in (
        ("first", first_s, "s", "CPU time of the first plan"),
        ("again", again_s, "s", "CPU time of a plan for 5 % more budget, made from the first"),
        ("gap", gap, "x", "the first plan's predicted pass over the roofline"),
    ):
        findings.add(
            Measurement.of(
                f"{name}_{num_bundles}", [value], unit=unit, description=f"{num_bundles} bundles: {description}"
            )
        )
