"""Sums that writing threads make, of blocks that are queued, overwritten or torn; and what breaks if one forgets."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mball.config import SwapCheck
from mball.errors import StorageError
from mball.storage import Read, SwapFile, writes
from mball.storage.extents import BLOCK_BYTES, BlockState, SwapExtent
from mball.storage.pending import PendingChunks
from mball.storage.swap_content import SwapContent
from mball.storage.writes import CHUNK_BYTES, WriteChunk
from mball.units import MIB
from tests.storage.reads import memory
from tests.storage.swaps import HeldWrites, content, flip, opened, read_back, write

PAGE = 4096
REFUSED = "cannot be read: writing them failed"
DAMAGED = "are not what was written there"


def eio(*_: Any) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_who_hands_over_sums_no_block_that_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, summed = writes.checksum, set()

    def noted(part: memoryview) -> int:
        summed.add(threading.current_thread())
        return real(part)

    for module in ("writes", "swap_content"):
        monkeypatch.setattr(f"mball.storage.{module}.checksum", noted)
    with opened(tmp_path) as (swap, reader):
        swap.allocate(3 * PAGE)
        start = swap.allocate(5 * MIB)
        swap.write(start, content(5 * MIB))
        assert summed
        assert threading.current_thread() not in summed
        assert read_back(swap, reader, start, 5 * MIB) == content(5 * MIB)
        assert swap.statistics.checked_bytes == 5 * MIB


def test_what_is_read_beside_queued_blocks_is_checked(tmp_path: Path, held_writes: HeldWrites) -> None:
    with opened(tmp_path, SwapCheck.ALWAYS) as (swap, reader):
        start = swap.allocate(4 * BLOCK_BYTES)
        held_writes.let_go.set()
        swap.write(start, content(4 * BLOCK_BYTES))
        held_writes.let_go.clear()
        handle = swap.submit([write(start + BLOCK_BYTES, content(BLOCK_BYTES, seed=1))])
        for at in (0, 3 * BLOCK_BYTES - 1):
            flip(swap, start + at)
            with pytest.raises(StorageError, match=DAMAGED):
                read_back(swap, reader, start, 4 * BLOCK_BYTES)
            flip(swap, start + at)
        flip(swap, start + BLOCK_BYTES)  # what is there is about to be written over
        expected = content(4 * BLOCK_BYTES)
        expected[BLOCK_BYTES : 2 * BLOCK_BYTES] = content(BLOCK_BYTES, seed=1)
        assert read_back(swap, reader, start, 4 * BLOCK_BYTES) == expected
        held_writes.let_go.set()
        handle.wait()
        assert read_back(swap, reader, start, 4 * BLOCK_BYTES) == expected
        flip(swap, start + BLOCK_BYTES)
        with pytest.raises(StorageError, match=DAMAGED):
            read_back(swap, reader, start + BLOCK_BYTES, BLOCK_BYTES)


def read_and_overtake(directory: Path, held_writes: HeldWrites, *, is_torn: bool) -> None:
    """Reads a block that is written meanwhile, as far as the middle of it if `is_torn`."""
    with opened(directory) as (swap, reader):
        start = swap.allocate(BLOCK_BYTES)
        held_writes.let_go.set()
        swap.write(start, content(BLOCK_BYTES))
        held_writes.let_go.clear()
        if is_torn:
            flip(swap, start)
        destination = memory(BLOCK_BYTES)
        handle = reader.submit(
            [Read(file=swap.name, offset_bytes=start, size_bytes=BLOCK_BYTES, destination=destination)]
        )
        while not handle.done():
            time.sleep(0.001)
        writing = swap.submit([write(start, content(BLOCK_BYTES, seed=1))])
        try:
            handle.wait()
        finally:
            held_writes.let_go.set()
        writing.wait()
        assert read_back(swap, reader, start, BLOCK_BYTES) == content(BLOCK_BYTES, seed=1)


@pytest.mark.parametrize("is_torn", [False, True])
def test_a_read_that_a_queued_write_overtakes_is_no_damage(
    is_torn: bool, tmp_path: Path, held_writes: HeldWrites
) -> None:
    """The sum of what is written is not known yet when the read is looked at."""
    read_and_overtake(tmp_path, held_writes, is_torn=is_torn)


def test_a_queued_block_is_overwritten_once_it_is_written(tmp_path: Path, held_writes: HeldWrites) -> None:
    with opened(tmp_path) as (swap, reader):
        start = swap.allocate(2 * BLOCK_BYTES)
        swap.submit([write(start, content(2 * BLOCK_BYTES))])
        handles: list[PendingChunks] = []
        parts = [(0, BLOCK_BYTES), (BLOCK_BYTES + PAGE, PAGE)]
        over = threading.Thread(
            target=lambda: handles.append(
                swap.submit([write(start + first, content(size, seed=1)) for first, size in parts])
            )
        )
        over.start()
        over.join(0.05)
        assert over.is_alive()
        assert read_back(swap, reader, start, 2 * BLOCK_BYTES) == content(2 * BLOCK_BYTES)
        held_writes.let_go.set()
        over.join(10)
        handles[0].wait()
        expected = content(2 * BLOCK_BYTES)
        for first, size in parts:
            expected[first : first + size] = content(size, seed=1)
        assert read_back(swap, reader, start, 2 * BLOCK_BYTES) == expected
        assert swap.statistics.checked_bytes == 2 * BLOCK_BYTES


def test_a_chunk_that_fails_half_way_is_refused_until_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev

    def half(descriptor: int, views: list[memoryview], offset: int) -> int:
        return real(descriptor, [views[0][:MIB]], offset) if len(views[0]) > MIB else eio()

    with opened(tmp_path) as (swap, reader):
        start = swap.allocate(2 * CHUNK_BYTES)
        swap.write(start, content(2 * CHUNK_BYTES))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", half)
            with pytest.raises(StorageError, match=f"at offset {start} B .*Input/output"):
                swap.write(start, content(CHUNK_BYTES, seed=1))
        for first in range(0, CHUNK_BYTES, BLOCK_BYTES):
            with pytest.raises(StorageError, match=REFUSED):
                read_back(swap, reader, start + first, BLOCK_BYTES)
            with pytest.raises(StorageError, match=REFUSED):
                swap.verify(start + first, PAGE)
        assert read_back(swap, reader, start + CHUNK_BYTES, CHUNK_BYTES) == content(2 * CHUNK_BYTES)[CHUNK_BYTES:]
        swap.write(start, content(CHUNK_BYTES, seed=2))
        assert read_back(swap, reader, start, CHUNK_BYTES) == content(CHUNK_BYTES, seed=2)


@pytest.mark.parametrize("check", list(SwapCheck))
def test_what_a_failed_write_left_is_refused_in_every_mode(
    check: SwapCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody wants sums: that it failed is known without one."""
    with opened(tmp_path, check) as (swap, reader):
        start = swap.allocate(3 * BLOCK_BYTES)
        expected = content(3 * BLOCK_BYTES)
        swap.write(start, expected)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", eio)
            with pytest.raises(StorageError, match="Input/output"):
                swap.write(start + BLOCK_BYTES + PAGE, content(2 * PAGE, seed=1))
        for act in (
            lambda: read_back(swap, reader, start, 3 * BLOCK_BYTES),
            lambda: read_back(swap, reader, start + BLOCK_BYTES, PAGE),
            lambda: swap.verify(start + BLOCK_BYTES, PAGE),
        ):
            with pytest.raises(StorageError, match=REFUSED):
                act()
        assert read_back(swap, reader, start, BLOCK_BYTES) == expected[:BLOCK_BYTES]
        swap.write(start + BLOCK_BYTES + 2 * PAGE, content(PAGE, seed=2))
        with pytest.raises(StorageError, match=REFUSED):
            read_back(swap, reader, start + BLOCK_BYTES, PAGE)
        first = BLOCK_BYTES + PAGE
        swap.write(start + first, content(2 * PAGE, seed=3))
        expected[first : first + 2 * PAGE] = content(2 * PAGE, seed=3)
        assert read_back(swap, reader, start, 3 * BLOCK_BYTES) == expected
        swap.verify(start, 3 * BLOCK_BYTES)


