"""Host memory below a GPU: nothing is copied before it was read, and nothing read into what is still copied."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mball.errors import DeviceError, StorageError
from mball.memory import Arena
from mball.memory.cuda_device import CudaDevice
from mball.memory.device import Event
from mball.memory.host_level import HostLevel
from mball.storage import ThreadedReader
from tests.memory.devices import CHUNK_BYTES, NUM_PAGES, PAGE, Bench, Look, cuda_on_the_stand_in, expect
from tests.memory.driver.standin import CODES, Order, StandIn

ORDERS = [Order.EARLIEST, Order.LATEST, Order.RANDOM]
HOST_PAGES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """A GPU and the host memory below it."""

    bench: Bench
    level: HostLevel
    host: Arena

    def stage(self, page: int, count: int, place: int) -> Event:
        """Reads pages of the file to a place of host memory."""
        self.level.discard(place * PAGE, count * PAGE)
        return self.level.copy([self.bench.read(page * PAGE, count * PAGE, place)], self.level.record())

    def copy(self, page: int, count: int, to: int) -> Event:
        """Copies pages to the GPU."""
        return self.bench.device.copy([self.bench.read(page * PAGE, count * PAGE, to)], self.bench.device.record())

    def see(self, event: Event, to: int, count: int) -> Look:
        """What compute sees that waits for a copy."""
        self.bench.device.wait(event)
        return self.bench.look(to, to + count)

    def pages(self, page: int, count: int) -> bytes:
        """What is in the file."""
        return self.bench.content[page * PAGE : (page + count) * PAGE]


@contextmanager
def levels(folder: Path, order: Order, seed: int = 0) -> Iterator[Levels]:
    with ExitStack() as stack:
        bench = stack.enter_context(cuda_on_the_stand_in(folder, order=order, seed=seed, has_level=True))
        assert isinstance(bench.device, CudaDevice)
        level = bench.device.below
        assert level is not None
        host = level.arena(HOST_PAGES * PAGE)
        stack.callback(host.close)
        host.resize(HOST_PAGES * PAGE)
        host.poison(0, HOST_PAGES * PAGE)
        yield Levels(bench=bench, level=level, host=host)
        bench.device.close()


@pytest.fixture(params=ORDERS, ids=lambda order: order.name.lower())
def both(request: pytest.FixtureRequest, standin: StandIn, tmp_path: Path) -> Iterator[Levels]:
    with levels(tmp_path, request.param, 3) as opened:
        yield opened
    assert not standin.registered_bytes


class Gate:
    """Holds up the thread that stages, before what it asks for is read."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        submit = ThreadedReader.submit

        def late(reader: ThreadedReader, reads: Any) -> Any:
            if threading.current_thread().name.startswith("mball-stage"):
                assert self.opened.wait(60)
            return submit(reader, reads)

        patch.setattr(ThreadedReader, "submit", late)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_a_copy_waits_for_what_it_copies(both: Levels, gate: Gate) -> None:
    both.stage(5, 3, 2)
    event = both.copy(5, 3, 0)
    assert not event.done()
    gate.opened.set()
    look = both.see(event, 0, 3)
    both.bench.finish()
    expect(look(), both.pages(5, 3))


def test_what_is_staged_is_read_once(both: Levels, submitted: list[Any]) -> None:
    both.stage(5, 3, 2).wait()
    for to in (0, 7, 0):
        look = both.see(both.copy(5, 3, to), to, 3)
        both.bench.finish()
        expect(look(), both.pages(5, 3))
    assert len(submitted) == 1
    submitted.clear()


def test_a_place_is_taken_when_its_last_copy_is_over(both: Levels, gate: Gate) -> None:
    """The second read waits for the copy of what the first one brought, however late that is."""
    gate.opened.set()
    both.stage(5, 3, 2).wait()
    first = both.copy(5, 3, 0)
    both.stage(20, 3, 2)
    second = both.copy(20, 3, 3)
    looks = [both.see(first, 0, 3), both.see(second, 3, 3)]
    both.bench.finish()
    expect(looks[0](), both.pages(5, 3))
    expect(looks[1](), both.pages(20, 3))


