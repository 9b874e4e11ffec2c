"""Short plays on a device whose compute and copies may run late, with an eye on every byte."""

from __future__ import annotations

import random
from collections.abc import Callable

from mball.memory import Event
from tests.memory.devices import NUM_PAGES, PAGE, Bench, expect


def slots_in_turn(bench: Bench, chance: random.Random, *, num_copies: int = 24) -> None:
    """Copies to slots that compute still reads and writes, waits some time later, and looks at what is there."""
    num_slots, slot_pages = 5, 8
    seen: list[tuple[Callable[[], bytes], bytes]] = []
    under_way: dict[int, tuple[Event, bytes]] = {}
    for number in range(num_copies):
        slot = number % num_slots
        if slot in under_way:
            _land(bench, under_way, slot, slot_pages, seen)
        first = slot * slot_pages
        byte = 200 + number % 50
        bench.fill(first, first + slot_pages, byte)
        seen.append((bench.look(first, first + slot_pages), bytes([byte]) * slot_pages * PAGE))
        pages = [chance.randrange(NUM_PAGES - 4) for _ in range(2)]
        reads = [bench.read(page * PAGE, 4 * PAGE, first + 4 * place) for place, page in enumerate(pages)]
        wanted = b"".join(bench.content[page * PAGE : (page + 4) * PAGE] for page in pages)
        under_way[slot] = bench.device.copy(reads, bench.device.record()), wanted
        for other in [other for other in under_way if chance.random() < 0.3]:
            _land(bench, under_way, other, slot_pages, seen)
    for slot in list(under_way):
        _land(bench, under_way, slot, slot_pages, seen)
    bench.finish()
    for number, (look, wanted) in enumerate(seen):
        expect(look(), wanted, f"look {number} of {len(seen)}")


def _land(
    bench: Bench,
    under_way: dict[int, tuple[Event, bytes]],
    slot: int,
    slot_pages: int,
    seen: list[tuple[Callable[[], bytes], bytes]],
) -> None:
    event, wanted = under_way.pop(slot)
    bench.device.wait(event)
    seen.append((bench.look(slot * slot_pages, (slot + 1) * slot_pages), wanted))


def events_are_reached(bench: Bench) -> None:
    """Whoever saw the end of an event, by waiting or by asking, needs no other order."""
    event = bench.device.copy([bench.read(PAGE, 30 * PAGE, 3)], None)
    for _ in range(2):
        event.wait()
        assert event.done()
    look = bench.look(3, 33)
    bench.finish()
    expect(look(), bench.content[PAGE : 31 * PAGE])
    event = bench.device.copy([bench.read(0, 20 * PAGE, 40)], None)
    while not event.done():
        pass
    look = bench.look(40, 60)
    bench.finish()
    expect(look(), bench.content[: 20 * PAGE])


def nothing_writes_after_synchronize(bench: Bench) -> None:
    """Nor does a copy that nobody waited for."""
    events = [bench.device.copy([bench.read(n * PAGE, 8 * PAGE, n * 8)], bench.device.record()) for n in range(6)]
    bench.device.synchronize()
    look = bench.look(0, 48)
    bench.fill(0, 48, 7)
    after = bench.look(0, 48)
    bench.finish()
    expect(look(), b"".join(bench.content[n * PAGE : (n + 8) * PAGE] for n in range(6)))
    expect(after(), bytes([7]) * 48 * PAGE)
    assert all(event.done() for event in events)


def compute_is_waited_for(bench: Bench) -> None:
    """By the event that was recorded behind it."""
    bench.fill(0, 4, 9)
    look = bench.look(0, 4)
    event = bench.device.record()
    bench.device.wait(event)
    event.wait()
    assert event.done()
    expect(look(), bytes([9]) * 4 * PAGE)
