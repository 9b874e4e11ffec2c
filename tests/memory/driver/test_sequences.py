"""Arenas that share a GPU's memory, in any order of calls, some of which fail: pages are conserved, no byte moves."""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mball.errors import DeviceError
from mball.memory.arena import Arena
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_virtual import CudaMemory
from mball.memory.page_pool import PagePool
from mball.units import KIB
from tests.memory.conftest import LOADED
from tests.memory.driver.standin import CODES, StandIn

GRANULE_BYTES = 4 * KIB
RESERVED_GRANULES = 24
MEMORY_GRANULES = 40
WINDOW_BYTES = 32


class Arenas(RuleBasedStateMachine):
    """Up to three arenas; `content` is what each must hold, at the start of each granule."""

    def __init__(self) -> None:
        super().__init__()
        assert LOADED
        self.standin: StandIn = LOADED
        self.arenas: list[Arena] = []
        self.content: list[dict[int, bytes]] = []
        self.source = random.Random(0)
        self.failed = False

    @initialize(extent=st.integers(1, 6), pool=st.sampled_from([0, 3, 10, MEMORY_GRANULES]))
    def open(self, extent: int, pool: int) -> None:
        self.standin.configure(granule_bytes=GRANULE_BYTES, memory_bytes=MEMORY_GRANULES * GRANULE_BYTES)
        self.standin.forget()
        driver = CudaDriver()
        self.pool = PagePool(driver, limit_bytes=pool * GRANULE_BYTES)
        self.pool_limit_bytes = pool * GRANULE_BYTES
        self.extent_bytes = extent * GRANULE_BYTES
        self.memory = CudaMemory(driver, pool=self.pool, extent_bytes=self.extent_bytes)

    @precondition(lambda self: len(self.arenas) < 3)
    @rule()
    def make(self) -> None:
        self.arenas.append(Arena(self.memory, RESERVED_GRANULES * GRANULE_BYTES))
        self.content.append({})

    @precondition(lambda self: self.arenas)
    @rule(which=st.integers(0, 2), granules=st.integers(0, RESERVED_GRANULES))
    def resize(self, which: int, granules: int) -> None:
        which %= len(self.arenas)
        arena, size = self.arenas[which], granules * GRANULE_BYTES
        before_bytes, address = arena.backed_bytes, arena.address
        others_bytes = self.memory.mapped_bytes - arena.taken_bytes
        told_bytes = arena.taken_bytes_at(size) if size <= before_bytes else None
        try:
            arena.resize(size)
        except DeviceError:
            assert size > before_bytes, "shrinking needs nothing"
            # Memory may be taken by a cut piece of another arena, and by pieces that are larger than what is missing.
            assert others_bytes + size > MEMORY_GRANULES * GRANULE_BYTES
            assert arena.backed_bytes == before_bytes
            return
        assert (arena.backed_bytes, arena.address) == (size, address)
        assert told_bytes is None or arena.taken_bytes == told_bytes
        kept = {number: data for number, data in self.content[which].items() if number < granules}
        self.content[which] = kept
        self.write(which)

    @precondition(lambda self: self.arenas)
    @rule(which=st.integers(0, 2), granules=st.integers(0, RESERVED_GRANULES), first=st.integers(1, 12),
          code=st.sampled_from(sorted(CODES.values())))  # fmt: skip
    def resize_with_a_failure(self, which: int, granules: int, first: int, code: int) -> None:
        which %= len(self.arenas)
        arena = self.arenas[which]
        before_bytes = arena.backed_bytes
        self.failed = True  # so the driver may not have taken what is over the pool's limit
        self.standin.forget()
        self.standin.fail(first, code=code)
        try:
            arena.resize(granules * GRANULE_BYTES)
        except DeviceError:
            assert arena.backed_bytes == before_bytes
        self.standin.forget()
        self.standin.pop_contexts()
        end = arena.backed_bytes // GRANULE_BYTES
        self.content[which] = {number: data for number, data in self.content[which].items() if number < end}
        self.write(which)

    @precondition(lambda self: self.arenas)
    @rule(which=st.integers(0, 2))
    def close(self, which: int) -> None:
        which %= len(self.arenas)
        self.arenas.pop(which).close()
        del self.content[which]

    @precondition(lambda self: hasattr(self, "memory"))
    @rule(keep=st.integers(0, 12))
    def trim_pool(self, keep: int) -> None:
        self.memory.trim_pool(keep * GRANULE_BYTES)
        assert self.memory.pooled_bytes <= keep * GRANULE_BYTES

    def write(self, which: int) -> None:
        arena = self.arenas[which]
        for number in range(arena.backed_bytes // GRANULE_BYTES):
            data = self.source.randbytes(WINDOW_BYTES)
            ctypes.memmove(arena.address + number * GRANULE_BYTES, data, WINDOW_BYTES)
            self.content[which][number] = data

    @invariant()
    def no_byte_moved(self) -> None:
        for arena, content in zip(self.arenas, self.content, strict=True):
            for number, data in content.items():
                assert ctypes.string_at(arena.address + number * GRANULE_BYTES, WINDOW_BYTES) == data

    @invariant()
    def bytes_are_conserved(self) -> None:
        if hasattr(self, "memory"):
            memory, standin = self.memory, self.standin
            assert memory.created_bytes == memory.mapped_bytes + memory.pooled_bytes
            assert memory.created_bytes == standin.handle_bytes == standin.taken_bytes
            assert memory.mapped_bytes == standin.mapped_bytes == sum(arena.taken_bytes for arena in self.arenas)
            assert memory.pooled_bytes <= self.pool_limit_bytes or self.failed

    @invariant()
    def arenas_lie_apart(self) -> None:
        spans = sorted((arena.address, arena.address + arena.reserved_bytes) for arena in self.arenas)
        assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans))

    @invariant()
    def less_than_an_extent_stays(self) -> None:
        assert all(0 <= arena.taken_bytes - arena.backed_bytes < self.extent_bytes for arena in self.arenas)

    def teardown(self) -> None:
        for arena in self.arenas:
            arena.close()
        if hasattr(self, "memory"):
            if self.memory.pooled_bytes:
                self.memory.trim_pool()
            self.memory.close()
            assert self.standin.is_empty()


def test_any_sequence_of_calls(standin: StandIn) -> None:
    run: Callable[[], None] = Arenas.TestCase().runTest
    run()


Arenas.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("seed", range(20))
def test_a_long_life(standin: StandIn, seed: int) -> None:
    """Sizes that go up and down for a long time leave nothing behind."""
    standin.configure(granule_bytes=GRANULE_BYTES)
    driver = CudaDriver()
    memory = CudaMemory(driver, pool=PagePool(driver, limit_bytes=16 * GRANULE_BYTES), extent_bytes=4 * GRANULE_BYTES)
    source = random.Random(seed)
    arena = Arena(memory, 64 * GRANULE_BYTES)
    most = 0
    for _ in range(200):
        arena.resize(source.randint(0, 64) * GRANULE_BYTES)
        most = max(most, memory.created_bytes)
    assert most <= (64 + 16 + 4) * GRANULE_BYTES
    arena.close()
    assert standin.is_empty()
    memory.close()
