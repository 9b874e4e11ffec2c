"""A plan of two lanes that was broken, at random or by hand, is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from mball.errors import PlanError, SchemaError
from mball.plan import make_plan, validate
from mball.plan.baselines import BASELINES
from mball.schema import Home, Lane, Machine, Offload, Placement, Plan, Tier, Trace, Transfer, Treatment
from mball.units import KIB, MIB
from tests.plan.test_lanes import AMPLE, MACHINE, budget_of, bundle_of, few, planned
from tests.plan.test_mutations import (
    MUTATIONS,
    Chance,
    Mutation,
    beside,
    change_made,
    change_offload_budget,
    change_resident,
    change_transfer,
    check_mutation,
    count_transfers,
    exchange,
    is_refused,
    is_wrong,
    keep_what_comes,
)
from tests.plan.traces import host_machines, lane_traces, make_optimized


def change_wait(chance: Chance, plan: Plan) -> Plan:
    at = chance.randrange(len(plan.transfers))
    one = plan.transfers[at]
    waits = [None, one.after, beside(chance, one.after_host or 0)]
    return replace(plan, transfers=exchange(plan.transfers, at, replace(one, after_host=chance.choice(waits))))


LANE_MUTATIONS: dict[Mutation, Callable[[Plan], Sequence[object]]] = {
    **MUTATIONS,
    change_wait: lambda plan: plan.transfers,
}
SHAPES: dict[str, tuple[Trace, int]] = {
    "beside": (make_optimized(5, 128 * KIB, host_s=1e-3, activation_bytes=64 * KIB), 5 * 128 * KIB),
    "on the device": (make_optimized(5, 128 * KIB, host_s=1e-3, on_device=True), 9 * 128 * KIB),
    "all stays": (make_optimized(5, 128 * KIB, host_s=1e-3, on_device=True), 64 * 128 * KIB),
}
# What only some shapes have.
ONLY: dict[Mutation, tuple[str, ...]] = {
    change_wait: ("beside",),
    change_resident: ("all stays",),
    change_made: ("beside",),
    change_offload_budget: ("beside",),
    change_transfer: ("beside", "on the device"),
    count_transfers: ("beside", "on the device"),
    keep_what_comes: ("beside", "on the device"),
}


@few
@given(
    trace=lane_traces(max_steps=8),
    machine=host_machines,
    share=st.floats(0, 1),
    chance=st.randoms(use_true_random=False),
)
def test_validate_refuses_every_mutation_that_breaks_a_plan_of_two_lanes(
    trace: Trace, machine: Machine, share: float, chance: Chance
) -> None:
    plan = make_plan(trace, machine, budget_of(trace, machine, share))
    for _ in range(4):
        mutation = chance.choice([one for one, needs in LANE_MUTATIONS.items() if needs(plan)])
        mutant = mutation(chance, plan)
        found = is_wrong(trace, mutant, machine)
        event(f"{mutation.__name__}: {'harmless' if found is None else 'broken'}")
        if found is not None:
            assert is_refused(trace, mutant, machine), f"{mutation.__name__}: {found}"


@pytest.mark.parametrize(
    ("shape", "mutation"),
    [(shape, mutation) for mutation in LANE_MUTATIONS for shape in ONLY.get(mutation, tuple(SHAPES))],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_each_mutation_breaks_plans_of_each_shape(shape: str, mutation: Mutation) -> None:
    trace, budget = SHAPES[shape]
    plan = planned(trace, MACHINE, budget)
    assert LANE_MUTATIONS[mutation](plan), "there is something to change"
    check_mutation(mutation, trace, plan, MACHINE, seeds=60, at_least=6)


BESIDE, ON_DEVICE, STAYING = (make_plan(trace, MACHINE, budget) for trace, budget in (SHAPES[name] for name in SHAPES))


def without(offloads: tuple[Offload, ...], at: int) -> tuple[Offload, ...]:
    return (*offloads[:at], *offloads[at + 1 :])


def with_offload(plan: Plan, bundle: int, **changes: int) -> Plan:
    """The plan with another first write of a bundle."""
    at = next(number for number, each in enumerate(plan.offloads) if each.bundle == bundle)
    changed = exchange(plan.offloads, at, replace(plan.offloads[at], **changes))
    return replace(plan, offloads=tuple(sorted(changed, key=lambda each: (each.after, each.until))))


def gradient_of(plan: Plan) -> Offload:
    """The write of a gradient."""
    index = next(n for n, tensor in enumerate(SHAPES["beside"][0].tensors) if tensor.name == "g2")
    return next(each for each in plan.offloads if index in plan.bundles[each.bundle].tensors)


def changed_and_brought() -> Transfer:
    """A transfer of what steps on the device change."""
    written = {each.bundle for each in ON_DEVICE.offloads}
    return next(each for each in ON_DEVICE.transfers if each.bundle in written)


def wrong_plans() -> dict[str, tuple[Trace, Plan]]:
    """By what is said of each."""
    beside_trace, device_trace, staying_trace = (SHAPES[name][0] for name in SHAPES)
    gradient = gradient_of(BESIDE)
    come = changed_and_brought()
    stays, first = STAYING.offloads[0], STAYING.residents[0]
    count = len(STAYING.steps)
    host_read = Placement(bundle=bundle_of(BESIDE, 0), offset_bytes=BESIDE.arena_bytes)
    grown = replace(BESIDE, arena_bytes=BESIDE.arena_bytes + MIB, budget_bytes=BESIDE.budget_bytes + MIB)
    of_zero = bundle_of(BESIDE, 0)
    return {
        "reads tensor 'g2' in host memory, and nothing writes it there before": (
            beside_trace,
            replace(BESIDE, offloads=tuple(each for each in BESIDE.offloads if each != gradient)),
        ),
        "is waited for in step": (beside_trace, with_offload(BESIDE, gradient.bundle, until=gradient.after - 1)),
        "waits for step None of the host lane": (
            beside_trace,
            replace(BESIDE, transfers=tuple(replace(each, after_host=None) for each in BESIDE.transfers)),
        ),
        "is resident, and step": (
            beside_trace,
            replace(
                grown,
                residents=(*BESIDE.residents, host_read),
                transfers=tuple(each for each in BESIDE.transfers if each.bundle != of_zero),
            ),
        ),
        "is written back 0 times": (
            device_trace,
            replace(ON_DEVICE, offloads=tuple(each for each in ON_DEVICE.offloads if each.bundle != come.bundle)),
        ),
        "times, 1 of them from where it is|change it, and is written back 2 times": (
            staying_trace,
            replace(STAYING, offloads=(stays, *STAYING.offloads)),
        ),
        "is written back from": (
            staying_trace,
            with_offload(STAYING, first.bundle, offset_bytes=first.offset_bytes + 4096),
        ),
        "changes it before that|is waited for in step": (
            staying_trace,
            with_offload(STAYING, stays.bundle, until=stays.after + count),
        ),
        "and no step on the device changes it": (
            replace(staying_trace, steps=tuple(replace(s, writes=s.writes[:1]) for s in staying_trace.steps)),
            STAYING,
        ),
    }


@pytest.mark.parametrize("reason", list(wrong_plans()))
def test_a_broken_plan_is_refused_by_its_reason(reason: str) -> None:
    trace, plan = wrong_plans()[reason]
    with pytest.raises(PlanError, match=reason):
        validate(trace, plan, MACHINE)


def test_what_is_brought_again_has_been_written_back() -> None:
    bundle = changed_and_brought().bundle
    write = next(each for each in ON_DEVICE.offloads if each.bundle == bundle)
    reasons = set()
    for later in range(1, len(ON_DEVICE.steps)):
        with pytest.raises(PlanError) as caught:
            validate(SHAPES["on the device"][0], with_offload(ON_DEVICE, bundle, until=write.until + later), MACHINE)
        reasons.add(str(caught.value))
    assert any("is not written back by then" in reason for reason in reasons)


def test_lanes_are_not_merged() -> None:
    trace = make_optimized(2, MIB, host_s=1e-3)
    alike = replace(trace, steps=tuple(replace(step, graph="g") for step in trace.steps))
    plan = planned(alike, MACHINE, AMPLE)
    at = next(n for n, step in enumerate(plan.steps) if trace.steps[step.first].lane is Lane.HOST)
    merged = replace(plan.steps[at - 1], end=plan.steps[at].end)
    with pytest.raises(PlanError, match="not on one lane"):
        validate(alike, replace(plan, steps=(*plan.steps[: at - 1], merged, *plan.steps[at + 1 :])), MACHINE)


def test_what_cannot_be_planned_is_refused_by_name() -> None:
    trace = make_optimized(2, MIB, host_s=1e-3)
    disk = replace(MACHINE, link=replace(MACHINE.link, source=Tier.DISK), write_link=None)
    with pytest.raises(SchemaError, match=r"'update1'.*uses host memory.*begins at disk"):
        make_plan(trace, disk, AMPLE)
    chained = replace(MACHINE, disk_link=replace(MACHINE.link, source=Tier.DISK, target=Tier.HOST))
    with pytest.raises(SchemaError, match=r"'update1'.*host lane.*disk_link"):
        make_plan(trace, chained, AMPLE, host_budget_bytes=AMPLE)
    with pytest.raises(SchemaError, match=r"'update1'.*writes 2 tensors.*disk_link"):
        make_plan(make_optimized(2, MIB, on_device=True), chained, AMPLE, host_budget_bytes=AMPLE)
    stuck = replace(
        trace, tensors=(*trace.tensors[:4], *(replace(t, may=(Treatment.STAY,)) for t in trace.tensors[4:]))
    )
    with pytest.raises(SchemaError, match=r"'g1' is born on the compute lane and read on the host lane.*offload"):
        make_plan(stuck, MACHINE, AMPLE)
    elsewhere = replace(trace.tensors[2], home=Home(tier=Tier.DISK, file="f", offset_bytes=0))
    with pytest.raises(SchemaError, match=r"'w2' has its home on tier disk"):
        make_plan(replace(trace, tensors=(*trace.tensors[:2], elsewhere, *trace.tensors[3:])), MACHINE, AMPLE)
    for plan_policy in BASELINES.values():
        with pytest.raises(SchemaError, match=r"'update1'.*this policy plans the device alone"):
            plan_policy(trace, MACHINE, AMPLE)
