"""What is recorded of a pass: every step, every wait, every read, and of the last pass that ended well only."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mball
from mball.api import trace_and_plan
from mball.errors import BudgetError, WrapError
from mball.observe.timeline import Lane, Timeline
from mball.run.execution import Execution
from mball.snapshot import take_timeline
from tests.preads import SetPreadv
from tests.run.harness import assert_same, assert_streamed, engine_of, make, run, weight_bytes, wrap_hostile
from tests.run.test_passes import Pieces
from tests.run.zoo import noise

X = noise(4, 64)


class Layers(nn.Module):
    """Six layers, and one more where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.extra = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, extra: bool = False) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x).relu()
            if extra and number == 3:
                x = self.extra(x)
        return x


def call(model: Any) -> torch.Tensor:
    return model(X)


def timeline_of(model: Any) -> Timeline:
    taken = take_timeline(engine_of(model))
    assert taken is not None
    return taken


def wrapped(directory: Path, capture: str) -> Any:
    model = make(Layers)
    mball.wrap(model, int(weight_bytes(model) * 0.6), swap_dir=directory, capture=capture)
    return model


def smallest(directory: Path) -> Any:
    """A model wrapped with the smallest budget that does for its passes."""
    model, budget = make(Layers), 4096
    while True:
        try:
            mball.wrap(model, budget, swap_dir=directory, capture="graphs")
            run(model, call)
        except BudgetError as refused:
            budget = refused.smallest_bytes
            model = make(Layers)
        else:
            return model


def settle(model: Any) -> None:
    """Runs passes until three in a row ran under one plan: what a pass takes may call for another."""
    plans: list[Any] = []
    while len(plans) < 4 or any(plan is not plans[-1] for plan in plans[-3:]):
        assert len(plans) < 40, "plans take turns"
        run(model, call)
        plans.append(engine_of(model).plan)


