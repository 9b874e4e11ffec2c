"""GPUDirect Storage over the stand-in: bytes go straight or come the other way, and nothing of cuFile is left."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from mball.errors import DeviceError, MballError, StorageError
from mball.gds import straight_file
from mball.memory import cufile
from mball.memory.cuda_device import CudaDevice
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_events import EventPool
from mball.memory.cuda_streams import CudaStreams
from mball.memory.cufile import CuFile, CuFileError
from mball.memory.gds_ring import GdsRing
from mball.run.file_read import FileRead
from mball.storage import DirectIO, FileTable, watchdog
from mball.storage.watchdog import watched
from tests.memory.device_scenes import slots_in_turn
from tests.memory.devices import BUFFER_BYTES, NUM_BUFFERS, NUM_PAGES, PAGE, Bench, cuda_on_the_stand_in, expect
from tests.memory.driver.standin import CODES, FILE_CODES, Order, StandIn

READ = "cuFileRead"


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody tried to open cuFile yet."""
    monkeypatch.setattr(cufile, "_session", cufile._Session())


def straight(folder: Path, order: Order = Order.LATEST, seed: int = 0):  # type: ignore[no-untyped-def]
    return cuda_on_the_stand_in(folder, order=order, seed=seed, straight=True)


def bring(bench: Bench, offset: int, size: int) -> None:
    """One copy of so much of the file, and a look at it."""
    num_pages = -(-size // PAGE)
    bench.device.wait(bench.device.copy([bench.read(offset, size, 0)], bench.device.record()))
    look = bench.look(0, num_pages)
    bench.finish()
    expect(look()[:size], bench.content[offset : offset + size])


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# -- the way ----------------------------------------------------------------------------------------------------------


def test_bytes_go_around_the_host(standin: StandIn, tmp_path: Path) -> None:
    with straight(tmp_path) as bench:
        assert not standin.falls_back
        pinned_bytes = standin.registered_bytes
        standin.forget()
        bring(bench, 5, 40 * PAGE)
        assert standin.registered_bytes == pinned_bytes, "there was no need for the pinned ring"
        assert standin.opened_bytes == NUM_BUFFERS * BUFFER_BYTES
        assert standin.calls(READ) == standin.calls("cuMemcpyDtoDAsync") == -(-(40 * PAGE + 5) // BUFFER_BYTES)
        assert standin.num_compat_reads == 0
        bring(bench, 7 * PAGE, 3 * PAGE)
        assert standin.calls("cuFileHandleRegister") == standin.num_file_handles == 1
    assert standin.has_no_files()
    assert standin.falls_back, "others have what they had before"


@pytest.mark.parametrize("most_bytes", [0, PAGE, PAGE + 1, 3 * PAGE - 1, 100])
def test_any_piece_of_a_file_comes_however_short_reads_are(most_bytes: int, standin: StandIn, tmp_path: Path) -> None:
    standin.set_files(most_bytes=most_bytes)
    chance = random.Random(3)
    with straight(tmp_path) as bench:
        end = len(bench.content) - 1000
        os.truncate(bench.path, end)  # its last page is not whole
        bring(bench, end - 3 * PAGE - 50, 3 * PAGE + 50)
        for _ in range(20):
            size = chance.choice([1, PAGE, chance.randrange(1, 9 * PAGE)])
            bring(bench, chance.randrange(end - size), size)
        assert standin.num_file_handles == 1
        assert (standin.calls(READ) > 20) == (most_bytes != 100)


def test_a_read_may_end_past_the_end_of_the_file(standin: StandIn, tmp_path: Path) -> None:
    """As those of bundles do, which are whole pages: a reader stops there, and so does cuFile."""
    content = b"short" * 1000
    (tmp_path / "short").write_bytes(content)
    files = FileTable(direct=DirectIO.ALWAYS)
    name = files.add_path(tmp_path / "short")
    with gpu() as pool:
        ring = GdsRing(pool, partial(straight_file, files), watched, num_buffers=2, buffer_bytes=2 * PAGE)
        assert ring.takes(name)
        buffer = ring.turn()
        read = FileRead(file=name, offset_bytes=0, size_bytes=2 * PAGE, arena_offset_bytes=0)
        ring.read(buffer, read, 0, 2 * PAGE).wait()
        expect(ctypes.string_at(buffer.address, len(content)), content)  # the stand-in's memory is the host's
        ring.close()
    files.close()


def test_reads_go_on_side_by_side_while_python_runs(standin: StandIn, tmp_path: Path) -> None:
    """The bindings let Python run while a read is under way, else nobody here would see that it is."""
    with straight(tmp_path) as bench:
        standin.hold_reads(True)
        try:
            event = bench.device.copy([bench.read(0, 30 * PAGE, 0)], None)
            deadline_s = time.monotonic() + 30
            while standin.num_reading < NUM_BUFFERS:
                assert time.monotonic() < deadline_s, "reads are made one after the other"
                time.sleep(0.001)
            assert not event.done()
        finally:
            standin.hold_reads(False)
        event.wait()
        assert standin.most_reading == NUM_BUFFERS
        look = bench.look(0, 30)
        bench.finish()
        expect(look(), bench.content[: 30 * PAGE])


def test_a_read_that_takes_very_long_is_named(
    standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdog, "SLOW_S", 0.05)
    monkeypatch.setattr(watchdog, "_TICK_S", 0.01)
    with straight(tmp_path) as bench:
        standin.hold_reads(True)
        try:
            event = bench.device.copy([bench.read(0, 3 * PAGE, 0)], None)
            deadline_s = time.monotonic() + 30
            while "straight into the GPU" not in caplog.text:
                assert time.monotonic() < deadline_s, "nobody is told"
                time.sleep(0.001)
        finally:
            standin.hold_reads(False)
        event.wait()
        assert f"reading {bench.path} straight into the GPU: 12.00 KiB, asked for and not done after" in caplog.text


def test_what_is_closed_with_reads_under_way_waits_for_them(standin: StandIn, tmp_path: Path) -> None:
    with straight(tmp_path) as bench:
        for number in range(6):
            bench.device.copy([bench.read(number * PAGE, 8 * PAGE, number * 8)], None)
        bench.device.close()
        assert standin.num_reading == 0
        assert standin.has_no_files()
        assert not any(thread.name.startswith("mball-gds") for thread in threading.enumerate())


def test_a_process_that_ends_reads_no_more(standin: StandIn, tmp_path: Path) -> None:
    """Python ends threads before anybody closes a device: what is under way then fails, and says so to who waits."""
    with straight(tmp_path) as bench:
        assert isinstance(bench.device, CudaDevice)
        assert bench.device._feed._gds is not None
        bench.device._feed._gds._threads.shutdown()
        event = bench.device.copy([bench.read(0, 8 * PAGE, 0)], None)
        with pytest.raises(DeviceError, match=rf"{bench.path} is not read any more: cannot schedule"):
            event.wait()


# -- cuFile that is not there, or would not go straight --------------------------------------------------------------


@contextmanager
def gpu() -> Iterator[EventPool]:
    driver = CudaDriver()
    pool = EventPool(CudaStreams(driver))
    yield pool
    with driver.current():
        pool.close()
    driver.close()


def ring_of(pool: EventPool) -> GdsRing:
    return GdsRing(pool, lambda name: None, watched, num_buffers=2, buffer_bytes=PAGE)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"straight": False}, "driver_open failed: DRIVER_NOT_INITIALIZED"), ({"forced": True}, "allow_compat_mode")],
    ids=["no nvidia-fs", "cufile.json"],
)
def test_a_cufile_that_would_read_through_the_host_is_refused(
    standin: StandIn, settings: dict[str, bool], match: str
) -> None:
    standin.set_files(**settings)
    for _ in range(2):
        with pytest.raises(CuFileError, match=match):
            CuFile()
        assert standin.calls("cuFileDriverOpen") == 1, "asking again may hang"
        assert standin.has_no_files()
        assert standin.falls_back


