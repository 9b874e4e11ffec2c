"""Where streamed bundles go in the pool, and how early each may be brought in.

The pool is a ring: visits take its bytes in the order of first use and begin again at its start. The plan
repeats with the same addresses, so a ring whose last round is nearly empty would leave no lead at the end of
the pass: `balanced_rounds` gives every round about the same bytes, and so the lead is even.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from mball.plan.steps import Visit


def place_visits(
    visits: Sequence[Visit], sizes_bytes: Sequence[int], pool_bytes: int, *, balanced_rounds: int | None = None
) -> tuple[list[int], int] | None:
    """Returns the offset of each visit in the pool and the number of rounds, or None when they do not fit.

    No two visits whose live ranges meet share a byte. When `visits` fall into stretches (all visits that meet
    have equal live ranges), placing fails only if a stretch is larger than the pool.

    Args:
        visits: by first use.
        sizes_bytes: the slot size of each visit.
        balanced_rounds: begin again after this share of the bytes; None fills the ring each time.
    """
    total = sum(sizes_bytes)
    offsets: list[int] = []
    active: list[int] = []
    pointer = placed_bytes = 0
    rounds = 1
    for number, visit in enumerate(visits):
        size = sizes_bytes[number]
        if not active or visits[number - 1].live.first != visit.live.first:
            active = [other for other in active if visits[other].live.end > visit.live.first]
            group_bytes = _stretch_bytes(visits, sizes_bytes, number)
            quota = total * rounds / balanced_rounds if balanced_rounds else None
            if (quota is not None and placed_bytes + size / 2 > quota) or (
                not active and pointer + group_bytes > pool_bytes
            ):
                pointer = 0
                rounds += 1
        taken = sorted((offsets[other], offsets[other] + sizes_bytes[other]) for other in active)
        offset = _next_gap(taken, size, pointer, pool_bytes)
        if offset is None:
            offset = _next_gap(taken, size, 0, pool_bytes)
            rounds += 1
        if offset is None:
            return None
        offsets.append(offset)
        active.append(number)
        pointer = offset + size
        placed_bytes += size
    return offsets, rounds


def earliest_starts(
    visits: Sequence[Visit], sizes_bytes: Sequence[int], offsets: Sequence[int], num_steps: int
) -> list[int]:
    """Returns for each visit the step that must have been left before its transfer may start.

    Live ranges count plan steps; the result counts from the pass that reads, so it is negative when the
    transfer starts in the pass before. Starts never overtake each other: the link serves in the order of need.
    """
    # Byte range -> the step that last used it, as parallel lists cut at `edges`. Two passes: the first fills it.
    edges, last = [0], [-2 * num_steps]
    starts = [0] * len(visits)
    for shift in (-num_steps, 0):
        for number, visit in enumerate(visits):
            low, high = offsets[number], offsets[number] + sizes_bytes[number]
            begin, end = _cut(edges, last, low), _cut(edges, last, high)
            starts[number] = max(last[begin:end])
            edges[begin:end] = [low]
            last[begin:end] = [visit.live.end - 1 + shift]
    latest = max(starts, default=0) - num_steps
    for number, start in enumerate(starts):
        latest = max(latest, start)
        starts[number] = latest
    return starts


def _cut(edges: list[int], last: list[int], offset: int) -> int:
    position = bisect_right(edges, offset) - 1
    if edges[position] == offset:
        return position
    edges.insert(position + 1, offset)
    last.insert(position + 1, last[position])
    return position + 1


def _stretch_bytes(visits: Sequence[Visit], sizes_bytes: Sequence[int], start: int) -> int:
    total = 0
    for number in range(start, len(visits)):
        if visits[number].live.first != visits[start].live.first:
            break
        total += sizes_bytes[number]
    return total


def _next_gap(taken: Sequence[tuple[int, int]], size: int, pointer: int, pool_bytes: int) -> int | None:
    offset = pointer
    for low, high in taken:
        if high <= offset:
            continue
        if offset + size <= low:
            break
        offset = high
    return offset if offset + size <= pool_bytes else None
