"""A model runs operator by operator until capturing graphs has paid; its numbers never change."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import mball
from mball.api import _states
from mball.run import tiers
from mball.run.tiers import kind_of, sizes_of
from mball.schema import Plan, Trace
from tests.run.harness import assert_same, assert_streamed, engine_of, make, run, weight_bytes, wrap_hostile
from tests.run.zoo import ZOO, generate, llama, noise, tied_sequential


@pytest.fixture
def captured_after(monkeypatch: pytest.MonkeyPatch) -> int:
    """After so many passes, whether they waited or not."""
    monkeypatch.setattr(tiers, "PASSES_BEFORE_CAPTURE", 3)
    monkeypatch.setattr(tiers, "WATCHING_S", 1e3)
    return 3


def small_sequential() -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))


@pytest.mark.parametrize("name", ["llama-tied-static-cache", "breaks", "t5", "transformer-encoder"])
@pytest.mark.usefixtures("captured_after")
def test_the_numbers_stay_when_graphs_take_over(name: str, tmp_path: Path) -> None:
    specimen = ZOO[name]
    plain, model = make(specimen.make), make(specimen.make)
    wrap_hostile(model, int(weight_bytes(model) * max(specimen.budget, 0.7)), swap_dir=tmp_path, capture="auto")
    for number in range(5):
        for call in specimen.runs:
            assert_same(run(model, call), run(plain, call), f"{name}, round {number}")
        report = mball.report(model)
        assert (report.in_place_bytes, report.weights_managed) == (0, report.weights_owned)
        assert report.peak_bytes <= report.budget_bytes
    assert report.graphs > 0
    assert report.bytes_read > 2 * weight_bytes(model), "streamed"


def test_a_prompt_is_another_kind_than_the_tokens_after_it(captured_after: int, tmp_path: Path) -> None:
    plain, model = make(lambda: llama(layers=2)), make(lambda: llama(layers=2))
    wrap_hostile(model, int(weight_bytes(model) * 0.7), swap_dir=tmp_path, capture="auto")
    call = generate("dynamic")
    first = run(model, call)
    captured = mball.report(model).graphs
    assert_same(first, run(plain, call))
    assert captured > 0, "tokens came more often than that"
    for _ in range(captured_after - 1):
        assert_same(run(model, call), run(plain, call))
        assert mball.report(model).graphs == captured, "the cache has grown, and another prompt came; both were known"
    assert_same(run(model, call), run(plain, call))
    assert mball.report(model).graphs > captured, "the prompt came as often now"


def test_graphs_are_captured_of_what_does_not_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(tiers, "PASSES_BEFORE_CAPTURE", 4)
    model, fitting = make(small_sequential), make(small_sequential)
    # The device delays every read by more than it takes to watch eight operators.
    wrap_hostile(model, int(weight_bytes(model) * 0.7), swap_dir=tmp_path, capture="auto")
    wrap_hostile(fitting, weight_bytes(fitting) * 4, swap_dir=tmp_path, capture="auto")
    x = noise(2, 64)
    with caplog.at_level(logging.INFO, logger="mball.run.tiers"):
        for number in range(12):
            for one in (model, fitting):
                run(one, lambda m: m(x))
            if number == 3:
                assert mball.report(fitting).graphs == 0
    assert (mball.report(model).graphs, mball.report(fitting).graphs) == (0, 1)
    assert mball.report(model).stall_s > 0
    assert len(caplog.records) == 1
    assert "4 passes" in caplog.text


def test_settings_that_need_graphs_capture_at_once(tmp_path: Path) -> None:
    for settings, graphs in (({}, 0), ({"fullgraph": True}, 1), ({"capture": "graphs"}, 1)):
        model = make(small_sequential)
        mball.wrap(model, budget="1MiB", swap_dir=tmp_path, **settings)
        run(model, lambda m: m(noise(2, 64)))
        assert mball.report(model).graphs == graphs, settings


@pytest.mark.usefixtures("captured_after")
def test_sizes_that_never_differed_are_fixed_in_the_graph(tmp_path: Path) -> None:
    for rows, dynamic in (((5, 5, 5, 5), False), ((5, 6, 7, 5), True)):
        model = make(small_sequential)
        wrap_hostile(model, weight_bytes(model) * 4, swap_dir=tmp_path, capture="auto")
        for number in rows:
            run(model, lambda m, number=number: m(noise(number, 64)))
        (runner,) = _states[model].backend.runners
        assert bool(runner.graph.traced_values()) == dynamic


@pytest.mark.usefixtures("captured_after")
def test_graphs_that_do_not_fit_leave_the_model_to_its_operators(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model, plain = make(small_sequential), make(small_sequential)
    wrap_hostile(model, weight_bytes(model) * 4, swap_dir=tmp_path, capture="auto")
    x = noise(2, 64)
    for _ in range(3):
        run(model, lambda m: m(x))
    plan = _states[model].engine.plans._plan

    def refusing(trace: Trace, budget_bytes: int, previous: Plan | None) -> Plan:
        if any(step.graph for step in trace.steps):
            raise mball.BudgetError("no room", budget_bytes=1, smallest_bytes=2, limited_by="a graph")
        return plan(trace, budget_bytes, previous)

    monkeypatch.setattr(_states[model].engine.plans, "_plan", refusing)
    with pytest.raises(mball.BudgetError):
        run(model, lambda m: m(x))
    assert "operator by operator" in caplog.text
    for _ in range(2):
        assert_same(run(model, lambda m: m(x)), run(plain, lambda m: m(x)))
    monkeypatch.setattr(_states[model].engine.plans, "_plan", plan)
    run(model, lambda m: m(x))
    assert all(step.graph is None for step in _states[model].engine.trace.steps), "not under this budget"
    mball.set_budget(model, weight_bytes(model) * 5)
    assert_same(run(model, lambda m: m(x)), run(plain, lambda m: m(x)))
    assert all(step.graph is not None for step in _states[model].engine.trace.steps), "a larger one is another matter"


def test_operators_that_hold_more_than_there_is_room_for_are_refused(tmp_path: Path) -> None:
    """Nothing is known of them at first, so what the weights leave is kept for them; and no more than that."""
    model = make(small_sequential)
    weights = sum(-(-p.nbytes // 4096) * 4096 for p in model.parameters())
    spare = 64 << 10
    mball.wrap(model, budget=weights // 4 + spare, swap_dir=tmp_path, capture="operators")
    run(model, lambda m: m(noise(8, 64)))
    assert mball.report(model).peak_bytes <= weights // 4 + spare
    with pytest.raises(mball.BudgetError, match="activations take"):
        run(model, lambda m: m(noise(1024, 64)))


def test_kinds() -> None:
    prompt, token = torch.zeros(1, 7, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    assert kind_of((prompt,), {}) == kind_of((prompt[:, :3],), {})
    assert kind_of((prompt,), {}) != kind_of((token,), {})
    assert kind_of((prompt,), {}) != kind_of((prompt.float(),), {})
    assert kind_of(([prompt, {"mask": token}],), {}) == kind_of((prompt,), {"mask": token})
    assert kind_of((prompt,), {"flag": True}) != kind_of((prompt,), {"flag": False})
    assert kind_of((prompt,), {"b": token, "a": prompt}) == kind_of((prompt,), {"a": prompt, "b": token})
    assert kind_of((torch.nested.nested_tensor([token, prompt]), object(), 3), {}) == ()
    assert len(kind_of((list(prompt.expand(100, 7)),), {})) < 20, "kinds are few, whatever is passed"
    assert sizes_of((prompt,), {}) != sizes_of((prompt[:, :3],), {})


def test_room_for_operators_follows_the_kind_of_call(tmp_path: Path) -> None:
    """What a long prompt holds is not kept free for the tokens after it."""
    model = make(tied_sequential)
    plain = make(tied_sequential)
    wrap_hostile(model, weight_bytes(model) + (4 << 20), swap_dir=tmp_path, capture="operators")
    shape = next(module for module in model.modules() if isinstance(module, nn.Linear)).in_features
    long, short = noise(1024, shape), noise(1, shape)
    for x in (long, short, long, short, short):
        assert_same(run(model, lambda m, x=x: m(x)), run(plain, lambda m, x=x: m(x)))
    engine = engine_of(model)
    assert engine.plan.activation_bytes < long.nbytes, "the plan for short ones"
    run(model, lambda m: m(long))
    assert engine.plan.activation_bytes >= 2 * long.nbytes
    report = mball.report(model)
    assert report.peak_bytes <= report.budget_bytes


def test_operators_that_come_in_another_order_than_expected_read_nothing_twice(tmp_path: Path) -> None:
    """Modules are expected in the order in which they were made; norms are often made last and run first."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer, self.norm = nn.Linear(256, 512), nn.Linear(512, 256), nn.LayerNorm(256)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.outer(self.inner(self.norm(x)))

    def blocks() -> nn.Module:
        return nn.Sequential(*(Block() for _ in range(6)))

    model, plain = make(blocks), make(blocks)
    wrap_hostile(model, int(weight_bytes(model) * 0.6), swap_dir=tmp_path, capture="operators")
    x = noise(2, 256)
    assert_same(run(model, lambda m: m(x)), run(plain, lambda m: m(x)))
    assert assert_streamed(model).bytes_read_last_pass < 1.7 * weight_bytes(model), "with what is read for the next"
