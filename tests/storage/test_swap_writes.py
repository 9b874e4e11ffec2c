"""Writes in the background: what is read is what was handed over last, queues are bounded, and reads go first."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mball.config import SwapCheck
from mball.errors import StorageError
from mball.storage import DirectIO, Read, SwapFile
from mball.storage.scratch import huge_page_memory
from mball.storage.write_queue import QueueLimits
from mball.storage.writes import CHUNK_BYTES
from mball.units import MIB
from tests.storage.reads import memory
from tests.storage.swaps import HeldWrites, content, opened, read_back, write

PAGE = 4096
DIRECT = list(DirectIO)


@pytest.mark.parametrize("direct", DIRECT)
@pytest.mark.parametrize("check", list(SwapCheck))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_reads_bring_what_was_written_last(
    data: st.DataObject, direct: DirectIO, check: SwapCheck, tmp_path: Path
) -> None:
    """Held against plain bytes, with writes under way, ragged, side by side and one over the other."""
    size = 300_000
    with opened(tmp_path, check, direct=direct, num_threads=2) as (swap, reader):
        starts = [swap.allocate(size) for _ in range(2)]
        model = [bytearray(size) for _ in starts]
        # A fresh extent reads as zeros; one that was used before need not.
        handles, sources = [], []
        for number in range(data.draw(st.integers(1, 12))):
            which = data.draw(st.integers(0, 1))
            unit = data.draw(st.sampled_from([1, PAGE, 65536]))
            first = data.draw(st.integers(0, size // unit - 1)) * unit
            length = min(data.draw(st.integers(1, 40)) * unit, size - first)
            if data.draw(st.booleans()):
                source = content(length, seed=number)
                handles.append(swap.submit([write(starts[which] + first, source)]))
                sources.append(source)
                model[which][first : first + length] = source
            else:
                got = read_back(swap, reader, starts[which] + first, length)
                assert got == model[which][first : first + length]
        for handle in handles:
            handle.wait()
            assert handle.done()
        for start, expected in zip(starts, model, strict=True):
            assert read_back(swap, reader, start, size) == expected
            assert os.pread(swap.fd, size, start) == expected


def test_a_read_of_what_is_still_written_comes_from_memory(tmp_path: Path, held_writes: HeldWrites) -> None:
    with opened(tmp_path) as (swap, reader):
        start = swap.allocate(3 * MIB)
        source = content(2 * MIB)
        handle = swap.submit([write(start + PAGE, source)])
        held_writes.begun.acquire()
        assert not handle.done()
        got = read_back(swap, reader, start, 3 * MIB)
        assert got == bytes(PAGE) + bytes(source) + bytes(MIB - PAGE)
        assert swap.statistics.hit_bytes == 2 * MIB
        assert swap.statistics.read_bytes == 3 * MIB
        held_writes.let_go.set()
        handle.wait()
        assert handle.began_s is not None
        assert handle.ended_s is not None
        assert handle.began_s <= handle.ended_s
        assert handle.size_bytes == 2 * MIB
        assert read_back(swap, reader, start + PAGE, 2 * MIB) == source
        assert swap.statistics.hit_bytes == 2 * MIB


def test_what_writes_waits_above_the_high_mark_and_goes_on_below_the_low_one(
    tmp_path: Path, held_writes: HeldWrites
) -> None:
    with opened(tmp_path, num_threads=1, high_bytes=4 * MIB, low_bytes=MIB) as (swap, _):
        start = swap.allocate(16 * MIB)
        source = content(2 * MIB)
        swap.submit([write(start, source)])
        assert not swap._queue.full
        swap.submit([write(start + 2 * MIB, source)])
        assert swap._queue.full
        third: list[object] = []
        writer = threading.Thread(target=lambda: third.append(swap.submit([write(start + 4 * MIB, source)])))
        writer.start()
        writer.join(0.1)
        assert writer.is_alive()
        held_writes.let_go.set()
        writer.join(10)
        assert third
        third[0].wait()  # type: ignore[attr-defined]
        assert not swap._queue.full


def test_the_depth_bounds_the_queue(tmp_path: Path, held_writes: HeldWrites) -> None:
    with opened(tmp_path, num_threads=1, depth=4) as (swap, _):
        start = swap.allocate(8 * MIB)
        source = content(PAGE)
        for number in range(5):
            assert not swap._queue.full
            swap.submit([write(start + number * MIB, source)])
            if not number:
                held_writes.begun.acquire()
        assert swap._queue.full
        held_writes.let_go.set()


def test_no_more_threads_write_than_were_asked_for(tmp_path: Path, held_writes: HeldWrites) -> None:
    with opened(tmp_path, num_threads=3) as (swap, _):
        start = swap.allocate(4 * CHUNK_BYTES)
        handle = swap.submit([write(start, content(4 * CHUNK_BYTES))])
        for _ in range(3):
            held_writes.begun.acquire()
        assert not held_writes.begun.acquire(timeout=0.05)
        held_writes.let_go.set()
        handle.wait()


class Reading:
    """Reads that are under way until somebody says that they are over."""

    size_bytes = 0
    began_s = ended_s = None

    def __init__(self) -> None:
        self.over = threading.Event()

    def done(self) -> bool:
        return self.over.is_set()

    def wait(self) -> None:
        self.over.wait()


@pytest.mark.alone
def test_writes_have_their_share_while_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, spans, under_way, most = os.pwritev, [], [], []

    def slow(*arguments: Any) -> int:
        under_way.append(None)
        most.append(len(under_way))
        began_s = time.perf_counter()
        time.sleep(0.01)
        done = real(*arguments)
        spans.append((began_s, time.perf_counter()))
        under_way.pop()
        return done

    monkeypatch.setattr(os, "pwritev", slow)
    with opened(tmp_path, num_threads=4, share=0.25) as (swap, _):
        start = swap.allocate(16 * CHUNK_BYTES)
        reading = Reading()
        swap.give_way_to(reading)
        handle = swap.submit([write(start, content(16 * CHUNK_BYTES))])
        while len(spans) < 6:
            time.sleep(0.001)
        busy_s = sum(end - begin for begin, end in spans[:6])
        assert max(most[:6]) == 1
        # The first begins at once; then each is followed by three times as long for others.
        assert 5 / 6 * busy_s / (spans[5][0] - spans[0][0]) < 0.3
        # Nobody reads any more: all of them write.
        reading.over.set()
        handle.wait()
        assert max(most) > 1


def test_what_is_waited_for_gives_way_to_nobody(tmp_path: Path) -> None:
    with opened(tmp_path, num_threads=1, share=1e-6) as (swap, _):
        start = swap.allocate(4 * CHUNK_BYTES)
        swap.give_way_to(Reading())
        swap.submit([write(start, content(4 * CHUNK_BYTES))]).wait()  # a chunk an hour, otherwise


def test_what_waits_for_room_in_the_queue_gives_way_to_nobody(tmp_path: Path) -> None:
    with opened(tmp_path, num_threads=1, share=1e-6, depth=2) as (swap, _):
        start = swap.allocate(6 * CHUNK_BYTES)
        swap.give_way_to(Reading())
        swap.write(start, content(6 * CHUNK_BYTES))  # a chunk at one time finds room


def test_extents_are_used_again_and_the_end_is_given_back(tmp_path: Path) -> None:
    with opened(tmp_path) as (swap, reader):
        first, second, third = (swap.allocate(MIB) for _ in range(3))
        swap.write(second, content(MIB, seed=1))
        swap.free(first)
        assert swap.size_bytes == 3 * MIB
        assert swap.allocate(MIB // 2) == first
        swap.free(third)
        swap.trim()
        assert swap.size_bytes == os.fstat(swap.fd).st_size == 2 * MIB
        assert swap.statistics.used_bytes == MIB + MIB // 2
        assert read_back(swap, reader, second, MIB) == content(MIB, seed=1)
        with pytest.raises(StorageError, match="no extent begins"):
            swap.free(third)


def test_an_extent_is_free_when_nothing_writes_to_it_any_more(tmp_path: Path, held_writes: HeldWrites) -> None:
    with opened(tmp_path) as (swap, reader):
        start = swap.allocate(MIB)
        swap.submit([write(start, content(MIB))])
        held_writes.begun.acquire()
        freed = threading.Thread(target=swap.free, args=(start,))
        freed.start()
        freed.join(0.05)
        assert freed.is_alive()
        held_writes.let_go.set()
        freed.join(10)
        assert swap.allocate(MIB) == start
        swap.write(start, content(MIB, seed=1))
        assert read_back(swap, reader, start, MIB) == content(MIB, seed=1)


def test_the_limit_is_held_beforehand(tmp_path: Path) -> None:
    with opened(tmp_path, limit_bytes=2 * MIB) as (swap, _):
        kept = swap.allocate(MIB)
        message = r"1\.50 MiB \(1572864 B\) .* make it 2\.50 MiB .* swap_limit is 2\.00 MiB .* 1\.00 MiB are in use"
        with pytest.raises(StorageError, match=message):
            swap.allocate(MIB + MIB // 2)
        assert swap.size_bytes == os.fstat(swap.fd).st_size == MIB
        swap.allocate(MIB)
        with pytest.raises(StorageError, match="swap_limit"):
            swap.allocate(1)
        swap.free(kept)
        assert swap.allocate(MIB) == kept


def test_large_blocks_go_past_the_page_cache(tmp_path: Path) -> None:
    with opened(tmp_path) as (swap, _):
        start = swap.allocate(2 * CHUNK_BYTES)
        swap.write(start, content(2 * CHUNK_BYTES))
        if swap.statistics.direct_bytes == 0:
            pytest.skip("this file system has no direct writes")
        odd = memory(2 * CHUNK_BYTES + 64)[64:]  # as torch allocates
        swap.write(start, odd)
        assert swap.statistics.direct_bytes == 4 * CHUNK_BYTES
        assert swap.statistics.num_writes == 4
        # Neighbours are one request.
        before = swap.statistics
        swap.write_all([write(start + number * PAGE, content(PAGE)) for number in range(256)])
        assert swap.statistics.num_writes == before.num_writes + 1


def test_what_odd_addresses_are_gathered_in_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[memoryview] = []

    def noted(size_bytes: int, *, populate: bool) -> memoryview:
        taken.append(huge_page_memory(size_bytes, populate=populate))
        return taken[-1]

    real, written_from = os.pwritev, set()

    def pwritev(descriptor: int, views: list[memoryview], offset: int) -> int:
        written_from.update(id(view.obj) for view in views)
        return real(descriptor, views, offset)

    monkeypatch.setattr("mball.storage.write_queue.huge_page_memory", noted)
    monkeypatch.setattr(os, "pwritev", pwritev)
    source = content(8 * MIB)
    with opened(tmp_path, num_threads=2) as (swap, reader):
        start = swap.allocate(8 * MIB)
        swap.write_all([write(start + at, source[at : at + 100_032]) for at in range(0, 8 * MIB, 100_032)])
        assert read_back(swap, reader, start, 8 * MIB) == source
        assert written_from <= {id(view.obj) for view in taken}
        deadline_s = time.monotonic() + 10
        while any(any(view[::PAGE]) for view in taken) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert len(taken) == 2
        assert not any(any(view) for view in taken)


def num_writers() -> int:
    return sum(thread.name.startswith("mball-write") for thread in threading.enumerate())


def test_dropping_a_swap_file_ends_its_threads(tmp_path: Path) -> None:
    gc.collect()  # what tests before this one dropped
    threads, descriptors = num_writers(), len(os.listdir("/proc/self/fd"))
    swap = SwapFile.create(tmp_path)
    assert num_writers() == threads
    swap.write(swap.allocate(PAGE), content(PAGE))
    assert num_writers() == threads + QueueLimits().num_threads
    del swap
    assert num_writers() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_closing_fails_what_was_not_written_yet(tmp_path: Path, held_writes: HeldWrites) -> None:
    with opened(tmp_path, num_threads=1) as (swap, _):
        start = swap.allocate(2 * MIB)
        first, second = (swap.submit([write(start + at, content(MIB))]) for at in (0, MIB))
        held_writes.begun.acquire()
        threading.Timer(0.05, held_writes.let_go.set).start()
        swap.close()
        first.wait()
        with pytest.raises(StorageError, match=r"1048576 B\) at offset 1048576 B .*closed"):
            second.wait()
        with pytest.raises(StorageError, match="is closed"):
            swap.submit([write(start, content(PAGE))])


def test_ranges_outside_extents_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as (swap, reader):
        start = swap.allocate(MIB)
        with pytest.raises(StorageError, match="outside"):
            swap.submit([write(start, content(PAGE)), write(start + MIB - PAGE, content(2 * PAGE))])
        assert swap.statistics.num_writes == 0
        destination = memory(PAGE)
        with pytest.raises(StorageError, match="does not fit its destination"):
            reader.submit([Read(file=swap.name, offset_bytes=0, size_bytes=2 * PAGE, destination=destination)])