def test_what_came_late_for_nobody_does_not_fall_on_what_came_after(
    both: Levels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first read ends after the second one was asked for, at the same place."""
    submit, begun = ThreadedReader.submit, threading.Event()

    class Late:
        def __init__(self, reader: ThreadedReader, reads: Any) -> None:
            self.reader, self.reads = reader, reads

        def done(self) -> bool:
            return False

        def wait(self) -> None:
            begun.set()
            submit(self.reader, self.reads).wait()

    def late(reader: ThreadedReader, reads: Any) -> Any:
        return Late(reader, reads) if reads[0].offset_bytes == 5 * PAGE else submit(reader, reads)

    monkeypatch.setattr(ThreadedReader, "submit", late)
    both.stage(5, 3, 2)
    both.stage(20, 3, 2).wait()
    look = both.see(both.copy(20, 3, 0), 0, 3)
    both.bench.finish()
    assert begun.is_set()
    expect(look(), both.pages(20, 3))


def test_what_is_not_there_comes_from_the_file(both: Levels, submitted: list[Any]) -> None:
    both.stage(5, 3, 2).wait()
    both.level.discard(3 * PAGE, PAGE)
    submitted.clear()
    look = both.see(both.copy(5, 3, 0), 0, 3)
    both.bench.finish()
    expect(look(), both.pages(5, 3))
    assert submitted
    submitted.clear()


def test_copies_go_across_chunks(both: Levels) -> None:
    count = CHUNK_BYTES // PAGE + 3
    both.stage(1, count, 2).wait()
    look = both.see(both.copy(1, count, 0), 0, count)
    both.bench.finish()
    expect(look(), both.pages(1, count))


def test_a_read_that_fails_is_said_by_who_copies_it(both: Levels) -> None:
    both.bench.path.write_bytes(both.bench.content[: 6 * PAGE])
    both.stage(5, 3, 2)
    both.stage(1, 3, 6)
    with pytest.raises(StorageError, match=str(both.bench.path)):
        both.see(both.copy(5, 3, 0), 0, 3)
    look = both.see(both.copy(1, 3, 0), 0, 3)
    both.bench.path.write_bytes(both.bench.content)
    both.stage(5, 3, 2)
    again = both.see(both.copy(5, 3, 3), 3, 3)
    both.bench.finish()
    expect(look(), both.pages(1, 3))
    expect(again(), both.pages(5, 3))


@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync", "cuEventRecord", "cuCtxPushCurrent", "cuMemHostRegister"])
def test_a_driver_that_refuses(call: str, standin: StandIn, tmp_path: Path) -> None:
    for first in range(1, 6):
        with levels(tmp_path, Order.LATEST) as both:
            standin.fail(first, first, code=CODES["OUT_OF_MEMORY"], function=call)
            for number in range(3):
                both.stage(5 + number, 3, 2)
                with contextlib.suppress(DeviceError):
                    both.see(both.copy(5 + number, 3, 0), 0, 3)
            standin.forget()
            both.bench.device.synchronize()
            both.stage(20, 3, 2)
            look = both.see(both.copy(20, 3, 0), 0, 3)
            both.bench.finish()
            expect(look(), both.pages(20, 3))
        assert standin.is_idle()
        assert not standin.registered_bytes


def test_all_is_over_once_it_was_waited_for(both: Levels, gate: Gate) -> None:
    threading.Timer(0.1, gate.opened.set).start()
    unread = both.stage(5, 3, 2)
    both.bench.device.synchronize()
    assert unread.done()
    gate.opened.clear()
    threading.Timer(0.1, gate.opened.set).start()
    both.stage(9, 3, 2)
    copied = both.copy(9, 3, 0)
    both.bench.device.synchronize()
    assert copied.done()


def test_it_may_be_closed_while_it_reads(standin: StandIn, tmp_path: Path) -> None:
    for number in range(6):
        with levels(tmp_path, Order.RANDOM, number) as both:
            for place in range(0, 12, 3):
                both.stage(place, 3, place)
                both.copy(place, 3, place)
                if number % 2:
                    both.stage(place + 20, 3, place)
        assert not standin.registered_bytes
        assert not [thread for thread in threading.enumerate() if thread.name.startswith(("mball-stage", "mball-copy"))]
        with pytest.raises(DeviceError, match="closed"):
            both.stage(0, 1, 0)


ASKED = st.tuples(st.sampled_from(["stage", "copy"]), st.integers(0, 7), st.integers(0, 5))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(ASKED, min_size=1, max_size=24), seed=st.integers(0, 9))
def test_whatever_is_asked_bytes_are_right(
    asked: list[tuple[str, int, int]], seed: int, standin: StandIn, tmp_path: Path
) -> None:
    """Each piece has eight pages of its own in the file; places in host memory and on the GPU take turns."""
    with levels(tmp_path, Order.RANDOM if seed % 2 else Order.LATEST, seed) as both:
        looks: list[tuple[Look, bytes]] = []
        for what, piece, place in asked:
            page, count = 8 * piece, 1 + piece % 3
            if what == "stage":
                both.stage(page, count, 2 * place)
            else:
                to = 4 * place
                looks.append((both.see(both.copy(page, count, to), to, count), both.pages(page, count)))
        both.bench.finish()
        for number, (look, wanted) in enumerate(looks):
            expect(look(), wanted, f"look {number}")
    assert NUM_PAGES >= 8 * 8
