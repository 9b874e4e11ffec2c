"""The CUDA device on the stand-in: how it copies, whom it keeps waiting, and what is left when a call fails."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import random
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from mball.errors import DeviceError, MballError
from mball.memory.cuda_device import CudaDevice
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_errors import OUT_OF_MEMORY, DriverError, GpuLostError
from mball.memory.cuda_events import EventPool
from mball.memory.cuda_feed import cut
from mball.memory.cuda_plain import PlainCudaMemory
from mball.memory.cuda_streams import CudaStreams
from mball.memory.pinned_ring import PinnedRing
from mball.memory.region import Region
from mball.run.file_read import FileRead
from mball.storage.pending import Pending
from tests.memory.device_scenes import slots_in_turn
from tests.memory.devices import BUFFER_BYTES, NUM_PAGES, PAGE, PLACES, Bench, cuda_on_the_stand_in, expect
from tests.memory.driver.standin import CODES, Order, StandIn

COPY = "cuMemcpyHtoDAsync"


def names_of_threads() -> set[str]:
    """Without the one that looks for slow disks, which stays with the process."""
    return {thread.name for thread in threading.enumerate()} - {"mball-slow-disk"}


def test_homes_side_by_side_are_one_copy_cut_where_pinning_was(standin: StandIn, tmp_path: Path) -> None:
    with cuda_on_the_stand_in(tmp_path, order=Order.LATEST, home_pages=PLACES["home"]) as bench:
        device = bench.device
        for pages, num_copies in [
            ([(0, 0), (1, 1), (2, 2), (3, 3)], 1),  # in the file and in the arena
            ([(0, 0), (2, 1)], 2),
            ([(0, 1), (1, 0)], 2),
            ([(4, 0), (5, 1), (6, 2), (7, 3)], 2),  # six pages are pinned at a time
            ([(0, 0)], 1),
        ]:
            standin.forget()
            event = device.copy([bench.read(page * PAGE, PAGE, place) for page, place in pages], None)
            assert standin.calls(COPY) == num_copies
            event.wait()
            for page, place in pages:
                look = bench.look(place, place + 1)
                bench.finish()
                expect(look(), bench.content[page * PAGE : (page + 1) * PAGE])


def test_the_host_waits_for_nothing_but_reads(standin: StandIn, tmp_path: Path) -> None:
    with cuda_on_the_stand_in(tmp_path, order=Order.LATEST, home_pages=PLACES["home"]) as bench:
        for number in range(20):
            bench.fill(0, 8, number)
            bench.device.wait(bench.device.copy([bench.read(0, 8 * PAGE, 0)], bench.device.record()))
            look = bench.look(0, 8)
        assert standin.num_waiting >= 20 * 6, "something ran, so somebody waited for it"
        assert "mball-feed" not in names_of_threads()
        bench.finish()
        expect(look(), bench.content[: 8 * PAGE])


def test_moments_are_those_of_the_stream_and_not_of_the_host(standin: StandIn, tmp_path: Path) -> None:
    with cuda_on_the_stand_in(tmp_path, order=Order.LATEST, home_pages=PLACES["home"]) as bench:
        device, stream = bench.device, bench.device._current_stream()
        moments = [device.moment()]
        for seconds in (0.25, 0.0, 2.0):
            standin.spin(stream, seconds)
            moments.append(device.moment())
        standin.spin(stream, 8.0)
        assert standin.num_waiting >= 8, "something ran, so somebody waited for it"
        assert [last.since(first) for first, last in pairwise(moments)] == pytest.approx([0.25, 0.0, 2.0])
        assert moments[3].since(moments[0]) == pytest.approx(2.25)
        num_events = standin.num_events
        for _ in range(4):
            del moments
            moments = [device.moment() for _ in range(4)]
        assert standin.num_events == num_events, "they are not used again"
        late = moments[-1]
    with pytest.raises(DeviceError, match="its clock cannot be read any more"):
        late.since(moments[0])
    with pytest.raises(DeviceError, match="the device is closed"):
        device.moment()


def test_bytes_from_disk_come_through_a_ring_that_is_gone_round(standin: StandIn, tmp_path: Path) -> None:
    before = names_of_threads()
    with cuda_on_the_stand_in(tmp_path, order=Order.LATEST) as bench:
        assert names_of_threads() == before
        pinned_bytes = standin.registered_bytes
        event = bench.device.copy([bench.read(5, 40 * PAGE, 0)], bench.device.record())
        bench.device.wait(event)
        assert "mball-feed" in names_of_threads()
        # Its buffers, with a page more each.
        assert standin.registered_bytes - pinned_bytes == 2 * (BUFFER_BYTES + PAGE)
        assert standin.calls(COPY) == -(-(40 * PAGE + 5) // BUFFER_BYTES)
        look = bench.look(0, 40)
        bench.finish()
        expect(look(), bench.content[5 : 5 + 40 * PAGE])
    assert names_of_threads() == before


@pytest.mark.parametrize("offset", [0, 1, PAGE - 1, PAGE, 10 * PAGE + 17])
@pytest.mark.parametrize("size", [1, PAGE, BUFFER_BYTES, BUFFER_BYTES + 1, 5 * BUFFER_BYTES + 7])
def test_a_read_is_cut_at_pages_of_its_file(offset: int, size: int) -> None:
    read = FileRead(file="f", offset_bytes=offset, size_bytes=size, arena_offset_bytes=0)
    parts = list(cut(read, 1000, BUFFER_BYTES))
    place = 0
    for part in parts:
        assert (part.first, part.address) == (place, 1000 + place)
        assert part.shift_bytes + part.size_bytes <= BUFFER_BYTES
        assert part.shift_bytes == (offset + place) % PAGE
        place += part.size_bytes
    assert place == size
    assert all(part.shift_bytes == 0 for part in parts[1:]), "O_DIRECT would not take them"


def test_without_pinned_memory_the_same_bytes_come(
    standin: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with cuda_on_the_stand_in(tmp_path, order=Order.LATEST) as bench:
        standin.fail(1, 99, code=CODES["OUT_OF_MEMORY"], function="cuMemHostRegister")
        slots_in_turn(bench, random.Random(3), num_copies=6)
        assert len([line for line in caplog.records if line.levelno >= logging.WARNING]) == 1
        assert "the rest is copied more slowly" in caplog.text
        standin.forget()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_keeps_nobody_waiting(
    standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody foresaw fails what is under way and what comes; the device can still be closed."""
    with cuda_on_the_stand_in(tmp_path, order=Order.LATEST) as bench:

        def into(read: FileRead, destination: memoryview, first: int = 0) -> None:
            raise ZeroDivisionError

        one_copy(bench)
        monkeypatch.setattr(FileRead, "into", into)
        event = bench.device.copy([bench.read(0, 30 * PAGE, 0)], None)
        with pytest.raises(DeviceError, match="thread that feeds the GPU died of ZeroDivisionError"):
            event.wait()
        with pytest.raises(DeviceError, match="thread that feeds the GPU died of ZeroDivisionError"):
            bench.device.copy([bench.read(0, PAGE, 0)], None)
        bench.device.synchronize()


