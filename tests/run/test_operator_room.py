"""What is kept for operators outside graphs, by what was measured."""

from __future__ import annotations

import pytest

from mball.run.operator_room import OperatorRoom
from mball.units import KIB, MIB

BUDGET_BYTES = 64 * MIB


@pytest.fixture
def room() -> OperatorRoom:
    found = OperatorRoom(BUDGET_BYTES)
    found.begin_pass("prompt")
    return found


def test_an_eighth_while_nothing_is_known(room: OperatorRoom) -> None:
    assert not room.is_measured
    assert room.needed_bytes == BUDGET_BYTES // 8


def test_what_was_measured_and_room_to_grow(room: OperatorRoom) -> None:
    room.note_peak(3 * MIB + 1)
    assert room.is_measured
    assert 3 * MIB < room.needed_bytes < 3.5 * MIB
    assert room.wished_bytes == 4 * MIB, "in 64ths of the budget"
    room.note_peak(1 * MIB)
    assert room.wished_bytes == 4 * MIB, "the most that was seen"
    room.note_live(2 * MIB)
    assert room.wished_bytes == 4 * MIB
    room.note_live(5 * MIB)
    assert room.needed_bytes == 5 * MIB


def test_growth_by_little_changes_what_is_needed_and_not_what_is_wished(room: OperatorRoom) -> None:
    room.note_peak(MIB)
    wished = set()
    for cache in range(2 * MIB, 3 * MIB, 32 * KIB):
        room.note_live(cache + KIB)
        assert cache < room.needed_bytes <= room.wished_bytes
        wished.add(room.wished_bytes)
    assert wished == {3 * MIB}


def test_each_kind_has_its_own_and_new_ones_take_the_largest(room: OperatorRoom) -> None:
    room.note_peak(6 * MIB)
    room.begin_pass("token")
    assert not room.is_measured
    assert room.needed_bytes == 6 * MIB
    room.note_peak(1 * MIB)
    assert room.needed_bytes == 1 * MIB
    room.captured = True
    assert room.needed_bytes == BUDGET_BYTES // 8, "graphs account for themselves: what operators held says nothing"
    room.begin_pass("prompt")
    assert not room.captured
    assert room.needed_bytes == 6 * MIB


def test_what_there_is_has_to_do_until_more_is_known(room: OperatorRoom) -> None:
    room.settle_for(MIB + 7)
    assert room.needed_bytes == MIB + 7
    room.note_live(MIB + 7)
    assert room.needed_bytes == MIB + 7
    room.note_live(MIB + 8)
    assert room.needed_bytes > MIB + 7


def test_another_budget_forgets_what_had_to_do_and_keeps_what_was_measured(room: OperatorRoom) -> None:
    room.settle_for(MIB)
    room.begin_pass("token")
    room.note_peak(2 * MIB)
    room.set_budget(2 * BUDGET_BYTES)
    assert room.needed_bytes == 2 * MIB
    assert room.wished_bytes == 2 * MIB, "in 64ths of the budget"
    room.begin_pass("prompt")
    assert not room.is_measured


def test_what_was_measured_after_it_had_to_do_stays_known(room: OperatorRoom) -> None:
    room.settle_for(MIB)
    room.note_peak(MIB // 2)
    room.set_budget(2 * BUDGET_BYTES)
    assert room.is_measured
    assert room.largest_bytes == MIB


def test_the_largest_is_of_what_runs_without_graphs_and_was_measured(room: OperatorRoom) -> None:
    assert room.largest_bytes == 0
    room.settle_for(9 * MIB)
    room.begin_pass("token")
    room.note_peak(2 * MIB)
    room.captured = True
    room.note_peak(5 * MIB)
    assert room.largest_bytes == 2 * MIB


def test_a_change_of_budget_can_be_taken_back(room: OperatorRoom) -> None:
    room.settle_for(MIB)
    before = room.state()
    room.set_budget(BUDGET_BYTES // 2)
    room.begin_pass("token")
    room.note_peak(3 * MIB)
    room.restore(before)
    room.begin_pass("prompt")
    assert room.needed_bytes == MIB
    room.begin_pass("token")
    assert not room.is_measured
