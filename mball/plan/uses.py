"""When bundles are used, which gaps between two uses they stay over, and the visits that follow from that.

A bundle that is used several times a pass has a gap after each use; the gap after its last use reaches into the next
pass. A plan keeps the bundle over a gap, or brings it again. Who is kept over all gaps is resident.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mball.plan.arrays import Bools, Ints
from mball.plan.demand import Demand
from mball.plan.leaving import Ways
from mball.schema import Trace


@dataclass(frozen=True, slots=True)
class Visits:
    """Stays of bundles in slots, by first use. Parallel arrays.

    Attributes:
        bundle: who.
        first: the step of its first use, within the pass.
        end: the step after its last use; past the end of the pass where it stays over it.
        gap: the gap that the visit ends: were it kept, the visit would be no visit of its own.
        born: whether a step bears it; None if the link brings all.
        anew: whether a step makes it anew; None likewise.
        written: the step of its last use, if it is written below after that: `end` is then the step after the one that
            is left only when that is done. -1 for others; None likewise.
    """

    bundle: Ints
    first: Ints
    end: Ints
    gap: Ints
    born: Bools | None = None
    anew: Bools | None = None
    written: Ints | None = None

    def __len__(self) -> int:
        return len(self.bundle)


class Uses:
    """The uses of all bundles, and the gap after each; arrays by bundle, then by step.

    Attributes:
        bundle: of each use.
        step: of each use.
        reaches: the step of the bundle's next use, counted on into the next pass.
        may_stay: whether the bundle can be kept over the gap: not where something writes it, nor past the end of a pass
            that is the only one, nor where it is dead.
        floor: of each gap the step that must have been left before the visit that ends it may begin, counted from the
            pass of that visit: another copy is in use until then, or the bytes are not written before. None if nothing
            is used twice or written.
    """

    def __init__(self, trace: Trace, demand: Demand, ways: Ways | None = None) -> None:
        counts = np.array([len(steps) for steps in demand.uses], dtype=np.int64)
        self.num_steps = len(trace.steps)
        self._is_used: Bools = counts > 0
        self.bundle: Ints = np.repeat(np.arange(len(counts)), counts)
        self.step: Ints = np.array([step for steps in demand.uses for step in steps], dtype=np.int64)
        ends = np.cumsum(counts)
        self._begin: Ints = (ends - counts)[self.bundle]
        self._end: Ints = ends[self.bundle]
        following = np.arange(len(self.step)) + 1
        is_last = following == self._end
        following[is_last] = self._begin[is_last]
        self._following: Ints = following
        self.reaches: Ints = self.step[following] + np.where(is_last, self.num_steps, 0)
        self._each_once = bool((counts <= 1).all()) and ways is None
        self._by_step: Ints = np.lexsort((self.bundle, self.step))
        self.may_stay: Bools = np.ones(len(self.step), dtype=bool)
        if not trace.cyclic:
            self.may_stay[is_last] = False
        self.floor: Ints | None = None
        if not self._each_once:  # else its own slot says the same
            self.floor = self.step - np.where(is_last, self.num_steps, 0)
        for gap, step in _written_gaps(trace, demand, self):
            if self.floor is None:
                self.floor = np.full(len(self), -2 * self.num_steps, dtype=np.int64)
            self.may_stay[gap] = False
            self.floor[gap] = max(int(self.floor[gap]), step)
        self._ways = ways
        if ways is not None:
            # From its last use to its birth in the next pass there is nothing to keep.
            self._is_dead: Bools = is_last & ways.is_born[self.bundle]
            self.may_stay[self._is_dead] = False
            self._until: Ints = np.where(self._is_dead, self.step, ways.until(self.bundle, self.step, self.reaches))
            lives = ways.is_born[self.bundle] & ~self._is_dead
            assert self.floor is not None, "the step that bears and those that read are several"
            self.floor[lives] = self._until[lives]

    def __len__(self) -> int:
        return len(self.step)

    def gaps_of(self, bundle: int) -> slice:
        """Returns where the gaps of a bundle that is used are."""
        at = int(np.searchsorted(self.bundle, bundle))
        return slice(at, int(self._end[at]))

    def residents(self, keep: Bools) -> Ints:
        """Returns the bundles that are kept over all their gaps, ascending."""
        stays = self._is_used.copy()
        stays[self.bundle[~keep]] = False
        return np.flatnonzero(stays)

    def stretches(self, demand: Demand, residents: Ints) -> Bools:
        """Returns the gaps within stretches of steps that all read the same bundles, residents apart.

        With no other gap kept, visits that meet are there for the same steps: those can always be placed.
        """
        kept = set(residents.tolist())
        keep: Bools = np.zeros(len(self), dtype=bool)
        last: tuple[int, frozenset[int]] = (-1, frozenset())
        for number, reads in enumerate(demand.reads):
            streamed = frozenset(reads) - kept
            if streamed and streamed == last[1]:
                for bundle in streamed:
                    gaps = self.gaps_of(bundle)
                    keep[gaps.start + int(np.searchsorted(self.step[gaps], last[0]))] = True
            if streamed:
                last = number, streamed
        return keep & self.may_stay

    def placeable(self, demand: Demand, residents: Ints) -> Bools:
        """Returns the gaps of these residents, and of others those that leave every visit a place: `stretches`."""
        return (np.isin(self.bundle, residents) & self.may_stay) | self.stretches(demand, residents)

    def visits(self, keep: Bools) -> Visits:
        """Returns the visits of what is not resident."""
        if self._each_once:
            gaps = self._by_step[~keep[self._by_step]]
            return Visits(self.bundle[gaps], self.step[gaps], self.step[gaps] + 1, gaps)
        dropped = np.flatnonzero(~keep)
        starts = self._following[dropped]
        # A run of uses ends at the first dropped gap from its start on, or it goes on in the next pass.
        at = np.searchsorted(dropped, starts)
        ends = dropped[np.minimum(at, len(dropped) - 1)] if len(dropped) else dropped
        wraps = (at == len(dropped)) | (ends >= self._end[starts])
        ends = np.where(wraps, dropped[np.searchsorted(dropped, self._begin[starts])] if len(dropped) else 0, ends)
        first = self.step[starts]
        end = self.step[ends] + 1 + np.where(wraps, self.num_steps, 0)
        order = np.lexsort((self.bundle[starts], first))
        bundle = self.bundle[starts]
        if self._ways is None:
            return Visits(bundle[order], first[order], end[order], dropped[order])
        born, is_anew = self._is_dead[dropped], self._ways.is_anew[bundle]
        written = np.where(born & ~is_anew & ~self._is_dead[ends], self.step[ends], -1)
        end = np.where(written >= 0, self._until[ends] + 1, end)
        anew = is_anew & ~born
        return Visits(bundle[order], first[order], end[order], dropped[order], born[order], anew[order], written[order])


def _written_gaps(trace: Trace, demand: Demand, uses: Uses) -> list[tuple[int, int]]:
    """Returns the gaps in which something writes to the bundle, and the step that does, as `Uses.floor` counts.

    A step reads before it writes, so a write of a step that also reads lies in the gap after that.
    """
    if not any(step.writes for step in trace.steps):
        return []
    home = {index: number for number, bundle in enumerate(demand.bundles) for index in bundle.tensors}
    found: list[tuple[int, int]] = []
    for number, step in enumerate(trace.steps):
        for bundle in {home[index] for index in step.writes}:
            if not demand.uses[bundle]:
                continue
            gaps = uses.gaps_of(bundle)
            # The gap that a write lies in begins with the last use that is not after it.
            before = int(np.searchsorted(uses.step[gaps], number, side="right")) - 1
            if before < 0:  # before the first use
                found.append((gaps.stop - 1, number))
            else:
                is_last = gaps.start + before == gaps.stop - 1
                found.append((gaps.start + before, number - (uses.num_steps if is_last else 0)))
    return found