def test_a_cufile_that_others_have_opened_is_refused_if_it_may_fall_back(standin: StandIn) -> None:
    from cuda.bindings import cufile as others

    others.driver_open()
    with pytest.raises(CuFileError, match=r"cannot be told not to.*Set allow_compat_mode to false"):
        CuFile()
    others.driver_close()
    CuFile().close()


def test_the_last_one_closes_it(standin: StandIn) -> None:
    first, second = CuFile(), CuFile()
    assert standin.calls("cuFileDriverOpen") == 1
    for _ in range(2):
        first.close()
    assert not standin.has_no_files()
    second.close()
    assert standin.has_no_files()
    assert standin.falls_back
    CuFile().close()


def test_each_refusal_has_a_name(standin: StandIn, tmp_path: Path) -> None:
    """Whichever way the call has of saying it."""
    library = CuFile()
    for code, match in (
        (errno.EIO, "Input/output error"),
        (FILE_CODES["IO_NOT_SUPPORTED"], "IO_NOT_SUPPORTED"),
        (5999, "5999"),
    ):
        standin.fail(1, code=code, function=READ)
        with pytest.raises(CuFileError, match=match):
            library.read(1, 0, PAGE, 0, 0)
        standin.forget()
    with (tmp_path / "file").open("wb") as file, pytest.raises(CuFileError, match="INVALID_FILE_OPEN_FLAG"):
        library.register_file(file.fileno())
    library.close()


