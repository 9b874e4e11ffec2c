"""Swap when things go wrong: one clear error or recovery, never wrong bytes, and nothing is left behind."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mball.config import SwapCheck
from mball.errors import DeviceError, StorageError
from mball.storage import CheckedReader, Read, SwapFile, checksum, watchdog
from mball.storage.extents import BLOCK_BYTES
from mball.storage.reader import ReadHandle
from mball.storage.writes import CHUNK_BYTES, Write
from mball.units import MIB
from tests.storage.interrupts import interrupted_at_each_call
from tests.storage.reads import memory
from tests.storage.swaps import content, flip, opened, read_back, write

PAGE = 4096


# -- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["XXH3", "CRC-32"])
@pytest.mark.parametrize("at", [0, 5 * BLOCK_BYTES + 77, 10 * BLOCK_BYTES - 1], ids=["first", "inside", "last"])
def test_a_flipped_bit_is_found(kind: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "XXH3":
        pytest.importorskip("xxhash")
    elif kind != checksum.NAME:
        import zlib

        for module in ("swap_content", "writes"):
            monkeypatch.setattr(f"mball.storage.{module}.checksum", zlib.crc32)
        monkeypatch.setattr("mball.storage.swap_content.NAME", kind)
    with opened(tmp_path) as (swap, reader):
        swap.allocate(PAGE)
        start = swap.allocate(10 * BLOCK_BYTES)
        swap.write(start, content(10 * BLOCK_BYTES))
        flip(swap, start + at)
        number = (start + at) // BLOCK_BYTES
        first = max(start, number * BLOCK_BYTES)
        end = min(start + 10 * BLOCK_BYTES, (number + 1) * BLOCK_BYTES)
        message = rf"{end - first} B at offset {first} B of {swap.name} in .* {kind} is 0x[0-9a-f]+, and it was 0x"
        for _ in range(2):
            with pytest.raises(StorageError, match=message):
                read_back(swap, reader, start, 10 * BLOCK_BYTES)
        flip(swap, start + at)
        assert read_back(swap, reader, start, 10 * BLOCK_BYTES) == content(10 * BLOCK_BYTES)


def test_a_read_of_part_of_a_block_finds_it_too(tmp_path: Path) -> None:
    with opened(tmp_path) as (swap, reader):
        start = swap.allocate(4 * BLOCK_BYTES)
        swap.write(start, content(4 * BLOCK_BYTES))
        flip(swap, start + BLOCK_BYTES + 3 * PAGE)
        with pytest.raises(StorageError, match="not what was written"):
            read_back(swap, reader, start + BLOCK_BYTES + 2 * PAGE, 2 * PAGE)
        assert read_back(swap, reader, start + 2 * BLOCK_BYTES + PAGE, PAGE)


def test_every_wait_raises(tmp_path: Path) -> None:
    with opened(tmp_path) as (swap, reader):
        start = swap.allocate(PAGE)
        swap.write(start, content(PAGE))
        flip(swap, start)
        handle = reader.submit([Read(file=swap.name, offset_bytes=start, size_bytes=PAGE, destination=memory(PAGE))])
        for _ in range(2):
            with pytest.raises(StorageError, match="not what was written"):
                handle.wait()


def test_when_it_is_looked_for(tmp_path: Path) -> None:
    found = {}
    for check in SwapCheck:
        with opened(tmp_path, check) as (swap, reader):
            start = swap.allocate(2 * BLOCK_BYTES)
            swap.write(start, content(2 * BLOCK_BYTES))
            read_back(swap, reader, start, 2 * BLOCK_BYTES)
            once = swap.statistics.checked_bytes
            flip(swap, start)
            try:
                read_back(swap, reader, start, 2 * BLOCK_BYTES)
                found[check] = (once, False)
            except StorageError:
                found[check] = (once, True)
    whole = 2 * BLOCK_BYTES
    assert found == {SwapCheck.FIRST: (whole, False), SwapCheck.ALWAYS: (whole, True), SwapCheck.OFF: (0, False)}


def test_writing_part_of_a_damaged_block_does_not_vouch_for_the_rest(tmp_path: Path) -> None:
    with opened(tmp_path) as (swap, reader):
        start = swap.allocate(BLOCK_BYTES)
        swap.write(start, content(BLOCK_BYTES))
        flip(swap, start + 3 * PAGE)
        before = swap.statistics.num_writes
        with pytest.raises(StorageError, match="not what was written"):
            swap.write(start, content(PAGE, seed=1))
        assert swap.statistics.num_writes == before
        swap.write(start, content(BLOCK_BYTES, seed=1))  # whole
        assert read_back(swap, reader, start, BLOCK_BYTES) == content(BLOCK_BYTES, seed=1)


def test_a_read_that_a_write_overtakes_is_no_damage(tmp_path: Path) -> None:
    with opened(tmp_path) as (swap, reader):
        start = swap.allocate(BLOCK_BYTES)
        swap.write(start, content(BLOCK_BYTES))
        read = Read(file=swap.name, offset_bytes=start, size_bytes=BLOCK_BYTES, destination=memory(BLOCK_BYTES))
        handle = reader.submit([read])
        while not handle.done():
            time.sleep(0.001)
        swap.write(start, content(BLOCK_BYTES, seed=1))
        handle.wait()


# -- writes that fail --------------------------------------------------------------------------------------------

ERRORS = {
    errno.EIO: "Input/output error",
    errno.ENOSPC: "No space left on device.*free disk space",
    errno.EDQUOT: "quota",
    errno.EFBIG: "ulimit -f",
}


@pytest.mark.parametrize("number", list(ERRORS), ids=errno.errorcode.get)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_write_that_fails(number: int, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwritev, []

    def fail(*arguments: Any) -> int:
        calls.append(None)
        if len(calls) == at + 1:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    with opened(tmp_path, num_threads=1) as (swap, reader):
        start = swap.allocate(4 * CHUNK_BYTES)
        swap.write(start, content(4 * CHUNK_BYTES))
        monkeypatch.setattr(os, "pwritev", fail)
        where = rf"at offset {at * CHUNK_BYTES} B of {swap.name} in .*{ERRORS[number]}"
        message = rf"(?i)writing 4\.00 MiB \({CHUNK_BYTES} B\) {where}"
        with pytest.raises(StorageError, match=message) as caught:
            swap.write(start, content(4 * CHUNK_BYTES, seed=1))
        assert isinstance(caught.value.__cause__, OSError)
        # Nobody knows what is there now, so nobody gets it.
        with pytest.raises(StorageError, match="writing them failed"):
            read_back(swap, reader, start + at * CHUNK_BYTES, CHUNK_BYTES)
        swap.write(start, content(4 * CHUNK_BYTES, seed=1))
        assert read_back(swap, reader, start, 4 * CHUNK_BYTES) == content(4 * CHUNK_BYTES, seed=1)


def test_a_failed_write_of_part_of_a_block_can_be_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(tmp_path) as (swap, reader):
        start = swap.allocate(BLOCK_BYTES)
        expected = content(BLOCK_BYTES)
        swap.write(start, expected)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", refuse)
            with pytest.raises(StorageError, match="Input/output"):
                swap.write(start + PAGE, content(PAGE, seed=1))
        expected[PAGE : 2 * PAGE] = content(PAGE, seed=1)
        swap.write(start + PAGE, content(PAGE, seed=1))
        assert read_back(swap, reader, start, BLOCK_BYTES) == expected


def test_what_is_left_of_a_failed_write_is_not_vouched_for_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(tmp_path) as (swap, reader):
        start = swap.allocate(BLOCK_BYTES)
        swap.write(start, content(BLOCK_BYTES))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", refuse)
            with pytest.raises(StorageError, match="Input/output"):
                swap.write(start + PAGE, content(4 * PAGE, seed=1))
        swap.write(start + 9 * PAGE, content(PAGE, seed=2))
        swap.write(start + PAGE, content(2 * PAGE, seed=1))
        with pytest.raises(StorageError, match="writing them failed"):
            read_back(swap, reader, start, BLOCK_BYTES)
        expected = content(BLOCK_BYTES)
        expected[9 * PAGE : 10 * PAGE] = content(PAGE, seed=2)
        expected[PAGE : 5 * PAGE] = content(4 * PAGE, seed=3)
        swap.write(start + PAGE, content(4 * PAGE, seed=3))
        assert read_back(swap, reader, start, BLOCK_BYTES) == expected


@pytest.mark.parametrize("most", [1, 511, 4096, 5000, 65536])
def test_short_writes_are_finished_wherever_they_end(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev

    def short(descriptor: int, views: list[memoryview], offset: int) -> int:
        return real(descriptor, [views[0][: max(most, len(views[0]) // 20)]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    with opened(tmp_path) as (swap, reader):
        start = swap.allocate(MIB)
        parts = [
            write(start + at, content(size, seed=at)) for at, size in ((0, PAGE), (PAGE, 3 * PAGE), (65536, MIB // 2))
        ]
        swap.write_all(parts)
        for part in parts:
            assert read_back(swap, reader, part.offset_bytes, len(part.source)) == part.source


@pytest.mark.parametrize("num_threads", [0, 1])
def test_where_threads_cannot_be_started(num_threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, left = threading.Thread.start, num_threads

    def refused(thread: threading.Thread) -> None:
        nonlocal left
        if thread.name.startswith("mball-write"):
            if not left:
                raise RuntimeError("can't start new thread")
            left -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with opened(tmp_path) as (swap, reader):
        place, source = swap.allocate(MIB), content(MIB)
        if not num_threads:
            with pytest.raises(StorageError, match=r"no thread can be started .* new thread\); .*ulimit -u"):
                swap.write(place, source)
            assert read_back(swap, reader, place, MIB) == bytes(MIB), "nothing was written"
            left = 100
        swap.write(place, source)
        assert read_back(swap, reader, place, MIB) == source.tobytes()


def test_signals_while_writing(tmp_path: Path) -> None:
    """EINTR: a timer fires all the time."""
    fired: list[None] = []
    before = signal.signal(signal.SIGALRM, lambda *_: fired.append(None))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        with opened(tmp_path) as (swap, reader):
            start = swap.allocate(16 * MIB)
            for seed in range(3):
                swap.write(start, content(16 * MIB, seed=seed))
                assert read_back(swap, reader, start, 16 * MIB) == content(16 * MIB, seed=seed)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert fired


def test_the_largest_size_of_a_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE, as an allocation meets it and as a write does; in a child, since it holds for the process."""
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
            swap = SwapFile.create(tmp_path)
            swap.allocate(MIB)
            try:
                swap.allocate(PAGE)
            except StorageError as error:
                os._exit(0 if "File too large" in str(error) and "ulimit -f" in str(error) else 2)
            os._exit(3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_an_allocation_that_fails_changes_nothing(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with opened(tmp_path) as (swap, reader):
        start = swap.allocate(MIB)
        swap.write(start, content(MIB))
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", refuse)
            with pytest.raises(StorageError, match=rf"2\.00 MiB \(2097152 B\) of swap in .*{os.strerror(number)}"):
                swap.allocate(2 * MIB)
        assert swap.size_bytes == os.fstat(swap.fd).st_size == MIB
        assert read_back(swap, reader, start, MIB) == content(MIB)
        assert swap.allocate(2 * MIB) == MIB


# -- processes ---------------------------------------------------------------------------------------------------

_CHILD = """
import os, signal, sys, threading, time
sys.path[:0] = [{root!r}]
from tests.storage.swaps import content, opened, read_back, write
from pathlib import Path
from mball.units import MIB
with opened(Path(sys.argv[1])) as (swap, reader):
    start = swap.allocate(32 * MIB)
    seed = os.getpid()
    for turn in range(int(sys.argv[2])):
        swap.submit([write(start, content(32 * MIB, seed=seed + turn))])
        if not turn:
            print("begun", flush=True)
        assert read_back(swap, reader, start, 32 * MIB) == content(32 * MIB, seed=seed + turn)
print("right", flush=True)
"""


def _child(directory: Path, turns: int) -> subprocess.Popen[str]:
    code = _CHILD.format(root=str(Path(__file__).parents[2]))
    return subprocess.Popen([sys.executable, "-c", code, str(directory), str(turns)], stdout=subprocess.PIPE, text=True)


def test_kill_leaves_nothing_in_the_directory(tmp_path: Path) -> None:
    with _child(tmp_path, 1000) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        before = os.statvfs(tmp_path).f_bavail
        assert list(tmp_path.iterdir()) == []
        child.kill()
    assert list(tmp_path.iterdir()) == []
    assert os.statvfs(tmp_path).f_bavail >= before


def test_two_processes_share_a_directory(tmp_path: Path) -> None:
    with _child(tmp_path, 2) as first, _child(tmp_path, 2) as second:
        for child in (first, second):
            out, _ = child.communicate(timeout=60)
            assert out == "begun\nright\n"
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as (swap, reader):
        start = swap.allocate(MIB)
        swap.write(start, content(MIB))
        finished = reader.submit([Read(file=swap.name, offset_bytes=start, size_bytes=PAGE, destination=memory(PAGE))])
        reader.drain()
        held, let_go = threading.Event(), threading.Event()

        def hold() -> None:
            with swap._queue.lock:
                held.set()
                let_go.wait()

        # As a writing thread may do at any time; in the child nobody releases it.
        threading.Thread(target=hold, daemon=True).start()
        held.wait()
        child = os.fork()
        let_go.set()
        if not child:
            code = 1
            try:
                acts = (
                    lambda: swap.write(start, content(MIB, seed=1)),
                    lambda: swap.allocate(MIB),
                    lambda: swap.free(start),
                    swap.trim,
                    lambda: read_back(swap, reader, start, PAGE),
                    lambda: swap.verify(start, PAGE),
                    finished.wait,
                )
                refused = 0
                for act in acts:
                    try:
                        act()
                    except DeviceError as error:
                        refused += "forked child" in str(error)
                swap.close()
                code = 0 if refused == len(acts) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert read_back(swap, reader, start, MIB) == content(MIB)
        swap.write(start, content(MIB, seed=2))
        assert read_back(swap, reader, start, MIB) == content(MIB, seed=2)


# -- interrupts --------------------------------------------------------------------------------------------------


class _RefusedError(Exception):
    """The bytes are those of a write that was not finished, and nobody gets them."""


def read_or_refuse(swap: SwapFile, reader: CheckedReader, start: int, size: int) -> bytes:
    try:
        return read_back(swap, reader, start, size)
    except StorageError as error:
        if "writing them failed" in str(error):
            raise _RefusedError from error
        raise


@pytest.mark.alone
def test_ctrl_c_wherever_it_strikes_loses_nothing(tmp_path: Path) -> None:
    """What was written before is right, what was being written is old, new or refused, and writing again succeeds."""
    size = BLOCK_BYTES + 2 * PAGE
    before, after = content(size), content(size, seed=1)
    with opened(tmp_path, num_threads=1) as (swap, reader):
        kept, start = swap.allocate(size), swap.allocate(size)
        swap.write(kept, before)
        holder: list[int] = []
        known = {bytes(view[at : at + PAGE]) for view in (before, after) for at in range(0, size, PAGE)}

        def scene() -> None:
            handle = swap.submit([write(start, after[:BLOCK_BYTES]), write(start + BLOCK_BYTES + PAGE, after[:PAGE])])
            handle.wait()
            swap.write(start, after)
            holder.append(swap.allocate(size))
            swap.free(holder.pop())
            swap.trim()

        for _ in interrupted_at_each_call(scene, lambda: swap.write(start, before)):
            assert read_back(swap, reader, kept, size) == before
            with contextlib.suppress(_RefusedError):
                got = read_or_refuse(swap, reader, start, size)
                assert {got[at : at + PAGE] for at in range(0, size, PAGE)} <= known
            swap.write(start, after)
            assert read_back(swap, reader, start, size) == after
        gc.collect()


# -- a slow disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "SLOW_S", 0.05)
    monkeypatch.setattr(watchdog, "_TICK_S", 0.01)


def let_go_when_said(let_go: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    """In the background: who looks at the clock may sleep through the first half second, by the ticks of before."""

    def wait() -> None:
        deadline_s = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline_s:
            time.sleep(0.01)
        time.sleep(0.1)  # and it is not said again
        let_go.set()

    threading.Thread(target=wait).start()


@pytest.mark.parametrize("what", ["reading", "writing to"])
def test_a_slow_disk_is_named_once(
    what: str, impatient: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    let_go = threading.Event()
    call = "preadv" if what == "reading" else "pwritev"
    real = getattr(os, call)

    def slow(*arguments: Any) -> int:
        let_go.wait(10)
        return int(real(*arguments))

    with opened(tmp_path, SwapCheck.OFF) as (swap, reader), caplog.at_level(logging.WARNING):
        start = swap.allocate(2 * MIB)
        swap.write(start, content(2 * MIB))
        assert not caplog.records
        with monkeypatch.context() as patch:
            patch.setattr(os, call, slow)
            handle: ReadHandle
            if what == "reading":
                read = Read(file=swap.name, offset_bytes=start, size_bytes=2 * MIB, destination=memory(2 * MIB))
                handle = reader.submit([read])
            else:
                handle = swap.submit([Write(offset_bytes=start, source=content(2 * MIB))])
            let_go_when_said(let_go, caplog)
            handle.wait()
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1
        assert said[0].startswith(f"{what} {swap.name}")
        assert "2.00 MiB, asked for and not done after " in said[0]
        assert read_back(swap, reader, start, PAGE) == content(2 * MIB)[:PAGE]
        assert len(caplog.records) == 1


def test_a_queue_that_stays_full_is_named(
    impatient: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    let_go, real = threading.Event(), os.pwritev

    def slow(*arguments: Any) -> int:
        let_go.wait(10)
        return int(real(*arguments))

    monkeypatch.setattr(os, "pwritev", slow)
    with opened(tmp_path, high_bytes=MIB, low_bytes=0) as (swap, _), caplog.at_level(logging.WARNING):
        start = swap.allocate(2 * MIB)
        swap.submit([write(start, content(MIB))])
        let_go_when_said(let_go, caplog)
        swap.submit([write(start + MIB, content(MIB))])
        (said,) = [record.getMessage() for record in caplog.records]
        assert said.startswith(f"writing to {swap.name} in {tmp_path}: 1.00 MiB, asked for and not done")


# -- all of it, by chance ----------------------------------------------------------------------------------------


def campaign(seed: int, num_steps: int, directory: Path, patch: pytest.MonkeyPatch) -> dict[str, int]:
    """Extents come and go, writes fail, stop short and are done again, bits flip: what is read is right, or refused."""
    chance, real, seen = random.Random(seed), os.pwritev, dict.fromkeys(("read", "refused", "failed"), 0)
    luck = threading.Lock()

    def unreliable(descriptor: int, views: list[memoryview], offset: int) -> int:
        with luck:
            draw, number = chance.random(), chance.choice(list(ERRORS))
        if draw < 0.15:
            raise OSError(number, os.strerror(number))
        return real(descriptor, views if draw > 0.3 else [views[0][: max(1, len(views[0]) // 3)]], offset)

    patch.setattr(os, "pwritev", unreliable)
    with opened(directory, SwapCheck.ALWAYS, num_threads=2, high_bytes=MIB, low_bytes=MIB // 2) as (swap, reader):
        extents: dict[int, bytearray] = {}

        def persist(start: int, first: int, source: memoryview) -> None:
            while True:
                try:
                    return swap.write(start + first, source)
                except StorageError as error:
                    if "failed (" not in str(error):
                        raise
                    seen["failed"] += 1

        for step in range(num_steps):
            with luck:
                act = chance.choice(["allocate", "write", "write", "read", "read", "flip", "free"])
                size = chance.choice([PAGE, 3 * PAGE, BLOCK_BYTES, 5 * BLOCK_BYTES + PAGE])
                start = chance.choice(list(extents)) if extents else None
                first = chance.randrange(len(extents[start])) if start is not None else 0
                length = chance.randint(1, len(extents[start]) - first) if start is not None else 0
            if act == "allocate" or start is None:
                start = swap.allocate(size)
                assert start not in extents
                extents[start] = bytearray(content(size, seed=step))
                persist(start, 0, memoryview(bytes(extents[start])))
            elif act == "write":
                source = content(length, seed=step)
                extents[start][first : first + length] = source
                persist(start, first, source)
            elif act == "free":
                swap.free(start)
                del extents[start]
                swap.trim()
            else:
                if act == "flip":
                    flip(swap, start + first)
                try:
                    got = read_back(swap, reader, start + first, length)
                    assert act == "read"
                    assert got == extents[start][first : first + length]
                    seen["read"] += 1
                except StorageError:
                    if act != "flip":
                        raise
                    seen["refused"] += 1
                    flip(swap, start + first)
        for start, expected in extents.items():
            assert read_back(swap, reader, start, len(expected)) == expected
        assert swap.statistics.used_bytes == sum(map(len, extents.values()))
    return seen


@pytest.mark.parametrize("seed", range(3))
def test_by_chance(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert min(campaign(seed, 500, tmp_path, monkeypatch).values()) > 5


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(100, 120))
def test_by_chance_for_long(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert min(campaign(seed, 20_000, tmp_path, monkeypatch).values()) > 100
