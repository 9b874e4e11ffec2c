"""CUDA's memory beneath the seam: which pieces there are, how many calls it takes, the pool, forks and threads."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mball.errors import DeviceError
from mball.memory.arena import Arena
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_plain import PlainCudaMemory
from mball.memory.cuda_region import CudaRegion
from mball.memory.cuda_virtual import EXTENT_BYTES as DEFAULT_EXTENT_BYTES
from mball.memory.cuda_virtual import CudaMemory, open_cuda_memory, piece_sizes
from mball.memory.page_pool import PagePool
from mball.memory.virtual import Reservation
from mball.units import MIB
from tests.memory.driver.standin import CODES, EXTENT_BYTES, GRANULE_BYTES, MEMORY_BYTES, StandIn


def open_memory() -> CudaMemory:
    """Extents of four granules, and a pool that keeps all while anything is reserved."""
    driver = CudaDriver()
    return CudaMemory(driver, pool=PagePool(driver, limit_bytes=MEMORY_BYTES), extent_bytes=EXTENT_BYTES)


@pytest.fixture
def memory(standin: StandIn) -> Iterator[CudaMemory]:
    memory = open_memory()
    yield memory
    standin.forget()
    memory.close()


def grow(memory: CudaMemory, reservation: Reservation, first: int, end: int) -> None:
    memory.back(reservation, first * GRANULE_BYTES, end * GRANULE_BYTES)


def shrink(memory: CudaMemory, reservation: Reservation, first: int) -> None:
    memory.trim(reservation, first * GRANULE_BYTES, reservation.size_bytes)


class Turn:
    """Has another thread do `work` before the `position`th instruction that this one runs, and waits for it."""

    def __init__(self, position: int, work: Callable[[], object]) -> None:
        self.position, self.seen = position, 0
        self._work = work

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Turn:
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.seen += 1
            if self.seen == self.position:
                thread = threading.Thread(target=self._work)
                thread.start()
                thread.join()
        return self

    def __enter__(self) -> Turn:
        sys.settrace(self)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9))
def test_pieces_fill_a_range_with_as_few_as_their_multiples_allow(first: int, length: int, extent: int) -> None:
    sizes = piece_sizes(first * 3, (first + length) * 3, granule_bytes=3, extent_bytes=extent * 3)
    assert sum(sizes) == length * 3
    position, extents = first * 3, 0
    for size in sizes:
        assert size in (3, extent * 3)
        if size == extent * 3:
            assert position % size == 0
            extents += 1
        position += size
    assert extents == sum(1 for number in range(first, first + length - extent + 1) if number % extent == 0)


def test_a_body_of_extents_between_ragged_ends(memory: CudaMemory, standin: StandIn) -> None:
    reservation = memory.reserve(64 * GRANULE_BYTES)
    standin.forget()
    grow(memory, reservation, 0, 22)
    assert standin.calls("cuMemCreate") == standin.calls("cuMemMap") == 5 + 2
    assert standin.calls("cuMemSetAccess") == 1, "access is granted once for all that is new"
    grow(memory, reservation, 22, 41)
    assert standin.calls("cuMemCreate") == 7 + 2 + 4 + 1
    assert standin.calls("cuMemSetAccess") == 2
    standin.forget()
    shrink(memory, reservation, 3)
    assert standin.calls("cuMemUnmap") == 1, "mappings that lie side by side go in one call"
    memory.release(reservation)


def test_growing_again_takes_what_was_given_back(memory: CudaMemory, standin: StandIn) -> None:
    reservation = memory.reserve(64 * GRANULE_BYTES)
    grow(memory, reservation, 0, 33)
    shrink(memory, reservation, 16)
    assert memory.pooled_bytes == 17 * GRANULE_BYTES
    standin.forget()
    for _ in range(5):
        grow(memory, reservation, 16, 33)
        shrink(memory, reservation, 16)
    assert standin.calls("cuMemCreate") == standin.calls("cuMemRelease") == 0
    assert memory.created_bytes == memory.mapped_bytes + memory.pooled_bytes == 33 * GRANULE_BYTES
    memory.release(reservation)
    assert standin.is_empty()


def test_a_piece_that_the_new_end_cuts_stays_and_serves_the_next_growth(memory: CudaMemory, standin: StandIn) -> None:
    reservation = memory.reserve(64 * GRANULE_BYTES)
    grow(memory, reservation, 0, 16)
    assert [memory.piece_end(reservation, n * GRANULE_BYTES) // GRANULE_BYTES for n in (0, 1, 4, 5, 8, 13, 16)] == [
        0, 4, 4, 8, 8, 16, 16,
    ]  # fmt: skip
    assert [memory.piece_start(reservation, n * GRANULE_BYTES) // GRANULE_BYTES for n in (0, 1, 4, 5, 8, 13, 16)] == [
        0, 0, 4, 4, 8, 12, 16,
    ]  # fmt: skip
    shrink(memory, reservation, 6)
    assert memory.mapped_bytes == 8 * GRANULE_BYTES
    standin.forget()
    grow(memory, reservation, 6, 7)
    assert standin.calls("cuMemMap") == 0
    grow(memory, reservation, 7, 9)
    assert (standin.calls("cuMemMap"), memory.mapped_bytes) == (1, 9 * GRANULE_BYTES)
    shrink(memory, reservation, 0)
    assert memory.mapped_bytes == 0
    memory.release(reservation)


def test_growing_goes_on_where_shrinking_failed(memory: CudaMemory, standin: StandIn) -> None:
    arena = Arena(memory, 32 * GRANULE_BYTES)
    arena.resize(10 * GRANULE_BYTES)
    arena.tensor(0, torch.uint8, (10 * GRANULE_BYTES,)).fill_(7)
    standin.fail(1, code=CODES["NOT_SUPPORTED"], function="cuMemUnmap")
    with pytest.raises(DeviceError, match=r"take back 384.00 KiB \(393216 bytes\): cuMemUnmap.*NOT_SUPPORTED"):
        arena.resize(4 * GRANULE_BYTES)
    assert arena.backed_bytes == memory.mapped_bytes == 10 * GRANULE_BYTES
    arena.resize(19 * GRANULE_BYTES)
    assert arena.tensor(0, torch.uint8, (10 * GRANULE_BYTES,)).eq(7).all()
    arena.close()


def test_the_pool_can_be_told_to_give_back(memory: CudaMemory, standin: StandIn) -> None:
    reservation = memory.reserve(64 * GRANULE_BYTES)
    grow(memory, reservation, 0, 32)
    shrink(memory, reservation, 0)
    assert memory.pooled_bytes == standin.taken_bytes == 32 * GRANULE_BYTES
    assert memory.trim_pool(8 * GRANULE_BYTES) == 24 * GRANULE_BYTES
    assert memory.pooled_bytes == standin.taken_bytes == 8 * GRANULE_BYTES
    standin.fail(2, code=CODES["NOT_SUPPORTED"], function="cuMemRelease")
    with pytest.raises(DeviceError, match=r"give back 512.00 KiB \(524288 bytes\) that are pooled: cuMemRelease"):
        memory.trim_pool()
    assert memory.pooled_bytes == standin.taken_bytes == 4 * GRANULE_BYTES
    memory.release(reservation)
    assert standin.is_empty(), "what is pooled goes with the last reservation"


def test_pages_go_from_one_reservation_to_another(memory: CudaMemory, standin: StandIn) -> None:
    one, two = memory.reserve(MEMORY_BYTES), memory.reserve(MEMORY_BYTES)
    memory.back(one, 0, MEMORY_BYTES)
    with pytest.raises(DeviceError, match=r"cannot back 256.00 KiB \(262144 bytes\) with memory of GPU 0: .*OUT_OF_"):
        memory.back(two, 0, EXTENT_BYTES)
    memory.trim(one, MEMORY_BYTES - EXTENT_BYTES, MEMORY_BYTES)
    memory.back(two, 0, EXTENT_BYTES)
    memory.release(one)
    assert standin.taken_bytes == MEMORY_BYTES
    memory.release(two)


def test_memory_that_another_process_took_is_an_error_that_says_so(memory: CudaMemory, standin: StandIn) -> None:
    reservation = memory.reserve(MEMORY_BYTES)
    memory.back(reservation, 0, 8 * EXTENT_BYTES)
    standin.configure(memory_bytes=10 * EXTENT_BYTES)
    with pytest.raises(DeviceError, match=r"cannot back 1.00 MiB \(1048576 bytes\).*0 B \(0 bytes\).*nvidia-smi"):
        memory.back(reservation, 8 * EXTENT_BYTES, 12 * EXTENT_BYTES)
    assert memory.mapped_bytes == 8 * EXTENT_BYTES
    memory.back(reservation, 8 * EXTENT_BYTES, 10 * EXTENT_BYTES)
    memory.release(reservation)


@pytest.mark.parametrize("granule_bytes", [GRANULE_BYTES, 2 * MIB, 3 * GRANULE_BYTES, 64 * MIB])
def test_sizes_follow_from_the_granularity(standin: StandIn, granule_bytes: int) -> None:
    standin.configure(granule_bytes=granule_bytes, memory_bytes=1 << 40)
    memory = CudaMemory(CudaDriver())
    reservation = memory.reserve(granule_bytes)
    assert memory.page_bytes == granule_bytes
    assert reservation.size_bytes >= DEFAULT_EXTENT_BYTES
    for size in (granule_bytes, reservation.size_bytes):
        memory.back(reservation, memory.mapped_bytes, size)
        assert standin.mapped_bytes == memory.mapped_bytes == size
    memory.release(reservation)
    memory.close()


def test_an_arena_of_tensors(memory: CudaMemory) -> None:
    """The stand-in's memory is host memory, so here tensors can be made of it as on the host."""
    arena = Arena(memory, 32 * GRANULE_BYTES)
    arena.resize(9 * GRANULE_BYTES)
    kept = arena.tensor(8, torch.float32, (3, 5))
    kept.fill_(2.5)
    arena.resize(30 * GRANULE_BYTES)
    arena.poison(arena.backed_bytes - 64, 64)
    assert arena.tensor(arena.backed_bytes - 64, torch.bfloat16, (32,)).isnan().all()
    arena.resize(2 * GRANULE_BYTES)
    assert (arena.backed_bytes, arena.taken_bytes) == (2 * GRANULE_BYTES, 4 * GRANULE_BYTES)
    assert arena.taken_bytes_at(0) == 0
    with pytest.raises(DeviceError, match="only"):
        arena.view(3 * GRANULE_BYTES, 1)
    arena.close()
    assert kept.eq(2.5).all(), "what a tensor reads stays"
    del kept
    gc.collect()
    assert memory.created_bytes == 0


