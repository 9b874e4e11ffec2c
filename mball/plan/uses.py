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

# Before any step that is asked about.
NEVER = np.iinfo(np.int64).min // 4


@dataclass(frozen=True, slots=True)
class Visits:
    """Stays of bundles in slots, by first use. Parallel arrays.

    Attributes:
        bundle: who.
        first: the step of its first use, within the pass.
        end: the step after the last in which it has its slot; past the end of the pass where it stays over it.
        gap: the gap that the visit ends: were it kept, the visit would be no visit of its own.
        born: whether a step bears it; None if the link brings all.
        anew: whether a step makes it anew; None likewise.
        written: the step after which it is written below: that of its last use, or the last that changes it, or the
            last before a step on the host lane reads it. -1 for others; None likewise.
        last: the step of its last use; None likewise.
        until: the step that is left only when the write is done, or that of its last use; None likewise.
    """

    bundle: Ints
    first: Ints
    end: Ints
    gap: Ints
    born: Bools | None = None
    anew: Bools | None = None
    written: Ints | None = None
    last: Ints | None = None
    until: Ints | None = None

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
        host_floor: of each gap the last step on the host lane that writes or bears the bundle before that visit,
            counted likewise: it must have ended too. `NEVER` where there is none; None if the host lane writes nothing.
    """

    def __init__(self, trace: Trace, demand: Demand, ways: Ways | None = None) -> None:
        counts = np.array([len(steps) for steps in demand.uses], dtype=np.int64)
        self.num_steps = len(trace.steps)
        self._cyclic = trace.cyclic
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
        self.host_floor: Ints | None = None
        for gap, step in _written_gaps(demand, self):
            if self.floor is None:
                self.floor = np.full(len(self), -2 * self.num_steps, dtype=np.int64)
            if self.host_floor is None:
                self.host_floor = np.full(len(self), NEVER, dtype=np.int64)
            self.may_stay[gap] = False
            self.floor[gap] = max(int(self.floor[gap]), step)
            self.host_floor[gap] = max(int(self.host_floor[gap]), step)
        self._ways = ways
        self._changes = demand.at_home.device_writes
        if ways is not None:
            # From its last use to its birth in the next pass there is nothing to keep.
            self._is_dead: Bools = is_last & ways.is_born[self.bundle]
            self.may_stay[self._is_dead] = False
            self.may_stay[_read_gaps(demand, self)] = False
            self._written: Ints = self._last_written(ways)
            reaches = self.reaches if trace.cyclic else np.minimum(self.reaches, self.num_steps)
            is_written = self._written > NEVER
            steps = np.where(is_written, self._written, self.step)
            self._until: Ints = np.where(is_written, ways.until(self.bundle, steps, reaches), self.step)
            assert self.floor is not None, "a step that bears or changes is there, so this pass has floors"
            done = np.maximum(self._until, self.step) - np.where(is_last, self.num_steps, 0)
            self.floor = np.where(is_written, np.maximum(self.floor, done), self.floor)

    def __len__(self) -> int:
        return len(self.step)

    @property
    def all_may_stay(self) -> bool:
        """Whether each bundle can be there from its first use on: for good, or until what is born in the pass dies."""
        stays = self.may_stay if self._ways is None else self.may_stay | self._is_dead
        return bool(stays.all())

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
        born = self._is_dead[dropped] & ~self._ways.is_below[bundle]
        anew = self._ways.is_anew[bundle] & ~born
        over = np.where(wraps, self.num_steps, 0)
        last = end - 1
        written = self._written[ends] + over
        # What is below already is not written again; what changed is, if that was in this visit.
        is_written = (born | self._ways.is_changed[bundle]) & (self._written[ends] > NEVER) & (written >= first)
        written = np.where(is_written, written, -1)
        until = np.where(is_written, self._until[ends] + over, last)
        end = np.maximum(last, until) + 1
        return Visits(
            bundle[order],
            first[order],
            end[order],
            dropped[order],
            born[order],
            anew[order],
            written[order],
            last[order],
            until[order],
        )

    def written_back(self) -> list[tuple[int, int, int]]:
        """Returns the bundles that steps on the device change and that may be resident, and the write of each if it is.

        That is the step that changes it last in the pass, and the one that is left only when its write is done.
        """
        found = []
        for bundle, steps in self._changes.items():
            gaps = self.gaps_of(bundle)
            if self._ways is not None and bool(self.may_stay[gaps].all()):
                last, again = np.array([steps[-1]]), np.array([steps[0] + self.num_steps])
                until = self._ways.until(np.array([bundle]), last, again)
                found.append((bundle, steps[-1], int(until[0])))
        return found

    def _last_written(self, ways: Ways) -> Ints:
        """Returns for each use the step after which its bundle is written if its visit ends there, `NEVER` if none is.

        Counted from the pass of the use: what changed last in the pass before has negative steps.
        """
        is_made = ways.is_born & ~ways.is_below & ~ways.is_anew
        written = np.where(is_made[self.bundle], self.step, NEVER)
        written[self._is_dead & (ways.first_read[self.bundle] < 0)] = NEVER
        for bundle in np.flatnonzero(ways.first_read >= 0).tolist():
            gaps = self.gaps_of(bundle)
            before = int(np.searchsorted(self.step[gaps], ways.first_read[bundle])) - 1
            written[gaps] = np.minimum(self.step[gaps], self.step[gaps][before])
        for bundle, steps in self._changes.items():
            gaps = self.gaps_of(bundle)
            before_each = np.searchsorted(steps, self.step[gaps], side="right") - 1
            last = np.array(steps, dtype=np.int64)[before_each]
            earlier = last - self.num_steps if self._cyclic else np.full(len(last), NEVER)
            written[gaps] = np.where(before_each < 0, earlier, last)
        return written


def _written_gaps(demand: Demand, uses: Uses) -> list[tuple[int, int]]:
    """Returns the gaps in which the host lane writes or bears the bundle, and the steps that do: see `Uses.floor`."""
    return [
        _gap_at(uses, bundle, step)
        for bundle, steps in demand.at_home.host_writes.items()
        if demand.uses[bundle]
        for step in steps
    ]


def _read_gaps(demand: Demand, uses: Uses) -> list[int]:
    """Returns the gaps in which the host lane reads a home that steps on the device change: the bundle goes there."""
    at_home = demand.at_home
    return [
        _gap_at(uses, bundle, step)[0]
        for bundle in at_home.device_writes
        for step in at_home.host_reads.get(bundle, ())
    ]


def _gap_at(uses: Uses, bundle: int, step: int) -> tuple[int, int]:
    """Returns the gap of a bundle that a step lies in, and the step counted from the pass of the use after it."""
    gaps = uses.gaps_of(bundle)
    # It begins with the last use that is not after the step.
    before = int(np.searchsorted(uses.step[gaps], step, side="right")) - 1
    if before < 0:  # before the first use
        return gaps.stop - 1, step
    is_last = gaps.start + before == gaps.stop - 1
    return gaps.start + before, step - (uses.num_steps if is_last else 0)
