"""A host part that was broken at random must be refused: what `validate` accepts, a replay of its bytes accepts too."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mball.errors import PlanError, SchemaError
from mball.plan import make_plan, simulate, validate
from mball.schema import HostPlan, HostTransfer, Machine, Placement, Plan, Trace
from mball.units import KIB, MIB
from tests.plan.chain_replay import ChainReplay
from tests.plan.replay import BrokenPlanError
from tests.plan.test_tiers import budgets_of, machines, one_link, shares, two_links
from tests.plan.traces import PAGE_BYTES, make_chain, make_tied, make_training, traces

few = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])

Chance = random.Random


def _host_of(plan: Plan) -> HostPlan:
    assert plan.host is not None
    return plan.host


def _with_transfer(plan: Plan, at: int, *new: HostTransfer) -> Plan:
    host = _host_of(plan)
    transfers = sorted((*host.transfers[:at], *new, *host.transfers[at + 1 :]), key=lambda t: (t.after, t.needed_by))
    return replace(plan, host=replace(host, transfers=tuple(transfers)))


def change_transfer(chance: Chance, plan: Plan) -> Plan:
    host, count = _host_of(plan), len(plan.transfers)
    at = chance.randrange(len(host.transfers))
    one, other = host.transfers[at], chance.choice(host.transfers)
    by = chance.choice([1, -1, 2, -2, count, -count])
    new = chance.choice([
        lambda: replace(one, after=one.after + by),
        lambda: replace(one, after=other.after),
        lambda: replace(one, needed_by=one.needed_by + by),
        lambda: replace(one, last_use=one.last_use + by),
        lambda: replace(one, after=one.after + by, needed_by=one.needed_by + by, last_use=one.last_use + by),
        lambda: replace(one, offset_bytes=other.offset_bytes),
        lambda: replace(one, offset_bytes=one.offset_bytes + chance.choice([PAGE_BYTES, -PAGE_BYTES, 512])),
        lambda: replace(one, bundle=chance.randrange(-1, len(plan.bundles) + 1)),
    ])()  # fmt: skip
    return _with_transfer(plan, at, new)


def count_transfers(chance: Chance, plan: Plan) -> Plan:
    host = _host_of(plan)
    at, other = chance.randrange(len(host.transfers)), chance.randrange(len(host.transfers))
    one = host.transfers[at]
    swapped = list(host.transfers)
    swapped[at], swapped[other] = swapped[other], swapped[at]
    return chance.choice([
        _with_transfer(plan, at),
        _with_transfer(plan, at, one, one),
        replace(plan, host=replace(host, transfers=tuple(swapped))),
    ])  # fmt: skip


def change_resident(chance: Chance, plan: Plan) -> Plan:
    host = _host_of(plan)
    at = chance.randrange(len(host.residents))
    one, other = host.residents[at], chance.choice(host.residents)
    new: tuple[Placement, ...] = chance.choice([
        (),
        (one, one),
        (replace(one, offset_bytes=other.offset_bytes),),
        (replace(one, offset_bytes=one.offset_bytes + chance.choice([PAGE_BYTES, -PAGE_BYTES, 512])),),
        (replace(one, bundle=chance.randrange(len(plan.bundles))),),
        (one, Placement(bundle=host.transfers[0].bundle, offset_bytes=one.offset_bytes)),
    ])  # fmt: skip
    return replace(plan, host=replace(host, residents=(*host.residents[:at], *new, *host.residents[at + 1 :])))


def change_bytes(chance: Chance, plan: Plan) -> Plan:
    host, by = _host_of(plan), chance.choice([1, -1, PAGE_BYTES, -PAGE_BYTES])
    return replace(plan, host=chance.choice([
        replace(host, arena_bytes=host.arena_bytes + by),
        replace(host, budget_bytes=host.arena_bytes - abs(by)),
    ]))  # fmt: skip


def change_copies(chance: Chance, plan: Plan) -> Plan:
    """The device's part, which the host part follows."""
    at = chance.randrange(len(plan.transfers))
    return replace(plan, transfers=plan.transfers[:at] + plan.transfers[at + 1 :])