def unforeseen(*arguments: object) -> None:
    raise ZeroDivisionError("of nobody's making")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("num_pages", [1, 30])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(Pending, "wait"), (PinnedRing, "copy_out"), (CudaStreams, "copy_in"), (EventPool, "record")],
    ids=["the read", "the ring", "the driver", "the event"],
)
def test_a_copy_that_never_happened_is_not_done(
    standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, num_pages: int
) -> None:
    """Whatever ended the thread, and were it with the last part of all."""
    with cuda_on_the_stand_in(tmp_path, order=Order.LATEST) as bench:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, unforeseen)
            event = bench.device.copy([bench.read(0, num_pages * PAGE, 0)], None)
            for _ in range(2):
                with pytest.raises(DeviceError, match=r"died of ZeroDivisionError: of nobody's making"):
                    event.wait()
        assert event.done()
        with pytest.raises(DeviceError, match=r"died of ZeroDivisionError: of nobody's making"):
            bench.device.copy([bench.read(0, PAGE, 0)], None)
        bench.device.synchronize()


@pytest.mark.parametrize("place", PLACES)
def test_a_closed_device_refuses_copies_and_events(standin: StandIn, tmp_path: Path, place: str) -> None:
    """Its events are destroyed; the driver may have given the same handle to somebody else."""
    with cuda_on_the_stand_in(tmp_path, order=Order.LATEST, home_pages=PLACES[place]) as bench:
        one_copy(bench)
        event = bench.device.record()
        bench.device.close()
        standin.forget()
        with pytest.raises(DeviceError, match="device is closed"):
            bench.device.record()
        with pytest.raises(DeviceError, match="device is closed"):
            bench.device.copy([bench.read(0, PAGE, 0)], None)
        bench.device.wait(event)
        event.wait()
        assert event.done()
        assert standin.calls("cuEventRecord") == standin.calls("cuEventCreate") == 0


