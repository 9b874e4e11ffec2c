"""Steps beside the device, and writes to homes: what waits for what, how long passes take, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from mball.errors import BudgetError
from mball.plan import explain, make_plan, simulate, smallest_budget, validate
from mball.plan.lanes import Waits, run_lanes
from mball.plan.simulate import Writes, busy_times, gathered_bytes, run_beside, run_passes, written_bytes
from mball.schema import (
    Gather,
    Kind,
    Lane,
    LiveRange,
    Machine,
    Plan,
    Step,
    Tensor,
    Tier,
    Trace,
    Treatment,
)
from mball.units import MIB
from tests.plan.lane_replay import LaneReplay
from tests.plan.replay import replay
from tests.plan.traces import (
    PAGE_BYTES,
    host_machines,
    lane_traces,
    make_host_machine,
    make_optimized,
    make_step,
    make_weights,
    traces,
)
from tests.plan.traces import machines as disk_machines

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# A MiB in half a millisecond, each way.
MACHINE = make_host_machine(bandwidth=2 * MIB * 1e3, write_bandwidth=2 * MIB * 1e3)
AMPLE = 64 * MIB


def weights_in_memory(sizes: list[int]) -> tuple[Tensor, ...]:
    return tuple(
        replace(weight, home=weight.home and replace(weight.home, tier=Tier.HOST))
        for weight in make_weights(sizes, start_bytes=0)
    )


def on_host(step: Step, *, writes: tuple[int, ...] = ()) -> Step:
    return replace(step, lane=Lane.HOST, writes=writes)


def planned(trace: Trace, machine: Machine, budget: int) -> Plan:
    plan = make_plan(trace, machine, budget)
    validate(trace, plan, machine)
    replay(trace, plan, machine)
    assert simulate(trace, plan, machine).prediction == plan.prediction
    return plan


def budget_of(trace: Trace, machine: Machine, share: float) -> int:
    total = sum(tensor.size_bytes for _, tensor in trace.homed())
    return smallest_budget(trace, machine).size_bytes + int(total * share)


def bundle_of(plan: Plan, index: int) -> int:
    return next(number for number, bundle in enumerate(plan.bundles) if index in bundle.tensors)


# -- worked out by hand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host_s", "pass_s"), [(1e-3, 8e-3), (2e-3, 9e-3), (3e-3, 11e-3)])
def test_an_optimizer_beside_the_device_overlaps_with_the_rest_of_backward(host_s: float, pass_s: float) -> None:
    # Two layers compute for 6 ms. After backward of layer 0 its gradient is written for 0.5 ms, its weight is updated,
    # and that comes back for 0.5 ms: 6 + 1 + the update. That of layer 1 begins 1.5 ms before backward of layer 0 ends,
    # so 2 ms of it end in time; 3 ms of it delay the other one by 1 ms.
    plan = planned(make_optimized(2, MIB, host_s=host_s), MACHINE, AMPLE)
    assert plan.prediction.pass_s == pytest.approx(pass_s)
    assert plan.prediction.compute_s == pytest.approx(6e-3)
    assert plan.prediction.host_s == pytest.approx(2 * host_s)


def test_the_only_pass_ends_when_both_lanes_have() -> None:
    # As above without the way back to the device, and with the first weight's way there: 0.5 + 6 + 0.5 + 3.
    trace = replace(make_optimized(1, MIB, host_s=3e-3, time_s=2e-3), cyclic=False)
    plan = planned(trace, MACHINE, AMPLE)
    assert plan.prediction.pass_s == pytest.approx(10e-3)
    assert plan.prediction.stall_s == pytest.approx(4e-3)
    late = simulate(trace, plan, MACHINE).steps[-1]
    assert (late.start_s, late.end_s) == (pytest.approx(7e-3), pytest.approx(10e-3))


def test_an_optimizer_that_writes_nothing_that_comes_delays_nothing() -> None:
    # Steps that only keep a state may end in the next pass.
    trace = make_optimized(6, MIB, host_s=2e-3)
    steps = tuple(replace(s, writes=s.writes[1:]) if s.lane is Lane.HOST else s for s in trace.steps)
    plan = planned(replace(trace, steps=steps), MACHINE, AMPLE)
    assert plan.prediction.pass_s == pytest.approx(18e-3)
    slower = tuple(replace(s, time_s=4e-3) if s.lane is Lane.HOST else s for s in steps)
    plan = planned(replace(trace, steps=slower), MACHINE, AMPLE)
    assert plan.prediction.pass_s == pytest.approx(24e-3), "as long as the host lane works"


@pytest.mark.parametrize("budget", [4 * MIB, 8 * MIB, AMPLE])
def test_a_pass_takes_little_more_than_the_host_lane_works_where_that_is_the_bottleneck(budget: int) -> None:
    plan = planned(make_optimized(8, MIB, host_s=10e-3, time_s=1e-4), MACHINE, budget)
    assert plan.prediction.roofline_s == pytest.approx(80e-3)
    assert plan.prediction.pass_s <= 1.05 * 80e-3


@pytest.mark.parametrize("mib", [4, 6, 8, 12])
def test_reads_and_writes_back_keep_the_link_they_share_busy(mib: int) -> None:
    steps = tuple(replace(make_step(f"s{n}", n, time_s=1e-4), writes=(n,)) for n in range(16))
    trace = Trace(name="changed", tensors=weights_in_memory([MIB] * 16), steps=steps)
    machine = make_host_machine(bandwidth=1e9)
    plan = planned(trace, machine, mib * MIB + 32 * PAGE_BYTES)
    assert plan.prediction.written_bytes == 16 * MIB
    moved_s = (plan.prediction.streamed_bytes + plan.prediction.written_bytes) / 1e9
    assert plan.prediction.roofline_s == pytest.approx(moved_s)
    assert plan.prediction.pass_s <= 1.06 * moved_s


def test_what_stays_is_written_back_from_its_place_once_a_pass() -> None:
    trace = make_optimized(4, MIB, host_s=1e-3, on_device=True)
    plan = planned(trace, MACHINE, AMPLE)
    assert not plan.transfers
    places = {placement.bundle: placement.offset_bytes for placement in plan.residents}
    assert sorted(offload.bundle for offload in plan.offloads) == sorted(places)
    assert all(offload.offset_bytes == places[offload.bundle] for offload in plan.offloads)
    # With the same in the arena, places may move, and the writes move with them.
    smaller = make_plan(trace, MACHINE, 8 * MIB, previous=plan)
    larger = make_plan(trace, MACHINE, AMPLE, previous=smaller)
    for other in (smaller, larger):
        validate(trace, other, MACHINE)
        replay(trace, other, MACHINE)


def test_an_optimizer_on_the_device_streams_its_state_and_writes_it_back() -> None:
    trace = make_optimized(6, MIB, host_s=1e-3, on_device=True)
    plan = planned(trace, make_host_machine(bandwidth=4e9), 10 * MIB)
    states = {bundle_of(plan, index) for index in range(6, 12)}
    streamed = {transfer.bundle for transfer in plan.transfers}
    assert states & streamed
    assert states <= {offload.bundle for offload in plan.offloads}
    assert plan.prediction.written_bytes >= 18 * MIB


def test_what_only_the_host_lane_uses_is_never_moved() -> None:
    trace = make_optimized(4, MIB, host_s=1e-3)
    plan = planned(trace, MACHINE, AMPLE)
    states = {bundle_of(plan, index) for index in range(4, 8)}
    moved = {each.bundle for each in (*plan.residents, *plan.transfers, *plan.offloads, *plan.made)}
    assert not states & moved
    found = explain(trace, plan, MACHINE)
    assert found.in_place == ("w4", "w5", "w6", "w7")
    assert found.in_place_bytes == 8 * MIB
    assert found.unread_bytes == 0


def test_bytes_of_host_memory_bound_the_time_of_a_step() -> None:
    # Gradient, state and weight are read, weight and state written: 1 + 2 + 1 + 1 + 2 MiB.
    slow = replace(MACHINE, host_bandwidth_bytes_per_s=7 * MIB / 5e-3)
    measured, unmeasured = make_optimized(2, MIB, host_s=1e-3), make_optimized(2, MIB)
    assert planned(measured, slow, AMPLE).prediction.host_s == pytest.approx(10e-3)
    assert planned(measured, MACHINE, AMPLE).prediction.host_s == pytest.approx(2e-3)
    assert planned(unmeasured, MACHINE, AMPLE).prediction.host_s == pytest.approx(14 * MIB / 20e9)


def test_rows_wait_for_the_step_that_writes_them() -> None:
    table = replace(weights_in_memory([16 * MIB])[0], may=(Treatment.STAY, Treatment.STREAM, Treatment.GATHER))
    lookup = replace(make_step("embed"), gathers=(Gather(tensor=0, size_bytes=MIB),))
    update = replace(on_host(make_step("update", time_s=3e-3), writes=(0,)), gathers=lookup.gathers)
    trace = Trace(name="table", tensors=(table,), steps=(lookup, make_step("head"), update))
    plan = planned(trace, MACHINE, MIB)
    # The step, 0.5 ms for its rows, the head, the update: nothing overlaps.
    assert plan.prediction.pass_s == pytest.approx(5.5e-3)
    (stall,) = explain(trace, plan, MACHINE).stalls
    assert (stall.step, stall.host_step) == ("embed + 1 more", "update")


def test_what_the_host_lane_bears_comes_over_the_link() -> None:
    live = LiveRange(first=0, end=2)
    batch = Tensor(
        name="batch", kind=Kind.ACTIVATION, size_bytes=MIB, live=live, may=(Treatment.STAY, Treatment.OFFLOAD)
    )
    steps = (on_host(make_step("load", time_s=2e-3)), make_step("use", 0))
    trace = Trace(name="batches", tensors=(batch,), steps=steps)
    plan = planned(trace, MACHINE, 2 * MIB)
    (transfer,) = plan.transfers
    assert (transfer.after, transfer.after_host) == (0, 0)
    assert not plan.made
    assert smallest_budget(trace, MACHINE).size_bytes == MIB, "nothing of it is among the activations"
    # The next one is loaded while this one is used.
    assert plan.prediction.pass_s == pytest.approx(3.5e-3)


def test_a_pass_waits_for_the_optimizer_and_says_so() -> None:
    trace = make_optimized(2, MIB, host_s=3e-3)
    found = explain(trace, planned(trace, MACHINE, AMPLE), MACHINE)
    assert found.stalls[0].step == "forward0"
    assert found.stalls[0].host_step == "update0"
    assert found.offloaded == ("g1", "g0")
    assert found.written_back == ()
    on_device = make_optimized(2, MIB, host_s=3e-3, on_device=True)
    plan = planned(on_device, MACHINE, AMPLE)
    assert sorted(explain(on_device, plan, MACHINE).written_back) == ["w0", "w1", "w2", "w3"]


def test_gradients_that_a_step_on_the_device_reads_first_are_written_after_it() -> None:
    # A norm over all gradients comes before the optimizer.
    may = (Treatment.STAY, Treatment.OFFLOAD)
    gradients = [
        replace(Tensor.activation(f"g{n}", size_bytes=MIB, live=LiveRange(first=n, end=5 + n)), may=may)
        for n in range(3)
    ]
    steps = [make_step(f"backward{n}", 3 + n) for n in range(3)]
    steps.append(make_step("norm", 0, 1, 2))
    steps += [on_host(make_step(f"update{n}", n, time_s=1e-3), writes=(3 + n,)) for n in range(3)]
    trace = Trace(name="norm", tensors=(*gradients, *weights_in_memory([MIB] * 3)), steps=tuple(steps))
    for budget in (smallest_budget(trace, MACHINE).size_bytes, AMPLE):
        plan = planned(trace, MACHINE, budget)
        assert len(plan.offloads) == 3


def test_gradients_for_the_host_lane_count_against_a_budget_of_offloads() -> None:
    trace = make_optimized(2, MIB, host_s=1e-3, activation_bytes=MIB)
    plan = make_plan(trace, MACHINE, 3 * MIB, offload_budget_bytes=8 * MIB)
    validate(trace, plan, MACHINE)
    with pytest.raises(BudgetError, match="offload budget") as caught:
        make_plan(trace, MACHINE, AMPLE, offload_budget_bytes=MIB)
    # Two gradients of one MiB: a larger device is no way out, and no budget of it is named.
    assert caught.value.limited_by == (
        f"what goes to the host lane takes 2.00 MiB ({2 * MIB} B) there by itself, whatever the budget of the device is"
    )
    assert str(caught.value).endswith("; raise the offload budget to that")
    assert f"({caught.value.smallest_bytes} B) are known to work" in str(caught.value)
    enough = make_plan(trace, MACHINE, AMPLE, offload_budget_bytes=caught.value.smallest_bytes)
    validate(trace, enough, MACHINE)


def test_a_larger_device_helps_where_it_is_not_the_host_lane_that_needs_more_below() -> None:
    trace = make_optimized(4, MIB, host_s=1e-3, activation_bytes=MIB)
    budget = smallest_budget(trace, MACHINE).size_bytes
    with pytest.raises(BudgetError, match="need not go to the host lane") as caught:
        make_plan(trace, MACHINE, budget, offload_budget_bytes=4 * MIB)
    larger = re.search(r"with (\d+) B nothing has to be offloaded that does not go", str(caught.value))
    assert larger is not None
    assert int(larger[1]) > budget
    validate(trace, make_plan(trace, MACHINE, int(larger[1]), offload_budget_bytes=4 * MIB), MACHINE)
    validate(trace, make_plan(trace, MACHINE, budget, offload_budget_bytes=caught.value.smallest_bytes), MACHINE)


# -- properties ----------------------------------------------------------------------------------------------------


@few
@given(trace=lane_traces(), machine=host_machines, share=st.floats(0, 1.1))
def test_plans_of_two_lanes_keep_their_promises(trace: Trace, machine: Machine, share: float) -> None:
    for budget in (budget_of(trace, machine, 0.0), budget_of(trace, machine, share)):
        plan = planned(trace, machine, budget)
        assert make_plan(trace, machine, budget).to_json() == plan.to_json()
        assert Plan.from_json(plan.to_json()) == plan
        prediction = plan.prediction
        if trace.cyclic:
            assert prediction.pass_s >= max(prediction.compute_s, prediction.host_s) * (1 - 1e-9)
        found = explain(trace, plan, machine)
        assert all(use.total_bytes <= budget for use in found.memory)
        event(f"written back: {bool(found.written_back)}, host steps: {prediction.host_s > 0}")


def uneven(trace: Trace) -> Trace:
    """The same with times of which no sums are alike: links then serve nobody at the same time."""
    steps = tuple(
        replace(step, time_s=(step.time_s or 0.0) + 1.2345678e-5 * (number * number + 1) + 3.33e-6 * number)
        for number, step in enumerate(trace.steps)
    )
    return replace(trace, steps=steps)


@few
@given(trace=lane_traces().map(uneven), machine=host_machines, share=st.floats(0, 1))
def test_passes_end_when_a_replay_says_they_do(trace: Trace, machine: Machine, share: float) -> None:
    assume(any(step.lane is Lane.HOST for step in trace.steps))
    plan = make_plan(trace, machine, budget_of(trace, machine, share))
    gathered = gathered_bytes(trace, plan.bundles, {placement.bundle for placement in plan.residents})
    found = run_beside(trace, machine, plan, busy_times(trace, machine, plan, gathered))
    num_passes = min(len(found.pass_ends_s), 8)
    # What the next pass asks for shares links with this one.
    ends = LaneReplay(trace, plan, machine, num_passes + 2 if trace.cyclic else 1).run()
    assert found.pass_ends_s[:num_passes] == pytest.approx(ends[:num_passes], rel=1e-9, abs=1e-12)


@few
@given(trace=traces(), machine=disk_machines, share=st.floats(0, 1), window=st.sampled_from([0, 100_000]))
def test_one_lane_is_followed_as_by_the_simulation_of_one(
    trace: Trace, machine: Machine, share: float, window: int
) -> None:
    assume(trace.steps)
    machine = replace(machine, link=replace(machine.link, window_bytes=window))
    plan = make_plan(trace, machine, budget_of(trace, machine, share))
    gathered = gathered_bytes(trace, plan.bundles, {placement.bundle for placement in plan.residents})
    compute = busy_times(trace, machine, plan, gathered)
    written = written_bytes(trace, plan.offloads, plan.bundles)
    read = [plan.bundles[transfer.bundle].moved_bytes for transfer in plan.transfers]
    waits = Waits.of(trace, plan, [[] for _ in trace.steps])
    out = machine.write_link
    lanes = run_lanes(plan, waits, compute, read, written, machine.link, out, cyclic=trace.cyclic)
    writes = Writes(plan.offloads, written, out)
    steps = run_passes(compute, plan.transfers, read, machine.link, cyclic=trace.cyclic, writes=writes)
    assert lanes.begins_s == pytest.approx([step.start_s for step in steps], abs=1e-9)
    assert lanes.ends_s == pytest.approx([step.end_s for step in steps], abs=1e-9)
