"""How long a pass takes if bytes had no addresses: what the search for residents asks thousands of times.

[Note: a relaxation]
Visits come over one link in the order of their first use. A visit may begin once so many bytes have been given back
that it fits the pool, wherever in the pool they are. Which step that is depends on sizes only, not on time, so it is
found for all visits at once; one loop over the visits then says when each has arrived. Placing (`slots.py`) can only
make starts later: what is computed here is a lower bound for the same visits, and close to it while bundles are small
against the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mball.plan.demand import Demand
from mball.plan.uses import Floats, Ints, Visits, prefix_sums
from mball.schema import Link

MAX_PASSES = 8
# Of many small requests in one window so many are looked at.
MOST_SHARING = 4
_SAME = 1e-6


@dataclass(frozen=True, slots=True)
class Timing:
    """Of a steady pass, or of the only one.

    Attributes:
        pass_s: how long it takes.
        stall_s: how long the first step of each visit waits for it.
        period: visits with the same number came without a break of the link.
    """

    pass_s: float
    stall_s: Floats
    period: Ints


class Flow:
    """The passes of one trace under one partition into bundles.

    Args:
        demand: the bundles.
        compute_s: of each trace step.
        link: brings bundles.
        cyclic: whether the pass repeats.
        floor: see `Uses.floor`.
    """

    def __init__(
        self, demand: Demand, compute_s: list[float], link: Link, *, cyclic: bool, floor: Ints | None = None
    ) -> None:
        self.sizes: Ints = np.array([bundle.size_bytes for bundle in demand.bundles], dtype=np.int64)
        self.link_s: Floats = np.array(demand.moved_bytes, dtype=np.float64) / link.bandwidth_bytes_per_s
        self.before_s = prefix_sums(compute_s)
        self.compute_s = float(self.before_s[-1])
        self.num_steps = len(compute_s)
        self.cyclic = cyclic
        self.floor = floor
        self._latency_s = link.latency_s
        self._window_s = link.window_bytes / link.bandwidth_bytes_per_s

    def releases(self, visits: Visits, pool_bytes: int) -> Ints | None:
        """Returns the step after which each visit may begin, counted from its pass; None if one would come too late."""
        sizes = self.sizes[visits.bundle]
        count = self.num_steps
        issued = np.cumsum(sizes)
        total = int(issued[-1]) if len(issued) else 0
        wraps = visits.end > count
        ends = np.where(wraps, visits.end - count, visits.end)
        by_end = np.argsort(ends, kind="stable")
        given = np.cumsum(sizes[by_end])
        # Bytes that must have been given back since the pass began; what stays over its end is given back in the next.
        needed = issued - pool_bytes + int(sizes[wraps].sum())
        if not self.cyclic:
            after = np.full(len(sizes), -1, dtype=np.int64)
        else:
            after = visits.end - 1 - count  # its own slot in the pass before
            earlier = (needed <= 0) & (needed + total > 0)
            after[earlier] = np.maximum(
                after[earlier], ends[by_end[np.searchsorted(given, needed[earlier] + total)]] - 1 - count
            )
        here = (needed > 0) & (needed <= total)
        after[here] = np.maximum(after[here], ends[by_end[np.searchsorted(given, needed[here])]] - 1)
        after[needed > total] = count
        if self.floor is not None:
            after = np.maximum(after, self.floor[visits.gap])
        if len(after):
            after = np.maximum.accumulate(np.maximum(after, after.max() - count if self.cyclic else -1))
        return None if bool((after >= visits.first).any()) else after

    def run(self, visits: Visits, pool_bytes: int) -> Timing | None:
        """Returns the timing of these visits through a pool of so many bytes, None if they do not fit."""
        after = self.releases(visits, pool_bytes)
        return None if after is None else self.time(visits, after)

    def time(self, visits: Visits, after: Ints) -> Timing:
        """Returns the timing of these visits if each may begin once step `after` of its pass has been left."""
        count, num = self.num_steps, len(visits)
        if not num:
            return Timing(self.compute_s, np.empty(0), np.empty(0, dtype=np.int64))
        is_ahead = after < 0
        within = after + np.where(is_ahead, count, 0) if self.cyclic else after
        # How many visits began up to the step that is left: their stalls delay it.
        known = np.searchsorted(visits.first, within, side="right").tolist()
        free_s = (self.before_s[within + 1] + self._latency_s).tolist()
        need_s = self.before_s[visits.first].tolist()
        link_s = self.link_s[visits.bundle].tolist()
        # Starts never overtake each other, so those ahead come first.
        num_ahead = int(is_ahead.sum())
        link, whole = self._latency_s, 0.0
        late = [0.0] * (num + 1)  # how late the pass is after each visit's first step
        begins: list[int] = []
        for number in range(MAX_PASSES if self.cyclic else 1):
            before, late = late, [0.0]
            current, begins = 0.0, []
            for v, (k, free, need, duration) in enumerate(zip(known, free_s, need_s, link_s, strict=True)):
                if v >= num_ahead:
                    ready = free + late[k]
                elif number:
                    ready = free + before[k] - whole
                else:
                    ready = 0.0
                if ready > link:
                    link = ready
                    begins.append(v)
                link += duration
                landed = link
                if self._window_s:
                    landed = self._shared(v, link, known, free_s, link_s, late, num_ahead)
                if landed - need > current:
                    current = landed - need
                late.append(current)
            last, whole = whole, self.compute_s + current
            link -= whole
            if abs(last - whole) <= _SAME * whole:
                break
        period = np.zeros(num, dtype=np.int64)
        period[begins] = 1
        return Timing(whole, np.diff(np.array(late)), np.cumsum(period))

    def _shared(
        self,
        visit: int,
        landed: float,
        known: list[int],
        free_s: list[float],
        link_s: list[float],
        late: list[float],
        num_ahead: int,
    ) -> float:
        """Returns when a visit has landed that shares the link with those behind it within the window."""
        limit = landed + self._window_s
        for other in range(visit + 1, min(visit + 1 + MOST_SHARING, len(known))):
            # One that begins after this visit's own step cannot be waited for.
            if landed >= limit or other < num_ahead or known[other] > visit:
                break
            if free_s[other] + late[known[other]] >= landed:
                break
            landed = min(landed + link_s[other], limit)
        return landed