@pytest.mark.parametrize("at_one_time", [True, False])
def test_parts_of_a_block_that_failed_can_be_written_again(
    at_one_time: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As homes do of which some pages were written: what lies between was right all the time."""
    with opened(tmp_path) as (swap, reader):
        start = swap.allocate(BLOCK_BYTES)
        expected = content(BLOCK_BYTES)
        swap.write(start, expected)
        pages = [write(start + number * PAGE, content(PAGE, seed=number)) for number in (1, 4, 9)]
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", eio)
            with pytest.raises(StorageError, match="Input/output"):
                swap.write_all(pages)
        for some in [pages] if at_one_time else [[page] for page in pages]:
            with pytest.raises(StorageError, match=REFUSED):
                read_back(swap, reader, start, PAGE)
            swap.write_all(some)
        for page in pages:
            expected[page.offset_bytes - start :][:PAGE] = page.source
        assert read_back(swap, reader, start, BLOCK_BYTES) == expected


def test_a_read_that_began_when_a_block_was_refused_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it brought may be of the failed write, though the block was written again meanwhile."""
    with opened(tmp_path) as (swap, reader):
        start = swap.allocate(BLOCK_BYTES)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", eio)
            with pytest.raises(StorageError, match="Input/output"):
                swap.write(start, content(BLOCK_BYTES))
        destination = memory(BLOCK_BYTES)
        handle = reader.submit(
            [Read(file=swap.name, offset_bytes=start, size_bytes=BLOCK_BYTES, destination=destination)]
        )
        while not handle.done():
            time.sleep(0.001)
        swap.write(start, content(BLOCK_BYTES, seed=1))
        with pytest.raises(StorageError, match=REFUSED):
            handle.wait()
        assert read_back(swap, reader, start, BLOCK_BYTES) == content(BLOCK_BYTES, seed=1)


def test_who_reads_a_mapping_waits_for_what_is_queued(tmp_path: Path, held_writes: HeldWrites) -> None:
    with opened(tmp_path) as (swap, _):
        start = swap.allocate(BLOCK_BYTES)
        swap.submit([write(start, content(BLOCK_BYTES))])
        verified = threading.Thread(target=swap.verify, args=(start, PAGE))
        verified.start()
        verified.join(0.05)
        assert verified.is_alive()
        held_writes.let_go.set()
        verified.join(10)
        assert os.pread(swap.fd, BLOCK_BYTES, start) == content(BLOCK_BYTES)


def test_what_was_right_once_is_verified_again_only_if_asked(tmp_path: Path) -> None:
    for check in SwapCheck:
        with opened(tmp_path, check) as (swap, _):
            start = swap.allocate(2 * BLOCK_BYTES)
            swap.write(start, content(2 * BLOCK_BYTES))
            swap.verify(start, PAGE, again=False)
            found = []
            for at, again in ((0, False), (0, True), (BLOCK_BYTES, False)):
                flip(swap, start + at)
                try:
                    swap.verify(start + at, PAGE, again=again)
                    found.append(False)
                except StorageError:
                    found.append(True)
                flip(swap, start + at)
            assert (
                found
                == {
                    SwapCheck.FIRST: [False, True, True],
                    SwapCheck.ALWAYS: [True, True, True],
                    SwapCheck.OFF: [False, False, False],
                }[check]
            )


def test_nothing_is_written_where_one_of_the_writes_is_outside(tmp_path: Path) -> None:
    with opened(tmp_path) as (swap, _):
        start = swap.allocate(64 * MIB)
        source = content(64 * MIB)
        with pytest.raises(StorageError, match="outside"):
            swap.write_all([write(start, source), write(start + 64 * MIB, source[:PAGE])])
        assert swap.statistics.num_writes == 0


def test_neighbours_in_two_extents_have_sums_of_their_own(tmp_path: Path) -> None:
    with opened(tmp_path) as (swap, reader):
        first, second = swap.allocate(3 * PAGE), swap.allocate(3 * PAGE)
        swap.write_all([write(start, content(3 * PAGE, seed=start)) for start in (first, second)])
        swap.free(second)
        flip(swap, second)
        assert read_back(swap, reader, first, 3 * PAGE) == content(3 * PAGE, seed=first)


# -- by chance, and what breaks if one forgets -------------------------------------------------------------------


def campaign(seed: int, num_steps: int, directory: Path, patch: pytest.MonkeyPatch) -> dict[str, int]:
    """Writes are handed over and not waited for; they fail or stop short. Reads are right or refused, all the time."""
    chance, real = random.Random(seed), os.pwritev
    seen = dict.fromkeys(("read", "beside", "refused", "failed", "found"), 0)
    luck = threading.Lock()
    size = 5 * BLOCK_BYTES

    def unreliable(descriptor: int, views: list[memoryview], offset: int) -> int:
        with luck:
            draw = chance.random()
        time.sleep(draw / 2000)
        if draw < 0.1:
            eio()
        return real(descriptor, views if draw > 0.3 else [views[0][: max(1, len(views[0]) // 3)]], offset)

    patch.setattr(os, "pwritev", unreliable)
    with opened(directory, SwapCheck.ALWAYS, num_threads=2) as (swap, reader):
        swap.allocate(3 * PAGE)
        start = swap.allocate(size)
        expected = content(size, seed=seed)
        under_way: list[tuple[PendingChunks, int, int]] = []

        def settle() -> None:
            for handle, first, length in under_way:
                try:
                    handle.wait()
                except StorageError:
                    seen["failed"] += 1
                    persist(first, length)
            under_way.clear()

        def persist(first: int, length: int) -> None:
            while True:
                try:
                    return swap.write(start + first, expected[first : first + length])
                except StorageError as error:
                    if "failed (" not in str(error):
                        raise

        @contextlib.contextmanager
        def refusals() -> Iterator[None]:
            try:
                yield
            except StorageError as error:
                if REFUSED not in str(error) or not any(handle.failure for handle, _, _ in under_way):
                    raise
                seen["refused"] += 1

        persist(0, size)
        for step in range(num_steps):
            with luck:
                act = chance.choice(["write", "write", "write", "read", "read", "read", "flip", "settle"])
                unit = chance.choice([1, PAGE, BLOCK_BYTES])
                first = chance.randrange(size // unit) * unit
                length = min(chance.randint(1, 20) * unit, size - first)
            if act == "write":
                source = content(length, seed=step)
                expected[first : first + length] = source
                destination = memory(size)
                reading = reader.submit(
                    [Read(file=swap.name, offset_bytes=start, size_bytes=size, destination=destination)]
                )
                under_way.append((swap.submit([write(start + first, source)]), first, length))
                with refusals():
                    reading.wait()  # of old bytes and new ones
            elif act == "settle":
                settle()
            elif act == "flip":
                settle()
                flip(swap, start + first)
                with pytest.raises(StorageError, match=DAMAGED):
                    read_back(swap, reader, start + first, length)
                flip(swap, start + first)
                seen["found"] += 1
            else:
                with refusals():
                    got = read_back(swap, reader, start + first, length)
                    assert got == expected[first : first + length]
                    seen["read"] += 1
                    seen["beside"] += any(not handle.done() for handle, _, _ in under_way)
        settle()
        assert read_back(swap, reader, start, size) == expected
    return seen


@pytest.mark.parametrize("seed", range(3))
def test_by_chance(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert min(campaign(seed, 400, tmp_path, monkeypatch).values()) > 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(100, 110))
def test_by_chance_for_long(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert min(campaign(seed, 10_000, tmp_path, monkeypatch).values()) > 100


def sum_nothing(patch: pytest.MonkeyPatch) -> None:
    """A block that was written stays one that waits, so it is never looked at."""
    patch.setattr(SwapExtent, "written", lambda self, blocks, sums: self.mark(blocks, BlockState.UNKNOWN))


def forget_failures(patch: pytest.MonkeyPatch) -> None:
    """A block whose write failed stays one that waits."""
    patch.setattr(SwapExtent, "fail", lambda self, first, end: None)


def sum_a_block_too_many(patch: pytest.MonkeyPatch) -> None:
    """A block that is written in part has the sum of that part."""
    patch.setattr(SwapExtent, "filled", SwapExtent.blocks)


def overtake(patch: pytest.MonkeyPatch) -> None:
    """What is written does not wait for what was queued to the same place."""
    patch.setattr(SwapFile, "_settle", lambda self, chunks: None)


def look_at_the_disk_alone(patch: pytest.MonkeyPatch) -> None:
    """Reads do not look at what is queued."""
    patch.setattr(SwapContent, "_from_queue", lambda self, first, end, destination: iter(()))


def copy_from_the_wrong_place(patch: pytest.MonkeyPatch) -> None:
    """Of a chunk the beginning is copied, wherever the read begins."""
    copy = WriteChunk.copy

    def shifted(self: WriteChunk, first: int, end: int, destination: memoryview) -> None:
        copy(self, self.offset, min(self.offset + end - first, self.end), destination)

    patch.setattr(WriteChunk, "copy", shifted)


def sum_the_first_alone(patch: pytest.MonkeyPatch) -> None:
    """All sums of a chunk are that of its beginning."""

    def wrong(extent: SwapExtent, placed: list[tuple[int, memoryview]]) -> list[int]:
        first, view = placed[0]
        return [writes.checksum(view[:BLOCK_BYTES])] * len(extent.filled(first, first + len(view)))

    patch.setattr(writes, "_sums", wrong)


@pytest.mark.parametrize(
    "mutant",
    [
        sum_nothing,
        forget_failures,
        sum_a_block_too_many,
        overtake,
        look_at_the_disk_alone,
        copy_from_the_wrong_place,
        sum_the_first_alone,
    ],
    ids=lambda mutant: mutant.__name__,
)
def test_a_mutant_is_noticed(
    mutant: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def campaigns() -> None:
        for seed in range(5):
            with monkeypatch.context() as patch:
                campaign(seed, 400, tmp_path, patch)

    mutant(monkeypatch)
    with pytest.raises((AssertionError, StorageError, pytest.fail.Exception)):
        campaigns()


def test_sums_that_are_known_too_early_are_noticed(
    tmp_path: Path, held_writes: HeldWrites, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that wait count as written, with the sums of before."""
    mark = SwapExtent.mark

    def early(self: SwapExtent, blocks: range, state: BlockState) -> None:
        mark(self, blocks, BlockState.WRITTEN if state == BlockState.QUEUED else state)

    monkeypatch.setattr(SwapExtent, "mark", early)
    with pytest.raises(StorageError, match=DAMAGED):
        read_and_overtake(tmp_path, held_writes, is_torn=True)
