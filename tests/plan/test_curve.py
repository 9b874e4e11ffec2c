"""Predicted time as a function of the budget."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mball.errors import ConfigError
from mball.plan import host_utility_curve, make_plan, smallest_budget, smallest_host_budget, utility_curve
from mball.schema import Machine, Trace
from mball.units import MIB
from tests.plan.test_tiers import two_links
from tests.plan.traces import PAGE_BYTES, machines, make_chain, make_machine, make_tied, traces


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


def test_more_host_memory_never_takes_longer() -> None:
    trace, machine = make_chain(40, MIB), two_links(disk=3e8)
    smallest = smallest_host_budget(trace, machine, 8 * MIB).size_bytes
    curve = host_utility_curve(trace, machine, 8 * MIB, [smallest - 1, smallest, *range(4 * MIB, 44 * MIB, 4 * MIB)])
    assert curve[0].prediction is None
    known = [point.prediction for point in curve if point.prediction is not None]
    assert len(known) == len(curve) - 1
    times = [prediction.pass_s for prediction in known]
    assert times == sorted(times, reverse=True)
    assert times[0] > 2 * times[-1]
    alone = make_plan(trace, machine, 8 * MIB, host_budget_bytes=40 * MIB).prediction
    assert times[-1] <= alone.pass_s


def test_a_device_that_leaves_too_much_for_host_memory_has_no_prediction() -> None:
    trace, machine = make_tied(6, MIB, 3 * MIB), two_links()
    budgets = [3 * MIB + 2 * PAGE_BYTES, 4 * MIB + 6 * PAGE_BYTES]
    curve = utility_curve(trace, machine, budgets, host_budget_bytes=MIB + 2 * PAGE_BYTES)
    assert [point.prediction is None for point in curve] == [True, False]
    with pytest.raises(ConfigError, match="has a disk_link"):
        utility_curve(trace, machine, budgets)
