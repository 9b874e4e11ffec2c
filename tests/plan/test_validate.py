"""A plan that was broken by hand must be refused, and for the right reason."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from mball.errors import PlanError
from mball.plan import make_plan, validate
from mball.schema import Placement, Plan, PlanStep, Trace
from mball.units import MIB
from tests.plan.traces import (
    PAGE_BYTES,
    make_chain,
    make_changing,
    make_host_machine,
    make_machine,
    make_step,
    make_weights,
)

MACHINE = make_machine()
TRACE: Trace = make_chain(12, MIB)
PLAN: Plan = make_plan(TRACE, MACHINE, 5 * MIB)


def change_transfer(number: int, **changes: int) -> Plan:
    changed = replace(PLAN.transfers[number], **changes)  # type: ignore[arg-type]  # all its fields are int
    transfers = [*PLAN.transfers[:number], changed, *PLAN.transfers[number + 1 :]]
    return replace(PLAN, transfers=tuple(sorted(transfers, key=lambda t: (t.after, t.needed_by))))


def change_bundle(**changes: object) -> Plan:
    first = PLAN.transfers[0].bundle
    bundle = replace(PLAN.bundles[first], **changes)  # type: ignore[arg-type]  # chosen by each case
    return replace(PLAN, bundles=(*PLAN.bundles[:first], bundle, *PLAN.bundles[first + 1 :]))


def moved_extent(**changes: int) -> Plan:
    extent = PLAN.bundles[PLAN.transfers[0].bundle].extents[0]
    return change_bundle(extents=(replace(extent, **changes),))  # type: ignore[arg-type]  # all of them int


def test_the_plan_itself_is_valid_and_worth_breaking() -> None:
    validate(TRACE, PLAN, MACHINE)
    validate(TRACE, PLAN)
    assert PLAN.residents
    assert len(PLAN.transfers) > 4


BROKEN: dict[str, tuple[Callable[[], Plan], str]] = {
    "slots overlap": (
        lambda: change_transfer(2, offset_bytes=PLAN.transfers[1].offset_bytes, after=PLAN.transfers[1].after),
        "overlap",
    ),
    "on a resident": (lambda: change_transfer(0, offset_bytes=PLAN.residents[0].offset_bytes), "overlap"),
    "starts a step too early": (lambda: too_early(), "overlap"),
    "late": (lambda: one_step_late(), "neither resident nor transferred"),
    "needed after it is read": (lambda: change_transfer(3, needed_by=PLAN.transfers[3].last_use + 1), "not in order"),
    "dropped": (lambda: replace(PLAN, transfers=PLAN.transfers[1:]), "neither resident nor transferred"),
    "dropped resident": (lambda: replace(PLAN, residents=PLAN.residents[1:]), "neither resident nor transferred"),
    "unsorted": (lambda: replace(PLAN, transfers=PLAN.transfers[::-1]), "not sorted"),
    "resident and transferred": (
        lambda: replace(PLAN, residents=(*PLAN.residents, Placement(bundle=PLAN.transfers[0].bundle, offset_bytes=0))),
        "resident and transferred",
    ),
    "outside the arena": (lambda: change_transfer(0, offset_bytes=PLAN.arena_bytes), "outside the arena"),
    "arena beyond the budget": (lambda: replace(PLAN, arena_bytes=6 * MIB), "exceed the budget"),
    "fixed memory beyond the budget": (lambda: replace(PLAN, fixed_bytes=6 * MIB), "exceed the budget"),
    "arena too small": (lambda: replace(PLAN, arena_bytes=PLAN.arena_bytes - PAGE_BYTES), "outside the arena"),
    "off a page": (
        lambda: replace(
            PLAN,
            arena_bytes=PLAN.arena_bytes + 512,
            residents=tuple(replace(p, offset_bytes=p.offset_bytes + 512) for p in PLAN.residents),
            transfers=tuple(replace(t, offset_bytes=t.offset_bytes + 512) for t in PLAN.transfers),
        ),
        "not on a page",
    ),
    "weight offset": (lambda: change_bundle(offsets_bytes=(511,)), "no extent brings"),
    "extent too short": (lambda: moved_extent(size_bytes=MIB // 2), "no extent brings"),
    "extent shifted": (lambda: moved_extent(offset_bytes=512), "no extent brings"),
    "slot too small": (lambda: change_bundle(size_bytes=MIB), "fills"),
    "slot no multiple of a page": (lambda: change_bundle(size_bytes=MIB + 8191), "no multiple"),
    "a weight lost": (lambda: change_bundle(tensors=(), offsets_bytes=()), "0 bundles"),
    "a tensor without a home": (
        lambda: change_bundle(tensors=(len(TRACE.tensors),)),
        "bundles hold those that have a home or may leave",
    ),
    "a weight twice": (
        lambda: replace(PLAN, bundles=(*PLAN.bundles, PLAN.bundles[0])),
        "2 bundles",
    ),
    "a step lost": (lambda: replace(PLAN, steps=PLAN.steps[:-1], transfers=()), "end at trace step"),
    "a step twice": (lambda: replace(PLAN, steps=(PLAN.steps[0], *PLAN.steps)), "instead of beginning"),
    "reads too little": (
        lambda: replace(PLAN, steps=(replace(PLAN.steps[0], reads=()), *PLAN.steps[1:])),
        "its trace steps read",
    ),
}


def one_step_late() -> Plan:
    """A transfer for which its reader would not wait."""
    late = next(n for n, transfer in enumerate(PLAN.transfers) if transfer.last_use + 1 < len(PLAN.steps))
    transfer = PLAN.transfers[late]
    return change_transfer(late, needed_by=transfer.needed_by + 1, last_use=transfer.last_use + 1)


def too_early() -> Plan:
    """The first transfer that takes a slot over from another one begins before that one's last use."""
    for number, transfer in enumerate(PLAN.transfers):
        for other in PLAN.transfers:
            if other.last_use == transfer.after and other.offset_bytes == transfer.offset_bytes:
                return change_transfer(number, after=transfer.after - 1)
    raise AssertionError("no slot is used twice")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plan_is_refused(name: str) -> None:
    broken, reason = BROKEN[name]
    with pytest.raises(PlanError, match=reason):
        validate(TRACE, broken(), MACHINE)


