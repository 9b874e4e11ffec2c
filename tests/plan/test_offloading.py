"""What is offloaded has room for so much only on the tier below: fewer tensors leave."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mball.errors import BudgetError, ConfigError, PlanError
from mball.plan import explain, make_plan, simulate, smallest_budget, utility_curve, validate
from mball.plan.draft import Draft
from mball.plan.offloading import drafts_within, fewest_offloaded, most_offloaded, offloadable, sets_within
from mball.plan.problem import Problem
from mball.plan.search import best_draft, partitions
from mball.plan.simulate import offloaded_bytes
from mball.schema import Machine, Plan, Trace, Treatment
from mball.units import MIB
from tests.plan.replay import replay
from tests.plan.test_tiers import two_links
from tests.plan.traces import machines, make_host_machine, make_machine, make_optimized, make_training, traces

few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])

OFFLOAD = (Treatment.STAY, Treatment.OFFLOAD)
BOTH = (Treatment.STAY, Treatment.OFFLOAD, Treatment.RECOMPUTE)


def born_bytes(trace: Trace) -> int:
    return sum(tensor.size_bytes for _, tensor in trace.movable())


def budget_of(trace: Trace, machine: Machine, share: float) -> int:
    return smallest_budget(trace, machine).size_bytes + int(share * sum(t.size_bytes for t in trace.tensors))


def planned(trace: Trace, machine: Machine, budget: int, limit: int | None, previous: Plan | None = None) -> Plan:
    plan = make_plan(trace, machine, budget, offload_budget_bytes=limit, previous=previous)
    validate(trace, plan, machine)
    replay(trace, plan, machine)
    simulation = simulate(trace, plan, machine)
    assert simulation.prediction == plan.prediction
    assert plan.offload_budget_bytes == limit
    assert simulation.peak_offloaded_bytes == max(offloaded_bytes(plan), default=0)
    assert limit is None or simulation.peak_offloaded_bytes <= limit
    return plan


@few
@given(trace=traces(), machine=machines, device=st.floats(0, 0.6), below=st.floats(0, 1))
def test_every_budget_gives_a_plan_within_it_or_says_what_works(
    trace: Trace, machine: Machine, device: float, below: float
) -> None:
    budget, limit = budget_of(trace, machine, device), int(below * born_bytes(trace))
    try:
        plan, error = planned(trace, machine, budget, limit), None
    except BudgetError as found:
        plan, error = planned(trace, machine, budget, found.smallest_bytes), found
    if error is not None:
        event("too small")
        assert error.budget_bytes == limit < error.smallest_bytes
        assert f"{error.smallest_bytes} B" in str(error)
        limit = error.smallest_bytes
    assert Plan.from_json(plan.to_json()) == plan
    assert make_plan(trace, machine, budget, offload_budget_bytes=limit) == plan
    free = make_plan(trace, machine, budget)
    event(f"offloads: {bool(plan.offloads)}, would offload more: {max(offloaded_bytes(free), default=0) > limit}")
    if max(offloaded_bytes(free), default=0) <= limit:
        assert plan.prediction.pass_s <= free.prediction.pass_s * (1 + 1e-3), "it has room for that too"


@few
@given(trace=traces(), machine=machines, device=st.floats(0, 0.6), below=st.floats(0, 1))
def test_sets_of_tensors_need_no_more_than_they_may(
    trace: Trace, machine: Machine, device: float, below: float
) -> None:
    try:
        problem = Problem.of(trace, machine, budget_of(trace, machine, device), fixed_bytes=0, moves_born=True)
    except BudgetError:
        return
    limit, known = int(below * born_bytes(trace)), {each.index for each in offloadable(problem)}
    assert fewest_offloaded(problem) <= known
    for chosen in sets_within(problem, limit):
        assert chosen <= known
        assert most_offloaded(problem, chosen) <= limit
        # All of them are below from the end of their birth to their last use.
        lives = {index: trace.tensors[index].live for index in chosen}
        pages = {index: -(-trace.tensors[index].size_bytes // machine.page_bytes) for index in chosen}
        at_once = [
            sum(pages[index] for index, live in lives.items() if live and live.first < step < live.end)
            for step in range(len(trace.steps))
        ]
        assert most_offloaded(problem, chosen) == max(at_once, default=0) * machine.page_bytes


def test_bytes_below_are_counted_from_the_write_to_the_end_of_the_copy_back() -> None:
    # Three layers: a0 is born in step 0 and read in step 5, a1 in 1 and 4, a2 in 2 and 3, so it need not leave.
    trace = make_training(3, 0, MIB, may=OFFLOAD)
    plan = planned(trace, make_machine(bandwidth=4e9), 2 * MIB, None)
    assert [each.after for each in plan.offloads] == [0, 1]
    back = {each.bundle: each.needed_by for each in plan.transfers if plan.bundles[each.bundle].tensors[0] >= 3}
    assert sorted(back.values()) == [4, 5]
    assert offloaded_bytes(plan) == [0, MIB, 2 * MIB, 2 * MIB, 2 * MIB, MIB]
    assert simulate(trace, plan, make_machine(bandwidth=4e9)).peak_offloaded_bytes == 2 * MIB


@pytest.mark.parametrize("write_bandwidth", [None, 1e9])
def test_what_may_not_leave_stays(write_bandwidth: float | None) -> None:
    trace, machine = make_training(12, 0, MIB, may=OFFLOAD), make_machine(write_bandwidth=write_bandwidth)
    free = planned(trace, machine, 9 * MIB, None)
    # Nine of twelve can stay, in slots; eight among the activations, beside the slot of one that is borne.
    for limit in (12, 5, 4, 3):
        plan = planned(trace, machine, 9 * MIB, limit * MIB)
        assert plan.prediction.pass_s == pytest.approx(free.prediction.pass_s)
    with pytest.raises(BudgetError, match=r"on tier disk is too small .* with 9\.00 MiB on the device: 4") as at:
        make_plan(trace, machine, 9 * MIB, offload_budget_bytes=3 * MIB - 1)
    assert at.value.smallest_bytes == 4 * MIB
    # The other way out, which the error names.
    alone = smallest_budget(make_training(12, 0, MIB, may=(Treatment.STAY,)), machine).size_bytes
    assert f"with {alone} B nothing has to be offloaded" in str(at.value)
    assert not planned(trace, machine, alone, 0).offloads


def test_those_stay_that_are_soon_read_again() -> None:
    trace, machine = make_training(12, 0, MIB, may=OFFLOAD), make_machine(bandwidth=1e9)
    plan = planned(trace, machine, 9 * MIB, 3 * MIB)
    names = [trace.tensors[plan.bundles[each.bundle].tensors[0]].name for each in plan.offloads]
    assert names == ["a0", "a1", "a2"]


def test_what_can_be_made_anew_is_where_there_is_no_room_below() -> None:
    trace, machine = make_training(12, 0, MIB, may=BOTH, recompute_s=3e-3), make_machine(bandwidth=1e10)
    free = planned(trace, machine, 5 * MIB, None)
    assert free.offloads
    assert not any(made.is_anew for made in free.made)
    half = planned(trace, machine, 5 * MIB, 4 * MIB)
    none = planned(trace, machine, 5 * MIB, 0)
    assert not none.offloads
    assert 0 < len(half.offloads) < len(free.offloads)
    anew = [sum(made.is_anew for made in plan.made) for plan in (free, half, none)]
    assert anew[0] < anew[1] < anew[2]
    assert free.prediction.pass_s < half.prediction.pass_s < none.prediction.pass_s


@pytest.mark.parametrize("weight_bytes", [0, MIB])
def test_more_room_below_makes_no_pass_slower(weight_bytes: int) -> None:
    trace, machine = make_training(10, weight_bytes, MIB, may=BOTH, recompute_s=1e-3), make_machine(bandwidth=2e9)
    plans: list[Plan] = []
    for limit in range(0, 11 * MIB, 2 * MIB):
        plans.append(planned(trace, machine, 5 * MIB, limit, plans[-1] if plans else None))
    for one, other in pairwise(plans):
        assert other.prediction.pass_s <= one.prediction.pass_s * (1 + 1e-3)
    assert plans[-1].prediction.pass_s < 0.95 * plans[0].prediction.pass_s


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trace=traces(), machine=machines, growing=st.lists(st.floats(0, 1), min_size=2, max_size=3))
def test_growing_the_offload_budget_never_predicts_a_slower_pass(
    trace: Trace, machine: Machine, growing: list[float]
) -> None:
    budget, plan = budget_of(trace, machine, 0.2), None
    for share in sorted(growing):
        limit = int(share * born_bytes(trace))
        try:
            grown = planned(trace, machine, budget, limit, plan)
        except BudgetError:
            assert plan is None, "it fitted less"
            continue
        assert plan is None or grown.prediction.pass_s <= plan.prediction.pass_s * (1 + 1e-3)
        plan = grown


def test_the_same_budgets_move_nothing() -> None:
    trace, machine = make_training(10, MIB, MIB, may=OFFLOAD), make_machine(bandwidth=1e9)
    assert max(offloaded_bytes(planned(trace, machine, 9 * MIB, None))) > 4 * MIB
    plan = planned(trace, machine, 9 * MIB, 4 * MIB)
    again = planned(trace, machine, 9 * MIB, 4 * MIB, plan)
    assert again.bundles == plan.bundles
    assert again.residents == plan.residents
    assert again.prediction.pass_s <= plan.prediction.pass_s


def test_a_plan_that_takes_more_below_than_it_may_is_refused() -> None:
    trace, machine = make_training(8, 0, MIB, may=OFFLOAD), make_machine()
    plan = planned(trace, machine, 4 * MIB, None)
    peak = max(offloaded_bytes(plan))
    validate(trace, replace(plan, offload_budget_bytes=peak), machine)
    with pytest.raises(PlanError, match=f"take {peak} B below at one time; their budget is {peak - 1} B"):
        validate(trace, replace(plan, offload_budget_bytes=peak - 1), machine)


def test_a_write_for_nobody_is_refused() -> None:
    trace, machine = make_training(8, 0, MIB, may=OFFLOAD), make_machine()
    plan = planned(trace, machine, 4 * MIB, None)
    stays = next(made for made in plan.made if made.bundle not in {each.bundle for each in plan.offloads})
    first = replace(
        plan.offloads[0],
        bundle=stays.bundle,
        offset_bytes=stays.offset_bytes,
        after=stays.last_use,
        until=stays.last_use,
    )
    more = tuple(sorted((*plan.offloads, first), key=lambda each: (each.after, each.until)))
    with pytest.raises(PlanError, match="nothing brings it back"):
        validate(trace, replace(plan, offloads=more), machine)


def test_a_budget_is_for_one_link_and_not_negative() -> None:
    trace = make_training(4, MIB, MIB, may=OFFLOAD)
    with pytest.raises(ConfigError, match="must be zero or more"):
        make_plan(trace, make_machine(), 6 * MIB, offload_budget_bytes=-1)
    for ask in (make_plan, lambda *args, **more: utility_curve(*args[:2], [args[2]], **more)):
        with pytest.raises(ConfigError, match="share host_budget_bytes"):
            ask(trace, two_links(), 6 * MIB, host_budget_bytes=20 * MIB, offload_budget_bytes=MIB)


def test_a_curve_and_an_explanation_know_the_budget() -> None:
    trace, machine = make_training(12, 0, MIB, may=OFFLOAD), make_machine(bandwidth=1e9)
    budgets = [3 * MIB, 6 * MIB, 9 * MIB]
    curve = utility_curve(trace, machine, budgets, offload_budget_bytes=3 * MIB)
    assert [point.prediction is None for point in curve] == [True, True, False]
    plan = planned(trace, machine, 9 * MIB, 3 * MIB)
    assert curve[-1].prediction == plan.prediction
    found = explain(trace, plan, machine)
    assert found.offloaded_peak_bytes == 3 * MIB
    assert len(found.offloaded) == 3


@pytest.mark.alone
def test_choosing_the_fewest_takes_longer_about_as_they_get_more() -> None:
    def choosing_s(num_layers: int) -> float:
        trace, machine = make_training(num_layers, 0, 100_000, may=OFFLOAD), make_machine()
        problem = Problem.of(trace, machine, num_layers * 50_000, fixed_bytes=0, moves_born=True)
        times = []
        for _ in range(3):  # the shortest, since others run too
            start = time.process_time()
            assert num_layers / 2 < len(fewest_offloaded(problem)) < 0.6 * num_layers
            times.append(time.process_time() - start)
        return min(times)

    # Five times as many layers; what is quadratic takes 25 times as long.
    assert choosing_s(3000) < 10 * choosing_s(600)


def test_nothing_is_searched_where_the_host_lane_alone_needs_more_below() -> None:
    trace, machine = make_optimized(3, MIB, host_s=1e-3, activation_bytes=MIB), make_host_machine()
    problem = Problem.of(trace, machine, 4 * MIB, fixed_bytes=0, moves_born=True)
    searched: list[Problem] = []

    def search(narrower: Problem) -> Draft | None:
        searched.append(narrower)
        found = partitions(trace, machine, narrower.arena_bytes, narrower.born, narrower.host_arena_bytes)
        return best_draft(found, narrower.arena_bytes)

    draft = search(problem)
    assert draft is not None
    # Three gradients of one MiB go to the host lane.
    assert list(drafts_within(problem, draft, 3 * MIB - 1, search)) == []
    assert len(searched) == 1
    list(drafts_within(problem, draft, 3 * MIB, search))
    assert len(searched) > 1
