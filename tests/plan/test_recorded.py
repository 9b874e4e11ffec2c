"""The planner on passes recorded from real models."""

from __future__ import annotations

import pytest

from bench import traces
from bench.traces.compare import bound_s, read_bytes
from mball.plan import make_plan, simulate, smallest_budget, validate
from tests.plan.traces import make_machine

DISK = make_machine(bandwidth=2e9, latency_s=1e-4, window_bytes=8 << 20)


@pytest.mark.parametrize("name", traces.names())
def test_plans_of_recorded_passes_hold(name: str) -> None:
    trace = traces.load(name)
    activations, weights = max(trace.activation_bytes()), read_bytes(trace)
    smallest = smallest_budget(trace, DISK).size_bytes
    times = []
    for percent in (10, 25, 50, 75):
        budget = max(smallest, activations + weights * percent // 100)
        plan = make_plan(trace, DISK, budget)
        validate(trace, plan, DISK)
        simulation = simulate(trace, plan, DISK)
        assert simulation.prediction == plan.prediction
        assert simulation.peak_arena_bytes + activations <= budget
        assert plan.prediction.pass_s >= bound_s(trace, DISK, budget) * (1 - 1e-9)
        times.append(plan.prediction.pass_s)
    assert times[0] > 0
    assert times == sorted(times, reverse=True), "more memory is not slower"
