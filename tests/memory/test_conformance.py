"""What holds for every virtual memory: the host's, CUDA's, and CUDA's plain allocations. No more may be relied on."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator

import pytest

from mball.errors import DeviceError
from mball.memory.arena import Arena
from mball.memory.cuda_plain import PlainCudaMemory
from mball.memory.virtual import Reservation
from tests.memory.implementations import IMPLEMENTATIONS, Implementation


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda implementation: implementation.__name__)
def subject(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    if "stand_in" in request.param.__name__:
        request.getfixturevalue("standin")
    with request.param() as implementation:
        yield implementation


class Range:
    """A reservation, what is backed of it, and what was written."""

    def __init__(self, subject: Implementation, num_pages: int) -> None:
        self.subject, self.memory = subject, subject.memory
        self.page = self.memory.page_bytes
        self.reservation: Reservation = self.memory.reserve(num_pages * self.page)
        self.num_pages = 0
        self.written: dict[int, bytes] = {}
        self.check()

    def resize(self, num_pages: int) -> None:
        if num_pages > self.num_pages:
            self.memory.back(self.reservation, self.num_pages * self.page, num_pages * self.page)
            self.memory.populate(self.reservation, self.num_pages * self.page, num_pages * self.page)
        else:
            stays_bytes = self.memory.piece_end(self.reservation, num_pages * self.page)
            self.memory.trim(self.reservation, num_pages * self.page, self.num_pages * self.page)
            assert self.subject.taken_bytes(self.reservation) == stays_bytes, "it was told before"
        self.num_pages = num_pages
        self.written = {number: data for number, data in self.written.items() if number < num_pages}
        self.check()

    def fill(self, seed: int) -> None:
        """Writes other bytes to the start and the end of every page."""
        for number in range(self.num_pages):
            data = random.Random(1000 * seed + number).randbytes(64)
            address = self.reservation.address + number * self.page
            self.subject.write(address, data)
            self.subject.write(address + self.page - 64, data)
            self.written[number] = data

    def check(self) -> None:
        backed_bytes = self.num_pages * self.page
        stays_bytes = self.memory.piece_end(self.reservation, backed_bytes)
        start_bytes = self.memory.piece_start(self.reservation, backed_bytes)
        assert start_bytes <= backed_bytes
        assert start_bytes == backed_bytes or self.memory.piece_end(self.reservation, start_bytes) == start_bytes
        assert backed_bytes <= stays_bytes <= self.reservation.size_bytes
        assert self.subject.taken_bytes(self.reservation) == stays_bytes
        for number, data in self.written.items():
            address = self.reservation.address + number * self.page
            assert self.subject.read(address, 64) == data, f"the start of page {number}"
            assert self.subject.read(address + self.page - 64, 64) == data, f"the end of page {number}"

    def release(self) -> None:
        self.memory.release(self.reservation)
        assert self.subject.taken_bytes(self.reservation) == 0


def test_a_reservation_is_whole_pages_and_at_least_what_was_asked(subject: Implementation) -> None:
    memory = subject.memory
    reservation = memory.reserve(3 * memory.page_bytes + 1)
    assert reservation.size_bytes >= 4 * memory.page_bytes
    assert reservation.size_bytes % memory.page_bytes == reservation.address % memory.page_bytes == 0
    assert subject.taken_bytes(reservation) == memory.piece_end(reservation, 0)
    memory.release(reservation)


@pytest.mark.parametrize("size_bytes", [0, -1])
def test_nothing_cannot_be_reserved(subject: Implementation, size_bytes: int) -> None:
    with pytest.raises(DeviceError, match=f"{size_bytes} bytes.*more than zero"):
        subject.memory.reserve(size_bytes)


def test_reservations_lie_apart(subject: Implementation) -> None:
    memory = subject.memory
    reservations = [memory.reserve(5 * memory.page_bytes) for _ in range(4)]
    spans = sorted((r.address, r.address + r.size_bytes) for r in reservations)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans))
    assert len({r.serial for r in reservations}) == 4
    for reservation in reservations:
        memory.release(reservation)


def test_growing_and_shrinking_moves_and_loses_no_byte_that_stays(subject: Implementation) -> None:
    range_ = Range(subject, 21)
    for seed, num_pages in enumerate([1, 3, 9, 9, 10, 7, 21, 20, 13, 12, 14, 2, 21, 4, 0, 8, 16]):
        range_.resize(num_pages)
        range_.fill(seed)
        range_.check()
    range_.release()


@pytest.mark.parametrize("seed", range(4))
def test_any_sizes_one_after_the_other(subject: Implementation, seed: int) -> None:
    source = random.Random(seed)
    range_ = Range(subject, 33)
    for step in range(12):
        range_.resize(source.choice([0, 33, range_.num_pages, source.randint(0, 33), source.randint(0, 33)]))
        if source.random() < 0.7:
            range_.fill(step)
    range_.release()


def test_giving_back_what_is_not_there_changes_nothing(subject: Implementation) -> None:
    range_ = Range(subject, 16)
    end = range_.reservation.size_bytes
    range_.memory.trim(range_.reservation, 0, end)
    range_.resize(6)
    range_.fill(0)
    range_.memory.trim(range_.reservation, 6 * range_.page, 6 * range_.page)
    for _ in range(2):
        range_.memory.trim(range_.reservation, 6 * range_.page, end)
        range_.check()
    range_.resize(11)
    range_.release()


def test_populating_again_keeps_the_content(subject: Implementation) -> None:
    range_ = Range(subject, 8)
    range_.resize(8)
    range_.fill(0)
    for first in (0, 3, 8):
        range_.memory.populate(range_.reservation, first * range_.page, 8 * range_.page)
    range_.check()
    range_.release()


def test_releasing_gives_all_back_and_again_does_nothing(subject: Implementation) -> None:
    memory = subject.memory
    gone = Range(subject, 12)
    gone.resize(7)
    gone.release()
    others = [memory.reserve(12 * memory.page_bytes) for _ in range(8)]
    for _ in range(2):
        memory.release(gone.reservation)
    for reservation in others:
        memory.back(reservation, 0, memory.page_bytes)
        subject.write(reservation.address, b"here")
        assert subject.read(reservation.address, 4) == b"here", (
            "released once more, an address took its next owner along"
        )
    for reservation in others:
        memory.release(reservation)


def test_more_than_there_is_is_refused_and_all_is_as_before(subject: Implementation) -> None:
    memory = subject.memory
    if isinstance(memory, PlainCudaMemory):  # which takes all at once
        with pytest.raises(DeviceError, match=r"bytes\).*lower the budget"):
            memory.reserve(2 * subject.limit_bytes)
        return
    limit = subject.limit_bytes // memory.page_bytes
    range_ = Range(subject, 2 * limit)
    range_.resize(3)
    range_.fill(0)
    asked_bytes = (limit + 1) * memory.page_bytes
    with pytest.raises(DeviceError, match=rf"cannot back .*\({asked_bytes} bytes\).*lower the budget") as caught:
        memory.back(range_.reservation, 3 * memory.page_bytes, 3 * memory.page_bytes + asked_bytes)
    assert re.search(r"\(\d+ bytes\).* free", str(caught.value)), "it says how much is free"
    range_.check()
    range_.resize(9)
    range_.release()


def test_an_arena_stands_on_it(subject: Implementation) -> None:
    page = subject.memory.page_bytes
    arena = Arena(subject.memory, 24 * page)
    address, source, written = arena.address, random.Random(0), b""
    for num_pages in (5, 24, 23, 11, 12, 1, 0, 13):
        arena.resize(num_pages * page)
        arena.populate()
        assert (arena.address, arena.backed_bytes) == (address, num_pages * page)
        assert arena.backed_bytes <= arena.taken_bytes <= arena.reserved_bytes
        assert arena.taken_bytes == subject.taken_bytes(arena._reservation)
        for smaller in range(0, num_pages * page + 1, page):
            assert smaller <= arena.taken_bytes_at(smaller) <= arena.taken_bytes
        kept = written[: arena.backed_bytes]
        assert not kept or subject.read(address, len(kept)) == kept
        written = source.randbytes(page // 64) * 64 * num_pages
        if written:
            subject.write(address, written)
    with pytest.raises(DeviceError, match="reserved"):
        arena.resize(arena.reserved_bytes + 1)
    arena.close()
    assert arena.taken_bytes == 0
