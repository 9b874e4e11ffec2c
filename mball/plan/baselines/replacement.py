"""Replacement policies: who is evicted when a slot is needed, and the stays that follow.

A pass is run against memory of so many bytes: what a step reads and finds is a hit, what it does not find is brought,
and others are evicted until that fits. The next pass begins with what the last one left. Once passes begin alike, their
hits are the stays of a plan that repeats. MIN may go through several passes before it begins alike (in a scan of n
bundles through m slots it takes n - 1); a plan repeats after one, so each of those passes is made to repeat and the one
that reads least is taken.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mball.plan.arrays import Bools, Ints
from mball.plan.baselines.layers import just_in_time_draft, shorter
from mball.plan.draft import Draft, Lead, draft_plan
from mball.plan.partition import Partition
from mball.plan.problem import Problem
from mball.plan.search import partitions
from mball.plan.uses import Uses

# So many passes through the memory may differ before one of them has to repeat.
MAX_REPLAYED_PASSES = 16
# Addresses are fixed in a plan, so some bytes may lie where nothing fits: then the policy has so much of the memory.
SHARES = (1.0, 15 / 16, 7 / 8, 3 / 4, 1 / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction:
    """Whom a policy evicts.

    Attributes:
        order: given the uses, a number for each gap: of the bundles that are in a gap and not read now, the one with
            the largest number goes.
        sign: 1 if that number grows with time, -1 if it falls.
        fills: whether memory that is left over once a pass is made to repeat goes to the shortest gaps.
    """

    order: Callable[[Uses], Ints]
    sign: int
    fills: bool


LEAST_RECENTLY_USED = Eviction(order=lambda uses: -uses.step, sign=-1, fills=False)
FURTHEST_IN_FUTURE = Eviction(order=lambda uses: uses.reaches, sign=1, fills=True)


def draft_replacing(problem: Problem, candidates: Iterable[Partition], eviction: Eviction, lead: Lead | None) -> Draft:
    """Returns the draft of a replacement policy under the first of these partitions that it fits.

    Args:
        candidates: tried in turn; after them nothing is resident and all comes just in time.
        eviction: the policy.
        lead: how early reads begin.
    """
    for partition in candidates:
        tried: list[bytes] = []
        for share in SHARES:
            keep = replaced(partition, int(share * problem.arena_bytes), eviction)
            if keep is None:
                break
            for stays in _simpler(partition, keep):
                if stays.tobytes() not in tried:
                    tried.append(stays.tobytes())
                    draft = draft_plan(partition, stays, problem.arena_bytes, lead=lead)
                    if draft is not None:
                        return draft
    return just_in_time_draft(problem)


def _simpler(partition: Partition, keep: Bools) -> Iterator[Bools]:
    """Yields these stays and, where they leave the others no place, less of them.

    Stays over the end of the pass go first, the longest first: without them equal slots always have places. Then all
    but residents go.
    """
    uses = partition.uses
    residents = uses.residents(keep)
    is_resident = np.isin(uses.bundle, residents)
    over_end = np.flatnonzero(keep & ~is_resident & (uses.reaches >= uses.num_steps))
    over_end = over_end[np.argsort((uses.step - uses.reaches)[over_end], kind="stable")]
    for kept in shorter(len(over_end)):
        stays = keep.copy()
        stays[over_end[: len(over_end) - kept]] = False
        yield stays
    yield uses.placeable(partition.demand, residents)


def bundled(problem: Problem) -> Iterator[Partition]:
    """Yields partitions into bundles like those of mball's own plans, the finest last."""
    yield from partitions(problem.trace, problem.machine, problem.arena_bytes)
    yield problem.finest