def test_a_closed_pool_gives_no_event(standin: StandIn) -> None:
    driver = CudaDriver()
    pool = EventPool(CudaStreams(driver))
    with driver.current():
        free, taken = pool.take(), pool.take()
        pool.give(free)
        pool.close()
        for _ in range(2):
            with pytest.raises(DeviceError, match="events are destroyed"):
                pool.take()
            pool.give(taken)  # who let it go last did so late
        pool.close()
    assert standin.num_events == 0
    driver.close()


# -- what is left when a call fails -----------------------------------------------------------------------------------


def one_copy(bench: Bench) -> None:
    """As the engine makes one, with reads from everywhere; raises what its event raises."""
    reads = [bench.read(2 * PAGE, 7 * PAGE, 0), bench.read((NUM_PAGES // 3) * PAGE, 3 * PAGE, 8)]
    event = bench.device.copy(reads, bench.device.record())
    try:
        bench.device.wait(event)
    except MballError:
        try:
            event.wait()  # where the waiting failed, and not the copy
        except MballError:
            with pytest.raises(MballError):  # each time
                event.wait()
        assert event.done()
        raise
    look = bench.look(0, 11)
    bench.finish()
    first, second = bench.content[2 * PAGE : 9 * PAGE], bench.content[(NUM_PAGES // 3) * PAGE :][: 3 * PAGE]
    assert (look()[: 7 * PAGE], look()[8 * PAGE :]) == (first, second)


def num_calls(standin: StandIn, work: Callable[[], None]) -> int:
    standin.forget()
    work()
    return standin.calls()


@pytest.mark.parametrize(
    ("place", "order", "num_failing", "warm"),
    [
        ("both", Order.EARLIEST, 1, False),
        ("disk", Order.LATEST, 1, False),
        ("home", Order.LATEST, 1, False),
        ("both", Order.LATEST, 1, True),
        ("disk", Order.EARLIEST, 1, True),
        ("both", Order.LATEST, 999, False),
        ("disk", Order.LATEST, 999, True),
    ],
)
def test_any_call_of_a_copy_may_fail(
    standin: StandIn, tmp_path: Path, place: str, order: Order, num_failing: int, warm: bool
) -> None:
    """The event says so or the copy is whole, nothing is lost, nothing comes late, and the next copy works."""
    position, total, num_failed = 0, 12 if num_failing > 1 else 1, 0
    while position < total:
        position += 1
        folder = tmp_path / str(position)
        folder.mkdir()
        with cuda_on_the_stand_in(folder, order=order, home_pages=PLACES[place]) as bench:
            if warm:
                one_copy(bench)
                total = num_calls(standin, lambda bench=bench: one_copy(bench))  # type: ignore[misc]
            standin.forget()
            standin.fail(position, position + num_failing - 1, code=CODES["OUT_OF_MEMORY"])
            try:
                one_copy(bench)
            except DriverError as error:
                num_failed += error.code_name == OUT_OF_MEMORY
            if not warm and num_failing == 1:
                total = max(total, standin.calls())
            standin.forget()
            standin.pop_contexts()  # where the call that does it failed
            if num_failing > 1:  # then waiting fails too, and the engine synchronizes before it goes on
                bench.device.synchronize()
            bench.fill(0, 11, 66)
            bench.finish()
            standin.run()
            look = bench.look(0, 11)
            bench.finish()
            expect(look(), bytes([66]) * 11 * PAGE, "a copy that failed wrote late")
            for _ in range(3):
                one_copy(bench)
        assert standin.is_idle(), "streams, events, pinned memory or work are left"
        assert standin.is_empty()
    assert num_failed >= total // 3 >= 4


def test_any_call_of_an_opening_may_fail(standin: StandIn) -> None:
    driver = CudaDriver()

    class Source:
        def drain(self) -> None: ...

        def close(self) -> None: ...

    def opened() -> CudaDevice:
        return CudaDevice(driver, PlainCudaMemory(driver), Source(), lambda: 0, region=Region)  # type: ignore[arg-type]

    total = num_calls(standin, lambda: opened().close())
    for position in range(1, total + 1):
        standin.forget()
        standin.fail(position, code=CODES["OUT_OF_MEMORY"])
        device = None
        try:
            device = opened()
            device.close()
        except DriverError:
            standin.forget()
            standin.pop_contexts()
            if device is not None:  # what was not given back is, when it is asked again
                device.close()
        standin.forget()
        standin.pop_contexts()
        assert standin.num_streams == standin.num_events == 0, position
    driver.close()


@pytest.mark.parametrize("place", PLACES)
def test_any_call_of_a_close_may_fail_and_the_next_close_goes_on(standin: StandIn, tmp_path: Path, place: str) -> None:
    position, total = 0, 1
    while position < total:
        position += 1
        folder = tmp_path / str(position)
        folder.mkdir()
        with cuda_on_the_stand_in(folder, order=Order.LATEST, home_pages=PLACES[place]) as bench:
            one_copy(bench)
            standin.forget()
            standin.fail(position, code=CODES["OUT_OF_MEMORY"])
            with contextlib.suppress(DriverError):
                bench.device.close()
            total = max(total, standin.calls())
            standin.forget()
            standin.pop_contexts()
            bench.device.close()
            assert standin.num_streams == 1  # that of compute
            assert standin.num_events == 0
    assert total > 5


@pytest.mark.parametrize("place", PLACES)
def test_a_gpu_that_is_lost_says_so_each_time_and_lets_go_of_the_rest(
    standin: StandIn, tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    with cuda_on_the_stand_in(tmp_path, order=Order.LATEST, home_pages=PLACES[place]) as bench:
        one_copy(bench)
        before = bench.device.copy([bench.read(0, 30 * PAGE, 0)], None)
        standin.lose(CODES["LAUNCH_FAILED"])
        for _ in range(2):
            with pytest.raises(GpuLostError, match=r"LAUNCH_FAILED.*lost.*save what is in host memory"):
                before.wait()
        assert before.done()
        with pytest.raises(GpuLostError):
            bench.device.copy([bench.read(0, 30 * PAGE, 0)], None).wait()
        with pytest.raises(GpuLostError):
            bench.device.record()
        with pytest.raises(GpuLostError):
            bench.device.synchronize()
        bench.device.close()
        assert "left to the end of the process" in caplog.text
        assert not {"mball-feed", "mball-read-0"} & names_of_threads()
        standin.forget()  # so that the test can clear up
        bench.device.close()


def test_an_event_is_behind_all_streams_that_were_computed_on(standin: StandIn, tmp_path: Path) -> None:
    """Memory is given back after it, by whoever changes a budget or drops a model, on whatever stream."""
    with cuda_on_the_stand_in(tmp_path, order=Order.LATEST) as bench:
        device = bench.device
        assert isinstance(device, CudaDevice)
        before = device._current_stream
        device.follow()
        with device._driver.current():
            other = device._streams.create_stream()
        bench.fill(0, 4, 77)
        device.record()
        device._current_stream = lambda: other
        device.record().wait()
        expect(ctypes.string_at(bench.arena.address, 4 * PAGE), bytes([77]) * 4 * PAGE)
        device._current_stream = before
        with device._driver.current():
            device._streams.destroy_stream(other)