def test_a_gpus_bytes_are_not_for_the_host(memory: CudaMemory) -> None:
    arena = Arena(memory, 16 * GRANULE_BYTES, region=CudaRegion)
    arena.resize(5 * GRANULE_BYTES)
    with pytest.raises(DeviceError, match=r"arena is memory of cuda:0, which the host cannot read; use a tensor"):
        arena.view(0, 1)
    with pytest.raises(DeviceError, match="only"):
        arena.poison(4 * GRANULE_BYTES, 2 * GRANULE_BYTES)
    with pytest.raises(DeviceError, match="outside"):
        arena.tensor(arena.reserved_bytes, torch.bfloat16, (1,))
    arena.close()
    with pytest.raises(DeviceError, match="closed"):
        arena.tensor(0, torch.bfloat16, (1,))


def test_a_reservation_may_be_dropped_on_any_thread_and_within_a_call(standin: StandIn) -> None:
    """Its last tensor dies where it dies: on another thread beside a call, or by the collector within one."""
    inside, dropped = threading.Event(), threading.Event()

    class SlowDriver(CudaDriver):
        def allow(self, address: int, size_bytes: int) -> None:
            inside.set()
            assert dropped.wait(10)
            memory.release(own)
            assert standin.num_ranges == 3, "nothing goes within a call"
            super().allow(address, size_bytes)

    memory = CudaMemory(SlowDriver(), extent_bytes=EXTENT_BYTES)
    kept, other, own = (memory.reserve(8 * GRANULE_BYTES) for _ in range(3))

    def drop() -> None:
        assert inside.wait(10)
        memory.release(other)
        dropped.set()

    thread = threading.Thread(target=drop)
    thread.start()
    memory.back(kept, 0, 8 * GRANULE_BYTES)
    thread.join()
    assert standin.num_ranges == 1, "both went when the call was over"
    memory.release(kept)
    memory.close()


