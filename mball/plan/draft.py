"""From decisions to a plan: places, plan steps, transfers, and what they take."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Self, TypeVar

import numpy as np

from mball.plan.arrays import Bools, Ints
from mball.plan.at_home import AtHome
from mball.plan.demand import Demand
from mball.plan.flow import Flow
from mball.plan.partition import Partition
from mball.plan.placement import stack
from mball.plan.simulate import run_plan
from mball.plan.slots import Layout, Pool
from mball.plan.uses import NEVER, Uses, Visits
from mball.schema import Bundle, Lane, Made, Offload, Placement, PlanStep, Prediction, Trace, Transfer

_WORTHWHILE = 1e-6
_Moved = TypeVar("_Moved", Transfer, Made, Offload)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A complete candidate; offsets are final."""

    partition: Partition
    steps: tuple[PlanStep, ...]
    residents: tuple[Placement, ...]
    transfers: tuple[Transfer, ...]
    made: tuple[Made, ...] = ()
    offloads: tuple[Offload, ...] = ()
    arena_bytes: int
    prediction: Prediction

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        """Those of the partition."""
        return self.partition.demand.bundles

    def cost(self) -> tuple[float, int, int]:
        """Returns what to minimise: pass time to four digits, then bytes on the link, then requests."""
        return float(f"{self.prediction.pass_s:.4g}"), self.prediction.streamed_bytes, len(self.transfers)


# When each visit may begin at the earliest, whatever room there is: a trace step that must have been left, counted from
# the pass that reads.
Lead = Callable[[Visits], Ints]


def shifted(moves: tuple[_Moved, ...], shift_bytes: int) -> tuple[_Moved, ...]:
    """Returns the same moves so many bytes further on in the arena."""
    if not shift_bytes:
        return moves
    return tuple(replace(each, offset_bytes=each.offset_bytes + shift_bytes) for each in moves)


def draft_plan(
    partition: Partition, keep: Bools, arena_bytes: int, *, lead: Lead | None = None, moves: int = 0
) -> Draft | None:
    """Returns the fastest layout found for these stays, or None when they do not fit.

    Args:
        partition: the pass.
        keep: for each gap of `partition.uses` whether its bundle stays over it.
        arena_bytes: room for residents and slots.
        lead: how early transfers may start; None: as early as there is room.
        moves: how many other places are tried, one visit at a time.
    """
    trace, demand, flow = partition.trace, partition.demand, partition.flow
    visits = partition.uses.visits(keep)
    residents = partition.uses.residents(keep).tolist()
    if not len(visits):
        residents += _tables_beside(partition, residents, arena_bytes)
    placements, resident_bytes = stack(demand, residents)
    sizes = flow.sizes[visits.bundle]
    earliest = lead(visits) if lead is not None else None
    if partition.uses.floor is not None:
        written = partition.uses.floor[visits.gap]
        earliest = written if earliest is None else np.maximum(earliest, written)
    layouts: list[Layout] = []
    for apart in _orders(partition.uses, visits):
        pool = Pool(
            visits,
            sizes,
            arena_bytes - resident_bytes,
            len(trace.steps),
            cyclic=trace.cyclic,
            earliest=earliest,
            apart=apart,
        )
        of_pool = pool.layouts()
        if of_pool:
            best = min(of_pool, key=lambda layout: flow.time(visits, layout.after).pass_s)
            layouts.append(_refined(flow, visits, pool, best, moves) if moves else best)
    if not layouts:
        return None
    stay = set(residents)
    written_back = [back for back in partition.uses.written_back() if back[0] in stay]
    cuts = {step + 1 for _, after, until in written_back for step in (after, until)}
    steps, step_of = _merge(trace, demand, visits, () if earliest is None else earliest.tolist(), cuts)
    found: list[tuple[float, int, _Movement, Prediction]] = []
    for number, layout in enumerate(layouts):
        movement = _Movement.of(partition, steps, visits, layout, placements, resident_bytes, step_of, written_back)
        _, prediction = run_plan(trace, partition.machine, movement, demand.moved_bytes)
        found.append((prediction.pass_s, number, movement, prediction))
    _, number, movement, prediction = min(found, key=lambda each: each[:2])
    return Draft(
        partition=partition,
        steps=steps,
        residents=placements,
        transfers=movement.transfers,
        made=movement.made,
        offloads=movement.offloads,
        arena_bytes=resident_bytes + int((layouts[number].offsets + sizes).max(initial=0)),
        prediction=prediction,
    )


def _orders(uses: Uses, visits: Visits) -> list[Bools | None]:
    """Returns who may begin out of order: nobody, and where the host lane writes bundles those that wait for it.

    Who waits for long does not hold up the others then, and who need not wait long comes before them.
    """
    if uses.host_floor is None:
        return [None]
    return [None, uses.host_floor[visits.gap] > NEVER]


def _tables_beside(partition: Partition, residents: Sequence[int], arena_bytes: int) -> list[int]:
    """Returns the tables that stay too where all that is read stays: those that there is room for, in their order."""
    if not partition.trace.cyclic:
        return []
    written = {index for step in partition.trace.steps for index in step.writes}
    demand, found = partition.demand, list[int]()
    left = arena_bytes - demand.slot_bytes(residents)
    for table in demand.tables():
        size = demand.bundles[table].size_bytes
        if size <= left and written.isdisjoint(demand.bundles[table].tensors):
            found.append(table)
            left -= size
    return found


