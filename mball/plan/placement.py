"""Where residents lie: packed at the start of the arena, and where they were if another plan came before."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Sequence

import numpy as np

from mball.plan.demand import Demand
from mball.schema import Placement, Plan

# So many residents, about, are given places while the best way is looked for.
PLACED = 20_000


def stack(demand: Demand, residents: Collection[int]) -> tuple[tuple[Placement, ...], int]:
    """Returns a place for each resident, one behind the other, and the bytes of all.

    Those at the start are spread over the pass, so that what is left of a smaller arena still is.
    """
    placements, offset = [], 0
    for bundle in _spread(sorted(residents)):
        placements.append(Placement(bundle=bundle, offset_bytes=offset))
        offset += demand.bundles[bundle].size_bytes
    return tuple(sorted(placements, key=lambda placement: placement.bundle)), offset


def _spread(bundles: Sequence[int]) -> list[int]:
    """Returns them in an order of which every beginning is spread evenly: by their position, its bits reversed."""
    positions = np.arange(len(bundles))
    turned = np.zeros_like(positions)
    for bit in range(max(len(bundles) - 1, 0).bit_length()):
        turned = 2 * turned + (positions >> bit & 1)
    return [bundles[position] for position in np.argsort(turned, kind="stable").tolist()]


def keep_in_place(
    demand: Demand, placements: Sequence[Placement], previous: Plan, spare_bytes: int
) -> tuple[tuple[Placement, ...], int]:
    """Returns other places for the same residents: what `previous` kept too stays where it is, mostly.

    And the bytes that they take more than packed, at most `spare_bytes`: gaps that nothing fits into.
    """
    sizes = {placement.bundle: demand.bundles[placement.bundle].size_bytes for placement in placements}
    was = {previous.bundles[placement.bundle]: placement.offset_bytes for placement in previous.residents}
    total = sum(sizes.values())
    limit = total + spare_bytes
    slots = sorted(
        (offset, size, bundle)
        for bundle, size in sizes.items()
        if size and (offset := was.get(demand.bundles[bundle])) is not None and offset + size <= limit
    )
    best: dict[int, int] | None = None
    most_bytes = -1
    # Some stay and the rest moves: the fewer stay the better the rest fills the gaps between them. Who stays longest is
    # who lies at the start, or who is large.
    for order in (slots, sorted(slots, key=lambda slot: (-slot[1], slot[0]))):
        low, high = 0, len(order)
        middle = high  # all stay where a plan grows
        tries = PLACED // max(len(sizes), 1) + 1
        while low <= high and tries:
            tries -= 1
            offsets = _fill(sizes, sorted(order[:middle]), limit)
            if offsets is None:
                high = middle - 1
                middle = (low + high + 1) // 2
                continue
            kept_bytes = sum(size for _, size, _ in order[:middle])
            if kept_bytes > most_bytes:
                best, most_bytes = offsets, kept_bytes
            low = middle + 1
            middle = (low + high + 1) // 2
    if best is None:
        best = _fill(sizes, (), limit)
        assert best is not None, "nothing that stays is no gap"
    found = tuple(Placement(bundle=p.bundle, offset_bytes=best[p.bundle]) for p in placements)
    end = max((offset + sizes[bundle] for bundle, offset in best.items()), default=0)
    return found, max(end - total, 0)


def _fill(sizes: dict[int, int], slots: Sequence[tuple[int, int, int]], limit: int) -> dict[int, int] | None:
    """Returns the offset of each bundle when those of `slots` (offset, size, bundle) stay; None if that takes too much.

    The others go into the smallest gaps that are large enough, the largest first, and what fits into none comes last.
    """
    offsets = {bundle: offset for offset, _, bundle in slots}
    gaps: list[tuple[int, int]] = []  # size, begin
    end = 0
    for offset, size, _ in slots:
        if offset > end:
            gaps.append((offset - end, end))
        end = offset + size
    gaps.sort()
    for bundle in sorted(sizes, key=lambda bundle: (-sizes[bundle], bundle)):
        if bundle in offsets:
            continue
        size = sizes[bundle]
        at = bisect_left(gaps, (size, 0))
        if not size:
            offsets[bundle] = 0
        elif at < len(gaps):
            gap, begin = gaps.pop(at)
            offsets[bundle] = begin
            if gap > size:
                insort(gaps, (gap - size, begin + size))
        else:
            offsets[bundle] = end
            end += size
            if end > limit:
                return None
    return offsets if end <= limit else None
