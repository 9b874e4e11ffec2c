"""Tries partitions, sizes of the pool and residents, and drafts the choices that seem fastest."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from mball.plan.arrays import Ints
from mball.plan.bundles import group_weights
from mball.plan.draft import Draft, draft_plan
from mball.plan.leaving import AT_ONCE, WAYS
from mball.plan.partition import Partition
from mball.plan.residency import Choice, Residency
from mball.plan.simulate import trace_times
from mball.schema import Bundle, Lane, Machine, Trace
from mball.units import MIB

LARGEST_TARGET_BYTES = 32 * MIB
# Bundles of an eighth of the arena leave room for a few in flight beside the residents.
TARGETS_PER_ARENA = (32, 8, 128)
# So much of the typical bundle, or of the largest, is tried for the pool.
POOL_DEPTHS = (1, 2, 3, 4, 6, 8, 16)
ROUNDS = 4
# So many of the choices that seem fastest are given addresses.
DRAFTS = 5
_ALIKE = 1.0001
# Beyond so many uses one partition has to do, and one draft.
MANY_USES = 2000
# So many visits, about, may be timed before anything is given addresses.
TIMED_VISITS = 60_000
FEWEST_POOLS = 3
# A draft this close to what no plan can beat is good enough; others are not looked for.
CLOSE = 1.005
# Where few bundles are used, sizes decide what fits beside what. With no more uses than this, stays are exchanged and
# slots are moved one by one, so many visits at most being timed in all.
FEW_USES = 64
EXCHANGED_VISITS = 3000
MOVED_VISITS = 1500
# Drafts cost more with more uses: with so many uses half of MOST_DRAFTS are made, and never fewer than DRAFTS.
MOST_DRAFTS = 12
HALVING_USES = 8
# One exchange or move is tried for so much of the predicted pass, and a few in any: planning must not take many passes.
TRY_S = 6e-5
FEWEST_TRIES = 64


def partitions(
    trace: Trace,
    machine: Machine,
    arena_bytes: int,
    born: Sequence[Bundle] = (),
    host_arena_bytes: int | None = None,
) -> Iterator[Partition]:
    """Yields partitions of the weights, the one first that is mostly good enough; `born` are in bundles already.

    Where bundles come through host memory they are of a size for that too, and those that do not fit there must stay.
    """
    smaller_bytes = arena_bytes if host_arena_bytes is None else min(arena_bytes, host_arena_bytes)
    found: list[tuple[Bundle, ...]] = []
    is_changed = any(step.writes for step in trace.steps if step.lane is Lane.COMPUTE)
    for share in TARGETS_PER_ARENA:
        bundles, pooled = group_weights(trace, machine, min(LARGEST_TARGET_BYTES, smaller_bytes // share))
        if tuple(bundles) not in found:
            found.append(tuple(bundles))
            if host_arena_bytes is not None:
                pooled |= {number for number, each in enumerate(bundles) if each.size_bytes > host_arena_bytes}
            for leaving in WAYS if born else (WAYS[0], AT_ONCE) if is_changed else WAYS[:1]:
                yield Partition.of(trace, machine, [*bundles, *born], pooled, leaving)


def best_draft(candidates: Iterable[Partition], arena_bytes: int, stayed: Ints | None = None) -> Draft | None:
    """Returns the fastest draft found for an arena of this size, None where none of these partitions fits.

    Partitions that come later are looked at while those before are not as fast as can be. See
    `Residency.choose` for `stayed`.
    """
    best: Draft | None = None
    for partition in candidates:
        draft = _best_of(partition, arena_bytes, stayed)
        if draft is not None and (best is None or draft.cost() < best.cost()):
            best = draft
        if best is not None and (
            len(partition.uses) > MANY_USES or best.prediction.pass_s <= CLOSE * fastest_s(partition, arena_bytes)
        ):
            break
    return best


def fastest_s(partition: Partition, arena_bytes: int) -> float:
    """Returns a time that no plan for this arena can beat while anything is streamed.

    That of the steps, with the rows that they look up at home unless all tables can stay too, and of the bytes that
    cannot stay, or change.
    """
    demand, machine, steps_s = partition.demand, partition.machine, partition.flow.least_s
    is_cyclic = partition.trace.cyclic
    fits = demand.slot_bytes([*demand.read_bundles(), *demand.tables()]) <= arena_bytes
    if is_cyclic and fits and steps_s == partition.flow.compute_s:
        steps_s = sum(trace_times(partition.trace))
    comes = sum(demand.moved_bytes[bundle] for bundle in demand.read_bundles() if not demand.born[bundle])
    if is_cyclic:
        anew = (bundle for bundle in demand.at_home.host_writes if demand.uses[bundle] and not demand.born[bundle])
        comes = max(comes - arena_bytes, sum(demand.moved_bytes[bundle] for bundle in anew))
    if machine.write_link is None:
        comes += sum(demand.at_home.changed_bytes.values())
    return max(steps_s, comes / machine.link.bandwidth_bytes_per_s)


def _best_of(partition: Partition, arena_bytes: int, stayed: Ints | None) -> Draft | None:
    uses = partition.uses
    if partition.read_slot_bytes <= arena_bytes and uses.all_may_stay:
        draft = draft_plan(partition, uses.may_stay, arena_bytes)
        assert draft is not None, "all are beside each other"
        return draft
    residency = Residency(partition)
    found = _choices(partition, residency, arena_bytes, stayed)
    if not found:
        return None
    drafts, moves = DRAFTS if len(uses) <= MANY_USES else 1, 0
    if len(uses) <= FEW_USES:
        # A search that takes longer than many passes does not pay.
        worth = max(int(found[0].pass_s / TRY_S), FEWEST_TRIES)
        found[:0] = reversed(residency.exchange(found[0], arena_bytes, min(EXCHANGED_VISITS // len(uses), worth)))
        drafts = max(MOST_DRAFTS * HALVING_USES // (HALVING_USES + len(uses)), DRAFTS)
        moves = min(MOVED_VISITS // len(uses), worth)
    best: Draft | None = None
    distinct: dict[bytes, Choice] = {}
    for choice in found:
        distinct.setdefault(choice.keep.tobytes(), choice)
    for rank, choice in enumerate(islice(distinct.values(), drafts)):
        # No choice that follows can be faster, even without addresses.
        if best is not None and choice.pass_s * _ALIKE >= best.prediction.pass_s:
            break
        draft = _draft(partition, choice, arena_bytes, moves=moves if rank < 2 else 0)
        if draft is not None and (best is None or draft.cost() < best.cost()):
            best = draft
    if moves and best is not None and found[0].pass_s * _ALIKE < best.prediction.pass_s:
        # Addresses cost time: something else may lie better that is as fast without them.
        for choice in residency.alternatives(found[0], arena_bytes, moves // 2):
            if choice.pass_s * _ALIKE < best.prediction.pass_s:
                draft = _draft(partition, choice, arena_bytes, moves=0)
                if draft is not None and draft.cost() < best.cost():
                    best = draft
    return best


def _choices(partition: Partition, residency: Residency, arena_bytes: int, stayed: Ints | None) -> list[Choice]:
    """Returns choices for several sizes of the pool, the fastest first.

    A pool that is too small cannot keep the link busy, one that is too large leaves too little for residents: every
    third size is tried, then those beside the best.
    """
    pools = list(_pool_sizes(partition, arena_bytes))
    affordable = TIMED_VISITS // max(len(partition.uses), 1)
    # Where most is known from the plan before, there is little to give out.
    rounds = ROUNDS if stayed is None and affordable > ROUNDS * FEWEST_POOLS else ROUNDS // 2
    most = max(affordable // (rounds + 2) if stayed is None else 0, FEWEST_POOLS)
    if len(pools) > most:
        pools = [pools[(2 * position + 1) * len(pools) // (2 * most)] for position in range(most)]
    rated: dict[int, Choice | None] = {}

    def rate(position: int) -> None:
        if 0 <= position < len(pools) and position not in rated:
            rated[position] = residency.choose(arena_bytes, pools[position], rounds, stayed)

    for position in range(0, len(pools), 3 if len(pools) > FEWEST_POOLS else 1):
        rate(position)
    if all(choice is None for choice in rated.values()):
        for position in range(len(pools)):
            rate(position)
    fits: dict[int, Choice] = {}
    num_seen = 0
    while num_seen < len(rated):
        num_seen = len(rated)
        fits = {position: choice for position, choice in rated.items() if choice is not None}
        if fits:
            best = min(fits, key=lambda position: (fits[position].cost(), position))
            rate(best - 1)
            rate(best + 1)
    return sorted(fits.values(), key=Choice.cost)


def _draft(partition: Partition, choice: Choice, arena_bytes: int, *, moves: int) -> Draft | None:
    draft = draft_plan(partition, choice.keep, arena_bytes, moves=moves)
    if draft is not None:
        return draft
    uses = partition.uses
    keep = uses.placeable(partition.demand, uses.residents(choice.keep))
    return draft_plan(partition, keep, arena_bytes, moves=moves)


def _pool_sizes(partition: Partition, arena_bytes: int) -> Iterator[int]:
    demand = partition.demand
    sizes = sorted(demand.bundles[b].size_bytes for b in demand.read_bundles() if b not in demand.pooled)
    sizes = [size for size in sizes if size] or [0]
    typical, largest = statistics.median_low(sizes), sizes[-1]
    pools = {depth * size for depth in POOL_DEPTHS for size in (typical, largest)} | {arena_bytes}
    return (pool for pool in sorted(pools) if pool <= arena_bytes)
