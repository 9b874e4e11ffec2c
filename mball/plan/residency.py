"""Which bundles stay in device memory, and over which gaps between two uses the others do.

[Note: what a byte of memory buys]
A bundle that stays saves its time on the link. That shortens the pass only where the link is what is waited for. So
memory is given out in rounds: a pass is timed, the visits that came without a break of the link before a wait are what
may stay, and they get a share of the memory in proportion to that wait, spread evenly over them. Then the next round
is timed. Where steps are alike this spreads residents evenly over the pass; where they are not, it puts them where
the link cannot keep up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from mball.plan.arrays import Bools, Ints
from mball.plan.flow import Timing
from mball.plan.partition import Partition
from mball.plan.uses import Uses

# Staying over this part of the pass or less, against the typical bundle, goes before all others.
PREFERRED_VALUE = 1.5
# Room over time is kept by so many equal stretches of the pass: a gap counts in each stretch it touches.
STRETCHES = 512
_SAME = 1e-6


@dataclass(slots=True)
class Choice:
    """Who stays.

    Attributes:
        keep: for each gap whether its bundle stays over it.
        pass_s: how long a pass takes if bytes had no addresses.
        streamed_bytes: what comes in a pass.
    """

    keep: Bools
    pass_s: float
    streamed_bytes: int

    def cost(self) -> tuple[float, int]:
        """Returns what to minimise."""
        return float(f"{self.pass_s:.6g}"), self.streamed_bytes


class Residency:
    """Chooses for one partition of the weights; ask it for several sizes of the pool.

    Args:
        partition: the pass.
    """

    def __init__(self, partition: Partition) -> None:
        demand, uses, flow = partition.demand, partition.uses, partition.flow
        self._demand = demand
        self._uses = uses
        self._flow = flow
        self._known: dict[tuple[int, bytes], Timing | None] = {}
        self._sizes: Ints = flow.sizes[uses.bundle]
        spans = uses.reaches - uses.step - 1
        self._span: Ints = np.maximum(spans, 0)
        moved_s = flow.cost_s[uses.bundle]
        with np.errstate(divide="ignore", invalid="ignore"):
            value = moved_s / (self._sizes * np.maximum(self._span, 1))
        self._value = np.where(self._sizes > 0, value, 0.0)
        self._moved_bytes: Ints = np.array(demand.moved_bytes, dtype=np.int64)
        # What is read between two uses of a bundle: if it is no more than the bundle, staying costs less than coming.
        before = np.array(demand.read_bytes_before, dtype=np.int64)
        self._step_bytes = np.diff(before)
        until = uses.reaches % max(uses.num_steps, 1)
        between = before[until] - before[uses.step + 1] + np.where(uses.reaches >= uses.num_steps, before[-1], 0)
        is_multiple = np.bincount(uses.bundle, minlength=len(flow.sizes))[uses.bundle] > 1
        self._near: Bools = is_multiple & uses.may_stay & (between <= self._sizes)
        self._idle: Bools = is_multiple & uses.may_stay & (between == 0)

    def choose(self, arena_bytes: int, pool_bytes: int, rounds: int, stayed: Ints | None = None) -> Choice | None:
        """Returns who stays in an arena that leaves `pool_bytes` for what comes and goes; None where that cannot be.

        Memory is given out in so many rounds, the last one taking what is left.

        Args:
            arena_bytes: room for all.
            pool_bytes: of that for what does not stay.
            rounds: how many.
            stayed: where in the arena each bundle that stayed before ends, beyond any arena for others: who lies where
                residents will lie goes on staying, before all others.
        """
        stays = self._must_stay(pool_bytes)
        room = _Room(self._uses, arena_bytes - pool_bytes)
        if stays is None or not room.take_bundles(self._resident_bytes(stays)):
            return None
        for keep in (stays | self._near, stays | self._idle, stays.copy()):
            timing = self._time(keep, arena_bytes - room.spare_bytes)
            if timing is not None:
                break
        else:
            return None
        if stayed is not None:
            lies_well = (stayed <= arena_bytes - pool_bytes)[self._uses.bundle] & self._uses.may_stay & ~keep
            before = keep.copy()
            self._keep_some(keep, np.flatnonzero(lies_well), float(room.free_bytes), room)
            again = self._time(keep, arena_bytes - room.spare_bytes)
            keep, timing = (before, timing) if again is None else (keep, again)
        for number in range(rounds):
            hot, quota = self._hot(keep, timing)
            if not quota:
                break
            before = keep.copy()
            if not self._keep_some(keep, hot, min(quota, room.free_bytes / (rounds - number)), room):
                continue
            again = self._time(keep, arena_bytes - room.spare_bytes)
            if again is None:  # stays over gaps lie where the pool is needed
                keep = before
                break
            timing = again
        before = keep.copy()
        self._keep_some(keep, np.flatnonzero(~keep), float(room.free_bytes), room)
        return self.rate(keep, arena_bytes) or self.rate(before, arena_bytes)

    def exchange(self, choice: Choice, arena_bytes: int, limit: int) -> list[Choice]:
        """Returns better choices, each found from the one before by exchanging what stays for something else.

        Ends when no exchange helps, when a pass takes no longer than its steps, or after `limit` others were timed.
        """
        found = [choice]
        limit += len(self._known)
        is_better = True
        while is_better and found[-1].pass_s > self._flow.least_s * (1 + _SAME):
            is_better = False
            for keep in self._exchanges(found[-1].keep, arena_bytes):
                rated = self.rate(keep, arena_bytes)
                if rated is not None and rated.cost() < found[-1].cost():
                    found.append(rated)
                    is_better = True
                    break
                if len(self._known) > limit:
                    return found[1:]
        return found[1:]

    def alternatives(self, choice: Choice, arena_bytes: int, limit: int) -> Iterator[Choice]:
        """Yields at most `limit` choices that are one exchange away, fast or slow."""
        for keep in islice(self._exchanges(choice.keep, arena_bytes), limit):
            rated = self.rate(keep, arena_bytes)
            if rated is not None:
                yield rated

    def _exchanges(self, keep: Bools, arena_bytes: int) -> Iterator[Bools]:
        """Yields what may stay instead: one more or one less, one for another, one for many, and many for one."""
        gaps = np.flatnonzero(self._uses.may_stay & (self._sizes > 0)).tolist()
        by_size = sorted(gaps, key=lambda gap: (int(self._sizes[gap]), gap))
        for gap in gaps:
            changed = keep.copy()
            changed[gap] = not keep[gap]
            yield changed
        for gap in gaps:
            for order in (by_size, by_size[::-1]):
                changed = keep.copy()
                changed[gap] = not keep[gap]
                if not keep[gap]:  # whoever is in the way goes, and more of them
                    fits = None
                    for other in order:
                        if self._time(changed, arena_bytes) is not None:
                            yield changed.copy()
                            fits = changed.copy() if fits is None else fits
                        changed[other] = other == gap
                    changed = changed if fits is None else fits
                for other in order:  # whoever finds room now stays
                    if not changed[other] and other != gap:
                        changed[other] = True
                        if self._time(changed, arena_bytes) is None:
                            changed[other] = False
                yield changed
        kept = [gap for gap in gaps if keep[gap]]
        dropped = [gap for gap in gaps if not keep[gap]]
        for one in kept:
            for number, two in enumerate(dropped):
                for three in (two, *dropped[number + 1 :]):
                    changed = keep.copy()
                    changed[one] = False
                    changed[two] = changed[three] = True
                    yield changed

    def rate(self, keep: Bools, arena_bytes: int) -> Choice | None:
        """Returns the choice with its time, None where it does not fit."""
        timing = self._time(keep, arena_bytes)
        if timing is None:
            return None
        return Choice(keep, timing.pass_s, int(self._moved_bytes[self._uses.visits(keep).bundle].sum()))

    def _time(self, keep: Bools, arena_bytes: int) -> Timing | None:
        key = (arena_bytes, keep.tobytes())
        if key not in self._known:
            pool_bytes = arena_bytes - self._resident_bytes(keep)
            self._known[key] = self._flow.run(self._uses.visits(keep), pool_bytes) if pool_bytes >= 0 else None
        return self._known[key]

    def _resident_bytes(self, keep: Bools) -> int:
        return int(self._flow.sizes[self._uses.residents(keep)].sum())

    def _must_stay(self, pool_bytes: int) -> Bools | None:
        """Returns the gaps of what takes no room or must not be streamed, and of what would overflow the pool."""
        demand, sizes = self._demand, self._flow.sizes
        if not self._flow.cyclic:
            return np.zeros(len(self._uses), dtype=bool)
        stays = np.zeros(len(sizes), dtype=bool)
        stays[sizes == 0] = True
        changes = np.zeros(len(sizes), dtype=bool)
        changes[self._uses.bundle[~self._uses.may_stay]] = True
        stays[list(demand.pooled)] = True
        stays &= ~changes  # what is written cannot stay, however small it is
        for number in np.flatnonzero(self._step_bytes > pool_bytes).tolist():
            streamed = [bundle for bundle in demand.reads[number] if not stays[bundle]]
            need = demand.slot_bytes(streamed)
            lasting = [bundle for bundle in streamed if not demand.born[bundle]]  # what dies cannot stay
            for bundle in sorted(lasting, key=lambda b: (-demand.bundles[b].size_bytes, b)):
                if need <= pool_bytes:
                    break
                stays[bundle] = True
                need -= demand.bundles[bundle].size_bytes
        keep: Bools = stays[self._uses.bundle]
        if bool((keep & ~self._uses.may_stay & (self._sizes > 0)).any()):
            return None
        return keep & self._uses.may_stay

    def _hot(self, keep: Bools, timing: Timing) -> tuple[Ints, float]:
        """Returns the gaps whose keeping would shorten a wait, and how many bytes would end all of them."""
        visits = self._uses.visits(keep)
        if not len(visits) or not timing.stall_s.any():
            return np.empty(0, dtype=np.int64), 0.0
        period = timing.period
        waits = np.bincount(period, weights=timing.stall_s)
        last = np.zeros(len(waits), dtype=np.int64)
        stalling = np.flatnonzero(timing.stall_s > 0)
        last[period[stalling]] = stalling
        hot = (waits[period] > 0) & (np.arange(len(visits)) <= last[period])
        cost_s = self._flow.cost_s[visits.bundle]
        sizes = self._flow.sizes[visits.bundle]
        served = np.bincount(period, weights=np.where(hot, cost_s, 0.0), minlength=len(waits))
        held = np.bincount(period, weights=np.where(hot, sizes, 0), minlength=len(waits))
        part = np.divide(waits, served, out=np.zeros_like(waits), where=served > 0)
        return visits.gap[hot], float((np.minimum(part, 1.0) * held).sum())

    def _keep_some(self, keep: Bools, gaps: Ints, quota_bytes: float, room: _Room) -> bool:
        """Keeps bundles over some of these gaps, about `quota_bytes` of them; returns whether there was one.

        First what saves most time for the room it takes over time, then evenly spread.
        """
        gaps = gaps[self._uses.may_stay[gaps] & (self._sizes[gaps] > 0)]
        if not len(gaps):
            return False
        value = self._value[gaps]
        # Not numpy's own: its first call imports a second's worth of modules.
        typical = float(np.sort(value)[len(value) // 2])
        preferred = gaps[value >= PREFERRED_VALUE * typical]
        changed = False
        for gap in preferred[np.lexsort((preferred, -self._value[preferred]))].tolist():
            size = int(self._sizes[gap])
            if size <= quota_bytes and room.take(gap, size):
                keep[gap] = True
                quota_bytes -= size
                changed = True
        spread = gaps[value < PREFERRED_VALUE * typical]
        spread = spread[np.argsort(self._uses.step[spread], kind="stable")]
        sizes = self._sizes[spread]
        total = int(sizes.sum())
        share = min(1.0, quota_bytes / total) if total else 0.0
        owed = 0.0
        for gap, size in zip(spread.tolist(), sizes.tolist(), strict=True):
            owed += share * size
            if owed >= size / 2 and size <= quota_bytes and room.take(gap, size):
                keep[gap] = True
                quota_bytes -= size
                owed -= size
                changed = True
        left = spread[~keep[spread] & (sizes <= quota_bytes)]
        for gap in left[np.lexsort((left, -self._sizes[left]))].tolist():
            size = int(self._sizes[gap])
            if size <= quota_bytes and room.take(gap, size):
                keep[gap] = True
                quota_bytes -= size
                changed = True
        return changed


class _Room:
    """What is left for stays, over the pass."""

    def __init__(self, uses: Uses, size_bytes: int) -> None:
        self._width = max(-(-uses.num_steps // STRETCHES), 1)
        self._count = -(-uses.num_steps // self._width) if uses.num_steps else 0
        self._begin = (uses.step // self._width).tolist()
        self._end = (uses.reaches // self._width + 1).tolist()
        # What stays over some stretches only, in each of them.
        self._partly = np.zeros(self._count, dtype=np.int64)
        # The most of that in a stretch: kept up to date, since it is asked for whenever something stays over all.
        self._most_partly = 0
        # The room without what stays over all stretches, as most does.
        self._left = size_bytes

    @property
    def free_bytes(self) -> int:
        """Where there is most."""
        return self._left - int(self._partly.min(initial=self._most_partly))

    @property
    def spare_bytes(self) -> int:
        """Where there is least."""
        return self._left - self._most_partly

    def take_bundles(self, size_bytes: int) -> bool:
        """Takes bytes throughout; returns whether there is room."""
        if self._left - self._most_partly < size_bytes:
            return False
        self._left -= size_bytes
        return True

    def take(self, gap: int, size_bytes: int) -> bool:
        """Takes bytes over a gap, uses at both ends included; returns whether there is room."""
        begin, end = self._begin[gap], self._end[gap]
        if end - begin >= self._count:
            return self.take_bundles(size_bytes)
        parts = [slice(begin, min(end, self._count))]
        if end > self._count:
            parts.append(slice(0, end - self._count))
        if any(self._left - int(self._partly[part].max()) < size_bytes for part in parts):
            return False
        for part in parts:
            self._partly[part] += size_bytes
        self._most_partly = int(self._partly.max())
        return True
