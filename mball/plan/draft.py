"""From decisions to a plan: places, plan steps, transfers, and what they take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np

from mball.plan.arrays import Bools, Ints
from mball.plan.demand import Demand
from mball.plan.flow import Flow
from mball.plan.partition import Partition
from mball.plan.placement import stack
from mball.plan.simulate import run_plan
from mball.plan.slots import Layout, Pool
from mball.plan.uses import Visits
from mball.schema import Bundle, Made, Offload, Placement, PlanStep, Prediction, Trace, Transfer

_WORTHWHILE = 1e-6


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

    def cost(self) -> tuple[float, int, int]:
        """Returns what to minimise: pass time to four digits, then bytes on the link, then requests."""
        return float(f"{self.prediction.pass_s:.4g}"), self.prediction.streamed_bytes, len(self.transfers)


# When each visit may begin at the earliest, whatever room there is: a trace step that must have been left, counted from
# the pass that reads.
Lead = Callable[[Visits], Ints]


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
    pool = Pool(
        visits,
        sizes,
        arena_bytes - resident_bytes,
        len(trace.steps),
        cyclic=trace.cyclic,
        earliest=earliest,
    )
    layouts = pool.layouts()
    if not layouts:
        return None
    best = min(layouts, key=lambda layout: flow.time(visits, layout.after).pass_s)
    if moves:
        best = _refined(flow, visits, pool, best, moves)
    steps, step_of = _merge(trace, demand, visits, () if earliest is None else earliest.tolist())
    movement = _Movement.of(demand.bundles, steps, visits, best, placements, resident_bytes, step_of)
    _, prediction = run_plan(trace, partition.machine, movement, demand.moved_bytes)
    return Draft(
        partition=partition,
        steps=steps,
        residents=placements,
        transfers=movement.transfers,
        made=movement.made,
        offloads=movement.offloads,
        arena_bytes=resident_bytes + int((best.offsets + sizes).max(initial=0)),
        prediction=prediction,
    )


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
    while is_better and best_s > flow.compute_s:
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
    trace: Trace, demand: Demand, visits: Visits, earliest: Sequence[int]
) -> tuple[tuple[PlanStep, ...], list[int]]:
    """Returns the plan steps, and for each trace step the plan step that runs it.

    A cut is made where a visit begins or ends, so that merging delays no transfer and holds no slot longer;
    around operators outside any graph; and between lanes.
    """
    num_steps = len(trace.steps)
    cuts = {0, num_steps}
    if num_steps:
        cuts.update((visits.first % num_steps).tolist())
        cuts.update((visits.end % num_steps).tolist())
        cuts.update((start + 1) % num_steps for start in earliest if start >= -num_steps)
        if visits.written is not None:
            cuts.update((visits.written[visits.written >= 0] + 1).tolist())
    for number, (one, other) in enumerate(pairwise(trace.steps), start=1):
        if other.graph is None or other.graph != one.graph or other.lane is not one.lane:
            cuts.add(number)
    edges = sorted(cuts)
    steps: list[PlanStep] = []
    step_of: list[int] = []
    for first, end in pairwise(edges):
        reads = dict.fromkeys(bundle for number in range(first, end) for bundle in demand.reads[number])
        step_of += [len(steps)] * (end - first)
        steps.append(PlanStep(first=first, end=end, reads=tuple(reads)))
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
        bundles: tuple[Bundle, ...],
        steps: tuple[PlanStep, ...],
        visits: Visits,
        layout: Layout,
        residents: tuple[Placement, ...],
        base: int,
        step_of: list[int],
    ) -> Self:
        count, num_steps = len(step_of), len(steps)

        def step(number: int) -> int:
            """Returns the plan step of a trace step of this pass or one beside it."""
            passes, within = divmod(number, count)
            return step_of[within] + passes * num_steps

        transfers: list[Transfer] = []
        made: list[Made] = []
        offloads: list[Offload] = []
        nobody, nothing = [False] * len(visits), [-1] * len(visits)
        born = nobody if visits.born is None else visits.born.tolist()
        anew = nobody if visits.anew is None else visits.anew.tolist()
        written = nothing if visits.written is None else visits.written.tolist()
        for bundle, first, end, within, after, is_born, is_anew, leaves in zip(
            visits.bundle.tolist(),
            visits.first.tolist(),
            visits.end.tolist(),
            layout.offsets.tolist(),
            layout.after.tolist(),
            born,
            anew,
            written,
            strict=True,
        ):
            offset, last = base + within, step(end - 1)
            if leaves >= 0:
                offloads.append(Offload(bundle=bundle, offset_bytes=offset, after=step(leaves), until=last))
                last = step(leaves)
            if is_born or is_anew:
                made.append(Made(bundle=bundle, offset_bytes=offset, step=step(first), last_use=last, is_anew=is_anew))
            else:
                transfers.append(
                    Transfer(
                        bundle=bundle, offset_bytes=offset, after=step(after), needed_by=step(first), last_use=last
                    )
                )
        return cls(
            bundles=bundles,
            steps=steps,
            residents=residents,
            transfers=tuple(sorted(transfers, key=lambda each: (each.after, each.needed_by, each.bundle))),
            made=tuple(made),
            offloads=tuple(sorted(offloads, key=lambda each: (each.after, each.until, each.bundle))),
        )
