"""What every device promises, see `Device`: bytes, order, errors, and the end. Compute and copies may run late."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from mball.errors import DeviceError, MballError, StorageError
from tests.memory.device_scenes import (
    compute_is_waited_for,
    events_are_reached,
    nothing_writes_after_synchronize,
    slots_in_turn,
)
from tests.memory.devices import DEVICES, NUM_PAGES, PAGE, Bench, expect

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
            expect(look()[: len(wanted)], wanted)


def test_a_copy_waits_for_what_it_comes_after_and_compute_for_the_copy(bench: Bench) -> None:
    """Slots are used in turn, written and read by compute in between; nothing comes too early or too late."""
    slots_in_turn(bench, random.Random(2))


def test_an_event_is_reached_once_the_bytes_are_there(bench: Bench) -> None:
    events_are_reached(bench)


def test_after_synchronize_no_copy_writes(bench: Bench) -> None:
    nothing_writes_after_synchronize(bench)


def test_compute_is_waited_for_by_its_event(bench: Bench) -> None:
    compute_is_waited_for(bench)


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
        expect(look(), bench.content[38 * PAGE : 46 * PAGE])
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
    expect(look()[: 8 * PAGE], bench.content[: 8 * PAGE])
    expect(look()[16 * PAGE :], bench.content[: 8 * PAGE])


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
    expect(look(), bench.content[: 8 * PAGE])


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
    expect(look(), bench.content[: 30 * PAGE])
