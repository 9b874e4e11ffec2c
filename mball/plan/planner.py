"""Chooses residency, slots and transfers: drafts a few dozen plans and keeps the one that simulates fastest."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mball.errors import BudgetError
from mball.plan.bundles import TINY_WEIGHT_BYTES, even_bundle, finest_bundles, group_weights, lay_out_bundle
from mball.plan.demand import Demand
from mball.plan.placement import keep_in_place, stack
from mball.plan.residency import choose_residents
from mball.plan.simulate import predict, run_passes, trace_times
from mball.plan.slots import earliest_starts, place_visits
from mball.plan.smallest import check_problem, smallest_for
from mball.plan.steps import Bridge, Visit, count_visits, find_visits, merge_steps
from mball.schema import LiveRange, Machine, Placement, Plan, PlanStep, Prediction, Trace, Transfer
from mball.units import MIB, format_bytes, round_down

LARGEST_TARGET_BYTES = 32 * MIB
# A bundle of an eighth of the arena leaves room for a few in flight beside the residents.
TARGETS_PER_ARENA = (8, 32, 128)
POOL_DEPTHS = (1, 2, 3, 4, 6, 8)
# A plan with other bundles than those in the arena takes over when it is faster by this factor: all that is there is
# then read again.
WORTH_OTHER_BUNDLES = 1.02
# The finest slots, which take no byte too many, each have a size of their own: nothing else fits in their place.
WORTH_ODD_SIZES = 1.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A complete candidate; offsets are final."""

    demand: Demand
    steps: tuple[PlanStep, ...]
    residents: tuple[Placement, ...]
    transfers: tuple[Transfer, ...]
    arena_bytes: int
    prediction: Prediction

    def cost(self) -> tuple[float, int, int]:
        """Returns what to minimise: pass time to four digits, then bytes on the link, then requests."""
        return float(f"{self.prediction.pass_s:.4g}"), self.prediction.streamed_bytes, len(self.transfers)


def make_plan(
    trace: Trace, machine: Machine, budget_bytes: int, *, fixed_bytes: int = 0, previous: Plan | None = None
) -> Plan:
    """Returns the plan that runs `trace` within `budget_bytes` in the least predicted time.

    Args:
        fixed_bytes: device memory that never moves (buffers); part of the budget.
        previous: the plan whose residents are in the arena now. Its bundles are kept while no others are faster by
            more than 2 %, and so are the places of its residents where they leave room for the others.

    Raises:
        BudgetError: the budget is below the smallest that works, which the error names.
        ConfigError: `fixed_bytes` is negative.
        SchemaError: trace or machine contradict themselves.
    """
    check_problem(trace, machine, fixed_bytes)
    finest = Demand.of(trace, finest_bundles(trace, machine))
    smallest = smallest_for(trace, finest, fixed_bytes)
    if budget_bytes < smallest.size_bytes:
        raise BudgetError(
            f"budget {format_bytes(budget_bytes)} ({budget_bytes} B) is too small for {trace.name!r}: the smallest "
            f"that works is {format_bytes(smallest.size_bytes)} ({smallest.size_bytes} B), because "
            f"{smallest.limited_by}; raise the budget to at least {smallest.size_bytes} B",
            budget_bytes=budget_bytes,
            smallest_bytes=smallest.size_bytes,
            limited_by=smallest.limited_by,
        )
    activation_bytes = smallest.activation_bytes
    arena_bytes = round_down(budget_bytes - fixed_bytes - activation_bytes, machine.page_bytes)
    best = _best_draft(trace, machine, finest, arena_bytes, previous)
    residents, transfers, moved_bytes = best.residents, best.transfers, 0
    if previous is not None:
        residents, moved_bytes = keep_in_place(best.demand, residents, previous, arena_bytes - best.arena_bytes)
        transfers = tuple(replace(each, offset_bytes=each.offset_bytes + moved_bytes) for each in transfers)
    return Plan(
        trace_name=trace.name,
        budget_bytes=budget_bytes,
        fixed_bytes=fixed_bytes,
        activation_bytes=activation_bytes,
        arena_bytes=best.arena_bytes + moved_bytes,
        bundles=best.demand.bundles,
        steps=best.steps,
        residents=residents,
        transfers=transfers,
        prediction=best.prediction,
    )


def draft_plan(
    trace: Trace,
    machine: Machine,
    demand: Demand,
    residents: frozenset[int],
    visits: Sequence[Visit],
    arena_bytes: int,
) -> Draft | None:
    """Returns the better of two ring layouts for these residents and visits, or None when the visits do not fit."""
    placements, resident_bytes = stack(demand, residents)
    pool_bytes = arena_bytes - resident_bytes
    sizes = [demand.bundles[visit.bundle].size_bytes for visit in visits]
    filled = place_visits(visits, sizes, pool_bytes)
    if filled is None:
        return None
    steps, step_of = merge_steps(trace, demand, visits)
    spans = [
        replace(visit, live=LiveRange(first=step_of[visit.live.first], end=step_of[visit.live.end - 1] + 1))
        for visit in visits
    ]
    costs = trace_times(trace)
    compute = [sum(costs[step.first : step.end]) for step in steps]
    layouts = [filled[0]]
    balanced = place_visits(visits, sizes, pool_bytes, balanced_rounds=filled[1]) if filled[1] > 1 else None
    if balanced is not None and balanced[0] != filled[0]:
        layouts.append(balanced[0])
    drafts = []
    for offsets in layouts:
        transfers = _transfers(spans, sizes, [resident_bytes + offset for offset in offsets], len(steps))
        moved = [demand.moved_bytes[transfer.bundle] for transfer in transfers]
        timings = run_passes(compute, transfers, moved, machine.link)
        ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
        drafts.append(
            Draft(
                demand=demand,
                steps=tuple(steps),
                residents=placements,
                transfers=transfers,
                arena_bytes=resident_bytes + max(ends, default=0),
                prediction=predict(compute, timings, sum(moved), machine.link),
            )
        )
    return min(drafts, key=Draft.cost)


