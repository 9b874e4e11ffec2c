"""Physical pages that are kept: who gets which, when the driver is asked, and what goes back to it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_errors import DriverError
from mball.memory.page_pool import Page, PagePool
from tests.memory.driver.standin import CODES, GRANULE_BYTES, MEMORY_BYTES, StandIn

LARGE_BYTES = 4 * GRANULE_BYTES


@pytest.fixture
def pool(standin: StandIn) -> Iterator[PagePool]:
    """A pool that keeps all, in its driver's context. What was lent has to be back at the end."""
    driver = CudaDriver()
    with driver.current():
        pool = PagePool(driver, limit_bytes=MEMORY_BYTES)
        yield pool
        standin.forget()
        pool.trim()
        assert pool.created_bytes == 0
    driver.close()


def test_what_was_given_is_taken_again_without_a_call(pool: PagePool, standin: StandIn) -> None:
    handles = pool.take([GRANULE_BYTES, LARGE_BYTES, GRANULE_BYTES])
    assert len(set(handles)) == 3
    assert (pool.created_bytes, pool.pooled_bytes) == (LARGE_BYTES + 2 * GRANULE_BYTES, 0)
    pool.give(handles)
    assert pool.pooled_bytes == pool.created_bytes == LARGE_BYTES + 2 * GRANULE_BYTES
    standin.forget()
    again = pool.take([LARGE_BYTES, GRANULE_BYTES, GRANULE_BYTES])
    assert standin.calls() == 0
    assert (again[0], set(again[1:])) == (handles[1], {handles[0], handles[2]})
    pool.give(again)


def test_sizes_are_not_confused(pool: PagePool, standin: StandIn) -> None:
    pool.give(pool.take([LARGE_BYTES]))
    handles = pool.take([GRANULE_BYTES])
    assert standin.handle_bytes == pool.created_bytes == LARGE_BYTES + GRANULE_BYTES
    pool.give(handles)


def test_what_is_over_the_limit_goes_to_the_driver(standin: StandIn) -> None:
    driver = CudaDriver()
    with driver.current():
        pool = PagePool(driver, limit_bytes=3 * GRANULE_BYTES)
        handles = pool.take([GRANULE_BYTES] * 5)
        for handle in handles:
            pool.give([handle])
            assert pool.pooled_bytes <= 3 * GRANULE_BYTES
        assert standin.handle_bytes == pool.created_bytes == 3 * GRANULE_BYTES
        assert pool.trim() == 3 * GRANULE_BYTES
    driver.close()


@pytest.mark.parametrize(("keep", "left"), [(0, 0), (1, 1), (3, 3), (4, 3), (7, 7), (8, 7), (11, 11), (99, 11)])
def test_trimming_leaves_at_most_what_is_to_be_kept(pool: PagePool, standin: StandIn, keep: int, left: int) -> None:
    pool.give(pool.take([GRANULE_BYTES] * 3 + [LARGE_BYTES] * 2))
    assert pool.pooled_bytes == 11 * GRANULE_BYTES
    assert pool.trim(keep * GRANULE_BYTES) == (11 - left) * GRANULE_BYTES
    assert pool.pooled_bytes == standin.handle_bytes == left * GRANULE_BYTES
    assert pool.trim(keep * GRANULE_BYTES) == 0


@pytest.mark.parametrize("position", [1, 2, 3, 4])
def test_taking_some_is_taking_all_or_none(pool: PagePool, standin: StandIn, position: int) -> None:
    pool.give(pool.take([GRANULE_BYTES]))
    standin.forget()
    standin.fail(position, code=CODES["NOT_SUPPORTED"], function="cuMemCreate")
    with pytest.raises(DriverError, match=r"cuMemCreate for 256.00 KiB \(262144 bytes\).*NOT_SUPPORTED"):
        pool.take([GRANULE_BYTES] + [LARGE_BYTES] * 4)
    assert pool.pooled_bytes == pool.created_bytes == standin.handle_bytes
    pool.give(pool.take([GRANULE_BYTES] + [LARGE_BYTES] * 4))