@pytest.mark.parametrize("code", [CODES["OUT_OF_MEMORY"], FILE_CODES["GPU_MEMORY_PINNING_FAILED"]])
def test_any_call_of_an_opening_may_fail(standin: StandIn, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with gpu() as pool:
        standin.forget()
        ring_of(pool).close()
        total = standin.calls()
        for position in range(1, total + 1):
            monkeypatch.setattr(cufile, "_session", cufile._Session())
            standin.forget()
            standin.fail(position, code=code)
            ring = None
            with suppress(DeviceError):
                ring = ring_of(pool)
                ring.close()
            standin.forget()
            standin.pop_contexts()
            if ring is not None:
                ring.close()
            assert standin.has_no_files(), position
            assert standin.taken_bytes == 0, position
            if not standin.falls_back:  # the call that sets it back was the one that failed
                standin.sweep_files()
        assert total > 8


def test_threads_that_cannot_be_started_refuse_the_ring(standin: StandIn, few_threads: None) -> None:
    """Later a read that was refused would still be queued, for the thread that there is."""
    with gpu() as pool:
        with pytest.raises(CuFileError, match=r"2 threads .* cannot be started: can't start new thread; .*ulimit -u"):
            ring_of(pool).close()
        assert standin.has_no_files()
        assert standin.taken_bytes == 0
    assert not any(thread.name.startswith("mball-gds") for thread in threading.enumerate())


# -- reads that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL, FILE_CODES["IO_NOT_SUPPORTED"], 5999])
@pytest.mark.parametrize("function", [READ, "cuFileHandleRegister"])
@pytest.mark.parametrize("order", [Order.LATEST, Order.RANDOM])
def test_what_cufile_does_not_read_comes_the_other_way(
    standin: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture, function: str, code: int, order: Order
) -> None:
    for position in range(1, 10):
        folder = tmp_path / str(position)
        folder.mkdir()
        with straight(folder, order, position) as bench:
            caplog.clear()
            standin.forget()
            standin.fail(position, code=code, function=function)
            slots_in_turn(bench, random.Random(position), num_copies=6)
            failed = standin.calls(function) >= position
            said = warnings_of(caplog)
            assert len(said) == failed, said
            assert all(f"{bench.path} is read through pinned host memory" in line for line in said)
            before = standin.calls(READ)
            bring(bench, 3, 20 * PAGE)
            assert (standin.calls(READ) == before) == failed, "a file that failed is left alone, and no other"
        assert standin.is_idle()
        assert standin.is_empty()
        assert standin.has_no_files()


def test_all_reads_under_way_may_fail_at_one_time(
    standin: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with straight(tmp_path) as bench:
        standin.fail(2, 9, code=errno.EIO, function=READ)
        slots_in_turn(bench, random.Random(3))
        assert len(warnings_of(caplog)) == 1


def test_a_disk_that_fails_is_an_error_that_names_the_file(
    standin: StandIn, tmp_path: Path, set_preadv: Callable[[Callable[..., int]], object]
) -> None:
    def fails(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with straight(tmp_path) as bench:
        bring(bench, 0, 8 * PAGE)
        standin.fail(1, 99, code=errno.EIO, function=READ)
        set_preadv(fails)
        event = bench.device.copy([bench.read(4 * PAGE, 8 * PAGE, 0)], None)
        with pytest.raises(StorageError, match=rf"{bench.path}.*Input/output error"):
            event.wait()


def test_a_file_that_is_cut_off_is_an_error(standin: StandIn, tmp_path: Path) -> None:
    with straight(tmp_path) as bench:
        bench.path.write_bytes(bench.content[: 8 * PAGE + 7])
        event = bench.device.copy([bench.read(2 * PAGE, 12 * PAGE, 0)], None)
        with pytest.raises(StorageError, match=str(bench.path)):
            event.wait()
        bench.path.write_bytes(bench.content)


def test_files_that_are_not_to_be_read_so_are_not(standin: StandIn, tmp_path: Path) -> None:
    """Such as swap, which is checked in host memory."""
    with cuda_on_the_stand_in(tmp_path, order=Order.LATEST) as bench:
        assert isinstance(bench.device, CudaDevice)
        bench.device.go_straight(bench.device.gds_ring(lambda name: None, watched))
        bring(bench, 5, 30 * PAGE)
        assert standin.calls(READ) == standin.calls("cuFileHandleRegister") == 0


# -- what is left when a call fails -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [Order.EARLIEST, Order.LATEST])
@pytest.mark.parametrize("num_failing", [1, 999])
def test_any_call_of_a_copy_may_fail(standin: StandIn, tmp_path: Path, order: Order, num_failing: int) -> None:
    position, total, num_failed = 0, 1, 0
    while position < total:
        position += 1
        folder = tmp_path / str(position)
        folder.mkdir()
        with straight(folder, order) as bench:
            standin.forget()
            standin.fail(position, position + num_failing - 1, code=CODES["OUT_OF_MEMORY"])
            try:
                bring(bench, 2 * PAGE, 7 * PAGE)
            except MballError:
                num_failed += 1
            total = max(total, min(standin.calls(), 60))
            standin.forget()
            standin.pop_contexts()
            bench.device.synchronize()
            bench.fill(0, 8, 66)
            bench.finish()
            standin.run()
            look = bench.look(0, 8)
            bench.finish()
            expect(look(), bytes([66]) * 8 * PAGE, "a copy that failed wrote late")
            for _ in range(2):
                bring(bench, 2 * PAGE, 7 * PAGE)
        assert standin.is_idle(), "streams, events, pinned memory or work are left"
        assert standin.is_empty()
        assert standin.has_no_files()
    assert num_failed >= 4


def test_any_call_of_a_close_may_fail_and_the_next_close_goes_on(standin: StandIn, tmp_path: Path) -> None:
    position, total = 0, 1
    while position < total:
        position += 1
        folder = tmp_path / str(position)
        folder.mkdir()
        with straight(folder) as bench:
            bring(bench, 0, 8 * PAGE)
            standin.forget()
            standin.fail(position, code=CODES["OUT_OF_MEMORY"])
            with suppress(DeviceError):
                bench.device.close()
            total = max(total, standin.calls())
            standin.forget()
            standin.pop_contexts()
            bench.device.close()
            assert standin.has_no_files(), position
        assert standin.is_empty(), position
    assert total > 12


def test_what_is_read_is_the_whole_of_a_large_file_in_any_order(standin: StandIn, tmp_path: Path) -> None:
    with straight(tmp_path, Order.RANDOM, 4) as bench:
        bring(bench, 0, NUM_PAGES * PAGE)