def test_two_threads_drop_a_reservation_at_any_instruction_of_each_other(memory: CudaMemory, standin: StandIn) -> None:
    for position in range(1, 1000):
        early, mine, theirs = (memory.reserve(8 * GRANULE_BYTES) for _ in range(3))
        with memory._lock:  # as a third one has it, whose call is under way
            memory.release(early)
            with Turn(position, partial(memory.release, theirs)) as turn:
                memory.release(mine)
        memory.trim_pool()  # any call releases what was dropped
        assert standin.num_ranges == (1 if turn.seen < position else 0)
        if turn.seen < position:
            break
    assert 10 < position < 999
    memory.release(theirs)
    assert standin.is_empty()


def test_pooled_bytes_can_be_read_at_any_instruction_of_a_call(standin: StandIn) -> None:
    """Of a call that pools pages of a size that the pool never had."""
    for position in range(1, 1000):
        memory = open_memory()
        reservation, other = memory.reserve(8 * GRANULE_BYTES), memory.reserve(8 * GRANULE_BYTES)
        grow(memory, reservation, 0, 4)  # an extent
        grow(memory, other, 0, 1)
        shrink(memory, other, 0)
        with Turn(position, partial(shrink, memory, reservation, 0)) as turn:
            pooled_bytes = memory.pooled_bytes
        assert pooled_bytes in (GRANULE_BYTES, 5 * GRANULE_BYTES)
        memory.release(reservation)
        memory.release(other)
        memory.close()
        if turn.seen < position:
            break
    assert 10 < position < 999


