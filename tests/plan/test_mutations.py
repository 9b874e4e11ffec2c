"""A plan that was broken at random must be refused: what `validate` accepts, a replay of its bytes accepts too."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mball.errors import PlanError, SchemaError
from mball.plan import make_plan, smallest_budget, validate
from mball.schema import Bundle, Extent, Machine, Placement, Plan, PlanStep, Trace, Transfer, Treatment
from mball.units import KIB, MIB
from tests.plan.replay import BrokenPlanError, replay
from tests.plan.traces import PAGE_BYTES, machines, make_chain, make_machine, make_tied, make_training, traces

few = settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.too_slow])

Chance = random.Random
T = TypeVar("T")


def is_refused(trace: Trace, plan: Plan, machine: Machine) -> bool:
    try:
        validate(trace, plan, machine)
    except (PlanError, SchemaError):
        return True
    return False


def is_wrong(trace: Trace, plan: Plan, machine: Machine) -> str | None:
    """What the replay finds wrong."""
    try:
        replay(trace, plan, machine)
    except BrokenPlanError as error:
        return str(error)
    return None


# -- mutations -----------------------------------------------------------------------------------------------------


def exchange(items: Sequence[T], at: int, *new: T) -> tuple[T, ...]:
    return (*items[:at], *new, *items[at + 1 :])


def beside(chance: Chance, value: int, *others: int, step: int = 1) -> int:
    """Another number: one step or a few away, the other way around, or one that is used elsewhere."""
    return chance.choice([value + step, value - step, value + 3 * step, value - 3 * step, -value - 1, 0, *others])


def change_transfer(chance: Chance, plan: Plan) -> Plan:
    at = chance.randrange(len(plan.transfers))
    one, other, count = plan.transfers[at], chance.choice(plan.transfers), len(plan.steps)
    new = chance.choice([
        lambda: replace(one, after=beside(chance, one.after, other.after, one.after + count, one.after - count)),
        lambda: replace(one, needed_by=beside(chance, one.needed_by, other.needed_by, one.needed_by + count)),
        lambda: replace(one, last_use=beside(chance, one.last_use, other.last_use, one.last_use + count)),
        lambda: replace(one, offset_bytes=beside(chance, one.offset_bytes, other.offset_bytes, step=PAGE_BYTES)),
        lambda: replace(one, offset_bytes=beside(chance, one.offset_bytes, step=512)),
        lambda: replace(one, bundle=chance.randrange(-1, len(plan.bundles) + 1)),
        lambda: replace(one, after=one.after + 1, needed_by=one.needed_by + 1, last_use=one.last_use + 1),
        lambda: replace(one, after=one.after - count, needed_by=one.needed_by - count, last_use=one.last_use - count),
    ])()  # fmt: skip
    return replace(plan, transfers=_perhaps_sorted(chance, exchange(plan.transfers, at, new)))


def change_made(chance: Chance, plan: Plan) -> Plan:
    at = chance.randrange(len(plan.made))
    one, other, count = plan.made[at], chance.choice(plan.made), len(plan.steps)
    new = chance.choice([
        lambda: replace(one, step=beside(chance, one.step, other.step, one.step + count)),
        lambda: replace(one, last_use=beside(chance, one.last_use, other.last_use, one.last_use + count)),
        lambda: replace(one, offset_bytes=beside(chance, one.offset_bytes, other.offset_bytes, step=PAGE_BYTES)),
        lambda: replace(one, bundle=chance.randrange(-1, len(plan.bundles) + 1)),
        lambda: replace(one, is_anew=not one.is_anew),
    ])()  # fmt: skip
    return replace(plan, made=chance.choice([exchange(plan.made, at, new), exchange(plan.made, at)]))


def change_offload(chance: Chance, plan: Plan) -> Plan:
    at = chance.randrange(len(plan.offloads))
    one, other, count = plan.offloads[at], chance.choice(plan.offloads), len(plan.steps)
    new = chance.choice([
        lambda: replace(one, after=beside(chance, one.after, other.after, one.after + count)),
        lambda: replace(one, until=beside(chance, one.until, other.until, one.until + count)),
        lambda: replace(one, offset_bytes=beside(chance, one.offset_bytes, other.offset_bytes, step=PAGE_BYTES)),
        lambda: replace(one, bundle=chance.randrange(-1, len(plan.bundles) + 1)),
    ])()  # fmt: skip
    changed = chance.choice([exchange(plan.offloads, at, new), exchange(plan.offloads, at), (*plan.offloads, one)])
    in_order = sorted(changed, key=lambda each: (each.after, each.until)) if chance.random() < 0.5 else changed
    return replace(plan, offloads=tuple(in_order))


def change_offload_budget(chance: Chance, plan: Plan) -> Plan:
    size = sum(plan.bundles[offload.bundle].size_bytes for offload in plan.offloads)
    return replace(plan, offload_budget_bytes=chance.choice([0, PAGE_BYTES, size // 2, size - 1, size]))


def count_transfers(chance: Chance, plan: Plan) -> Plan:
    at = chance.randrange(len(plan.transfers))
    one, other = plan.transfers[at], chance.randrange(len(plan.transfers))
    dropped = exchange(plan.transfers, at)
    swapped = exchange(exchange(plan.transfers, at, plan.transfers[other]), other, one)
    doubled = exchange(plan.transfers, at, one, one)
    places = exchange(
        exchange(plan.transfers, at, replace(one, offset_bytes=plan.transfers[other].offset_bytes)),
        other,
        replace(plan.transfers[other], offset_bytes=one.offset_bytes),
    )
    return replace(plan, transfers=chance.choice([dropped, swapped, doubled, places]))


def change_resident(chance: Chance, plan: Plan) -> Plan:
    at = chance.randrange(len(plan.residents))
    one, other = plan.residents[at], chance.choice(plan.residents)
    new: tuple[Placement, ...] = chance.choice([
        (),
        (one, one),
        (replace(one, offset_bytes=beside(chance, one.offset_bytes, other.offset_bytes, step=PAGE_BYTES)),),
        (replace(one, bundle=chance.randrange(len(plan.bundles))),),
        (one, replace(one, bundle=chance.randrange(len(plan.bundles)))),
    ])  # fmt: skip
    return replace(plan, residents=exchange(plan.residents, at, *new))


def keep_what_comes(chance: Chance, plan: Plan) -> Plan:
    one = chance.choice(plan.transfers)
    place = Placement(bundle=one.bundle, offset_bytes=chance.choice([one.offset_bytes, plan.arena_bytes]))
    others = tuple(other for other in plan.transfers if other.bundle != one.bundle)
    return replace(plan, residents=(*plan.residents, place), transfers=chance.choice([plan.transfers, others]))


def change_step(chance: Chance, plan: Plan) -> Plan:
    at = chance.randrange(len(plan.steps))
    one = plan.steps[at]
    other = chance.randrange(len(plan.bundles)) if plan.bundles else 0
    new: tuple[PlanStep, ...] = chance.choice([
        (),
        (one, one),
        (replace(one, first=beside(chance, one.first)),),
        (replace(one, end=beside(chance, one.end)),),
        (replace(one, reads=one.reads[1:]),),
        (replace(one, reads=(*one.reads, other)),),
        (replace(one, reads=one.reads[::-1]),),
        (replace(one, reads=(other, *one.reads[1:])),),
        (replace(one, end=one.first + 1), replace(one, first=one.first + 1)),
    ])  # fmt: skip
    return replace(plan, steps=exchange(plan.steps, at, *new))


def merge_steps(chance: Chance, plan: Plan) -> Plan:
    if len(plan.steps) < 2:
        return plan
    at = chance.randrange(len(plan.steps) - 1)
    one, other = plan.steps[at : at + 2]
    merged = PlanStep(first=one.first, end=other.end, reads=tuple(dict.fromkeys((*one.reads, *other.reads))))

    def later(step: int, *, is_start: bool = False) -> int:
        passes, within = divmod(step, len(plan.steps))
        # What started or ended between the two steps does so beside them: rightly, or not.
        moved = within - (within > at) if not is_start or chance.random() < 0.8 else within
        return passes * (len(plan.steps) - 1) + moved

    transfers = [
        replace(
            each,
            after=later(each.after, is_start=True),
            needed_by=later(each.needed_by),
            last_use=later(each.last_use),
        )
        for each in plan.transfers
    ]
    steps = (*plan.steps[:at], merged, *plan.steps[at + 2 :])
    return replace(plan, steps=steps, transfers=_perhaps_sorted(chance, transfers))


def change_bundle(chance: Chance, plan: Plan) -> Plan:
    at = chance.randrange(len(plan.bundles))
    one, other = plan.bundles[at], chance.choice(plan.bundles)
    new: Bundle = chance.choice([
        lambda: replace(one, size_bytes=beside(chance, one.size_bytes, other.size_bytes, step=PAGE_BYTES)),
        lambda: replace(one, size_bytes=one.size_bytes + chance.choice([1, -1, 512])),
        lambda: replace(one, tensors=one.tensors[1:], offsets_bytes=one.offsets_bytes[1:]),
        lambda: replace(one, tensors=one.tensors[1:]),
        lambda: replace(one, tensors=one.tensors[::-1]),
        lambda: replace(one, tensors=(*one.tensors, *other.tensors)),
        lambda: replace(one, tensors=other.tensors, offsets_bytes=other.offsets_bytes),
        lambda: replace(one, offsets_bytes=tuple(beside(chance, each) for each in one.offsets_bytes)),
        lambda: replace(one, extents=other.extents),
        lambda: replace(one, extents=one.extents[1:]),
        lambda: replace(one, extents=one.extents + one.extents[:1]),
    ])()  # fmt: skip
    return replace(plan, bundles=exchange(plan.bundles, at, new))


def change_extent(chance: Chance, plan: Plan) -> Plan:
    with_extents = [number for number, bundle in enumerate(plan.bundles) if bundle.extents]
    if not with_extents:
        return plan
    at = chance.choice(with_extents)
    bundle = plan.bundles[at]
    which = chance.randrange(len(bundle.extents))
    one = bundle.extents[which]
    new: Extent = chance.choice([
        lambda: replace(one, file=chance.choice("abf")),
        lambda: replace(one, offset_bytes=beside(chance, one.offset_bytes, step=512)),
        lambda: replace(one, size_bytes=beside(chance, one.size_bytes, step=512)),
        lambda: replace(one, slot_offset_bytes=beside(chance, one.slot_offset_bytes, step=PAGE_BYTES)),
        lambda: replace(one, slot_offset_bytes=beside(chance, one.slot_offset_bytes, step=512)),
        lambda: replace(one, offset_bytes=one.offset_bytes - 512, size_bytes=one.size_bytes + 512),
        lambda: replace(one, offset_bytes=one.offset_bytes + 1, size_bytes=one.size_bytes - 1),
    ])()  # fmt: skip
    changed = replace(bundle, extents=exchange(bundle.extents, which, new))
    return replace(plan, bundles=exchange(plan.bundles, at, changed))


def change_bytes(chance: Chance, plan: Plan) -> Plan:
    by = chance.choice([1, -1, PAGE_BYTES, -PAGE_BYTES, MIB, -MIB])
    return chance.choice([
        lambda: replace(plan, arena_bytes=plan.arena_bytes + by),
        lambda: replace(plan, fixed_bytes=plan.fixed_bytes + by),
        lambda: replace(plan, activation_bytes=plan.activation_bytes + by),
        lambda: replace(plan, budget_bytes=plan.budget_bytes + by),
        lambda: replace(plan, budget_bytes=plan.fixed_bytes + plan.activation_bytes + plan.arena_bytes - abs(by)),
    ])()  # fmt: skip


def _perhaps_sorted(chance: Chance, transfers: Sequence[Transfer]) -> tuple[Transfer, ...]:
    if chance.random() < 0.9:
        return tuple(sorted(transfers, key=lambda each: (each.after, each.needed_by)))
    return tuple(transfers)


Mutation = Callable[[Chance, Plan], Plan]
# With what each needs of a plan.
MUTATIONS: dict[Mutation, Callable[[Plan], Sequence[object]]] = {
    change_transfer: lambda plan: plan.transfers,
    count_transfers: lambda plan: plan.transfers,
    change_resident: lambda plan: plan.residents,
    keep_what_comes: lambda plan: plan.transfers,
    change_step: lambda plan: plan.steps,
    merge_steps: lambda plan: plan.steps,
    change_bundle: lambda plan: plan.bundles,
    change_extent: lambda plan: plan.bundles,
    change_bytes: lambda plan: [plan],
    change_made: lambda plan: plan.made,
    change_offload: lambda plan: plan.offloads,
    change_offload_budget: lambda plan: plan.offloads,
}


# -- tests ---------------------------------------------------------------------------------------------------------


def budget_of(trace: Trace, machine: Machine, share: float) -> int:
    total = sum(tensor.size_bytes for _, tensor in trace.homed())
    return smallest_budget(trace, machine).size_bytes + int(total * share)


@few
@given(trace=traces(), machine=machines, share=st.floats(0, 1), chance=st.randoms(use_true_random=False))
def test_validate_refuses_every_mutation_that_breaks_a_plan(
    trace: Trace, machine: Machine, share: float, chance: Chance
) -> None:
    plan = make_plan(trace, machine, budget_of(trace, machine, share))
    assert is_wrong(trace, plan, machine) is None
    validate(trace, plan, machine)
    for _ in range(4):
        mutation = chance.choice([one for one, needs in MUTATIONS.items() if needs(plan)])
        mutant = mutation(chance, plan)
        found = is_wrong(trace, mutant, machine)
        event(f"{mutation.__name__}: {'harmless' if found is None else 'broken'}")
        if found is not None:
            assert is_refused(trace, mutant, machine), f"{mutation.__name__}: {found}"


SIZE = 128 * KIB
SHAPES: dict[str, tuple[Trace, int]] = {
    "trained": (make_training(6, SIZE, SIZE, may=(Treatment.STAY, Treatment.OFFLOAD)), 5 * SIZE),
    "made anew": (
        make_training(6, SIZE, SIZE, may=(Treatment.STAY, Treatment.RECOMPUTE), recompute_s=1e-4),
        5 * SIZE,
    ),
    "chain": (make_chain(9, SIZE), 4 * SIZE),
    "tied": (make_tied(6, SIZE, 2 * SIZE), 5 * SIZE),
    "over the end": (make_tied(6, SIZE, 2 * SIZE), 3 * SIZE + 10 * PAGE_BYTES),
    "once": (replace(make_chain(9, SIZE), cyclic=False), 4 * SIZE),
}


# What only some shapes have.
ONLY = {
    change_resident: ("chain", "tied"),
    change_made: ("trained", "made anew"),
    change_offload: ("trained",),
    change_offload_budget: ("trained",),
}


@pytest.mark.parametrize(
    ("shape", "mutation"),
    [(shape, mutation) for mutation in MUTATIONS for shape in ONLY.get(mutation, SHAPES)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_each_mutation_breaks_plans_of_each_shape(shape: str, mutation: Mutation) -> None:
    trace, budget = SHAPES[shape]
    machine = make_machine()
    plan = make_plan(trace, machine, budget)
    assert MUTATIONS[mutation](plan), "there is something to change"
    check_mutation(mutation, trace, plan, machine, seeds=80, at_least=8)


def check_mutation(
    mutation: Mutation, trace: Trace, plan: Plan, machine: Machine, *, seeds: int, at_least: int
) -> None:
    """Mutates a plan so many times: what breaks it is refused, and it breaks so often."""
    outcomes: Counter[tuple[bool, bool]] = Counter()
    for seed in range(seeds):
        mutant = mutation(random.Random(seed), plan)
        found = is_wrong(trace, mutant, machine)
        outcomes[found is not None, is_refused(trace, mutant, machine)] += 1
        assert found is None or is_refused(trace, mutant, machine), f"seed {seed}: {found}"
    # Steps may mostly be merged; a test of mutations that do nothing would prove nothing.
    assert mutation is merge_steps or outcomes[True, True] >= at_least, outcomes


def test_shapes_have_what_is_mutated() -> None:
    plans = {name: make_plan(trace, make_machine(), budget) for name, (trace, budget) in SHAPES.items()}
    assert plans["chain"].residents
    assert all(plan.transfers for plan in plans.values())
    over = plans["over the end"]
    assert any(transfer.last_use >= len(over.steps) for transfer in over.transfers)
    assert not plans["once"].residents
    assert plans["trained"].offloads
    assert any(made.is_anew for made in plans["made anew"].made)


def test_the_replay_sees_what_no_rule_names() -> None:
    """The replay itself: each of these is found by its bytes."""
    trace, budget = SHAPES["chain"]
    machine = make_machine()
    plan = make_plan(trace, machine, budget)
    assert is_wrong(trace, plan, machine) is None
    first = plan.transfers[0]
    moved = replace(first, offset_bytes=plan.transfers[1].offset_bytes)
    shifted = replace(plan.bundles[first.bundle].extents[0], offset_bytes=512)
    wrong = {
        "overwrites": replace(plan, transfers=exchange(plan.transfers, 0, moved)),
        "in 0 places": replace(plan, transfers=plan.transfers[1:]),
        "is not there": replace(
            plan,
            bundles=exchange(plan.bundles, first.bundle, replace(plan.bundles[first.bundle], extents=(shifted,))),
        ),
        "outside the arena": replace(plan, arena_bytes=plan.arena_bytes - PAGE_BYTES),
        "more than the budget": replace(plan, budget_bytes=plan.arena_bytes - 1),
    }
    for reason, mutant in wrong.items():
        found = is_wrong(trace, mutant, machine)
        assert found is not None
        assert reason in found