@pytest.fixture(params=["graphs", "operators"])
def settled(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A wrapped model whose passes run under a plan that is not changed any more, with reads that come late."""
    model = make(Layers)
    wrap_hostile(model, int(weight_bytes(model) * 0.6), swap_dir=tmp_path, capture=request.param)
    settle(model)
    return model


def test_each_step_of_the_plan_computes_once_in_order(settled: Any) -> None:
    for _ in range(3):
        run(settled, call)
        trace, plan = trace_and_plan(settled)
        timeline = timeline_of(settled)
        spans = timeline.of(Lane.COMPUTE)
        assert [span.step for span in spans] == list(range(len(plan.steps)))
        for span, step in zip(spans, plan.steps, strict=True):
            first = trace.steps[step.first].name
            assert span.name == first if step.end == step.first + 1 else span.name.startswith(f"{first} + ")
        edges = [edge for span in spans for edge in (span.start_s, span.end_s)]
        assert edges == sorted(edges)
        assert edges[0] > 0
        assert edges[-1] < timeline.pass_s == mball.report(settled).pass_s


def test_stalls_lie_before_the_step_that_waits_and_sum_up_to_the_report(settled: Any) -> None:
    run(settled, call)
    timeline = timeline_of(settled)
    computes, stalls = timeline.of(Lane.COMPUTE), timeline.of(Lane.STALLS)
    assert stalls, "nothing was waited for, so nothing is shown"
    for stall in stalls:
        assert stall.step is not None
        assert stall.end_s <= computes[stall.step].start_s
        assert stall.start_s >= (computes[stall.step - 1].end_s if stall.step else 0)
        assert stall.name.startswith("wait for layers.")
    assert timeline.stall_s == pytest.approx(mball.report(settled).stall_s, rel=1e-6, abs=1e-9)


def test_reads_asked_for_in_a_pass_are_the_bytes_of_the_report(settled: Any) -> None:
    read_bytes = mball.report(settled).bytes_read
    for _ in range(3):
        run(settled, call)
        report = assert_streamed(settled)
        timeline = timeline_of(settled)
        assert timeline.bytes_read == report.bytes_read_last_pass == report.bytes_read - read_bytes
        read_bytes = report.bytes_read
        asked = [span.asked_s for span in timeline.of(Lane.READS) if span.asked_s is not None]
        assert len(asked) == len(timeline.of(Lane.READS))
        assert max(asked) < timeline.pass_s
        assert any(span.name.startswith("layers.") for span in timeline.of(Lane.READS))
        num_asked = sum(asked_s >= 0 for asked_s in asked)
        assert len(engine_of(settled).execution.recorder.last.reads) <= 2 * num_asked, "reads of old passes pile up"


def test_events_that_know_no_times_last_from_asking_to_landing(settled: Any) -> None:
    run(settled, call)
    timeline = timeline_of(settled)
    reads, stalls = timeline.of(Lane.READS), timeline.of(Lane.STALLS)
    assert all(read.start_s == read.asked_s for read in reads)
    landed = [read for read in reads if read.end_s < timeline.pass_s]
    assert landed
    for read in landed:
        ends = [stall.end_s for stall in stalls if stall.name == f"wait for {read.name}"]
        assert any(end_s <= read.end_s < end_s + 0.1 for end_s in ends), read


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_the_reader_knows_when_a_read_really_ran(capture: str, tmp_path: Path, set_preadv: SetPreadv) -> None:
    model = wrapped(tmp_path, capture)
    for _ in range(4):
        run(model, call)
    times: list[tuple[float, float]] = []
    preadv = os.preadv

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        began_s = time.perf_counter()
        time.sleep(0.003)
        result = preadv(descriptor, buffers, offset)
        times.append((began_s, time.perf_counter()))
        return result

    set_preadv(slow)
    engine_of(model).execution.device.synchronize()
    run(model, call)
    engine_of(model).execution.device.synchronize()
    record = engine_of(model).execution.recorder.last
    reads = timeline_of(model).of(Lane.READS)
    assert len(reads) > 2
    slack_s = 0.002  # a thread may be kept from going on between its looks at the clock, but not often
    fitting = 0
    for read in reads:
        start_s, end_s = read.start_s + record.began_s, read.end_s + record.began_s
        assert any(start_s <= began_s and ended_s <= end_s for began_s, ended_s in times)
        fitting += any(0 <= began_s - start_s < slack_s for began_s, _ in times)
        fitting += any(0 <= end_s - ended_s < slack_s for _, ended_s in times)
    assert fitting >= len(reads), "they are the times of something else"


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    opened = threading.Event()
    opened.set()
    yield opened
    opened.set()


def test_a_read_across_the_end_of_a_pass_is_in_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_preadv: SetPreadv, gate: threading.Event
) -> None:
    # Where there is room for one step only, what the first one reads has to wait for the last one, in every plan.
    model = smallest(tmp_path)
    settle(model)
    leave, enter, preadv = Execution.leave, Execution.enter, os.preadv
    begun = threading.Event()

    def gated(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if not gate.is_set():
            begun.set()
        assert gate.wait(60)
        return preadv(descriptor, buffers, offset)

    def leave_and_close(self: Execution, step: int) -> None:
        assert self.plan is not None
        if step == len(self.plan.steps) - 1:
            self.device.synchronize()
            begun.clear()
            gate.clear()  # what the next pass needs is asked for now, and stays under way
        leave(self, step)

    def open_and_enter(self: Execution, step: int) -> Any:
        gate.set()
        return enter(self, step)

    set_preadv(gated)
    monkeypatch.setattr(Execution, "leave", leave_and_close)
    monkeypatch.setattr(Execution, "enter", open_and_enter)
    run(model, call)
    assert begun.wait(60)
    # The first of these two passes also finds reads that ran freely before.
    before = timeline_of(model)
    late = [read for read in before.of(Lane.READS) if read.end_s >= before.pass_s]
    assert late
    assert all(read.end_s == pytest.approx(max(read.start_s, before.pass_s)) for read in late)
    run(model, call)
    after = timeline_of(model)
    carried = [read for read in after.of(Lane.READS) if read.asked_s is not None and read.asked_s < 0]
    assert sorted(read.name for read in carried) == sorted(read.name for read in late)
    assert all(read.end_s > 0 for read in carried)
    assert any(read.start_s < 0 for read in carried)
    assert after.bytes_read == mball.report(model).bytes_read_last_pass


def test_a_read_that_was_over_before_a_pass_began_is_not_in_it(tmp_path: Path) -> None:
    model = wrapped(tmp_path, "graphs")
    for _ in range(5):
        run(model, call)
        engine_of(model).execution.device.synchronize()
    timeline = timeline_of(model)
    reads = timeline.of(Lane.READS)
    assert len(engine_of(model).execution.recorder.last.reads) > len(reads), "no read was ahead of the pass"
    assert all(read.asked_s is not None and read.asked_s > 0 for read in reads)
    assert timeline.bytes_read == sum(read.size_bytes or 0 for read in reads)


def test_a_pass_that_fails_leaves_the_timeline_of_the_last_good_one(
    settled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(settled, call)
    good = timeline_of(settled)
    leave = Execution.leave

    def strike(self: Execution, step: int) -> None:
        if step == 1:
            raise KeyboardInterrupt
        leave(self, step)

    monkeypatch.setattr(Execution, "leave", strike)
    with pytest.raises(KeyboardInterrupt):
        run(settled, call)
    monkeypatch.undo()
    assert timeline_of(settled).of(Lane.COMPUTE) == good.of(Lane.COMPUTE)
    assert timeline_of(settled).bytes_read == good.bytes_read == mball.report(settled).bytes_read_last_pass
    run(settled, call)
    again = timeline_of(settled)
    assert len(again.of(Lane.COMPUTE)) == len(good.of(Lane.COMPUTE)), "steps of the failed pass are in the next one"
    assert again.bytes_read == mball.report(settled).bytes_read_last_pass
    assert again != good


def test_operators_that_come_unannounced_are_there_too(tmp_path: Path) -> None:
    plain, model = make(Layers), make(Layers)
    wrap_hostile(model, int(weight_bytes(model) * 0.8), swap_dir=tmp_path, capture="operators")
    for _ in range(4):
        run(model, call)
    assert_same(run(model, lambda m: m(X, extra=True)), run(plain, lambda m: m(X, extra=True)))
    computes = timeline_of(model).of(Lane.COMPUTE)
    assert [(span.name, span.step) for span in computes if span.step is None] == [
        ("extra.weight + 1 more, not planned", None)
    ]
    assert len(computes) == 7
    assert all(before.end_s <= after.start_s for before, after in itertools.pairwise(computes))


def test_plans_that_change_in_a_pass_name_the_steps_after_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(Pieces)
    wrap_hostile(model, int(weight_bytes(model) * 0.6), swap_dir=tmp_path)
    names: list[str] = []
    plans: list[int] = []
    enter = Execution.enter

    def noted(self: Execution, step: int) -> Any:
        assert self.plan is not None
        names.append(engine_of(model).trace.steps[self.plan.steps[step].first].name)
        plans.append(id(self.plan))
        return enter(self, step)

    monkeypatch.setattr(Execution, "enter", noted)
    changed = 0
    for rows in (2, 3, 5, 9, 9):
        names.clear()
        plans.clear()
        run(model, lambda m, rows=rows: m(noise(rows, 64)))
        changed += len(set(plans)) > 1
        spans = timeline_of(model).of(Lane.COMPUTE)
        assert [span.name.split(" + ")[0] for span in spans] == names
    assert changed, "every pass had one plan, so nothing was shown"


def test_the_public_function_writes_files(settled: Any, tmp_path: Path) -> None:
    path = mball.timeline(settled, tmp_path / "trace.json")
    assert path == tmp_path / "trace.json"
    trace = json.loads(path.read_text())
    lanes = {event["cat"] for event in trace["traceEvents"] if event["ph"] == "X"}
    assert lanes == {"compute", "stalls", "reads"}
    assert trace["otherData"]["bytes_read"] == mball.report(settled).bytes_read_last_pass


def test_without_a_pass_there_is_no_timeline(tmp_path: Path) -> None:
    with pytest.raises(WrapError, match="not wrapped"):
        mball.timeline(make(Layers), tmp_path / "t.json")
    model = wrapped(tmp_path, "graphs")
    before = set(tmp_path.iterdir())
    with pytest.raises(WrapError, match="call the model once"):
        mball.timeline(model, tmp_path / "t.json")
    assert set(tmp_path.iterdir()) == before