def change_room(chance: Chance, plan: Plan) -> Plan:
    """What is set aside for offloaded tensors."""
    host = _host_of(plan)
    by = chance.choice([1, -1, PAGE_BYTES, -PAGE_BYTES, -host.offloaded_bytes, host.budget_bytes])
    return replace(plan, host=replace(host, offloaded_bytes=host.offloaded_bytes + by))


def change_offload(chance: Chance, plan: Plan) -> Plan:
    """The writes of the device's part."""
    at, by = chance.randrange(len(plan.offloads)), chance.choice([1, -1, 2, -2])
    one, other = plan.offloads[at], chance.choice(plan.offloads)
    new = chance.choice([
        [replace(one, after=one.after + by)],
        [replace(one, until=one.until + by)],
        [replace(one, after=one.after + by, until=one.until + by)],
        [replace(one, offset_bytes=other.offset_bytes)],
        [replace(one, offset_bytes=one.offset_bytes + by * PAGE_BYTES)],
        [replace(one, bundle=other.bundle)],
        [],
    ])  # fmt: skip
    changed = [*plan.offloads[:at], *new, *plan.offloads[at + 1 :]]
    return replace(plan, offloads=tuple(sorted(changed, key=lambda each: (each.after, each.until))))


Mutation = Callable[[Chance, Plan], Plan]
MUTATIONS: dict[Mutation, Callable[[Plan], Sequence[object]]] = {
    change_transfer: lambda plan: _host_of(plan).transfers,
    count_transfers: lambda plan: _host_of(plan).transfers,
    change_resident: lambda plan: _host_of(plan).residents if _host_of(plan).transfers else (),
    change_bytes: lambda plan: [plan],
    change_copies: lambda plan: plan.transfers,
    change_room: lambda plan: plan.offloads,
    change_offload: lambda plan: plan.offloads,
}


def is_refused(trace: Trace, plan: Plan, machine: Machine) -> bool:
    try:
        validate(trace, plan, machine)
    except (PlanError, SchemaError):
        return True
    return False


def is_wrong(trace: Trace, plan: Plan, machine: Machine) -> bool:
    """What the replay of its bytes, or its budget, says of a plan."""
    host = _host_of(plan)
    if host.arena_bytes + host.offloaded_bytes > host.budget_bytes:
        return True
    places = [(each.bundle, each.offset_bytes) for each in (*host.residents, *host.transfers)]
    if any(not 0 <= bundle < len(plan.bundles) for bundle, _ in places):
        return True
    if any(at < 0 or at + plan.bundles[bundle].size_bytes > host.arena_bytes for bundle, at in places):
        return True
    if any(not 0 <= each.after <= each.until < len(plan.steps) for each in plan.offloads):
        return True
    try:
        ChainReplay(trace, plan, machine, 4 if trace.cyclic else 1).follow_bytes()
    except (BrokenPlanError, RecursionError):
        return True
    return False


SHAPES: dict[str, tuple[Trace, int, int]] = {
    "chain": (make_chain(12, 128 * KIB), 3 * 128 * KIB, 5 * 144 * KIB),
    "visits": (make_tied(8, 128 * KIB, 256 * KIB), 4 * 128 * KIB, 4 * 144 * KIB),
    "once": (replace(make_chain(9, 128 * KIB), cyclic=False), 4 * 128 * KIB, 3 * 144 * KIB),
}
TRAINED = make_training(6, 128 * KIB, 256 * KIB)
SHAPES["trained"] = (TRAINED, 6 * 144 * KIB, 10 * 144 * KIB)
MACHINE = two_links(link=1e9, disk=2e8, link_latency_s=1e-6, disk_latency_s=1e-5)


# What only some shapes have.
ONLY: dict[Mutation, tuple[str, ...]] = {
    change_resident: ("chain",),
    change_room: ("trained",),
    change_offload: ("trained",),
}


