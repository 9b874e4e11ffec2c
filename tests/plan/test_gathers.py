"""A table that steps only read rows of stays home, and costs its rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mball.plan import explain, make_plan, simulate, smallest_budget, validate
from mball.plan.baselines import BASELINES
from mball.schema import Gather, Lane, Machine, Plan, Tier, Trace, Treatment
from mball.units import KIB, MIB
from tests.plan.replay import replay
from tests.plan.test_baselines import staying
from tests.plan.traces import machines, make_gathering, make_host_machine, make_machine, make_step, traces

few = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])

MACHINE = make_machine(latency_s=1e-4)
LAYER_BYTES, TABLE_BYTES, ROWS_BYTES = MIB, 6 * MIB, 64 * KIB
TRACE = make_gathering(8, LAYER_BYTES, TABLE_BYTES, ROWS_BYTES)
TIED = make_gathering(8, LAYER_BYTES, TABLE_BYTES, ROWS_BYTES, tied=True)
ROWS_S = 1e-4 + ROWS_BYTES / 1e9


def read_whole(trace: Trace) -> Trace:
    """The same trace if no tensor may be read by rows at home."""
    tensors = [replace(each, may=tuple(t for t in each.may if t is not Treatment.GATHER)) for each in trace.tensors]
    return replace(trace, tensors=tuple(tensors))


def places_of(plan: Plan, weight: int) -> tuple[bool, int]:
    """Whether the weight is resident, and how often it is transferred."""
    (bundle,) = (number for number, bundle in enumerate(plan.bundles) if weight in bundle.tensors)
    residents = [placement.bundle for placement in plan.residents]
    return bundle in residents, [transfer.bundle for transfer in plan.transfers].count(bundle)


def test_the_smallest_budget_has_no_room_for_a_table_that_is_only_gathered_from() -> None:
    smallest = smallest_budget(TRACE, MACHINE)
    assert smallest_budget(read_whole(TRACE), MACHINE).size_bytes >= TABLE_BYTES
    assert LAYER_BYTES <= smallest.size_bytes < LAYER_BYTES + 2 * MACHINE.page_bytes
    assert "'layer" in smallest.limited_by
    validate(TRACE, make_plan(TRACE, MACHINE, smallest.size_bytes), MACHINE)


def test_a_table_stays_home_until_all_fits() -> None:
    for budget in (2 * MIB, 5 * MIB, 9 * MIB, 8 * MIB + TABLE_BYTES - MIB):
        plan = make_plan(TRACE, MACHINE, budget)
        assert places_of(plan, 0) == (False, 0), budget
    # All layers stay, so the pass takes their time and that of the rows.
    assert plan.prediction.pass_s == pytest.approx(9e-3 + ROWS_S)
    assert plan.prediction.streamed_bytes == ROWS_BYTES
    assert explain(TRACE, plan, MACHINE).gathered == ("w0",)
    assert explain(TRACE, plan, MACHINE).gathered_bytes == ROWS_BYTES


def in_memory(trace: Trace) -> Trace:
    """The same with homes in host memory."""
    tensors = (replace(each, home=each.home and replace(each.home, tier=Tier.HOST)) for each in trace.tensors)
    return replace(trace, tensors=tuple(tensors))


def test_a_table_is_resident_where_all_fits() -> None:
    plan = make_plan(TRACE, MACHINE, 8 * MIB + TABLE_BYTES + MIB)
    validate(TRACE, plan, MACHINE)
    assert places_of(plan, 0) == (True, 0)
    assert plan.prediction.pass_s == pytest.approx(9e-3)
    assert plan.prediction.streamed_bytes == 0
    assert explain(TRACE, plan, MACHINE).gathered == ()


def test_of_two_tables_the_one_that_fits_is_resident() -> None:
    # The chain's last weight becomes a table too, and a small one.
    small = replace(TRACE.tensors[8], may=(*TRACE.tensors[8].may, Treatment.GATHER))
    last = replace(TRACE.steps[8], reads=(), gathers=(Gather(tensor=8, size_bytes=ROWS_BYTES),))
    trace = replace(TRACE, tensors=(*TRACE.tensors[:8], small), steps=(*TRACE.steps[:8], last))
    plan = make_plan(trace, MACHINE, 10 * MIB)
    assert (places_of(plan, 0), places_of(plan, 8)) == ((False, 0), (True, 0))


def test_a_table_that_something_writes_stays_home() -> None:
    writer = replace(make_step("update"), writes=(0,), lane=Lane.HOST)
    trace = replace(in_memory(TRACE), steps=(*TRACE.steps, writer))
    machine = make_host_machine()
    plan = make_plan(trace, machine, 30 * MIB)
    validate(trace, plan, machine)
    assert places_of(plan, 0) == (False, 0)


def test_a_table_that_a_step_on_the_device_writes_is_there_for_it() -> None:
    writer = replace(make_step("update"), writes=(0,))
    trace = replace(TRACE, steps=(*TRACE.steps, writer))
    plan = make_plan(trace, MACHINE, smallest_budget(trace, MACHINE).size_bytes)
    validate(trace, plan, MACHINE)
    assert places_of(plan, 0) == (False, 1)
    assert [plan.bundles[offload.bundle].tensors for offload in plan.offloads] == [(0,)]
    assert plan.prediction.written_bytes == TABLE_BYTES


def test_a_tied_table_comes_for_the_step_that_reads_it_only() -> None:
    plan = make_plan(TIED, MACHINE, TABLE_BYTES + 2 * MIB)
    validate(TIED, plan, MACHINE)
    assert places_of(plan, 0) == (False, 1)
    (transfer,) = (each for each in plan.transfers if 0 in plan.bundles[each.bundle].tensors)
    assert plan.steps[transfer.needed_by].end == len(TIED.steps)
    assert not any(bundle == transfer.bundle for bundle in plan.steps[0].reads)
    # Where the table stays, its rows are there too.
    rich = make_plan(TIED, MACHINE, TABLE_BYTES + 9 * MIB)
    assert places_of(rich, 0) == (True, 0)
    assert rich.prediction.pass_s == pytest.approx(10e-3)


def test_a_bundle_that_is_gathered_from_shares_a_slot_with_nothing() -> None:
    plan = make_plan(TRACE, MACHINE, 5 * MIB)
    (own,) = (bundle for bundle in plan.bundles if 0 in bundle.tensors)
    assert own.tensors == (0,)


def test_a_table_that_may_not_gather_is_read_as_a_whole() -> None:
    whole = read_whole(TRACE)
    plan = make_plan(whole, MACHINE, TABLE_BYTES + 2 * MIB)
    validate(whole, plan, MACHINE)
    assert places_of(plan, 0) == (False, 1)


def test_a_growing_budget_keeps_a_plan_that_is_no_slower() -> None:
    plan, passes = None, []
    for budget in range(2 * MIB, 18 * MIB, MIB):
        plan = make_plan(TRACE, MACHINE, budget, previous=plan)
        validate(TRACE, plan, MACHINE)
        passes.append(plan.prediction.pass_s)
    assert passes == sorted(passes, reverse=True)
    assert places_of(plan, 0) == (True, 0)


@few
@given(trace=traces(), machine=machines, share=st.floats(0, 1.2), name=st.sampled_from([None, *BASELINES]))
def test_plans_of_traces_that_gather_keep_their_promises(
    trace: Trace, machine: Machine, share: float, name: str | None
) -> None:
    trace = trace if name is None else staying(trace)
    smallest = smallest_budget(trace, machine).size_bytes
    # What a step writes is there as a whole; it shares its pages with other weights only if all read it alike.
    if not any(step.writes for step in trace.steps):
        assert smallest <= smallest_budget(read_whole(trace), machine).size_bytes
    total = sum(tensor.size_bytes for _, tensor in trace.homed())
    planner = make_plan if name is None else BASELINES[name]
    plan = planner(trace, machine, smallest + int(share * total))
    validate(trace, plan, machine)
    replay(trace, plan, machine)
    assert simulate(trace, plan, machine).prediction == plan.prediction


@few
@given(
    layers=st.integers(1, 8),
    table_bytes=st.integers(1, 3 * MIB),
    rows_bytes=st.integers(0, MIB),
    machine=machines,
    share=st.floats(0, 1),
)
def test_a_table_at_home_costs_what_its_rows_take(
    layers: int, table_bytes: int, rows_bytes: int, machine: Machine, share: float
) -> None:
    """A pass is planned like one whose first step takes as much longer as the rows do, and gathers nothing."""
    rows_bytes = min(rows_bytes, table_bytes)
    trace = make_gathering(layers, LAYER_BYTES, table_bytes, rows_bytes)
    rows_s = machine.link.latency_s + rows_bytes / machine.link.bandwidth_bytes_per_s
    slower = replace(trace.steps[0], gathers=(), time_s=1e-3 + rows_s)
    without = replace(trace, steps=(slower, *trace.steps[1:]))
    # Room for all layers at most, and not for the table beside them.
    budget = smallest_budget(trace, machine).size_bytes + int(share * (layers - 1) * LAYER_BYTES)
    found, other = (make_plan(each, machine, budget).prediction for each in (trace, without))
    assert found.pass_s == pytest.approx(other.pass_s)
    assert found.compute_s == pytest.approx(other.compute_s)
    assert found.streamed_bytes == other.streamed_bytes + rows_bytes