def test_pooled_pages_of_another_size_go_when_memory_runs_out(pool: PagePool, standin: StandIn) -> None:
    pool.give(pool.take([GRANULE_BYTES] * (MEMORY_BYTES // GRANULE_BYTES)))
    (large,) = pool.take([LARGE_BYTES])
    assert standin.handle_bytes == pool.created_bytes == LARGE_BYTES
    pool.give([large])


def test_without_pooled_pages_running_out_is_an_error(pool: PagePool) -> None:
    (all_,) = pool.take([MEMORY_BYTES])
    with pytest.raises(DriverError, match=r"cuMemCreate for 64.00 KiB \(65536 bytes\).*OUT_OF_MEMORY"):
        pool.take([GRANULE_BYTES])
    pool.give([all_])


def test_what_the_driver_does_not_take_stays_pooled_and_is_tried_again(
    standin: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    driver = CudaDriver()
    with driver.current():
        pool = PagePool(driver, limit_bytes=0)
        one, two = pool.take([GRANULE_BYTES] * 2)
        standin.fail(1, code=CODES["NOT_SUPPORTED"], function="cuMemRelease")
        with caplog.at_level(logging.WARNING):
            pool.give([one])
        assert "64.00 KiB are pooled, over the limit: cuMemRelease failed" in caplog.text
        assert pool.pooled_bytes == GRANULE_BYTES
        pool.give([two])
        assert pool.pooled_bytes == pool.created_bytes == standin.handle_bytes == 0
        pool.give(pool.take([GRANULE_BYTES]))
    driver.close()


def test_pages_leave_the_books_with_their_owner(pool: PagePool, standin: StandIn) -> None:
    handles = pool.take([GRANULE_BYTES, GRANULE_BYTES, LARGE_BYTES, LARGE_BYTES])
    assert pool.hand_over(MEMORY_BYTES) == []  # they are lent
    pool.give(handles)
    pages = pool.hand_over(LARGE_BYTES + 2 * GRANULE_BYTES - 1)
    assert [page.size_bytes for page in pages] == [LARGE_BYTES, GRANULE_BYTES]
    assert pool.created_bytes == pool.pooled_bytes == LARGE_BYTES + GRANULE_BYTES
    assert standin.handle_bytes == 2 * pool.created_bytes
    pool.reclaim(set())
    assert pool.created_bytes == LARGE_BYTES + GRANULE_BYTES
    pool.adopt(pages)
    assert pool.created_bytes == pool.pooled_bytes == standin.handle_bytes
    assert set(pool.take([GRANULE_BYTES] * 2)) == set(handles[:2])
    pool.give(handles[:2])


def test_what_is_adopted_over_the_limit_goes_to_the_driver(standin: StandIn) -> None:
    driver = CudaDriver()
    with driver.current():
        pool = PagePool(driver, limit_bytes=GRANULE_BYTES)
        pool.adopt([Page(driver.create(GRANULE_BYTES), GRANULE_BYTES) for _ in range(3)])
        assert pool.created_bytes == standin.handle_bytes == GRANULE_BYTES
        pool.trim()
    driver.close()


def test_what_somebody_else_has_taken_is_forgotten(pool: PagePool) -> None:
    one, two = pool.take([GRANULE_BYTES] * 2)
    pool.disown([one])
    pool.give([two])
    assert pool.created_bytes == GRANULE_BYTES
    pool.adopt([Page(one, GRANULE_BYTES)])


def test_reclaiming_takes_back_what_nobody_uses(pool: PagePool) -> None:
    used, lost, *given = pool.take([GRANULE_BYTES] * 5)
    pool.give(given)
    pool.reclaim({used})
    assert pool.pooled_bytes == 4 * GRANULE_BYTES
    assert lost in pool.take([GRANULE_BYTES] * 4)
    pool.reclaim(set())
    assert pool.pooled_bytes == pool.created_bytes == 5 * GRANULE_BYTES
