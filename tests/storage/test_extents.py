"""Extents of a swap file: none overlap, no byte is lost, and holes are used again."""

from __future__ import annotations

import itertools
import random

from hypothesis import assume, given
from hypothesis import strategies as st

from mball.storage.extents import BLOCK_BYTES, ExtentMap, SwapExtent
from mball.units import PAGE_BYTES
from tests.storage.interrupts import interrupted_at_each_call


def spans(extents: ExtentMap) -> list[tuple[int, int]]:
    return [(extent.start, extent.end) for extent in extents]


def check(extents: ExtentMap, live: list[SwapExtent]) -> None:
    found = spans(extents)
    assert found == sorted((extent.start, extent.end) for extent in live)
    holes = sorted(extents.holes())
    whole = sorted(found + holes)
    # Side by side from byte 0 to the end: nothing overlaps and nothing is lost.
    assert [first for first, _ in whole] == [0, *(end for _, end in whole)][: len(whole)]
    assert (whole[-1][1] if whole else 0) == extents.end
    assert extents.used_bytes == sum(end - first for first, end in found)
    # Holes that touch are one.
    assert not {end for _, end in holes} & {first for first, _ in holes}
    for extent in live:
        assert extents.find(extent.start) is extent
        assert extents.find(extent.end - 1) is extent


@given(st.data())
def test_nothing_overlaps_and_nothing_is_lost(data: st.DataObject) -> None:
    extents, live = ExtentMap(), []
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["allocate", "allocate", "free", "trim"]))
        if action == "allocate":
            size = PAGE_BYTES * data.draw(st.integers(1, 40))
            end = extents.end_with(size)
            live.append(extents.allocate(size))
            assert extents.end == end
        elif action == "free" and live:
            extents.free(live.pop(data.draw(st.integers(0, len(live) - 1))))
        elif action == "trim":
            end = extents.trim()
            assert end == max((extent.end for extent in live), default=0)
        check(extents, live)


def test_the_smallest_hole_that_holds_it_is_taken() -> None:
    extents = ExtentMap()
    pages = [extents.allocate(PAGE_BYTES * size) for size in (8, 1, 4, 1, 6, 1)]
    for hole in (pages[0], pages[2], pages[4]):
        extents.free(hole)
    assert extents.allocate(PAGE_BYTES * 4).start == pages[2].start
    assert extents.allocate(PAGE_BYTES * 5).start == pages[4].start
    assert extents.allocate(PAGE_BYTES * 9).start == pages[5].end


def test_what_comes_and_goes_takes_little_more_than_it_holds() -> None:
    """Two years of activations, so to speak: sizes of a few kinds, thousands of times."""
    chance = random.Random(0)
    extents, live, most = ExtentMap(), [], 0
    sizes = [PAGE_BYTES * pages for pages in (1, 2, 7, 16, 64, 100, 256)]
    for _ in range(20_000):
        if live and (extents.used_bytes > 4000 * PAGE_BYTES or chance.random() < 0.45):
            extents.free(live.pop(chance.randrange(len(live))))
        else:
            live.append(extents.allocate(chance.choice(sizes)))
        most = max(most, extents.used_bytes)
    check(extents, live)
    assert extents.end <= 1.35 * most


def test_blocks_cover_an_extent() -> None:
    extents = ExtentMap()
    extents.allocate(PAGE_BYTES)
    extent = extents.allocate(2 * BLOCK_BYTES + PAGE_BYTES)
    bounds = [extent.bounds(block) for block in extent.blocks(extent.start, extent.end)]
    # They end where requests do: at multiples in the file.
    assert bounds == [
        (PAGE_BYTES, BLOCK_BYTES),
        (BLOCK_BYTES, 2 * BLOCK_BYTES),
        (2 * BLOCK_BYTES, 2 * BLOCK_BYTES + 2 * PAGE_BYTES),
    ]
    assert bounds[-1][1] == extent.end
    assert list(extent.blocks(BLOCK_BYTES - 1, BLOCK_BYTES + 1)) == [0, 1]


@given(
    start=st.integers(0, 40),
    size=st.integers(1, 60),
    span=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_filled_blocks_are_those_of_which_nothing_is_missing(start: int, size: int, span: list[float]) -> None:
    extent = SwapExtent(start * PAGE_BYTES, (start + size) * PAGE_BYTES)
    first, end = (extent.start + int(part * size * PAGE_BYTES) for part in span)
    assume(first < end)
    every = {block: extent.bounds(block) for block in extent.blocks(extent.start, extent.end)}
    assert [begin for begin, _ in every.values()] == [extent.start, *[stop for _, stop in every.values()][:-1]]
    assert [*extent.filled(first, end)] == [b for b, (begin, stop) in every.items() if first <= begin and stop <= end]
    filled = extent.filled(first, end)
    assert extent.cuts(filled) == [every[block][0] for block in filled] + [every[block][1] for block in filled[-1:]]
    assert [*extent.blocks(first, end)] == [b for b, (begin, stop) in every.items() if begin < end and first < stop]


def test_an_interrupt_gives_no_byte_away_twice() -> None:
    def scene() -> None:
        live[:] = [extents.allocate(PAGE_BYTES * size) for size in (4, 2, 3, 1)]
        for number in (2, 0):
            extents.free(live.pop(number))
        live.append(extents.allocate(PAGE_BYTES))
        extents.trim()

    extents, live = ExtentMap(), list[SwapExtent]()
    for _ in interrupted_at_each_call(scene, lambda: (extents.__init__(), live.clear())):
        # What is found again is whole, and apart from what comes now.
        for size in (1, 2, 3, 4, 5):
            extents.allocate(PAGE_BYTES * size)
        whole = sorted([*spans(extents), *extents.holes()])
        assert all(end <= first for (_, end), (first, _) in itertools.pairwise(whole))
        assert all(extents.find(first) is not None for first, _ in spans(extents))
        assert whole[-1][1] <= extents.end