def _refined(flow: Flow, visits: Visits, pool: Pool, layout: Layout, limit: int) -> Layout:
    """Returns the layout after moving visits one by one while that is faster, with at most `limit` moves tried."""
    best_s = flow.time(visits, layout.after).pass_s
    tried = 0
    is_better = True
    while is_better and best_s > flow.least_s:
        is_better = False
        for changed in pool.neighbours(layout):
            tried += 1
            if tried > limit:
                return layout
            pass_s = flow.time(visits, changed.after).pass_s if changed is not None else math.inf
            if changed is not None and pass_s < best_s * (1 - _WORTHWHILE):
                layout, best_s, is_better = changed, pass_s, True
                break
    return layout


def _merge(
    trace: Trace, demand: Demand, visits: Visits, earliest: Sequence[int], others: Collection[int]
) -> tuple[tuple[PlanStep, ...], list[int]]:
    """Returns the plan steps, and for each trace step the plan step that runs it.

    A cut is made where a visit begins or ends, so that merging delays no transfer and holds no slot longer;
    around operators outside any graph; around steps on the host lane; and before the steps `others`, which may lie in
    the pass after.
    """
    num_steps = len(trace.steps)
    cuts = {0, num_steps}
    if num_steps:
        cuts.update(step % num_steps for step in others)
        cuts.update((visits.first % num_steps).tolist())
        cuts.update((visits.end % num_steps).tolist())
        cuts.update((start + 1) % num_steps for start in earliest if start >= -num_steps)
        if visits.written is not None:
            assert visits.until is not None
            cuts.update(((visits.written[visits.written >= 0] + 1) % num_steps).tolist())
            cuts.update(((visits.until + 1) % num_steps).tolist())
    for number, (one, other) in enumerate(pairwise(trace.steps), start=1):
        if other.graph is None or other.graph != one.graph or Lane.HOST in (one.lane, other.lane):
            cuts.add(number)
    edges = sorted(cuts)
    steps: list[PlanStep] = []
    step_of: list[int] = []
    for first, end in pairwise(edges):
        reads = demand.reads[first]
        if end - first > 1:
            reads = tuple(dict.fromkeys(chain.from_iterable(demand.reads[first:end])))
        step_of += [len(steps)] * (end - first)
        steps.append(PlanStep(first=first, end=end, reads=reads))
    return tuple(steps), step_of


@dataclass(frozen=True, slots=True, kw_only=True)
class _Movement:
    """What happens in a pass, as `simulate.Movement` has it."""

    bundles: tuple[Bundle, ...]
    steps: tuple[PlanStep, ...]
    residents: tuple[Placement, ...]
    transfers: tuple[Transfer, ...]
    made: tuple[Made, ...]
    offloads: tuple[Offload, ...]

    @classmethod
    def of(
        cls,
        partition: Partition,
        steps: tuple[PlanStep, ...],
        visits: Visits,
        layout: Layout,
        residents: tuple[Placement, ...],
        base: int,
        step_of: list[int],
        written_back: Sequence[tuple[int, int, int]],
    ) -> Self:
        trace, bundles = partition.trace, partition.demand.bundles
        count, num_steps = len(step_of), len(steps)
        at_home = AtHome.of(trace, bundles, steps)

        def step(number: int) -> int:
            """Returns the plan step of a trace step of this pass or one beside it."""
            passes, within = divmod(number, count)
            return step_of[within] + passes * num_steps

        def offload(bundle: int, offset: int, after: int, until: int) -> Offload:
            """Returns the write after one trace step until another: a step on the device waits for it."""
            while trace.steps[until % count].lane is Lane.HOST:
                until -= 1
            written, done = step(after), step(until)
            return Offload(
                bundle=bundle,
                offset_bytes=offset,
                after=written % num_steps,
                until=done - written // num_steps * num_steps,
            )

        transfers: list[Transfer] = []
        made: list[Made] = []
        offloads: list[Offload] = []
        nobody, nothing = [False] * len(visits), [-1] * len(visits)
        born = nobody if visits.born is None else visits.born.tolist()
        anew = nobody if visits.anew is None else visits.anew.tolist()
        written = nothing if visits.written is None else visits.written.tolist()
        ends = (visits.end - 1).tolist()
        lasts = ends if visits.last is None else visits.last.tolist()
        untils = ends if visits.until is None else visits.until.tolist()
        for bundle, first, used_last, until, within, after, is_born, is_anew, leaves in zip(
            visits.bundle.tolist(),
            visits.first.tolist(),
            lasts,
            untils,
            layout.offsets.tolist(),
            layout.after.tolist(),
            born,
            anew,
            written,
            strict=True,
        ):
            offset, last, begin = base + within, step(used_last), step(after)
            if leaves >= 0:
                offloads.append(offload(bundle, offset, leaves, until))
            if is_born or is_anew:
                made.append(Made(bundle=bundle, offset_bytes=offset, step=step(first), last_use=last, is_anew=is_anew))
            else:
                transfers.append(
                    Transfer(
                        bundle=bundle,
                        offset_bytes=offset,
                        after=begin,
                        needed_by=step(first),
                        last_use=last,
                        after_host=at_home.host_write(bundle, begin, num_steps, cyclic=trace.cyclic),
                    )
                )
        places = {placement.bundle: placement.offset_bytes for placement in residents}
        offloads += [offload(bundle, places[bundle], after, until) for bundle, after, until in written_back]
        return cls(
            bundles=bundles,
            steps=steps,
            residents=residents,
            transfers=tuple(sorted(transfers, key=lambda each: (each.after, each.needed_by, each.bundle))),
            made=tuple(made),
            offloads=tuple(sorted(offloads, key=lambda each: (each.after, each.until, each.bundle))),
        )
