"""How long a pass takes if bytes had no addresses: what the search for residents asks thousands of times.

[Note: a relaxation]
Visits come over one link in the order of their first use. A visit may begin once so many bytes have been given back
that it fits the pool, wherever in the pool they are. Which step that is depends on sizes only, not on time, so it is
found for all visits at once; one loop over the visits then says when each has arrived. Placing (`slots.py`) can only
make starts later: what is computed here is a lower bound for the same visits, and close to it while bundles are small
against the pool. Where tensors born in the pass leave it is an estimate: writes and reads on one wire are taken in the
order in which they are waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from mball.plan.arrays import Floats, Ints, prefix_sums
from mball.plan.beside import Beside
from mball.plan.demand import Demand
from mball.plan.leaving import Ways
from mball.plan.uses import Visits
from mball.schema import Machine

# Fewer than `simulate` runs: a search asks thousands of times.
MAX_TIMED_PASSES = 8
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


@dataclass(frozen=True, slots=True)
class _Requests:
    """When visits may ask for the link, and for how long. Parallel lists, by visit.

    Attributes:
        known: how many visits have begun when the step is left after which this one may.
        free_s: when that is if the pass is not late, latency included.
        link_s: how long it takes the link.
        num_ahead: so many, the first ones, ask in the pass before.
    """

    known: list[int]
    free_s: list[float]
    link_s: list[float]
    num_ahead: int


class Flow:
    """The passes of one trace under one partition into bundles.

    Args:
        demand: the bundles.
        compute_s: of each trace step.
        machine: its link brings bundles.
        cyclic: whether the pass repeats.
        floor: see `Uses.floor`.
        ways: how tensors born in the pass leave, and what changes; None if nothing does.
        beside: what happens beside the visits; None for nothing.

    Attributes:
        least_s: no pass is faster: that of the busier lane of steps.
        cost_s: of each bundle, what it costs on a link or in compute to leave and come again.
    """

    def __init__(
        self,
        demand: Demand,
        compute_s: list[float],
        machine: Machine,
        *,
        cyclic: bool,
        floor: Ints | None = None,
        ways: Ways | None = None,
        beside: Beside | None = None,
    ) -> None:
        link = machine.link
        self.sizes: Ints = np.array([bundle.size_bytes for bundle in demand.bundles], dtype=np.int64)
        self.link_s: Floats = np.array(demand.moved_bytes, dtype=np.float64) / link.bandwidth_bytes_per_s
        self.before_s = prefix_sums(compute_s)
        self.compute_s = float(self.before_s[-1])
        self.least_s = self.compute_s if beside is None else max(self.compute_s, beside.host_s)
        self._beside = beside
        self.num_steps = len(compute_s)
        self.cyclic = cyclic
        self.floor = floor
        self.cost_s = self.link_s
        self._ways = ways
        self._write_latency_s: float | None = None
        if ways is not None:
            write_s = np.where(ways.always_written, 0.0, ways.write_s)
            self.cost_s = np.where(ways.is_anew, ways.anew_s, self.link_s + write_s)
            if machine.write_link is not None:
                self._write_latency_s = machine.write_link.latency_s
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
            pass_s = max(self.least_s, sum(self._back_s(visits)))
            return Timing(pass_s, np.empty(0), np.empty(0, dtype=np.int64))
        if visits.born is not None:
            return self._time_moves(visits, after)
        is_ahead = after < 0
        within = after + np.where(is_ahead, count, 0) if self.cyclic else after
        # How many visits began up to the step that is left: their stalls delay it.
        known = np.searchsorted(visits.first, within, side="right").tolist()
        free_s = (self.before_s[within + 1] + self._latency_s).tolist()
        need_s = self.before_s[visits.first].tolist()
        link_s = self.link_s[visits.bundle].tolist()
        # Starts never overtake each other, so those ahead come first.
        num_ahead = int(is_ahead.sum())
        requests = _Requests(known, free_s, link_s, num_ahead)
        link, whole = self._latency_s, 0.0
        late = [0.0] * (num + 1)  # how late the pass is after each visit's first step
        begins: list[int] = []
        window_s = self._window_s
        # When those ahead may begin is known before the pass; the others wait for what is late in it.
        ahead_s, ahead_known = np.array(free_s[:num_ahead]), np.array(known[:num_ahead], dtype=np.int64)
        within_known, within_s = [0] * num_ahead + known[num_ahead:], free_s[num_ahead:]
        for number in range(MAX_TIMED_PASSES if self.cyclic else 1):
            ready_s = ahead_s + np.array(late)[ahead_known] - whole if number else np.zeros(num_ahead)
            late = [0.0]
            append = late.append
            current, begins = 0.0, []
            for k, free, need, duration in zip(within_known, ready_s.tolist() + within_s, need_s, link_s, strict=True):
                ready = free + late[k]
                if ready > link:
                    link = ready
                    begins.append(len(late) - 1)
                link += duration
                landed = link
                if window_s:
                    landed = self._shared(len(late) - 1, link, late, requests)
                if landed - need > current:
                    current = landed - need
                append(current)
            last, whole = whole, self.compute_s + current
            link -= whole
            if abs(last - whole) <= _SAME * whole:
                break
        period = np.zeros(num, dtype=np.int64)
        period[begins] = 1
        return Timing(max(whole, self.least_s), np.diff(np.array(late)), np.cumsum(period))

    def _time_moves(self, visits: Visits, after: Ints) -> Timing:
        """Does the same where steps make some of the visits and others are written below.

        A write delays the step after the one that is left when it is done; making a tensor anew delays the pass by what
        it takes. A wait for a write counts as one for the visit that brings the tensor back. Windows are left out.
        """
        count, num = self.num_steps, len(visits)
        events, back = _events(visits), self._written_back(visits)
        events += [(until + 1, _Event.LEAVES, num + number) for number, (_, _, until) in enumerate(back)]
        events.sort()
        steps = np.array([step for step, _, _ in events], dtype=np.int64)
        is_ahead = after < 0
        left = after + np.where(is_ahead, count, 0)  # never ahead in the only pass
        known = np.searchsorted(steps, left, side="right").tolist()
        free_s = (self.before_s[np.clip(left + 1, 0, count)] + self._latency_s).tolist()
        delay_s = self._delay_s(visits, after)
        need_s = self.before_s[visits.first].tolist()
        link_s = self.link_s[visits.bundle].tolist()
        own_latency_s = self._write_latency_s
        out_latency_s = self._latency_s if own_latency_s is None else own_latency_s
        ways = self._ways
        assert ways is not None
        assert visits.written is not None
        assert visits.until is not None
        anew_s = ways.anew_s[visits.bundle].tolist()
        bundle, written, until = visits.bundle, visits.written, visits.until
        if back:
            others = np.array(back, dtype=np.int64).T
            bundle, written, until = (
                np.concatenate(each) for each in zip((bundle, written, until), others, strict=True)
            )
        write_s = (ways.write_s[bundle] - out_latency_s).tolist()
        write_known = np.searchsorted(steps, written, side="right").tolist()
        write_free_s = (self._left_s(written) + out_latency_s).tolist()
        write_need_s = self._left_s(until).tolist()
        link, out, whole = self._latency_s, out_latency_s, 0.0
        late = [0.0] * (len(events) + 1)
        begins: list[int] = []
        for number in range(MAX_TIMED_PASSES if self.cyclic else 1):
            before, late = late, [0.0]
            current, begins = 0.0, []
            for _, kind, v in events:
                if kind is _Event.ARRIVES:
                    k, ready = known[v], 0.0
                    if not is_ahead[v]:
                        ready = free_s[v] + late[k]
                    elif number:
                        ready = free_s[v] + before[k] - whole
                    if delay_s[v] and (number or not is_ahead[v]):  # others go first while it waits for the host lane
                        current = max(current, max(link, ready + delay_s[v]) + link_s[v] - need_s[v])
                        link += link_s[v]
                        late.append(current)
                        continue
                    if ready > link:
                        link = ready
                        begins.append(v)
                    link += link_s[v]
                    current = max(current, link - need_s[v])
                elif kind is _Event.LEAVES:
                    ready = write_free_s[v] + late[write_known[v]]
                    if own_latency_s is None:
                        out = link = max(link, ready) + write_s[v]
                    else:
                        out = max(out, ready) + write_s[v]
                    current = max(current, out - write_need_s[v])
                elif kind is _Event.ANEW:
                    current += anew_s[v]
                late.append(current)
            last, whole = whole, self.compute_s + current
            link -= whole
            out -= whole
            if abs(last - whole) <= _SAME * whole:
                break
        stall_s = np.zeros(num + len(back))
        brought = _brought_back(visits)
        for (_, kind, v), delay_s in zip(events, np.diff(np.array(late)).tolist(), strict=True):
            stall_s[brought.get(v, v) if kind is _Event.LEAVES else v] += delay_s
        period = np.zeros(num, dtype=np.int64)
        period[begins] = 1
        return Timing(max(whole, self.least_s), stall_s[:num], np.cumsum(period))

    def _left_s(self, steps: Ints) -> Floats:
        """Returns when steps of this pass, or of those beside it, have been left if no step waits."""
        passes, within = np.divmod(steps, self.num_steps)
        return self.before_s[within + 1] + passes * self.compute_s

    def _delay_s(self, visits: Visits, after: Ints) -> list[float]:
        """Returns how long visits that may begin once step `after` has been left wait for the host lane."""
        if self._beside is None or self._beside.ready_s is None:
            return [0.0] * len(visits)
        found: list[float] = self._beside.delay_s(visits.gap, self._left_s(after)).tolist()
        return found

    def _written_back(self, visits: Visits) -> list[tuple[int, int, int]]:
        """Returns of the bundles that are written back those that stay: see `Uses.written_back`."""
        if self._beside is None or not self._beside.written_back:
            return []
        comes = set(visits.bundle.tolist())
        return [back for back in self._beside.written_back if back[0] not in comes]

    def _back_s(self, visits: Visits) -> list[float]:
        """Returns the seconds on the link of those."""
        return [
            0.0 if self._ways is None else float(self._ways.write_s[bundle])
            for bundle, _, _ in self._written_back(visits)
        ]

    def _shared(self, visit: int, landed: float, late: list[float], requests: _Requests) -> float:
        """Returns when a visit has landed that shares the link with those behind it within the window.

        Args:
            visit: which.
            landed: when it lands if it has the link to itself.
            late: how late the pass is after the first step of each visit so far.
            requests: of all visits.
        """
        known = requests.known
        limit = landed + self._window_s
        for other in range(visit + 1, min(visit + 1 + MOST_SHARING, len(known))):
            # One that begins after this visit's own step cannot be waited for.
            if landed >= limit or other < requests.num_ahead or known[other] > visit:
                break
            if requests.free_s[other] + late[known[other]] >= landed:
                break
            landed = min(landed + requests.link_s[other], limit)
        return landed


class _Event(IntEnum):
    """What may delay a step, in the order in which it does: first waits, then work."""

    ARRIVES = 0
    LEAVES = 1
    BORN = 2
    ANEW = 3


def _events(visits: Visits) -> list[tuple[int, _Event, int]]:
    """Returns step, kind and visit of what may delay a pass, by step."""
    assert visits.born is not None
    assert visits.anew is not None
    assert visits.written is not None
    events = []
    assert visits.until is not None
    for v, (first, until, is_born, is_anew, written) in enumerate(
        zip(
            visits.first.tolist(),
            visits.until.tolist(),
            visits.born.tolist(),
            visits.anew.tolist(),
            visits.written.tolist(),
            strict=True,
        )
    ):
        events.append((first, _Event.BORN if is_born else _Event.ANEW if is_anew else _Event.ARRIVES, v))
        if written >= 0:
            events.append((until + 1, _Event.LEAVES, v))
    return sorted(events)


def _brought_back(visits: Visits) -> dict[int, int]:
    """Returns for each visit that is written below the next one of its bundle."""
    assert visits.written is not None
    back: dict[int, int] = {}
    waiting: dict[int, int] = {}
    for v, (bundle, written) in enumerate(zip(visits.bundle.tolist(), visits.written.tolist(), strict=True)):
        if bundle in waiting:
            back[waiting.pop(bundle)] = v
        if written >= 0:
            waiting[bundle] = v
    return back