def replaced(partition: Partition, capacity_bytes: int, eviction: Eviction) -> Bools | None:
    """Returns the gaps over which bundles stay under this policy; None where a step does not fit the memory."""
    if not Admission(partition, capacity_bytes).fits:
        return None
    uses, moved = partition.uses, partition.flow.link_s[partition.uses.bundle]
    order = eviction.order(uses)
    best: Bools | None = None
    for hits in _steady(partition, capacity_bytes, eviction):
        admission = Admission(partition, capacity_bytes)
        keep = admission.admit(np.flatnonzero(hits)[np.argsort(order[hits], kind="stable")])
        if eviction.fills:
            left = np.flatnonzero(~keep & uses.may_stay)
            keep |= admission.admit(left[np.argsort((uses.reaches - uses.step)[left], kind="stable")])
        if best is None or moved[keep].sum() > moved[best].sum():
            best = keep
    assert best is not None, "there is at least one pass"
    return best


def _steady(partition: Partition, capacity_bytes: int, eviction: Eviction) -> list[Bools]:
    """Returns the gaps that end in a hit, for each of the passes that repeat, or for the last where none does."""
    uses, demand, sizes = partition.uses, partition.demand, partition.flow.sizes
    order, later = eviction.order(uses), eviction.sign * uses.num_steps
    gap_at = {(int(b), int(s)): gap for gap, (b, s) in enumerate(zip(uses.bundle, uses.step, strict=True))}
    before = _gaps_before(uses)
    held: dict[int, int] = {}  # bundle -> how readily it is evicted
    queue: list[tuple[int, int]] = []
    free = capacity_bytes
    passes: list[Bools] = []
    begun: list[tuple[tuple[int, int], ...]] = []
    for number in range(MAX_REPLAYED_PASSES if partition.trace.cyclic else 1):
        state = tuple(sorted((bundle, key - number * later) for bundle, key in held.items()))
        if state in begun:
            return passes[begun.index(state) :]
        begun.append(state)
        hits: Bools = np.zeros(len(uses), dtype=bool)
        for step, reads in enumerate(demand.reads):
            for bundle in reads:
                if bundle in held:
                    hits[before[gap_at[bundle, step]]] = True
                    del held[bundle]
                    free += int(sizes[bundle])
            free -= demand.slot_bytes(reads)
            while free < 0:
                key, victim = heapq.heappop(queue)
                if held.get(victim) == -key:
                    del held[victim]
                    free += int(sizes[victim])
            for bundle in reads:
                gap = gap_at[bundle, step]
                if not uses.may_stay[gap]:  # its bytes are void, or never needed again
                    free += int(sizes[bundle])
                    continue
                held[bundle] = int(order[gap]) + number * later
                heapq.heappush(queue, (-held[bundle], bundle))
        passes.append(hits)
    return passes[-1:]


def _gaps_before(uses: Uses) -> Ints:
    """Returns for each use the gap that it ends."""
    before = np.arange(len(uses)) - 1
    begins = np.flatnonzero(np.diff(uses.bundle, prepend=-1))
    ends = np.append(begins[1:], len(uses)) if len(begins) else begins
    before[begins] = ends - 1
    return before


class Admission:
    """Who can stay beside whom: bytes over the steps of the pass.

    Args:
        partition: the pass.
        capacity_bytes: of memory, in each step.
    """

    def __init__(self, partition: Partition, capacity_bytes: int) -> None:
        self._uses = partition.uses
        self._sizes = partition.flow.sizes
        before = partition.demand.read_bytes_before
        needed = [later - earlier for earlier, later in pairwise(before)]
        self._free: Ints = capacity_bytes - np.array(needed, dtype=np.int64)
        self.fits = bool((self._free >= 0).all())

    def admit(self, gaps: Ints) -> Bools:
        """Returns those of these gaps for which there still is room, the first ones first, and takes it."""
        uses, count = self._uses, self._uses.num_steps
        keep: Bools = np.zeros(len(uses), dtype=bool)
        for gap in gaps.tolist():
            size = int(self._sizes[uses.bundle[gap]])
            begin, end = int(uses.step[gap]) + 1, int(uses.reaches[gap])
            parts = [self._free[begin : min(end, count)], self._free[: max(end - count, 0)]]
            if all(int(part.min(initial=size)) >= size for part in parts):
                for part in parts:
                    part -= size
                keep[gap] = True
        return keep