@pytest.mark.parametrize(
    ("shape", "mutation"),
    [(shape, mutation) for mutation in MUTATIONS for shape in ONLY.get(mutation, tuple(SHAPES))],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_host_part_that_was_broken_is_refused(shape: str, mutation: Mutation) -> None:
    trace, budget, host_bytes = SHAPES[shape]
    plan = make_plan(trace, MACHINE, budget, host_budget_bytes=host_bytes)
    validate(trace, plan, MACHINE)
    assert not is_wrong(trace, plan, MACHINE)
    assert MUTATIONS[mutation](plan), "there is something to change"
    outcomes: Counter[tuple[bool, bool]] = Counter()
    for seed in range(60):
        mutant = mutation(random.Random(seed), plan)
        wrong = is_wrong(trace, mutant, MACHINE)
        outcomes[wrong, is_refused(trace, mutant, MACHINE)] += 1
        assert not wrong or is_refused(trace, mutant, MACHINE), f"seed {seed}"
    assert outcomes[True, True] >= 8, outcomes


@few
@given(
    trace=traces(max_steps=8, writing=False), machine=machines, device=shares, chance=st.randoms(use_true_random=False)
)
def test_validate_refuses_every_mutation_of_a_host_part_that_breaks_it(
    trace: Trace, machine: Machine, device: float, chance: Chance
) -> None:
    budget, host_bytes = budgets_of(trace, machine, device * 0.6, chance.random() * 0.4)
    plan = make_plan(trace, machine, budget, host_budget_bytes=host_bytes)
    for _ in range(3):
        fitting = [one for one, needs in MUTATIONS.items() if needs(plan)]
        mutation = chance.choice(fitting)
        mutant = mutation(chance, plan)
        # The device's part is for other tests; here it is whole.
        if mutation not in (change_copies, change_offload) and plan.transfers and is_wrong(trace, mutant, machine):
            event(f"{mutation.__name__}: broken")
            assert is_refused(trace, mutant, machine), mutation.__name__


def test_a_plan_without_the_part_that_its_machine_needs_is_refused() -> None:
    trace = make_chain(12, MIB)
    plan = make_plan(trace, MACHINE, 4 * MIB, host_budget_bytes=4 * MIB)
    with pytest.raises(PlanError, match="no host part"):
        validate(trace, replace(plan, host=None), MACHINE)
    with pytest.raises(PlanError, match="a host part"):
        validate(trace, plan, one_link(MACHINE))


def test_reads_that_overtake_each_other_are_refused() -> None:
    trace = make_chain(12, MIB)
    plan = make_plan(trace, MACHINE, 3 * MIB, host_budget_bytes=8 * MIB)
    host = _host_of(plan)
    late = replace(host.transfers[0], after=host.transfers[0].needed_by - 1)
    assert host.transfers[1].after < late.after, "so that the second comes before the first"
    with pytest.raises(PlanError, match="overtake each other"):
        validate(trace, _with_transfer(plan, 0, late), MACHINE)


def test_a_plan_that_waits_for_itself_is_refused() -> None:
    trace = make_chain(12, MIB)
    plan = make_plan(trace, MACHINE, 4 * MIB, host_budget_bytes=4 * MIB)
    host = _host_of(plan)
    first = host.transfers[0]
    stuck = _with_transfer(plan, 0, replace(first, after=first.needed_by))
    with pytest.raises(PlanError, match=r"after 0, needed by 0, .* not in order"):
        validate(trace, stuck, MACHINE)
    with pytest.raises(PlanError, match="waits for what waits for it"):
        simulate(trace, stuck, MACHINE)


def test_a_host_part_for_a_pass_that_writes_is_refused() -> None:
    trace = make_chain(12, MIB)
    plan = make_plan(trace, MACHINE, 4 * MIB, host_budget_bytes=16 * MIB)
    steps = (*trace.steps[:-1], replace(trace.steps[-1], writes=(11,)))
    with pytest.raises(PlanError, match="a host part, and step 'layer11' writes 1 tensors"):
        validate(replace(trace, steps=steps), plan, None)
