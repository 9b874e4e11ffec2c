"""Where streamed bundles go in the pool, and how early each may be brought in.

The plan repeats with the same addresses, so where a bundle lies decides who has to leave before it may come. Two ways
of placing are tried. The ring takes the bytes in the order of first use and begins again at its start; a ring whose
last round is nearly empty would leave no lead at the end of the pass, so it is also tried with about the same bytes in
every round. The other way gives each bundle the bytes that were free first, which is better where sizes differ and few
fit.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from mball.plan.arrays import Bools, Ints
from mball.plan.uses import Visits

# With more visits than this in the pool at one time, looking for the place that was free first takes too long.
MOST_SLOTS = 16
MOST_FITTED = 1000


@dataclass(frozen=True, slots=True)
class Layout:
    """Where visits lie and when they may begin.

    Attributes:
        offsets: of each visit in the pool.
        after: the step that must have been left before its transfer may start, counted from the pass that reads.
    """

    offsets: Ints
    after: Ints


class Pool:
    """The visits of a pass in a pool.

    A cyclic pass is laid out from the step on over whose begin the fewest bytes stay: where that is none, a ring begins
    anew there. Within this class steps and visits count from there.

    Args:
        visits: who is there when.
        sizes_bytes: the slot size of each visit.
        pool_bytes: how large the pool is.
        num_steps: of the pass.
        cyclic: whether the pass repeats.
        earliest: a step that must have been left before each visit begins, whatever room there is.
        apart: visits that need not keep to the order of the others; None for none.
    """

    def __init__(
        self,
        visits: Visits,
        sizes_bytes: Ints,
        pool_bytes: int,
        num_steps: int,
        *,
        cyclic: bool,
        earliest: Ints | None = None,
        apart: Bools | None = None,
    ) -> None:
        turn = _quietest_step(visits, sizes_bytes, num_steps) if cyclic else 0
        first = visits.first - turn
        shift = np.where(first < 0, num_steps, 0)
        self._turned: Ints = turn - shift
        self._order: Ints = np.argsort(first + shift, kind="stable")
        self._spans: list[tuple[int, int]] = list(
            zip(
                (visits.first - self._turned)[self._order].tolist(),
                (visits.end - self._turned)[self._order].tolist(),
                strict=True,
            )
        )
        self._sizes: list[int] = sizes_bytes[self._order].tolist()
        self._floor = None if earliest is None else (earliest - self._turned)[self._order].tolist()
        made = None if visits.born is None or visits.anew is None else visits.born | visits.anew
        if apart is not None:
            made = apart if made is None else made | apart
        # Who a step makes: it takes its place when that step begins, and delays nobody on the link.
        self._made: list[bool] | None = None if made is None else made[self._order].tolist()
        self._pool_bytes = pool_bytes
        self._num_steps = num_steps
        self._cyclic = cyclic

    def layouts(self) -> list[Layout]:
        """Returns up to three layouts, none when the visits do not fit.

        When visits fall into stretches (all visits that meet are there for the same steps), they do not fit only if a
        stretch is larger than the pool.
        """
        found: list[list[int]] = []
        filled = self._ring(None)
        if filled is not None:
            offsets, rounds = filled
            found.append(offsets)
            balanced = self._ring(rounds) if rounds > 1 else None
            if balanced is not None and balanced[0] not in found:
                found.append(balanced[0])
        fitted = self._free_first() if len(self._spans) <= MOST_FITTED else None
        if fitted is not None and fitted not in found:
            found.append(fitted)
        return [layout for offsets in found if (layout := self._layout(offsets)) is not None]

    def neighbours(self, layout: Layout) -> Iterator[Layout | None]:
        """Yields layouts in which one visit lies elsewhere, at an end of the pool or beside another; None for each
        place where it cannot lie.
        """
        offsets = layout.offsets[self._order].tolist()
        edges = {0, *offsets, *(offset + size for offset, size in zip(offsets, self._sizes, strict=True))}
        for number, size in enumerate(self._sizes):
            places = {edge for edge in edges if edge + size <= self._pool_bytes} | {self._pool_bytes - size}
            places |= {edge - size for edge in edges if edge >= size}
            for place in sorted(places - {offsets[number]}):
                yield self._layout([*offsets[:number], place, *offsets[number + 1 :]])

    def _layout(self, offsets: Sequence[int]) -> Layout | None:
        """Returns the layout with these offsets, None where a visit would begin too late."""
        starts = self._starts(offsets)
        if any(start >= first for start, (first, _) in zip(starts, self._spans, strict=True)):
            return None
        placed, after = np.empty(len(starts), dtype=np.int64), np.empty(len(starts), dtype=np.int64)
        placed[self._order] = offsets
        after[self._order] = starts
        return Layout(placed, after + self._turned)

    def _ring(self, balanced_rounds: int | None) -> tuple[list[int], int] | None:
        """Returns the offset of each visit and the number of rounds, or None when they do not fit.

        What stays over the end of the pass lies at the pool's start, where nothing else goes.

        Args:
            balanced_rounds: begin again after this share of the bytes; None fills the ring each time.
        """
        spans, sizes = self._spans, self._sizes
        offsets = [-1] * len(spans)
        group: dict[int, int] = {}
        base = 0
        for number, (first, end) in enumerate(spans):
            if end > self._num_steps:
                offsets[number] = base
                base += sizes[number]
            else:
                group[first] = group.get(first, 0) + sizes[number]
        if base > self._pool_bytes:
            return None
        total = sum(sizes) - base
        active: list[int] = []
        pointer, placed_bytes = base, 0
        rounds, previous = 1, -1
        for number, (first, end) in enumerate(spans):
            if end > self._num_steps:
                continue
            size = sizes[number]
            if not active or previous != first:
                active = [other for other in active if spans[other][1] > first]
                quota = total * rounds / balanced_rounds if balanced_rounds else None
                if (quota is not None and placed_bytes + size / 2 > quota) or (
                    not active and pointer + group[first] > self._pool_bytes
                ):
                    pointer = base
                    rounds += 1
            previous = first
            taken = sorted((offsets[other], offsets[other] + sizes[other]) for other in active) if active else []
            offset = _next_gap(taken, size, pointer, self._pool_bytes)
            if offset is None:
                offset = _next_gap(taken, size, base, self._pool_bytes)
                rounds += 1
            if offset is None:
                return None
            offsets[number] = offset
            if size:  # what has no bytes is in nobody's way
                active.append(number)
            pointer = offset + size
            placed_bytes += size
        return offsets, rounds

    def _free_first(self) -> list[int] | None:
        """Returns the offset of each visit where it takes the bytes that were free first, None where it finds no room.

        Of places that were free equally early it takes the one that leaves least of what is free beside it. The second
        of two passes counts: it begins with what the first has left.
        """
        offsets = [0] * len(self._spans)
        sizes = [size for size in self._sizes if size]
        if sizes and self._pool_bytes > MOST_SLOTS * statistics.median_high(sizes):
            return None
        nobody = self._nobody
        edges, last = [0, self._pool_bytes], [nobody, 0]
        for shift in (-self._num_steps, 0) if self._cyclic else (0,):
            for number, (first, end) in enumerate(self._spans):
                size = self._sizes[number]
                if not size:
                    continue
                if len(edges) > 3 * MOST_SLOTS:
                    return None
                best: tuple[int, int, int] | None = None
                begin, limit = 0, first + shift
                while edges[begin] + size <= self._pool_bytes:
                    high = edges[begin] + size
                    stop, latest = begin, nobody
                    while edges[stop] < high and last[stop] < limit:
                        if last[stop] > latest:
                            latest = last[stop]
                        stop += 1
                    if edges[stop] < high:  # these bytes are in the way of all places up to their own
                        begin = stop + 1
                        continue
                    place = latest, edges[stop] - high, edges[begin]
                    if best is None or place < best:
                        best = place
                        limit = latest + 1
                    begin += 1
                if best is None:
                    return None
                offsets[number] = best[2]
                _take(edges, last, best[2], best[2] + size, end - 1 + shift)
        return offsets

    def _starts(self, offsets: Sequence[int]) -> list[int]:
        """Returns for each visit the step that must have been left before its transfer may start.

        The result counts from the pass that reads, so it is negative when the transfer starts in the pass before.
        Starts never overtake each other: the link serves in the order of need.
        """
        # Byte range -> the step that last used it, as parallel lists cut at `edges`. Two passes: the first fills it.
        nobody = self._nobody
        edges, last = [0, self._pool_bytes], [nobody, nobody]
        starts = [nobody] * len(self._spans)
        for shift in (-self._num_steps, 0) if self._cyclic else (0,):
            for number, (low, size, (_, end)) in enumerate(zip(offsets, self._sizes, self._spans, strict=True)):
                if size:
                    starts[number] = _take(edges, last, low, low + size, end - 1 + shift)
        if self._cyclic:
            # A slot without bytes has no user before it, and must still not be held for more than a pass.
            starts = [max(s, end - 1 - self._num_steps) for s, (_, end) in zip(starts, self._spans, strict=True)]
        if self._floor:
            starts = [max(start, floor) for start, floor in zip(starts, self._floor, strict=True)]
        if self._made is None:
            latest = max(starts, default=0) - self._num_steps if self._cyclic else -1
            return list(accumulate(starts, max, initial=latest))[1:]
        comes = [start for start, is_made in zip(starts, self._made, strict=True) if not is_made]
        latest = max(comes, default=0) - self._num_steps if self._cyclic else -1
        for number, is_made in enumerate(self._made):
            if not is_made:
                starts[number] = latest = max(latest, starts[number])
        return starts

    @property
    def _nobody(self) -> int:
        """Says that nobody has used a byte yet."""
        return -2 * self._num_steps if self._cyclic else -1


def _quietest_step(visits: Visits, sizes_bytes: Ints, num_steps: int) -> int:
    """Returns the step before which the fewest bytes stay from the step before it."""
    if not len(visits):
        return 0
    crossing = np.zeros(2 * num_steps + 1, dtype=np.int64)
    np.add.at(crossing, visits.first + 1, sizes_bytes)
    np.add.at(crossing, visits.end, -sizes_bytes)
    staying = np.cumsum(crossing)
    return int(np.argmin(staying[:num_steps] + staying[num_steps : 2 * num_steps]))


def _take(edges: list[int], last: list[int], low: int, high: int, step: int) -> int:
    """Notes that the bytes from `low` to `high` are used up to `step`; returns the last step that used one before.

    Args:
        edges: where ranges of bytes begin, and where the last one ends.
        last: for each range the step that last used it.
    """
    begin = bisect_left(edges, low)
    stop = bisect_left(edges, high, begin)
    before = last[begin if edges[begin] == low else begin - 1 : stop]
    if edges[stop] == high:
        edges[begin:stop] = (low,)
        last[begin:stop] = (step,)
    else:  # the rest of the last range stays as it was
        edges[begin:stop] = (low, high)
        last[begin:stop] = (step, before[-1])
    return max(before)


def _next_gap(taken: Sequence[tuple[int, int]], size: int, pointer: int, pool_bytes: int) -> int | None:
    offset = pointer
    for low, high in taken:
        if high <= offset:
            continue
        if offset + size <= low:
            break
        offset = high
    return offset if offset + size <= pool_bytes else None
