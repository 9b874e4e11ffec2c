"""Many threads of Python on one allocator, through ctypes, which lets the GIL go: each finds what it wrote."""

from __future__ import annotations

import random
import threading

import pytest

from mball.errors import DeviceError
from mball.memory.allocator.segment_allocator import SegmentAllocator
from mball.memory.cuda_driver import CudaDriver
from mball.memory.page_pool import PagePool
from tests.memory.driver.segment_scenes import (
    EXTENT_BYTES,
    GRANULE_BYTES,
    LIMIT_BYTES,
    MEMORY_BYTES,
    Extents,
    fill,
    holds,
    library,
)
from tests.memory.driver.standin import Order, StandIn

NUM_THREADS = 6
NUM_TURNS = 150


class Lives:
    """Threads that allocate and free, and an engine's that lends, takes back and offers meanwhile."""

    def __init__(self, allocator: SegmentAllocator) -> None:
        self.allocator = allocator
        self.errors: list[BaseException] = []
        self.num_made = 0
        self.is_over = threading.Event()

    def life(self, number: int) -> None:
        source = random.Random(number)
        own: dict[int, tuple[int, int]] = {}
        try:
            for turn in range(NUM_TURNS):
                if own and source.random() < 0.5:
                    self.end(own, source.choice(list(own)))
                    continue
                size_bytes = source.randint(1, 7) * GRANULE_BYTES
                try:
                    address = self.allocator.allocate(size_bytes)
                except DeviceError:
                    continue
                self.num_made += 1
                own[address] = size_bytes, number * NUM_TURNS + turn
                fill(address, *own[address])
            for address in list(own):
                self.end(own, address)
        except BaseException as error:
            self.errors.append(error)

    def end(self, own: dict[int, tuple[int, int]], address: int) -> None:
        assert holds(address, *own.pop(address))
        self.allocator.free(address)

    def engine(self, driver: CudaDriver, pool: PagePool, extents: Extents) -> None:
        source = random.Random(0)
        donors: dict[int, int] = {}
        lent_bytes = 0
        try:
            while not self.is_over.is_set():
                seen = self.allocator.generation
                for number in [number for number in donors if source.random() < 0.3]:
                    address = donors.pop(number)
                    if self.allocator.withdraw(number):
                        assert holds(address, EXTENT_BYTES, address)
                    else:
                        extents.drop(address)
                for address, page in extents.pages.items():
                    if address not in donors.values():
                        fill(address, EXTENT_BYTES, address)
                        donors[self.allocator.offer(address, page)] = address
                with driver.current():
                    # No more is taken back than was lent, so that the limit never sinks below what it was at first.
                    lent_bytes += self.allocator.lend_from(pool, source.randint(0, 4) * GRANULE_BYTES)
                    lent_bytes -= self.allocator.return_to(pool, min(lent_bytes, source.randint(0, 4) * GRANULE_BYTES))
                now = self.allocator.statistics()
                assert now.held_bytes <= now.limit_bytes >= LIMIT_BYTES
                assert self.allocator.generation >= seen
                self.allocator.segments()
                self.allocator.trim(GRANULE_BYTES)
            for number, address in donors.items():
                if not self.allocator.withdraw(number):
                    extents.drop(address)
        except BaseException as error:
            self.errors.append(error)


@pytest.mark.parametrize("seed", range(3))
def test_everybody_finds_what_they_wrote(standin: StandIn, seed: int) -> None:
    standin.configure(granule_bytes=GRANULE_BYTES, memory_bytes=4 * MEMORY_BYTES)
    standin.run_in(Order.RANDOM, seed)
    driver = CudaDriver()
    extents = Extents(driver, 3)
    with driver.current():
        pool = PagePool(driver, limit_bytes=MEMORY_BYTES)
        pool.give(pool.take([GRANULE_BYTES] * 8))
    allocator = SegmentAllocator(library(), limit_bytes=LIMIT_BYTES, extent_bytes=EXTENT_BYTES)
    lives = Lives(allocator)
    threads = [threading.Thread(target=lives.life, args=[seed * NUM_THREADS + n]) for n in range(NUM_THREADS)]
    engine = threading.Thread(target=lives.engine, args=[driver, pool, extents])
    for thread in (*threads, engine):
        thread.start()
    for thread in threads:
        thread.join()
    lives.is_over.set()
    engine.join()
    assert not lives.errors
    assert lives.num_made > NUM_THREADS  # how many there is room for depends on who is quick
    assert allocator.statistics().in_use_bytes == 0
    allocator.close()
    with driver.current():
        pool.trim()
    extents.close()
    driver.close()
    assert standin.is_empty()
