"""What every device promises, see `Device`: bytes, order, errors, and the end. Compute and copies may run late."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from mball.errors import DeviceError, MballError, StorageError
from mball.memory import Event
from tests.memory.devices import DEVICES, NUM_PAGES, PAGE, Bench

Opener = Callable[[Path], AbstractContextManager[Bench]]

pytestmark = pytest.mark.parametrize("opener", DEVICES)


@pytest.fixture
def bench(opener: Opener, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    if request.node.callspec.id.startswith(("disk", "home", "both", "plain")):
        request.getfixturevalue("standin")
    with opener(tmp_path) as bench:
        yield bench


def test_bytes_land(bench: Bench) -> None:
    chance = random.Random(1)
    for _ in range(12):
        reads, expected, looks = [], [], []
        page = 0
        while page < NUM_PAGES - 12 and len(reads) < 5:
            size = chance.choice([1, 5, PAGE, 4 * PAGE, 11 * PAGE + 7, 9 * PAGE - 1])
            offset = chance.choice([0, PAGE, 3, chance.randrange(len(bench.content) - size)])
            reads.append(bench.read(offset, size, page))
            expected.append((page, bench.content[offset : offset + size]))
            page += -(-size // PAGE)
        bench.device.wait(bench.device.copy(reads, bench.device.record()))
        looks = [bench.look(page, page - (-len(wanted) // PAGE)) for page, wanted in expected]
        bench.finish()
        for look, (_, wanted) in zip(looks, expected, strict=True):
            assert look()[: len(wanted)] == wanted


def test_a_copy_waits_for_what_it_comes_after_and_compute_for_the_copy(bench: Bench) -> None:
    """Slots are used in turn, written and read by compute in between; nothing comes too early or too late."""
    play(bench, random.Random(2), num_copies=24)


def play(bench: Bench, chance: random.Random, *, num_copies: int) -> None:
    """Copies to slots that compute still reads and writes, waits some time later, and looks at what is there."""
    num_slots, slot_pages = 5, 8
    seen: list[tuple[Callable[[], bytes], bytes]] = []
    under_way: dict[int, tuple[Event, bytes]] = {}
    for number in range(num_copies):
        slot = number % num_slots
        if slot in under_way:
            land(bench, under_way, slot, slot_pages, seen)
        first = slot * slot_pages
        byte = 200 + number % 50
        bench.fill(first, first + slot_pages, byte)
        seen.append((bench.look(first, first + slot_pages), bytes([byte]) * slot_pages * PAGE))
        pages = [chance.randrange(NUM_PAGES - 4) for _ in range(2)]
        reads = [bench.read(page * PAGE, 4 * PAGE, first + 4 * place) for place, page in enumerate(pages)]
        wanted = b"".join(bench.content[page * PAGE : (page + 4) * PAGE] for page in pages)
        under_way[slot] = bench.device.copy(reads, bench.device.record()), wanted
        for other in [other for other in under_way if chance.random() < 0.3]:
            land(bench, under_way, other, slot_pages, seen)
    for slot in list(under_way):
        land(bench, under_way, slot, slot_pages, seen)
    bench.finish()
    for number, (look, wanted) in enumerate(seen):
        assert look() == wanted, f"look {number} of {len(seen)}"


def land(
    bench: Bench,
    under_way: dict[int, tuple[Event, bytes]],
    slot: int,
    slot_pages: int,
    seen: list[tuple[Callable[[], bytes], bytes]],
) -> None:
    event, wanted = under_way.pop(slot)
    bench.device.wait(event)
    seen.append((bench.look(slot * slot_pages, (slot + 1) * slot_pages), wanted))


def test_an_event_is_reached_once_the_bytes_are_there(bench: Bench) -> None:
    event = bench.device.copy([bench.read(PAGE, 30 * PAGE, 3)], None)
    for _ in range(2):
        event.wait()
        assert event.done()
    look = bench.look(3, 33)
    bench.finish()
    assert look() == bench.content[PAGE : 31 * PAGE]
    event = bench.device.copy([bench.read(0, 20 * PAGE, 40)], None)
    while not event.done():
        pass
    look = bench.look(40, 60)
    bench.finish()
    assert look() == bench.content[: 20 * PAGE]


def test_after_synchronize_no_copy_writes(bench: Bench) -> None:
    events = [bench.device.copy([bench.read(n * PAGE, 8 * PAGE, n * 8)], bench.device.record()) for n in range(6)]
    bench.device.synchronize()
    look = bench.look(0, 48)
    bench.fill(0, 48, 7)
    after = bench.look(0, 48)
    bench.finish()
    assert look() == b"".join(bench.content[n * PAGE : (n + 8) * PAGE] for n in range(6))
    assert after() == bytes([7]) * 48 * PAGE
    assert all(event.done() for event in events)


def test_compute_is_waited_for_by_its_event(bench: Bench) -> None:
    bench.fill(0, 4, 9)
    look = bench.look(0, 4)
    event = bench.device.record()
    bench.device.wait(event)
    event.wait()
    assert event.done()
    assert look() == bytes([9]) * 4 * PAGE


def test_a_copy_of_nothing_is_over(bench: Bench) -> None:
    event = bench.device.copy([], bench.device.record())
    event.wait()
    assert event.done()
    bench.device.wait(bench.device.copy([bench.read(0, 0, 0)], None))


def test_memory_that_is_not_there_is_refused(bench: Bench) -> None:
    with pytest.raises(DeviceError, match="is backed"):
        bench.device.copy([bench.read(0, 2 * PAGE, bench.arena.backed_bytes // PAGE - 1)], None)
    bench.device.wait(bench.device.copy([bench.read(0, PAGE, 0)], None))


def test_a_read_that_fails_stays_with_its_event(bench: Bench, request: pytest.FixtureRequest) -> None:
    good = bench.device.copy([bench.read(0, 8 * PAGE, 0)], bench.device.record())
    good.wait()
    os.truncate(bench.path, 40 * PAGE)
    bad = bench.device.copy([bench.read(38 * PAGE, 8 * PAGE, 8)], bench.device.record())
    after = bench.device.copy([bench.read(0, 8 * PAGE, 16)], bench.device.record())
    if request.node.callspec.id.startswith(("home", "cuda-home")):  # which does not need the file any more
        bench.device.wait(bad)
        look = bench.look(8, 16)
        bench.finish()
        assert look() == bench.content[38 * PAGE : 46 * PAGE]
        return
    for _ in range(2):
        with pytest.raises(StorageError, match=rf"offset {40 * PAGE} B|offset {38 * PAGE} B.*{bench.path}"):
            bench.device.wait(bad)
        with pytest.raises(StorageError, match=str(bench.path)):
            bad.wait()
    assert bad.done()
    bench.device.synchronize()
    for event in (good, after):
        bench.device.wait(event)
    look = bench.look(0, 24)
    bench.finish()
    assert look()[: 8 * PAGE] == look()[16 * PAGE :] == bench.content[: 8 * PAGE]


def test_after_close_nothing_is_copied(bench: Bench) -> None:
    event = bench.device.copy([bench.read(0, 8 * PAGE, 0)], None)
    bench.device.wait(event)
    look = bench.look(0, 8)
    bench.finish()
    bench.device.close()
    bench.device.close()
    with pytest.raises(MballError, match="closed"):
        bench.device.copy([bench.read(0, PAGE, 0)], None)
    assert event.done()
    assert look() == bench.content[: 8 * PAGE]


def test_a_forked_child_is_refused_and_takes_nothing_with_it(bench: Bench) -> None:
    under_way = bench.device.copy([bench.read(0, 30 * PAGE, 0)], bench.device.record())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with pytest.raises(DeviceError, match="fork"):
                bench.device.copy([bench.read(0, PAGE, 0)], None)
            bench.device.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    bench.device.wait(under_way)
    look = bench.look(0, 30)
    bench.finish()
    assert look() == bench.content[: 30 * PAGE]