def test_a_transfer_across_the_end_of_the_pass_must_not_meet_the_last_reader() -> None:
    reader = max(PLAN.transfers, key=lambda transfer: transfer.last_use)
    number = min(range(len(PLAN.transfers)), key=lambda n: PLAN.transfers[n].needed_by)
    with pytest.raises(PlanError, match="overlap"):
        validate(TRACE, change_transfer(number, offset_bytes=reader.offset_bytes, after=-2), MACHINE)


def test_a_transfer_must_not_overwrite_its_own_previous_pass() -> None:
    number = next(n for n, transfer in enumerate(PLAN.transfers) if transfer.last_use > 0)
    with pytest.raises(PlanError, match="overwrite itself"):
        validate(TRACE, change_transfer(number, after=-len(PLAN.steps)), MACHINE)


def test_merging_across_graphs_is_refused() -> None:
    steps = (make_step("a", 0), make_step("b", 1, graph="h"))
    trace = replace(make_chain(2, MIB), steps=steps)
    plan = make_plan(trace, MACHINE, 9 * MIB)
    reads = tuple(bundle for step in plan.steps for bundle in step.reads)
    with pytest.raises(PlanError, match="not of one graph"):
        validate(trace, replace(plan, steps=(PlanStep(first=0, end=2, reads=reads),)), MACHINE)


def test_too_little_room_for_activations_is_refused() -> None:
    trace = replace(TRACE, steps=(replace(TRACE.steps[0], scratch_bytes=999), *TRACE.steps[1:]))
    with pytest.raises(PlanError, match="activations need 999 B"):
        validate(trace, PLAN, MACHINE)


def test_a_second_copy_must_not_come_while_the_first_is_used() -> None:
    # A weight that is read by two of four steps, with no room to stay.
    trace = Trace(
        name="twice",
        tensors=make_weights([MIB] * 3, start_bytes=0),
        steps=tuple(make_step(f"s{number}", read) for number, read in enumerate((0, 1, 0, 2))),
    )
    plan = make_plan(trace, MACHINE, MIB)
    validate(trace, plan, MACHINE)
    number = next(
        n for n, each in enumerate(plan.transfers) if each.needed_by == 2 and 0 in plan.bundles[each.bundle].tensors
    )
    room = replace(plan, arena_bytes=2 * MIB, budget_bytes=2 * MIB)
    for after, is_right in ((0, True), (-1, False)):
        early = replace(plan.transfers[number], after=after, offset_bytes=MIB)
        transfers = sorted(
            (*plan.transfers[:number], early, *plan.transfers[number + 1 :]),
            key=lambda each: (each.after, each.needed_by),
        )
        broken = replace(room, transfers=tuple(transfers))
        if is_right:
            validate(trace, broken, MACHINE)
            continue
        with pytest.raises(PlanError, match="its copy in another slot is used up to step 0"):
            validate(trace, broken, MACHINE)


@pytest.mark.alone
@pytest.mark.usefixtures("settled_heap")
def test_checking_takes_longer_about_as_the_changed_weights_get_more() -> None:
    def checking_s(num_layers: int) -> float:
        trace, machine = make_changing(num_layers, 300_000), make_host_machine()
        plan = make_plan(trace, machine, num_layers * 75_000)
        assert len(plan.offloads) == num_layers
        times = []
        for _ in range(3):  # the shortest, since others run too
            start = time.process_time()
            validate(trace, plan, machine)
            times.append(time.process_time() - start)
        return min(times)

    # Five times as many layers; what is quadratic takes 25 times as long.
    assert checking_s(3000) < 10 * checking_s(600)
