"""Which plan a pass runs under: found once, kept, made anew when more is known."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import mball
from mball.api import _states, _wrap, trace_and_plan
from mball.config import Config
from mball.memory import Device
from mball.memory.device import Gauge
from mball.run.engine import Engine
from mball.run.execution import Execution
from mball.units import MIB
from tests.adaptors import DeviceAdaptor, adapted
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
    assert sum(len(bundle.tensors) for bundle in plan.bundles) == 12
    read = {bundle for step in plan.steps for bundle in step.reads}
    assert {weight for bundle in read for weight in plan.bundles[bundle].tensors} == set(range(12))
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
    # What really was measured is larger than this whole model, so it is on top.
    assert engine.capture.held_bytes + engine.capture.passing_bytes > engine.ledger.budget_bytes
    assert not mball.report(model).capture_is_counted
    engine.capture.held_bytes, engine.capture.passing_bytes = engine.ledger.budget_bytes // 16, 0
    engine.forget_plans(list(engine._segments))
    assert_same(run(model, lambda m: m(x)), run(plain, lambda m: m(x)))
    report = mball.report(model)
    assert report.capture_is_counted
    assert report.arena_bytes + report.activation_bytes + report.capture_bytes <= report.budget_bytes
    assert report.peak_bytes <= report.budget_bytes


class SaidGauge:
    """Says that memory rises by what the test wants."""

    rises_bytes = 0

    def reset(self) -> None: ...

    def rise_bytes(self) -> int:
        return self.rises_bytes

    def used_bytes(self) -> int:
        return 0


class SaidDevice(DeviceAdaptor):
    def __init__(self, device: Device, said: SaidGauge) -> None:
        super().__init__(device)
        self.said = said

    def gauge(self) -> Gauge:
        return self.said


def test_workspace_is_measured_again_when_sizes_outgrow_it(tmp_path: Path) -> None:
    _, model = wrapped_pieces(tmp_path)
    mball.unwrap(model)
    gauge = SaidGauge()
    _wrap(
        (model,),
        Config.of(budget="256MiB", swap_dir=tmp_path, capture="graphs"),
        None,
        {},
        adapted(lambda device: SaidDevice(device, gauge)),
    )

    def rows(number: int) -> int:
        run(model, lambda m: m(noise(number, 64)))
        run(model, lambda m: m(noise(number, 64)))  # planned with what the first one told
        return mball.report(model).activation_bytes

    for number in (32, 48, 64):  # captured once more, with a size that varies
        small = rows(number)
    assert small < 1 * MIB
    gauge.rises_bytes = 32 * MIB
    assert rows(64) == small, "a size that was measured is not measured again"
    graphs = mball.report(model).graphs
    assert rows(1024) > 32 * MIB
    assert mball.report(model).graphs == graphs, "a new graph would have been measured in any case"


class Mapped(nn.Module):
    """Dynamo's graph of `vmap` holds tensors whose memory nobody can name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.vmap(lambda row: row * self.scale)(self.first(x)))


def test_a_graph_with_tensors_of_unknown_memory_runs_operator_by_operator(tmp_path: Path) -> None:
    plain, model = make(Mapped), make(Mapped)
    wrap_hostile(model, int(weight_bytes(model) * 0.6), swap_dir=tmp_path)
    x = noise(4, 64)
    for number in range(3):
        assert_same(run(model, lambda m: m(x)), run(plain, lambda m: m(x)), f"pass {number}")
    report = mball.report(model)
    assert _states[model].backend.unsupported
    assert report.graphs == 0
    assert report.weights_managed == report.weights_owned == 9
    assert report.steps > 1
    assert report.bytes_read_last_pass > 0


class Turns(nn.Module):
    """The same layers in either order: two passes with a plan each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

    def forward(self, x: torch.Tensor, reverse: bool = False) -> torch.Tensor:
        for layer in reversed(self.layers) if reverse else self.layers:
            x = layer(x)
        return x


def strike_once(place: tuple[str, int] | None, act: Any) -> list[tuple[str, int]]:
    """Runs `act`, with KeyboardInterrupt at a line of the code that changes plans; returns the lines it ran."""
    codes = {Engine._replan.__code__, Execution.adopt.__code__}
    lines: list[tuple[str, int]] = []

    def local(frame: FrameType, event: str, _: object) -> Any:
        here = (frame.f_code.co_name, frame.f_lineno)
        if event == "line" and here not in lines:
            lines.append(here)
            if here == place:
                raise KeyboardInterrupt
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, _, __: local if frame.f_code in codes else None)
    try:
        act()
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_ctrl_c_while_plans_change(capture: str, tmp_path: Path) -> None:
    plain, model = make(Turns), make(Turns)
    mball.wrap(model, budget=int(weight_bytes(model) * 0.6), swap_dir=tmp_path, capture=capture)
    x = noise(4, 64)
    expected = {reverse: run(plain, lambda m, r=reverse: m(x, reverse=r)) for reverse in (False, True)}

    def go(reverse: bool) -> torch.Tensor:
        return run(model, lambda m: m(x, reverse=reverse))

    def settle() -> None:
        for reverse in (False, False, True, True, False, False):
            assert_same(go(reverse), expected[reverse])

    settle()
    settle()
    lines = strike_once(None, lambda: go(True))
    assert len(lines) > 20
    settle()
    for place in lines:
        with pytest.raises(KeyboardInterrupt):
            strike_once(place, lambda: go(True))
        for reverse in (False, False, True, False):
            assert_same(go(reverse), expected[reverse], f"after an interrupt at {place}")


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.yes, self.no, self.last = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = torch.cond(x.sum() > 0, lambda x: self.yes(x) + 1, lambda x: self.no(x) - 1, (x,))
        return self.last(x)


def test_a_graph_that_calls_graphs(tmp_path: Path) -> None:
    plain, model = make(Decides), make(Decides)
    wrap_hostile(model, int(weight_bytes(model) * 0.8), swap_dir=tmp_path)
    for seed in range(4):
        x = noise(4, 64, seed=seed)
        assert_same(run(model, lambda m, x=x: m(x)), run(plain, lambda m, x=x: m(x)), f"pass {seed}")
    assert_streamed(model)
