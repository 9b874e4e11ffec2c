"""Which plan a pass runs under: found once, kept, made anew when more is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import mball
from mball.api import _states, trace_and_plan
from tests.run.harness import assert_same, assert_streamed, make, run, weight_bytes, wrap_hostile
from tests.run.zoo import noise


class Pieces(nn.Module):
    """Three graphs a pass, since a value decides between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        self.second = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        self.third = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if x.sum() > 1e9:
            x = x + 1
        x = self.second(x)
        if x.sum() > 1e9:
            x = x + 1
        return self.third(x)


def wrapped_pieces(directory: Path) -> tuple[Any, Any]:
    plain, model = make(Pieces), make(Pieces)
    wrap_hostile(model, int(weight_bytes(model) * 0.6), swap_dir=directory)
    return plain, model


def test_a_pass_of_several_graphs_gets_one_plan_and_keeps_it(tmp_path: Path) -> None:
    plain, model = wrapped_pieces(tmp_path)
    x = noise(4, 64)
    for _ in range(4):  # captured, timed, planned with that
        assert_same(run(model, lambda m: m(x)), run(plain, lambda m: m(x)))
    _, plan = trace_and_plan(model)
    assert sum(len(bundle.weights) for bundle in plan.bundles) == 12
    read = {bundle for step in plan.steps for bundle in step.reads}
    assert {weight for bundle in read for weight in plan.bundles[bundle].weights} == set(range(12))
    for _ in range(3):
        assert_same(run(model, lambda m: m(x)), run(plain, lambda m: m(x)))
        report = assert_streamed(model)
        assert trace_and_plan(model)[1] is plan
        assert report.unplanned_fetches == 0
        assert report.bytes_read_last_pass <= plan.prediction.streamed_bytes


def test_sizes_that_grow_keep_the_rest_of_the_pass_planned(tmp_path: Path) -> None:
    plain, model = wrapped_pieces(tmp_path)
    for rows in (2, 3, 5, 9, 17, 33, 33, 33):
        x = noise(rows, 64)
        assert_same(run(model, lambda m, x=x: m(x)), run(plain, lambda m, x=x: m(x)))
    trace, _ = trace_and_plan(model)
    assert {weight for step in trace.steps for weight in step.reads} == set(range(12))
    assert mball.report(model).unplanned_fetches == 0


def test_times_come_from_the_second_run(tmp_path: Path) -> None:
    _, model = wrapped_pieces(tmp_path)
    x = noise(4, 64)
    run(model, lambda m: m(x))
    graphs = [runner.graph for runner in _states[model].backend.runners]
    assert all(step.time_s is None and step.rise_bytes is not None for graph in graphs for step in graph.steps)
    assert sum(step.flops for graph in graphs for step in graph.steps) == 6 * 2 * 4 * 64 * 64
    run(model, lambda m: m(x))
    assert all(step.time_s is not None for graph in graphs for step in graph.steps)
    run(model, lambda m: m(x))
    times = {step.name: step.time_s for graph in graphs for step in graph.steps}
    trace, _ = trace_and_plan(model)
    assert all(step.time_s == times[step.name] for step in trace.steps)


def test_what_capture_holds_shares_a_budget_that_is_large_enough(tmp_path: Path) -> None:
    plain, model = wrapped_pieces(tmp_path)
    x = noise(4, 64)
    for _ in range(3):
        assert_same(run(model, lambda m: m(x)), run(plain, lambda m: m(x)))
    engine = _states[model].engine
    assert not mball.report(model).capture_is_counted or engine.capture_bytes == 0
    # What really was measured is larger than this whole model.
    engine.capture_bytes, engine._capturing_bytes = engine.ledger.budget_bytes // 16, 0
    engine.forget_plans(list(engine._segments))
    assert_same(run(model, lambda m: m(x)), run(plain, lambda m: m(x)))
    report = mball.report(model)
    assert report.capture_is_counted
    assert report.arena_bytes + report.activation_bytes + report.capture_bytes <= report.budget_bytes
    assert report.peak_bytes <= report.budget_bytes
