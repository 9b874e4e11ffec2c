"""The ledger never lets the total pass the budget."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.errors import DeviceError
from mball.memory import Kind, Ledger


@given(st.integers(0, 100), st.lists(st.tuples(st.sampled_from(Kind), st.integers(0, 120)), max_size=30))
def test_the_total_stays_within_the_budget_and_refusals_change_nothing(
    budget: int, entries: list[tuple[Kind, int]]
) -> None:
    ledger = Ledger(budget)
    current, peak, peak_total = dict.fromkeys(Kind, 0), dict.fromkeys(Kind, 0), 0
    for kind, num_bytes in entries:
        before = ledger.snapshot()
        if sum(current.values()) - current[kind] + num_bytes <= budget:
            ledger.set(kind, num_bytes)
            current[kind] = num_bytes
            peak[kind] = max(peak[kind], num_bytes)
            peak_total = max(peak_total, sum(current.values()))
        else:
            with pytest.raises(DeviceError, match=rf"{num_bytes} bytes.*budget of {budget} bytes"):
                ledger.set(kind, num_bytes)
            assert ledger.snapshot() == before
        for kind_ in Kind:
            assert ledger.account(kind_).current_bytes == current[kind_]
            assert ledger.account(kind_).peak_bytes == peak[kind_]
        assert ledger.current_bytes == sum(current.values()) <= budget
        assert ledger.peak_bytes == peak_total <= budget
    snapshot = ledger.snapshot()
    assert set(snapshot) == {kind.value for kind in Kind} | {"total"}
    assert snapshot["total"].peak_bytes == peak_total


def test_many_threads_do_not_pass_the_budget() -> None:
    ledger = Ledger(100)
    refused = []

    def work(kind: Kind) -> None:
        for _ in range(300):
            try:
                ledger.set(kind, 60)
            except DeviceError:
                refused.append(kind)
            ledger.set(kind, 0)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in Kind]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.current_bytes == 0
    assert ledger.peak_bytes == 60


def test_another_budget() -> None:
    ledger = Ledger(1000)
    ledger.set(Kind.ARENA, 800)
    ledger.set(Kind.ARENA, 300)
    with pytest.raises(DeviceError, match=r"300 bytes\) are taken, so the budget cannot be 299"):
        ledger.set_budget(299)
    assert (ledger.budget_bytes, ledger.peak_bytes) == (1000, 800)
    before = ledger.state()
    ledger.set_budget(300)
    assert (ledger.budget_bytes, ledger.peak_bytes) == (300, 300), "peaks begin anew"
    assert ledger.account(Kind.ARENA).peak_bytes == 300
    with pytest.raises(DeviceError):
        ledger.set(Kind.ACTIVATIONS, 1)
    ledger.restore(before)
    ledger.set(Kind.ACTIVATIONS, 700)
    assert (ledger.budget_bytes, ledger.current_bytes, ledger.peak_bytes) == (1000, 1000, 1000)