def test_mapped_bytes_can_be_read_at_any_instruction_of_a_call(memory: CudaMemory) -> None:
    reservation = memory.reserve(8 * GRANULE_BYTES)
    for position in range(1, 1000):
        grow(memory, reservation, 0, 4)
        with Turn(position, partial(shrink, memory, reservation, 0)) as turn:
            mapped_bytes = memory.mapped_bytes
        assert mapped_bytes in (0, 4 * GRANULE_BYTES)
        if turn.seen < position:
            break
    assert 10 < position < 999
    memory.release(reservation)


def test_releasing_fails_and_can_be_done_again(memory: CudaMemory, standin: StandIn) -> None:
    reservation = memory.reserve(16 * GRANULE_BYTES)
    grow(memory, reservation, 0, 9)
    for function in ("cuCtxPushCurrent", "cuMemUnmap", "cuMemRelease", "cuMemAddressFree"):
        standin.fail(1, code=CODES["NOT_SUPPORTED"], function=function)
        with pytest.raises(DeviceError, match=rf"cannot release 1.00 MiB \(1048576 bytes\).*{function}.*NOT_SUPPORTED"):
            memory.release(reservation)
    memory.release(reservation)
    assert standin.is_empty()


def test_a_release_that_failed_does_not_hold_up_the_next(memory: CudaMemory, standin: StandIn) -> None:
    one, two = memory.reserve(16 * GRANULE_BYTES), memory.reserve(16 * GRANULE_BYTES)
    standin.fail(1, code=CODES["NOT_SUPPORTED"], function="cuMemAddressFree")
    with pytest.raises(DeviceError, match="cannot release"):
        memory.release(one)
    memory.release(two)
    assert standin.num_ranges == 1
    memory.release(one)