def _best_draft(trace: Trace, machine: Machine, finest: Demand, arena_bytes: int, previous: Plan | None) -> Draft:
    candidates = _granularities(trace, machine, arena_bytes)
    kept = None
    if previous is not None and (demand := _demand_of(trace, machine, previous)) is not None:
        same = [candidate for candidate in candidates if candidate[0].bundles == demand.bundles]
        kept = _best_of(same or [(demand, candidates[0][1])], trace, machine, arena_bytes)
        if kept is not None and not kept.transfers:
            return kept
        candidates = [candidate for candidate in candidates if candidate not in same]
    best = _best_of(candidates, trace, machine, arena_bytes)
    odd = _best_of([(finest, 0)], trace, machine, arena_bytes)
    if best is None:
        best = odd
    elif odd is not None:
        is_faster = odd.prediction.pass_s * WORTH_ODD_SIZES < best.prediction.pass_s
        best = odd if is_faster or (best.transfers and not odd.transfers) else best
    if kept is not None and (best is None or kept.prediction.pass_s <= WORTH_OTHER_BUNDLES * best.prediction.pass_s):
        best = kept
    assert best is not None, "the finest bundles, nothing resident and no bridging fit every budget that is allowed"
    return best


def _demand_of(trace: Trace, machine: Machine, previous: Plan) -> Demand | None:
    """Returns the demand under the bundles of another plan, None if they are not of these weights."""
    bundles = previous.bundles
    if sorted(index for bundle in bundles for index in bundle.tensors) != [index for index, _ in trace.homed()]:
        return None
    for bundle in bundles:
        if bundle not in (lay_out_bundle(bundle.tensors, trace, machine), even_bundle(bundle.tensors, trace, machine)):
            return None
    demand = Demand.of(trace, bundles)
    tiny = {index for index, tensor in trace.homed() if tensor.size_bytes <= TINY_WEIGHT_BYTES}
    pools = [number for number in demand.read_bundles() if len(bundles[number].tensors) > 1]
    return replace(demand, pooled=frozenset(number for number in pools if tiny.issuperset(bundles[number].tensors)))


def _best_of(
    candidates: Sequence[tuple[Demand, int]], trace: Trace, machine: Machine, arena_bytes: int
) -> Draft | None:
    for demand, _ in candidates:
        everything = frozenset(demand.read_bundles())
        if demand.slot_bytes(sorted(everything)) <= arena_bytes:
            draft = draft_plan(trace, machine, demand, everything, (), arena_bytes)
            assert draft is not None
            return draft
    best: Draft | None = None
    for demand, near_bytes in candidates:
        counts = count_visits(demand, near_bytes)
        tried: set[frozenset[int]] = set()
        for pool_bytes in _pool_sizes(demand, arena_bytes):
            residents = choose_residents(
                demand, counts, machine.link, resident_bytes=arena_bytes - pool_bytes, pool_bytes=pool_bytes
            )
            if residents is None or residents in tried:
                continue
            tried.add(residents)
            for bridge in Bridge:
                visits = find_visits(demand, residents, bridge, near_bytes)
                # The bridges that follow bring no fewer bytes.
                if best is not None and _read_s(demand, visits, machine) > best.prediction.pass_s:
                    break
                draft = draft_plan(trace, machine, demand, residents, visits, arena_bytes)
                if draft is not None:
                    best = draft if best is None or draft.cost() < best.cost() else best
                    break
    return best


def _read_s(demand: Demand, visits: Sequence[Visit], machine: Machine) -> float:
    return sum(demand.moved_bytes[visit.bundle] for visit in visits) / machine.link.bandwidth_bytes_per_s


def _granularities(trace: Trace, machine: Machine, arena_bytes: int) -> list[tuple[Demand, int]]:
    """Returns partitions of the weights from coarse to fine, each with its target size."""
    found: list[tuple[Demand, int]] = []
    for share in TARGETS_PER_ARENA:
        target = min(LARGEST_TARGET_BYTES, arena_bytes // share)
        bundles, pooled = group_weights(trace, machine, target)
        if all(tuple(bundles) != demand.bundles for demand, _ in found):
            found.append((Demand.of(trace, bundles, pooled), target))
    return found


def _pool_sizes(demand: Demand, arena_bytes: int) -> Iterator[int]:
    sizes = sorted(demand.bundles[b].size_bytes for b in demand.read_bundles() if b not in demand.pooled)
    sizes = [size for size in sizes if size] or [0]
    typical, largest = statistics.median_low(sizes), sizes[-1]
    pools = {depth * size for depth in POOL_DEPTHS for size in (typical, largest)} | {arena_bytes}
    return (pool for pool in sorted(pools) if pool <= arena_bytes)


def _transfers(
    visits: Sequence[Visit], sizes: Sequence[int], offsets: Sequence[int], num_steps: int
) -> tuple[Transfer, ...]:
    starts = earliest_starts(visits, sizes, offsets, num_steps)
    transfers = [
        Transfer(
            bundle=visit.bundle,
            offset_bytes=offset,
            after=start,
            needed_by=visit.live.first,
            last_use=visit.live.end - 1,
        )
        for visit, offset, start in zip(visits, offsets, starts, strict=True)
    ]
    return tuple(sorted(transfers, key=lambda transfer: (transfer.after, transfer.needed_by, transfer.bundle)))
