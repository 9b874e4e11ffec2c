"""What of the arena is idle, on offer to operators that find no memory elsewhere.

[Note: which extents] Residents lie at the start of the arena, what is streamed behind them, and copies are nearly
always under way there. So what is offered are extents with residents that the step does not read, from the end of the
arena down, and bytes where nothing lies. They stay on offer from step to step, each since the event after which nothing
used it, until a step reads what lies there. Some steps do; the others cost a look at a number.

[Note: how much] What is taken costs a plan, and copies. So no more is on offer than a few steps may suddenly want, and
never so much that the largest step would not fit what is left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from mball.memory import Donors, Event, Extent
from mball.run.slots import Occupant
from mball.schema import Plan
from mball.units import MIB

MOST_BYTES = 512 * MIB


class IdleExtents:
    """Offers idle extents of one arena, and has them back before they are used."""

    def __init__(self, donors: Donors) -> None:
        self._donors = donors
        self._extents: list[Extent] = []  # that may be on offer under the plan, in the order in which they are taken
        self._of_step: dict[int, list[Extent]] = {}  # those that hold what a plan step uses
        self._bounds = Extent(0, 0)  # of all of them
        self._waits = False  # some of them are not on offer

    @property
    def is_possible(self) -> bool:
        """Whether anything may be on offer under this plan."""
        return bool(self._extents)

    @property
    def taken_bytes(self) -> int:
        """What operators took, ever."""
        return self._donors.taken_bytes

    @property
    def has_lost(self) -> bool:
        """Whether something was taken, as far as one sees without a call."""
        return self._donors.has_lost

    def adopt(self, plan: Plan, uses: Sequence[Collection[int]]) -> None:
        """Says that `plan` is executed from now on, whose steps use these bundles; nothing is on offer."""
        self._extents, self._of_step, self._bounds, self._waits = [], {}, Extent(0, 0), False
        there = self._donors.extents()
        if not there:
            return
        streamed = _joined((t.offset_bytes, t.offset_bytes + plan.bundles[t.bundle].size_bytes) for t in plan.transfers)
        most_bytes = max((sum(plan.bundles[b].size_bytes for b in step.reads) for step in plan.steps), default=0)
        left_bytes = min(plan.arena_bytes - most_bytes, MOST_BYTES)
        for extent in reversed(there):
            size_bytes = extent.end - extent.first
            if size_bytes > left_bytes:
                break
            if not _meets(extent, streamed):
                self._extents.append(extent)
                left_bytes -= size_bytes
        places = {
            p.bundle: (p.offset_bytes, p.offset_bytes + plan.bundles[p.bundle].size_bytes) for p in plan.residents
        }
        places = {bundle: place for bundle, place in places.items() if any(_meets(e, [place]) for e in self._extents)}
        for step, used in enumerate(uses):
            if read := [places[bundle] for bundle in used if bundle in places]:
                self._of_step[step] = [extent for extent in self._extents if _meets(extent, read)]
        if self._extents:
            self._bounds, self._waits = Extent(self._extents[-1].first, self._extents[0].end), True

    def offer(self, occupants: Iterable[Occupant], in_use: Iterable[Occupant], after: Event) -> None:
        """Offers what is idle; nothing that is idle is used by what is not before `after`."""
        if not self._waits:
            return
        busy = [*in_use, *(each for each in occupants if each.event is not None or not each.planned)]
        ranges = [(each.offset_bytes, each.end_bytes) for each in busy]
        waiting = [extent for extent in self._extents if not self._donors.is_offered(extent)]
        idle = [extent for extent in waiting if not _meets(extent, ranges)]
        self._donors.offer(idle, after)
        self._waits = len(idle) < len(waiting)

    def claim(self, step: int) -> None:
        """Has back what a plan step uses; all, if some was taken."""
        for extent in self._of_step.get(step, ()):
            self.withdraw(*extent)
        if self._donors.has_lost:
            self.withdraw()

    def withdraw(self, first: int = 0, end: int | None = None) -> None:
        """Has back what is on offer of `[first, end)`; see `Donors.withdraw`."""
        if end is not None and (end <= self._bounds.first or self._bounds.end <= first):
            return
        self._donors.withdraw(first, end)
        self._waits = bool(self._extents)


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns as few ranges as have the same bytes."""
    found: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((first, end))
    return found


def _meets(extent: Extent, ranges: Iterable[tuple[int, int]]) -> bool:
    return any(first < extent.end and extent.first < end for first, end in ranges)
