"""What is said of a plan agrees with the plan."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mball.plan import explain, make_plan, smallest_budget
from mball.schema import Lane, Machine, Trace
from mball.units import MIB
from tests.plan.test_tiers import budgets_of
from tests.plan.test_tiers import machines as chained
from tests.plan.traces import machines, make_chain, make_changing, make_host_machine, make_machine, traces


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trace=traces(), machine=machines, share=st.floats(0, 1.2), fixed=st.integers(0, 5000))
def test_an_explanation_adds_up(trace: Trace, machine: Machine, share: float, fixed: int) -> None:
    total = sum(tensor.size_bytes for _, tensor in trace.homed())
    budget = smallest_budget(trace, machine, fixed_bytes=fixed).size_bytes + int(share * total)
    plan = make_plan(trace, machine, budget, fixed_bytes=fixed)
    found = explain(trace, plan, machine)
    assert found.prediction == plan.prediction
    sizes = {tensor.name: tensor.size_bytes for _, tensor in trace.homed()}
    home_bytes = sum(sizes[name] for name in found.gathered)
    assert found.resident_bytes + found.streamed_bytes + home_bytes + found.unread_bytes == total
    assert len({*found.resident, *found.streamed, *found.gathered}) == sum(
        map(len, (found.resident, found.streamed, found.gathered))
    )
    asked = [each for step in trace.steps for each in step.gathers if trace.tensors[each.tensor].name in found.gathered]
    assert found.gathered_bytes == sum(each.size_bytes for each in asked)
    assert len(found.memory) == len(plan.steps)
    assert all(use.total_bytes <= budget for use in found.memory)
    assert all(use.fixed_bytes == fixed for use in found.memory)
    assert sum(stall.stall_s for stall in found.stalls) == pytest.approx(plan.prediction.stall_s)
    assert found.gap >= 1 - 1e-9
    for transfer, served in zip(plan.transfers, found.simulation.transfers, strict=True):
        assert served.start_s <= served.end_s
        if transfer.after >= 0:
            freed_s = found.simulation.steps[transfer.after].end_s
            assert freed_s - 1e-9 <= served.start_s
            assert served.end_s <= found.simulation.steps[transfer.needed_by].start_s + 1e-9


def test_a_stall_names_what_it_waits_for() -> None:
    trace, machine = make_chain(6, MIB, time_s=1e-3), make_machine(bandwidth=1e8)
    plan = make_plan(trace, machine, smallest_budget(trace, machine).size_bytes)
    found = explain(trace, plan, machine)
    assert len(found.stalls) == 6, "one slot: nothing comes while a step computes"
    for stall in found.stalls:
        assert stall.weights == (f"w{stall.step.removeprefix('layer')}",)
        assert stall.size_bytes >= MIB
        assert stall.stall_s == pytest.approx(MIB / 1e8, rel=0.02)
        assert stall.lead_s == pytest.approx(0.0, abs=1e-9), "its slot was in use until then"
    assert found.stalls[0].stall_s == max(stall.stall_s for stall in found.stalls)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trace=traces(writing=False), machine=chained, device=st.floats(0, 0.8), host=st.floats(0, 0.8))
def test_what_comes_through_host_memory_adds_up(trace: Trace, machine: Machine, device: float, host: float) -> None:
    budget, host_bytes = budgets_of(trace, machine, device, host)
    plan = make_plan(trace, machine, budget, host_budget_bytes=host_bytes)
    found = explain(trace, plan, machine)
    below = found.below
    assert below is not None
    assert below.resident_bytes + below.read_bytes == found.streamed_bytes
    assert {*below.resident, *below.read} == set(found.streamed)
    assert plan.host is not None
    assert below.slots == len(plan.host.transfers)
    assert (below.slots == 0) == (below.read_bytes == 0)
    assert sum(stall.stall_s for stall in found.stalls) == pytest.approx(plan.prediction.stall_s)


def test_one_link_has_no_host_memory_to_explain() -> None:
    trace, machine = make_chain(6, MIB), make_machine()
    assert explain(trace, make_plan(trace, machine, 3 * MIB), machine).below is None


def test_a_wait_for_a_write_names_all_that_is_written() -> None:
    trace, machine = make_changing(4, 100_000, num_weights=3), make_host_machine()
    plan = make_plan(trace, machine, 64 * MIB)
    assert [bundle.tensors for bundle in plan.bundles] == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)]
    waits = [stall for stall in explain(trace, plan, machine).stalls if stall.is_write]
    assert sorted(stall.weights for stall in waits) == sorted(
        tuple(f"w{3 * layer + number}" for number in range(3)) for layer in range(4)
    )
    assert all(stall.size_bytes == 300_000 for stall in waits)


@pytest.mark.alone
@pytest.mark.parametrize("lane", list(Lane))
@pytest.mark.usefixtures("settled_heap")
def test_explaining_takes_longer_about_as_the_changed_weights_get_more(lane: Lane) -> None:
    def explaining_s(num_layers: int) -> float:
        trace, machine = make_changing(num_layers, 300_000), make_host_machine(host_bandwidth=1e9)
        trace = replace(trace, steps=tuple(replace(step, lane=lane) for step in trace.steps))
        plan = make_plan(trace, machine, num_layers * 75_000)
        times = []
        for _ in range(3):  # the shortest, since others run too
            start = time.process_time()
            found = explain(trace, plan, machine)
            times.append(time.process_time() - start)
        if lane is Lane.HOST:
            assert len(found.in_place) == num_layers
        else:
            assert sum(stall.is_write for stall in found.stalls) == num_layers
        return min(times)

    # Five times as many layers; what is quadratic takes 25 times as long.
    assert explaining_s(3000) < 10 * explaining_s(600)
