"""Plans device and host memory together, where bundles come from disk through host memory.

[Note: two levels, one decision]
Each level is planned as one level is: the device on the link from host memory, then host memory on the link from disk,
under the copies that the device has asked for (`host.py`). What the first decision does not know is how fast bundles
will come: as fast as the link for what stays in host memory, as slow as the disk for the rest. So the device is planned
for several speeds, host memory for each of these, and the fastest over both links is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, product

import numpy as np

from mball.errors import BudgetError, ConfigError, PlanError
from mball.plan.chain import disk_bytes, simulate
from mball.plan.draft import Draft, draft_plan
from mball.plan.host import from_disk, host_partition
from mball.plan.offloading import (
    Search,
    is_sound,
    most_offloaded,
    narrowed,
    offloadable,
    peak_offloaded,
    placed_before,
    sets_within,
)
from mball.plan.partition import Partition
from mball.plan.placement import keep_in_place
from mball.plan.problem import Problem
from mball.plan.search import CLOSE, MANY_USES, best_draft
from mball.plan.smallest_host import confined, smallest_host_for
from mball.plan.validate import validate
from mball.schema import HostPlan, Link, Machine, Plan
from mball.units import format_bytes, round_down

# The device is also planned as if the slower of the links were slower still by these factors.
SLOWER = (3, 9)
# Where tensors are offloaded it is also tried with at most so much of the room below, which weights have instead.
SHARES = (1.0, 0.5, 0.25)
# For each of these shares the device is planned for so many speeds only.
NARROW_SPEEDS = 2
# Beyond this factor what both links do together is another speed than that of one.
_ALIKE = 1.02
# Other bundles, and others in host memory, take over for a pass that is faster by this factor: they are all read again.
WORTH_MOVING = 1.02


def check_host_budget(machine: Machine, host_budget_bytes: int | None) -> None:
    """Raises ConfigError unless there is a budget of host memory exactly where bundles come through it."""
    if machine.disk_link is None and host_budget_bytes is not None:
        raise ConfigError(
            f"host_budget_bytes is {host_budget_bytes} B, and machine {machine.name!r} has no disk_link: its bundles "
            "do not come through host memory; leave host_budget_bytes out, or give the machine a disk_link"
        )
    if machine.disk_link is not None and (host_budget_bytes is None or host_budget_bytes < 0):
        raise ConfigError(
            f"host_budget_bytes is {host_budget_bytes}, and machine {machine.name!r} has a disk_link: say how many "
            "bytes of host memory the bundles that come through it may take, zero or more"
        )


def plan_tiers(problems: Sequence[Problem], search: Search) -> Plan:
    """Returns the fastest plan found for both levels.

    Args:
        problems: the pass with a budget of host memory, once for each treatment of what is born in it: where that may
            leave the device, that problem comes first.
        search: returns the fastest draft of the device for a problem on one link, None where it finds none.

    Raises:
        BudgetError: the budget of host memory is below the smallest that works, which the error names.
    """
    safe = _check_host_fits(problems)
    found: list[Plan] = []
    for problem in problems:
        bound_s = max(problem.finest.flow.compute_s, *_link_times(problem))
        for narrower in _shares(problem, found):
            if any(plan.prediction.pass_s <= CLOSE * bound_s for plan in found):
                break
            most = None if narrower is problem else NARROW_SPEEDS
            found += (plan for plan in _plans(narrower, search, bound_s, most) if is_sound(problem.trace, plan))
    before = _as_before(problems[0])
    if before is not None:
        found.append(before)
    if not found:
        plan = _with_host(safe, _confined_draft(safe))
        assert plan is not None, "no bundle that comes is larger than the smallest budget of host memory"
        found.append(plan)
    best = min(found, key=_cost)
    previous = problems[0].previous
    if previous is not None:
        kept = min((plan for plan in found if plan.bundles == previous.bundles), key=_cost, default=best)
        if kept.prediction.pass_s <= WORTH_MOVING * best.prediction.pass_s:
            return kept
    return best


def _plans(problem: Problem, search: Search, bound_s: float, most: int | None) -> Iterator[Plan]:
    """Yields the plans of a problem for at most so many speeds of the link, until one is as fast as can be."""
    tried: list[Draft] = []
    for draft in islice(_device_drafts(problem, search), most):
        if not any(_is_same(draft, other) for other in tried):
            tried.append(draft)
            plan = _with_host(problem, draft)
            if plan is not None:
                yield plan
                if not disk_bytes(plan) or plan.prediction.pass_s <= CLOSE * bound_s:
                    break


def _shares(problem: Problem, found: Sequence[Plan]) -> Iterator[Problem]:
    """Yields the problem, then with less and less of host memory for what is offloaded.

    Args:
        problem: the pass.
        found: the plans so far; those of the first problem are looked at.
    """
    yield problem
    budget_bytes = problem.host_budget_bytes
    assert budget_bytes is not None, "asked only where bundles come through host memory"
    if not problem.born:
        return
    every = frozenset(each.index for each in offloadable(problem))
    tried = {(every, False), (every, True)}
    most = min(most_offloaded(problem, every), budget_bytes)
    if found:
        most = max(plan.host.offloaded_bytes for plan in found if plan.host is not None)
    sets = placed_before(problem)
    if most:
        shares = SHARES if len(problem.finest.uses) <= MANY_USES else SHARES[:1]
        sets += [chosen for share in shares for chosen in islice(sets_within(problem, int(share * most)), 2)]
        sets.append(frozenset())
    for chosen, in_slots in product(sets, (True, False)):
        if (chosen, in_slots) not in tried:
            tried.add((chosen, in_slots))
            room_bytes = min(most_offloaded(problem, chosen), budget_bytes)
            narrower = narrowed(problem, chosen, room_bytes, in_slots=in_slots)
            if narrower is not None:
                yield narrower


def _check_host_fits(problems: Sequence[Problem]) -> Problem:
    """Returns a problem that fits for sure, with a share of host memory for what is offloaded in it."""
    budget_bytes = problems[0].host_budget_bytes
    assert budget_bytes is not None, "asked only where bundles come through host memory"
    smallest, safe = smallest_host_for(problems)
    if budget_bytes < smallest.size_bytes:
        raise BudgetError(
            f"host budget {format_bytes(budget_bytes)} ({budget_bytes} B) is too small for {safe.trace.name!r} with "
            f"{format_bytes(safe.budget_bytes)} on the device: the smallest that works is "
            f"{format_bytes(smallest.size_bytes)} ({smallest.size_bytes} B) of host memory, because "
            f"{smallest.limited_by}; raise the host budget to at least {smallest.size_bytes} B, or the budget of the "
            "device",
            budget_bytes=budget_bytes,
            smallest_bytes=smallest.size_bytes,
            limited_by=smallest.limited_by,
        )
    return safe


def _device_drafts(problem: Problem, search: Search) -> Iterator[Draft]:
    """Yields drafts of the device, each the fastest if bundles came at some speed."""
    previous = problem.previous and replace(problem.previous, host=None)
    if previous is not None and any(
        each.extents and each.size_bytes > (problem.host_arena_bytes or 0) for each in previous.bundles
    ):
        previous = None  # the search would keep bundles that cannot come any more
    finest = confined(problem, problem.host_arena_bytes or 0)
    if finest is None:  # with as much of what is born in the pass on the device
        return
    for link in _speeds(problem):
        machine = replace(problem.machine, link=link, disk_link=None)
        seen = Partition.of(problem.trace, machine, finest.demand.bundles, finest.demand.pooled)
        draft = search(replace(problem, finest=seen, previous=previous))
        if draft is not None:
            yield draft


def _speeds(problem: Problem) -> Iterator[Link]:
    """Yields the link as it is, as fast as both links are together at best, as slow as the disk is, and slower.

    A pass that waits for the disk gains by fewer bytes, not by bundles that come early: host memory sees to that. The
    slower the link seems, the more of the device is given to what stays.
    """
    machine = problem.machine
    assert machine.disk_link is not None, "asked only where there are two links"
    yield machine.link
    latency_s = machine.link.latency_s + machine.disk_link.latency_s
    slower = min(machine.link.bandwidth_bytes_per_s, machine.disk_link.bandwidth_bytes_per_s)
    speeds = [slower]
    if len(problem.finest.uses) <= MANY_USES:
        link_s, disk_s = _link_times(problem)
        if disk_s > _ALIKE * link_s > 0:
            speeds.insert(0, machine.link.bandwidth_bytes_per_s * link_s / disk_s)
        speeds += [slower / factor for factor in SLOWER]
    for speed in speeds:
        yield replace(machine.link, bandwidth_bytes_per_s=speed, latency_s=latency_s)


def _link_times(problem: Problem) -> tuple[float, float]:
    """Returns for how long a pass keeps each link busy at least: with what neither level can hold."""
    machine, demand = problem.machine, problem.finest.demand
    assert machine.disk_link is not None, "asked only where there are two links"
    comes = sum(demand.moved_bytes[bundle] for bundle in demand.read_bundles() if not demand.born[bundle])
    below = comes
    if problem.trace.cyclic:
        comes = max(comes - problem.arena_bytes, 0)
        below = max(comes - (problem.host_arena_bytes or 0), 0)
    return comes / machine.link.bandwidth_bytes_per_s, below / machine.disk_link.bandwidth_bytes_per_s


def _is_same(one: Draft, other: Draft) -> bool:
    return (one.bundles, one.residents, one.transfers, one.made, one.offloads) == (
        other.bundles,
        other.residents,
        other.transfers,
        other.made,
        other.offloads,
    )


def _confined_draft(problem: Problem) -> Draft:
    """Returns a draft of the device that needs as little host memory as any."""
    partition = confined(problem, problem.host_arena_bytes or 0)
    assert partition is not None, "the budget of host memory was checked"
    draft = best_draft([partition], problem.arena_bytes)
    if draft is None or not _fits_host(draft, problem.host_arena_bytes or 0):
        kept = np.array(sorted(partition.demand.pooled), dtype=np.int64)
        keep = partition.uses.placeable(partition.demand, kept)
        draft = draft_plan(partition, keep, problem.arena_bytes)
    assert draft is not None, "visits that meet are there for the same steps, and those fit"
    return draft


def _fits_host(draft: Draft, arena_bytes: int) -> bool:
    sizes = [draft.bundles[each.bundle].size_bytes for each in draft.transfers if draft.bundles[each.bundle].extents]
    return max(sizes, default=0) <= arena_bytes


def _with_host(problem: Problem, draft: Draft) -> Plan | None:
    """Returns the plan with host memory planned under this draft; None if a bundle is too large for that."""
    machine, budget_bytes = problem.machine, problem.host_budget_bytes
    assert budget_bytes is not None, "asked only where bundles come through host memory"
    offloaded = peak_offloaded(draft)
    arena_bytes = round_down(budget_bytes - offloaded, machine.page_bytes)
    if arena_bytes < 0 or not _fits_host(draft, arena_bytes):
        return None
    demand = draft.partition.demand
    previous = problem.previous
    before = None
    if previous is not None and previous.host is not None and previous.bundles == demand.bundles:
        before = previous.below()
    lower = _host_draft(host_partition(draft, machine), arena_bytes, before)
    residents, moved_bytes = lower.residents, 0
    if before is not None:
        residents, moved_bytes = keep_in_place(demand, residents, before, arena_bytes - lower.arena_bytes)
    reads = from_disk(lower.transfers)
    host = HostPlan(
        budget_bytes=budget_bytes,
        arena_bytes=lower.arena_bytes + moved_bytes,
        residents=residents,
        transfers=tuple(replace(each, offset_bytes=each.offset_bytes + moved_bytes) for each in reads),
        offloaded_bytes=offloaded,
    )
    plan = replace(problem.plan(draft), host=host)
    return replace(plan, prediction=simulate(problem.trace, plan, machine).prediction)


def _host_draft(below: Partition, arena_bytes: int, before: Plan | None) -> Draft:
    """Returns the draft of host memory; what stayed there before stays, unless that is slower by more than a little."""
    best = best_draft([below], arena_bytes)
    if best is None:  # one after another through one slot
        nothing = np.zeros(len(below.uses), dtype=bool)
        best = draft_plan(below, nothing, arena_bytes)
        assert best is not None, "no bundle that comes is larger than host memory"
    if before is None:
        return best
    stayed = np.full(len(before.bundles), np.iinfo(np.int64).max)
    for placement in before.residents:
        stayed[placement.bundle] = placement.offset_bytes + before.bundles[placement.bundle].size_bytes
    kept = best_draft([below], arena_bytes, stayed)
    is_close = kept is not None and kept.prediction.pass_s <= WORTH_MOVING * best.prediction.pass_s
    return kept if kept is not None and is_close else best


def _as_before(problem: Problem) -> Plan | None:
    """Returns the plan before as it is; None where it does not fit any more."""
    previous = problem.previous
    if previous is None or previous.host is None or problem.host_budget_bytes is None:
        return None
    apart = {index for bundle in previous.bundles for index in bundle.tensors}
    plan = replace(
        previous,
        trace_name=problem.trace.name,
        budget_bytes=problem.budget_bytes,
        fixed_bytes=problem.fixed_bytes,
        activation_bytes=max(problem.trace.activation_bytes(apart), default=0),
        host=replace(previous.host, budget_bytes=problem.host_budget_bytes),
    )
    try:
        validate(problem.trace, plan, problem.machine)
    except PlanError:
        return None
    return replace(plan, prediction=simulate(problem.trace, plan, problem.machine).prediction)


def _cost(plan: Plan) -> tuple[float, int, int, int]:
    """Returns what to minimise: pass time to four digits, then bytes from disk, to the device, and requests."""
    prediction = plan.prediction
    return float(f"{prediction.pass_s:.4g}"), disk_bytes(plan), prediction.streamed_bytes, len(plan.transfers)