def test_somebody_elses_failing_release_is_no_failure_of_a_call(
    memory: CudaMemory, standin: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    kept, gone = memory.reserve(16 * GRANULE_BYTES), memory.reserve(16 * GRANULE_BYTES)
    memory._dropped.append(gone)
    standin.fail(1, code=CODES["NOT_SUPPORTED"], function="cuMemAddressFree")
    with caplog.at_level(logging.WARNING):
        grow(memory, kept, 0, 3)
    assert "still taken: cannot release 1.00 MiB" in caplog.text
    assert memory.mapped_bytes == 3 * GRANULE_BYTES
    memory.release(gone)
    memory.release(kept)


def test_a_forked_child_is_refused_and_takes_nothing_from_its_parent(memory: CudaMemory, standin: StandIn) -> None:
    arena = Arena(memory, 16 * GRANULE_BYTES)
    arena.resize(5 * GRANULE_BYTES)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for num_granules in (9, 2):
            try:
                arena.resize(num_granules * GRANULE_BYTES)
            except DeviceError as error:
                said.append(str(error))
        arena.close()
        gc.collect()
        try:
            memory.release(arena._reservation)
        except DeviceError as error:
            said.append(str(error))
        said.append(f"{standin.mapped_bytes} mapped")
        os.write(writer, "\n".join(said).encode())
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 4096).decode().splitlines()
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0
    assert said[:2] == [said[0]] * 2
    assert "CUDA does not survive a fork" in said[0]
    assert said[2] == f"{5 * GRANULE_BYTES} mapped"
    arena.resize(9 * GRANULE_BYTES)
    arena.close()


def test_a_child_that_was_forked_beside_a_call_is_refused_and_waits_for_nobody(memory: CudaMemory) -> None:
    reservation = memory.reserve(16 * GRANULE_BYTES)
    reader, writer = os.pipe()
    with memory._lock:  # as another thread has it, which the child does not have
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            with contextlib.suppress(DeviceError):
                grow(memory, reservation, 0, 1)
                os._exit(1)
            memory.release(reservation)
            os.write(writer, b"refused")
            os._exit(0)
    os.close(writer)
    assert os.read(reader, 100) == b"refused"
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0
    memory.release(reservation)


def test_without_virtual_memory_there_is_one_allocation_and_one_line_about_it(
    standin: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    standin.configure(virtual_memory=False)
    with caplog.at_level(logging.INFO):
        memory = open_cuda_memory()
        assert isinstance(memory, PlainCudaMemory)
        arena = Arena(memory, 20 * MIB)
        for size in (4 * MIB, 20 * MIB, 0, 6 * MIB):
            arena.resize(size)
            assert (arena.backed_bytes, arena.taken_bytes, standin.taken_bytes) == (size, 20 * MIB, 20 * MIB)
        assert arena.taken_bytes_at(0) == 20 * MIB
    assert len(caplog.records) == 1
    assert "GPU 0 has no virtual memory" in caplog.text
    assert standin.calls("cuMemAlloc") == 1
    ctypes.memset(arena.address, 7, 6 * MIB)
    standin.fail(1, code=CODES["NOT_SUPPORTED"], function="cuMemFree")
    reservation = arena._reservation
    with pytest.raises(DeviceError, match=r"cannot free 20.00 MiB \(20971520 bytes\).*NOT_SUPPORTED"):
        memory.release(reservation)
    arena.close()
    assert standin.is_empty()
    memory.close()


def test_with_virtual_memory_it_is_used(standin: StandIn) -> None:
    memory = open_cuda_memory()
    assert isinstance(memory, CudaMemory)
    memory.close()
