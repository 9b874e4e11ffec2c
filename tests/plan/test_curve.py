"""Predicted time as a function of the budget."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mball.errors import ConfigError
from mball.plan import make_plan, smallest_budget, utility_curve
from mball.schema import Machine, Trace
from mball.units import MIB
from tests.plan.traces import machines, make_chain, make_machine, traces


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trace=traces(), machine=machines, steps=st.lists(st.integers(-50_000, 3_000_000), max_size=6))
def test_more_memory_never_takes_longer(trace: Trace, machine: Machine, steps: list[int]) -> None:
    smallest = smallest_budget(trace, machine).size_bytes
    budgets = [smallest + step for step in steps]
    curve = utility_curve(trace, machine, budgets)
    assert [point.budget_bytes for point in curve] == sorted(set(budgets))
    for point in curve:
        assert (point.prediction is None) == (point.budget_bytes < smallest)
        if point.prediction is not None:
            alone = make_plan(trace, machine, point.budget_bytes).prediction
            assert point.prediction.pass_s <= alone.pass_s * (1 + 1e-9)
    known = [point.prediction for point in curve if point.prediction is not None]
    assert all(later.pass_s <= earlier.pass_s * (1 + 1e-9) for earlier, later in pairwise(known))


def test_the_curve_of_a_chain_falls_to_its_compute() -> None:
    trace, machine = make_chain(40, MIB), make_machine(bandwidth=2e8)
    curve = utility_curve(trace, machine, [mib * MIB for mib in range(2, 62, 4)], fixed_bytes=MIB)
    times = [point.prediction.pass_s for point in curve if point.prediction is not None]
    assert times[-1] == pytest.approx(40e-3), "all resident"
    assert times[0] > 4 * times[-1]
    assert curve[-1].prediction is not None
    assert curve[-1].prediction.streamed_bytes == 0


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="fixed_bytes is -1"):
        utility_curve(make_chain(2, MIB), make_machine(), [8 * MIB], fixed_bytes=-1)
    assert utility_curve(make_chain(2, MIB), make_machine(), []) == ()
