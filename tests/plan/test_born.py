"""What is born in a pass and leaves the device before it is read: offloaded beside the compute, or made anew."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from mball.errors import SchemaError
from mball.plan import explain, make_plan, simulate, smallest_budget, utility_curve, validate
from mball.plan.bundles import born_bundles, finest_bundles
from mball.plan.draft import draft_plan
from mball.plan.leaving import WAYS
from mball.plan.partition import Partition
from mball.schema import LiveRange, Machine, Plan, Trace, Treatment
from mball.units import KIB, MIB, round_down
from tests.plan.traces import PAGE_BYTES, make_machine, make_training

OFFLOAD = (Treatment.STAY, Treatment.OFFLOAD)
ANEW = (Treatment.STAY, Treatment.RECOMPUTE)
BOTH = (Treatment.STAY, Treatment.OFFLOAD, Treatment.RECOMPUTE)


def all_bytes(trace: Trace) -> int:
    """More than everything takes together."""
    return sum(tensor.size_bytes + 3 * PAGE_BYTES for tensor in trace.tensors)


def planned(trace: Trace, machine: Machine, budget: int) -> Plan:
    plan = make_plan(trace, machine, budget)
    validate(trace, plan, machine)
    assert simulate(trace, plan, machine).prediction == plan.prediction
    return plan


def test_nothing_leaves_where_everything_fits() -> None:
    trace = make_training(8, MIB, MIB, may=BOTH, recompute_s=1e-3)
    plan = planned(trace, make_machine(), all_bytes(trace))
    assert not plan.offloads
    assert not plan.transfers
    assert not any(made.is_anew for made in plan.made)
    assert plan.prediction.stall_s == 0


@pytest.mark.parametrize("cyclic", [True, False], ids=["again", "once"])
def test_offloading_hides_behind_the_compute(cyclic: bool) -> None:
    # A layer's activation is written in 0.5 ms while the next one computes for 1 ms.
    trace = replace(make_training(16, 0, MIB, may=OFFLOAD), cyclic=cyclic)
    machine = make_machine(bandwidth=2.1e9, latency_s=0.0, write_bandwidth=2.1e9)
    plan = planned(trace, machine, 6 * MIB)
    assert len(plan.offloads) >= 10
    assert plan.prediction.stall_s == pytest.approx(0, abs=1e-9)
    assert plan.prediction.roofline_s == plan.prediction.pass_s
    simulation = simulate(trace, plan, machine)
    assert len(simulation.offloads) == len(plan.offloads)
    # Written after the step that bears it, and done before the step that is left only then.
    for offload, timing in zip(plan.offloads, simulation.offloads, strict=True):
        assert timing.start_s >= simulation.steps[offload.after].end_s - 1e-9
        assert timing.end_s <= simulation.steps[offload.until].end_s + 1e-9


def test_reads_and_writes_take_turns_on_one_wire() -> None:
    trace = make_training(16, 0, MIB, may=OFFLOAD)
    one_wire = planned(trace, make_machine(bandwidth=1e9), 6 * MIB)
    two_wires = planned(trace, make_machine(bandwidth=1e9, write_bandwidth=1e9), 6 * MIB)
    assert one_wire.prediction.roofline_s >= 2 * two_wires.prediction.streamed_bytes / 1e9
    assert two_wires.prediction.pass_s <= one_wire.prediction.pass_s


def test_what_is_cheap_to_compute_is_made_anew_on_a_slow_link() -> None:
    trace = make_training(16, 0, MIB, may=BOTH, recompute_s=2e-4)
    plan = planned(trace, make_machine(bandwidth=1e8), 6 * MIB)
    anew = [made for made in plan.made if made.is_anew]
    assert anew
    assert not plan.offloads
    # Ten of sixteen at most do not fit; each costs its time.
    compute_s = sum(step.time_s or 0.0 for step in trace.steps)
    assert plan.prediction.pass_s == pytest.approx(compute_s + len(anew) * 2e-4)
    assert len(anew) <= 11


def test_what_is_dear_to_compute_is_offloaded_on_a_fast_link() -> None:
    trace = make_training(16, 0, MIB, may=BOTH, recompute_s=5e-3)
    plan = planned(trace, make_machine(bandwidth=1e10), 6 * MIB)
    assert plan.offloads
    assert not any(made.is_anew for made in plan.made)


@pytest.mark.parametrize("bandwidth", [2e8, 1e9, 5e9])
def test_a_choice_of_both_is_no_slower_than_either(bandwidth: float) -> None:
    machine = make_machine(bandwidth=bandwidth)
    both, either = make_training(12, MIB, MIB, may=BOTH, recompute_s=1e-3), []
    for may in (OFFLOAD, ANEW):
        seconds = 1e-3 if Treatment.RECOMPUTE in may else None
        either.append(planned(make_training(12, MIB, MIB, may=may, recompute_s=seconds), machine, 8 * MIB))
    found = planned(both, machine, 8 * MIB).prediction.pass_s
    assert found <= min(plan.prediction.pass_s for plan in either) * 1.01


def test_the_smallest_budget_is_that_of_one_step() -> None:
    trace = make_training(16, MIB, MIB, may=OFFLOAD)
    smallest = smallest_budget(trace, make_machine()).size_bytes
    assert smallest <= 2 * MIB + 4 * PAGE_BYTES
    plan = planned(trace, make_machine(), smallest)
    assert len(plan.offloads) == 15  # the last one is read at once
    kept = make_training(16, MIB, MIB, may=(Treatment.STAY,))
    assert smallest_budget(kept, make_machine()).size_bytes >= 16 * MIB


def test_more_memory_makes_no_pass_slower() -> None:
    trace = make_training(12, MIB, MIB, may=OFFLOAD)
    machine = make_machine(bandwidth=1e9)
    passes, plan = [], None
    for budget in range(4 * MIB, 26 * MIB, 2 * MIB):
        plan = make_plan(trace, machine, budget, previous=plan)
        validate(trace, plan, machine)
        passes.append(plan.prediction.pass_s)
    assert passes == sorted(passes, reverse=True)
    assert passes[-1] == pytest.approx(36e-3)
    assert passes[0] > 1.5 * passes[-1]


def test_steps_that_need_much_for_themselves_do_not_crowd_out_what_stays() -> None:
    # Slots and activations are set aside for the whole pass. Where both have their peak in another step, tensors that
    # need not leave are better among the activations.
    trace = make_training(4, 0, MIB, may=OFFLOAD)
    steps = (replace(trace.steps[0], scratch_bytes=3 * MIB), *trace.steps[1:])
    trace = replace(trace, steps=steps)
    plan = planned(trace, make_machine(), 5 * MIB)
    assert not plan.made
    assert plan.prediction.stall_s == 0


def test_an_explanation_says_what_leaves() -> None:
    trace = make_training(16, 0, MIB, may=OFFLOAD)
    machine = make_machine(bandwidth=2e9, write_bandwidth=2e9)
    plan = planned(trace, machine, 6 * MIB)
    found = explain(trace, plan, machine)
    assert len(found.offloaded) == len(plan.offloads)
    assert found.anew == ()
    assert max(use.total_bytes for use in found.memory) <= 6 * MIB


def test_memory_that_spares_making_tensors_anew_shows_in_the_curve() -> None:
    # Nothing is streamed in any of these passes, and yet more memory helps.
    trace = make_training(8, 0, MIB, may=ANEW, recompute_s=1e-3)
    points = utility_curve(trace, make_machine(), [3 * MIB, 6 * MIB, 12 * MIB])
    passes = [point.prediction.pass_s for point in points if point.prediction is not None]
    assert len(passes) == 3
    assert passes[0] > passes[1] > passes[2] == pytest.approx(24e-3)


def test_a_wait_for_a_write_is_explained() -> None:
    trace = make_training(8, 0, MIB, may=OFFLOAD)
    machine = make_machine(bandwidth=1e10, write_bandwidth=2e8)
    found = explain(trace, planned(trace, machine, 3 * MIB), machine)
    writes = [stall for stall in found.stalls if stall.is_write]
    assert writes
    assert all(stall.weights and stall.size_bytes and stall.lead_s >= 0 for stall in writes)
    assert sum(stall.stall_s for stall in found.stalls) == pytest.approx(found.prediction.stall_s)


def test_what_may_leave_must_be_read_in_its_last_step() -> None:
    trace = make_training(4, 0, MIB, may=OFFLOAD)
    kept = replace(trace.tensors[4], live=LiveRange(first=0, end=8))
    unread = replace(trace.steps[7], reads=(0,))
    with pytest.raises(SchemaError, match="its last step, 'backward0', does not read it"):
        make_plan(
            replace(trace, tensors=(*trace.tensors[:4], kept, *trace.tensors[5:]), steps=(*trace.steps[:7], unread)),
            make_machine(),
            64 * MIB,
        )


def test_other_bundles_take_over_only_for_a_gain() -> None:
    # With more memory all could stay among the activations too, and would be no faster there.
    trace = make_training(5, 90 * KIB, 256 * KIB, may=OFFLOAD)
    machine = make_machine(bandwidth=1e9)
    plan = make_plan(trace, machine, 356352)
    assert plan.made
    more = make_plan(trace, machine, 1507840)
    assert more.bundles != plan.bundles
    again = make_plan(trace, machine, 1507840, previous=plan)
    assert again.bundles == plan.bundles
    assert again.prediction.pass_s == pytest.approx(more.prediction.pass_s)


def test_a_plan_that_keeps_its_bundles_tries_all_ways_out_too() -> None:
    # To make a tensor anew takes less than to write and read it, but there the link has nothing else to do.
    trace = make_training(8, 150 * KIB, MIB, may=BOTH, recompute_s=1e-4)
    machine = make_machine(bandwidth=1e9)
    plan = make_plan(trace, machine, 6496991)
    again = make_plan(trace, machine, 6234847, previous=plan)
    assert again.bundles == plan.bundles
    assert again.prediction.stall_s == pytest.approx(0, abs=1e-9)
    assert again.prediction.pass_s == pytest.approx(24e-3, rel=1e-3)


@pytest.mark.parametrize("bandwidth", [3e8, 1e9])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_small_passes_are_close_to_the_best_of_all_choices(bandwidth: float, share: float) -> None:
    trace = make_training(3, MIB, 2 * MIB, may=BOTH, recompute_s=2e-3)
    machine = make_machine(bandwidth=bandwidth)
    smallest = smallest_budget(trace, machine).size_bytes
    budget = smallest + int(share * (all_bytes(trace) - smallest))
    arena = round_down(budget, machine.page_bytes)
    bundles = [*finest_bundles(trace, machine), *born_bundles(trace, machine)]
    best = float("inf")
    for leaving in WAYS:
        partition = Partition.of(trace, machine, bundles, leaving=leaving)
        may = np.flatnonzero(partition.uses.may_stay)
        for choice in product([False, True], repeat=len(may)):
            keep = np.zeros(len(partition.uses), dtype=bool)
            keep[may] = choice
            resident = sum(bundles[bundle].size_bytes for bundle in partition.uses.residents(keep).tolist())
            draft = draft_plan(partition, keep, arena) if resident <= arena else None
            best = min(best, draft.prediction.pass_s if draft else best)
    assert planned(trace, machine, budget).prediction.pass_s <= 1.15 * best
