"""Another budget between two passes: the same numbers, nothing captured anew, and memory that is given back at once."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mball
from mball.api import _states, trace_and_plan
from mball.errors import ConfigError, DeviceError, WrapError
from mball.memory.gauge import HostGauge
from mball.schema import Plan
from tests.run.door import backend, compiled
from tests.run.harness import assert_same, assert_streamed, engine_of, make, run, weight_bytes, wrap_hostile
from tests.run.test_interrupts import Place, assert_consistent, call, tracing, wrap
from tests.run.zoo import llama, logits, noise, tied_sequential

X = noise(4, 64)


def arena_bytes(model: nn.Module) -> int:
    size: int = engine_of(model).execution.arena.backed_bytes
    return size


def plan_of(model: nn.Module) -> Plan:
    plan: Plan = engine_of(model).execution.plan
    return plan


def used_bytes(model: nn.Module) -> int:
    size: int = engine_of(model).ledger.current_bytes
    return size


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_any_budget_after_any_other(capture: str, tmp_path: Path) -> None:
    plain, model = make(llama), make(llama)
    weights = weight_bytes(model)
    wrap_hostile(model, weights, swap_dir=tmp_path, capture=capture)
    act = logits(1, 8)
    expected = run(plain, act)
    assert_same(run(model, act), expected)
    graphs = mball.report(model).graphs
    for share in (0.4, 3.0, 0.6, 0.5, 1.0, 0.35):
        budget = int(share * weights)
        mball.set_budget(model, budget)
        report = mball.report(model)
        assert report.budget_bytes == budget
        assert used_bytes(model) <= report.peak_bytes <= budget, "peaks begin anew"
        assert arena_bytes(model) <= budget, "given back before set_budget returned"
        for _ in range(2):
            assert_same(run(model, act), expected)
        report = mball.report(model)
        assert report.peak_bytes <= budget
        assert (report.bytes_read_last_pass == 0) == (share > 2)
        assert report.graphs == graphs, "nothing is captured anew"
    assert_streamed(model)
    assert_same(run(mball.unwrap(model), act), expected)


def test_a_larger_budget_reads_only_what_was_not_there(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(16)))
    weights = weight_bytes(model)
    x = noise(2, 256)
    expected = run(model, lambda m: m(x))
    mball.wrap(model, weights // 2, swap_dir=tmp_path, capture="graphs")
    for _ in range(3):
        run(model, lambda m: m(x))
    resident = mball.report(model).resident_bytes
    assert resident > weights // 16, "more than one layer stays, whatever room this CPU's kernels take"
    before = mball.report(model).bytes_read
    mball.set_budget(model, 2 * weights)
    assert mball.report(model).bytes_read == before, "a new budget alone reads nothing"
    assert_same(run(model, lambda m: m(x)), expected)
    read = mball.report(model).bytes_read - before
    assert read <= 1.1 * (weights - resident)
    assert_same(run(model, lambda m: m(x)), expected)
    assert mball.report(model).bytes_read_last_pass == 0
    # And back: besides what comes in each pass, and what comes ahead for the next, only residents that lie elsewhere.
    before_plan = plan_of(model)
    mball.set_budget(model, weights // 2)
    plan = plan_of(model)
    assert_same(run(model, lambda m: m(x)), expected)
    there = {(before_plan.bundles[place.bundle], place.offset_bytes) for place in before_plan.residents}
    moved = [p.bundle for p in plan.residents if (plan.bundles[p.bundle], p.offset_bytes) not in there]
    comes = [
        *moved,
        *(each.bundle for each in plan.transfers),
        *(each.bundle for each in plan.transfers if each.after < 0),
    ]
    expected_bytes = sum(extent.size_bytes for bundle in comes for extent in plan.bundles[bundle].extents)
    assert mball.report(model).bytes_read_last_pass <= expected_bytes


def test_memory_goes_back_to_the_machine_at_once(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))
    mball.wrap(model, 2 * weight_bytes(model), swap_dir=tmp_path, capture="graphs")
    x = noise(2, 1024)
    for _ in range(2):
        run(model, lambda m: m(x))
    gauge = HostGauge()
    before = gauge.used_bytes()
    mball.set_budget(model, weight_bytes(model) // 4)
    assert before - gauge.used_bytes() > 0.7 * weight_bytes(model)


def test_before_the_first_pass(tmp_path: Path) -> None:
    plain, model = make(tied_sequential), make(tied_sequential)
    wrap_hostile(model, 2 * weight_bytes(model), swap_dir=tmp_path)
    mball.set_budget(model, int(0.6 * weight_bytes(model)))
    assert_same(run(model, call), run(plain, call))
    assert_streamed(model)


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_a_budget_that_is_too_small_changes_nothing(capture: str, tmp_path: Path) -> None:
    plain, model = make(tied_sequential), make(tied_sequential)
    budget = int(0.6 * weight_bytes(model))
    wrap_hostile(model, budget, swap_dir=tmp_path, capture=capture)
    for _ in range(3):
        run(model, call)
    plan, used = trace_and_plan(model)[1], used_bytes(model)
    with pytest.raises(mball.BudgetError, match="one module at a time") as caught:
        mball.set_budget(model, 1000)
    # Holds each module, and not the activations of the pass beside it.
    with pytest.raises(mball.BudgetError, match="activations take"):
        mball.set_budget(model, caught.value.smallest_bytes)
    for wrong in ("much", 0, -1, None):
        with pytest.raises(ConfigError):
            mball.set_budget(model, wrong)
    assert mball.report(model).budget_bytes == budget
    assert trace_and_plan(model)[1] is plan
    assert used_bytes(model) == used
    assert_same(run(model, call), run(plain, call))
    assert trace_and_plan(model)[1] is plan
    assert mball.report(model).unplanned_fetches == 0


def test_memory_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = make(llama), make(llama)
    budget = int(0.5 * weight_bytes(model))
    wrap_hostile(model, budget, swap_dir=tmp_path)
    act = logits(1, 8)
    expected = run(plain, act)
    assert_same(run(model, act), expected)
    with monkeypatch.context() as patch:
        patch.setattr(engine_of(model).execution.arena._memory, "_headroom", lambda: 0)
        with pytest.raises(DeviceError, match="free memory"):
            mball.set_budget(model, 4 * weight_bytes(model))
    report = mball.report(model)
    assert report.budget_bytes == budget
    assert used_bytes(model) <= report.peak_bytes <= budget
    assert_same(run(model, act), expected)
    assert assert_streamed(model).budget_bytes == budget


def test_not_in_the_middle_of_a_pass(tmp_path: Path) -> None:
    plain, model = make(tied_sequential), make(tied_sequential)
    budget = int(0.6 * weight_bytes(model))
    wrap_hostile(model, budget, swap_dir=tmp_path, capture="operators")
    errors: list[BaseException] = []

    def hook(*_: Any) -> None:
        try:
            mball.set_budget(model, 2 * budget)
        except WrapError as error:
            errors.append(error)

    handle = model[1].register_forward_hook(hook)
    assert_same(run(model, call), run(plain, call))
    handle.remove()
    assert errors
    assert all("in the middle" in str(error) for error in errors)
    assert mball.report(model).budget_bytes == budget
    with pytest.raises(WrapError, match="not wrapped"):
        mball.set_budget(plain, budget)


def test_calls_in_other_threads_are_waited_for(tmp_path: Path) -> None:
    plain, model = make(tied_sequential), make(tied_sequential)
    expected = run(plain, call)
    small, large = int(0.6 * weight_bytes(model)), 2 * weight_bytes(model)
    wrap_hostile(model, small, swap_dir=tmp_path)
    run(model, call)
    failures: list[BaseException] = []

    def passes() -> None:
        try:
            for _ in range(30):
                assert_same(run(model, call), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=passes) for _ in range(2)]
    for thread in threads:
        thread.start()
    number = 0
    while any(thread.is_alive() for thread in threads):
        number += 1
        mball.set_budget(model, (small, large)[number % 2])
    for thread in threads:
        thread.join()
    assert not failures
    assert number


def test_modules_that_share_a_budget(tmp_path: Path) -> None:
    first, second = make(tied_sequential), make(tied_sequential, seed=1)
    expected = [run(first, call), run(second, call)]
    budget = weight_bytes(first)
    with mball.balloon(first, second, budget=budget, swap_dir=tmp_path):
        mball.set_budget(second, int(0.7 * budget))
        assert mball.report(first).budget_bytes == int(0.7 * budget)
        assert_same([run(first, call), run(second, call)], expected)


def test_compiled_steps_are_not_compiled_again(tmp_path: Path) -> None:
    model = make(tied_sequential)
    weights = weight_bytes(model)
    wrap_hostile(model, int(0.7 * weights), swap_dir=tmp_path, compile="inductor")
    expected = run(model, call)
    runners = list(_states[model].backend.runners)
    for share in (2.0, 0.6, 0.8):
        mball.set_budget(model, int(share * weights))
        for _ in range(2):
            assert_same(run(model, call), expected)
        assert mball.report(model).peak_bytes <= int(share * weights)
    assert _states[model].backend.runners == runners
    assert all(len(runner._programs) == 1 for runner in runners), "still the compiled one"


def test_what_was_compiled_in_one_piece_runs_in_steps_while_it_does_not_fit(tmp_path: Path) -> None:
    model = make(tied_sequential)
    weights = weight_bytes(model)
    plain = run(model, call)
    wrap_hostile(model, 3 * weights, swap_dir=tmp_path, compile="inductor")
    compiled_whole = run(model, call)
    for _ in range(2):
        assert_same(run(model, call), compiled_whole)
    for _ in range(2):
        mball.set_budget(model, int(0.7 * weights))
        assert arena_bytes(model) <= int(0.7 * weights)
        for _ in range(2):
            assert_same(run(model, call), plain)
            assert_streamed(model)
        mball.set_budget(model, 3 * weights)
        for _ in range(2):
            assert_same(run(model, call), compiled_whole)


def test_a_prompt_like_the_last_one_still_fits(tmp_path: Path) -> None:
    """Operators of a prompt take more room than those of the token that ran last, though they are the same."""
    plain, model = make(tied_sequential), make(tied_sequential)
    weights = weight_bytes(model)
    wrap_hostile(model, weights + (4 << 20), swap_dir=tmp_path, capture="operators")
    long, short = noise(2048, 64), noise(1, 64)
    for x in (long, short, short, short):
        run(model, lambda m, x=x: m(x))
    with pytest.raises(mball.BudgetError, match="activations take") as caught:
        mball.set_budget(model, weights)
    assert caught.value.smallest_bytes > 2 * long.nbytes
    mball.set_budget(model, caught.value.smallest_bytes)
    for x in (short, long, short):
        assert_same(run(model, lambda m, x=x: m(x)), run(plain, lambda m, x=x: m(x)))


def test_the_options_of_the_first_capture_stay_good(tmp_path: Path) -> None:
    """Dynamo gives them to every later capture of a wrapped model, whatever its budget is by then."""
    plain, model = make(tied_sequential), make(tied_sequential)
    first, second = 2 * weight_bytes(model), int(0.7 * weight_bytes(model))
    wrap_hostile(model, first, swap_dir=tmp_path)
    through = torch.compile(model, backend=backend(), options={"budget": first})
    assert_same(run(through, call), run(plain, call))
    mball.set_budget(model, second)
    x = noise(7, 64)
    assert_same(run(through, lambda m: m(x)), run(plain, lambda m: m(x)))


def test_a_model_that_came_through_the_door_of_torch_compile(tmp_path: Path) -> None:
    plain, model = compiled(llama, 0.5, tmp_path)
    inputs = {"input_ids": torch.arange(8).reshape(1, 8), "use_cache": False}
    with torch.no_grad():
        expected = plain(**inputs).logits
        for share in (0.5, 3.0, 0.4):
            budget = int(share * weight_bytes(model))
            if mball.api.find_door(model) is not None:
                mball.set_budget(model, budget)
                assert mball.report(model).budget_bytes == budget
            for _ in range(3):
                assert_same(model(**inputs).logits, expected)
            assert mball.report(model).peak_bytes <= budget


@pytest.mark.usefixtures("planned_once")
def test_ctrl_c_at_every_line(tmp_path: Path) -> None:
    """It leaves the old budget or the new one, and nothing broken. Planning is left out: it changes nothing."""
    model = make(tied_sequential)
    expected = run(model, call)
    old, new = int(0.8 * weight_bytes(model)), int(0.6 * weight_bytes(model))
    wrap(model, 0.8, tmp_path, "graphs")
    for _ in range(3):
        run(model, call)
    places: dict[Place, None] = {}
    planning = {"plan", "schema"}
    for budget in (new, old):  # what runs the first time only is over by then
        mball.set_budget(model, budget)
    with tracing(lambda place: places.setdefault(place), outside=planning):
        mball.set_budget(model, new)
    found = list(places)
    assert len(found) > 60
    budgets, struck = set(), 0
    for place in found:
        mball.set_budget(model, old)
        left = [place]

        def strike(here: Place, left: list[Place] = left) -> None:
            if here in left:
                left.clear()
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt), tracing(strike, outside=planning):
            mball.set_budget(model, new)
        struck += not left
        budgets.add(mball.report(model).budget_bytes)
        assert_consistent(model, expected)
        report = mball.report(model)
        assert report.peak_bytes <= old
        assert arena_bytes(model) <= report.budget_bytes
    assert budgets == {old, new}
    assert struck > 0.9 * len(found), struck
