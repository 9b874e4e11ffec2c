"""When streamed bundles are in their slots, and where the pass is cut into plan steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import pairwise

from mball.plan.demand import Demand
from mball.schema import LiveRange, PlanStep, Trace


class Bridge(Enum):
    """How long a streamed bundle stays in its slot between two uses."""

    NEAR = auto()  # while other bundles of less than its own size, or the bundle's target, are read
    IDLE = auto()  # only while nothing else is read
    NEVER = auto()  # only over steps that read exactly the same streamed bundles


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One stay of a streamed bundle in a slot, from its first to its last use there."""

    bundle: int
    live: LiveRange


def find_visits(demand: Demand, residents: Collection[int], bridge: Bridge, near_bytes: int) -> list[Visit]:
    """Returns the visits of all bundles that are not resident, by first use; live ranges in trace steps."""
    if bridge is Bridge.NEVER:
        visits = _visits_of_stretches(demand, residents)
    else:
        visits = []
        for bundle in demand.read_bundles():
            if bundle not in residents:
                visits += _visits_of_bundle(demand, bundle, near_bytes if bridge is Bridge.NEAR else 0)
    visits.sort(key=lambda visit: (visit.live.first, visit.bundle))
    return visits


def count_visits(demand: Demand, near_bytes: int) -> list[int]:
    """Returns for each bundle how often it would be brought in if it were streamed."""
    return [len(_visits_of_bundle(demand, bundle, near_bytes)) for bundle in range(len(demand.bundles))]


def merge_steps(trace: Trace, demand: Demand, visits: Sequence[Visit]) -> tuple[list[PlanStep], list[int]]:
    """Returns the plan steps, and for each trace step the plan step that runs it.

    A cut is made where a visit begins or ends, so that merging delays no transfer and holds no slot longer;
    and around operators outside any graph.
    """
    num_steps = len(trace.steps)
    cuts = {0, num_steps}
    for visit in visits:
        cuts.add(visit.live.first)
        cuts.add(visit.live.end)
    for number in range(1, num_steps):
        graph = trace.steps[number].graph
        if graph is None or graph != trace.steps[number - 1].graph:
            cuts.add(number)
    edges = sorted(cuts)
    steps: list[PlanStep] = []
    step_of: list[int] = []
    for first, end in pairwise(edges):
        reads = dict.fromkeys(bundle for number in range(first, end) for bundle in demand.reads[number])
        step_of += [len(steps)] * (end - first)
        steps.append(PlanStep(first=first, end=end, reads=tuple(reads)))
    return steps, step_of


def _visits_of_bundle(demand: Demand, bundle: int, near_bytes: int) -> list[Visit]:
    uses = demand.uses[bundle]
    before = demand.read_bytes_before
    # Staying costs the slot while others pass by; coming again costs the bundle's own bytes on the link.
    allowed_bytes = max(near_bytes, demand.bundles[bundle].size_bytes) if near_bytes else 0
    visits: list[Visit] = []
    first = 0
    for position, step in enumerate(uses):
        is_last = position + 1 == len(uses)
        if is_last or before[uses[position + 1]] - before[step + 1] > allowed_bytes:
            visits.append(Visit(bundle=bundle, live=LiveRange(first=uses[first], end=step + 1)))
            first = position + 1
    return visits


def _visits_of_stretches(demand: Demand, residents: Collection[int]) -> list[Visit]:
    visits: list[Visit] = []
    current: tuple[int, ...] = ()
    first = end = 0
    for number, reads in enumerate([*demand.reads, None]):
        streamed = None if reads is None else tuple(sorted(set(reads).difference(residents)))
        if streamed == ():
            continue
        if streamed != current:
            visits += [Visit(bundle=bundle, live=LiveRange(first=first, end=end)) for bundle in current]
            current, first = streamed or (), number
        end = number + 1
    return visits
