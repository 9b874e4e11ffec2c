"""Plans are made anew with what passes really took."""

from __future__ import annotations

import logging
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import mball
from mball.run.correction import FIRST_PASSES, Correction, Measured, Verdict, busy_s
from mball.schema import Link, Machine, Prediction
from tests.calibrations import keep_calibration
from tests.preads import SetPreadv
from tests.run.harness import assert_same, engine_of, make, run, weight_bytes
from tests.run.zoo import noise

TAPE = ("graph",)
MACHINE = Machine(name="t", page_bytes=4096, alignment_bytes=4096, link=Link(bandwidth_bytes_per_s=1e9, latency_s=1e-4))
PREDICTION = Prediction(pass_s=1.0, compute_s=0.5, stall_s=0.5, streamed_bytes=10**9, roofline_s=1.0)


def measured(wall_s: float, *, compute_s: float = 0.5, bandwidth: float = 1e9) -> Measured:
    """Of a pass that waits."""
    return Measured(wall_s=wall_s, compute_s=compute_s, read_bytes=10**9, busy_s=1e9 / bandwidth)


@pytest.fixture
def correction() -> Correction:
    found = Correction(lambda: MACHINE)
    found.adopted()
    return found


def note(correction: Correction, count: int, each: Measured, prediction: Prediction = PREDICTION) -> list[bool]:
    """Returns after which of so many passes plans are made anew."""
    return [verdict is Verdict.ANOTHER_PLAN for verdict in verdicts(correction, count, each, prediction)]


def verdicts(correction: Correction, count: int, each: Measured, prediction: Prediction = PREDICTION) -> list[Verdict]:
    return [correction.note(TAPE, prediction, prediction.pass_s, each) for _ in range(count)]


def test_a_plan_that_was_right_stays(correction: Correction) -> None:
    assert not any(note(correction, 50, measured(1.14)))
    assert correction() == MACHINE
    assert correction.slower(TAPE) == 1.0


def test_a_slower_link_is_learned_after_a_few_steady_passes(correction: Correction) -> None:
    slow = measured(2.0, bandwidth=0.5e9)
    # The first pass of a plan brings the residents.
    assert note(correction, FIRST_PASSES + 1, slow) == [False] * FIRST_PASSES + [True]
    assert correction().link.bandwidth_bytes_per_s == 0.5e9
    assert correction().link.latency_s == MACHINE.link.latency_s
    assert correction.slower(TAPE) == 1.0


def test_slower_compute_is_learned_for_the_pass_it_was_seen_in(correction: Correction) -> None:
    assert note(correction, FIRST_PASSES + 1, measured(2.0, compute_s=1.5))[-1]
    assert correction.slower(TAPE) == 3.0
    assert correction.slower(("other",)) == 1.0
    correction.adopted()
    # Of three times the compute, as the next plan has it, half: and it takes twice as many passes to be believed.
    wrong = Prediction(pass_s=2.0, compute_s=1.5, stall_s=0.5, streamed_bytes=10**9, roofline_s=1.5)
    found = note(correction, 2 * FIRST_PASSES + 1, measured(1.0, compute_s=0.75), wrong)
    assert found == [False] * (2 * FIRST_PASSES) + [True]
    assert correction.slower(TAPE) == 1.5
    correction.forget({"graph"})
    assert correction.slower(TAPE) == 1.0, "its steps were measured anew"


def test_a_single_slow_pass_changes_nothing(correction: Correction) -> None:
    for wall_s in (9.0, 1.0, 9.0, 1.0, 1.0, 1.0):
        each = measured(wall_s, bandwidth=1e8 if wall_s > 1 else 1e9)
        assert correction.note(TAPE, PREDICTION, PREDICTION.pass_s, each) is Verdict.AS_PREDICTED


def test_a_plan_that_stays_is_timed_anew_by_what_the_last_passes_showed(correction: Correction) -> None:
    slower = measured(1.1, bandwidth=0.9e9)
    found = verdicts(correction, 2 * FIRST_PASSES + 1, slower)
    assert found[FIRST_PASSES] is Verdict.ANOTHER_TIME
    assert set(found[:FIRST_PASSES] + found[FIRST_PASSES + 1 :]) == {Verdict.AS_PREDICTED}, "nothing new was seen"
    machine, longer = correction.lately()
    assert machine.link.bandwidth_bytes_per_s == pytest.approx(0.9e9)
    assert longer == 1.0
    assert correction() == MACHINE, "plans are made for the machine as it was"
    # What is expected now is right, and then it is not.
    assert correction.note(TAPE, PREDICTION, 1.1, slower) is Verdict.AS_PREDICTED
    for _ in range(FIRST_PASSES - 1):
        correction.note(TAPE, PREDICTION, 1.1, measured(0.95))
    assert correction.lately()[0].link.bandwidth_bytes_per_s == pytest.approx(1e9)
    correction.adopted()
    assert correction.lately() == (MACHINE, 1.0)


def test_drifting_slowly_is_noticed_in_the_end(correction: Correction) -> None:
    """Though what is expected follows, the plan was made for another link."""

    def passes(percent: int) -> list[Verdict]:
        expected_s = 1e9 / correction.lately()[0].link.bandwidth_bytes_per_s
        each = measured(100 / percent, bandwidth=percent * 1e7)
        return [correction.note(TAPE, PREDICTION, expected_s, each) for _ in range(FIRST_PASSES)]

    note(correction, 1, measured(1.0))  # the first pass of a plan says nothing
    for percent in (95, 91, 87):
        assert Verdict.ANOTHER_PLAN not in passes(percent)
    assert correction.lately()[0].link.bandwidth_bytes_per_s == pytest.approx(0.87e9)
    assert Verdict.ANOTHER_PLAN in passes(82)


def test_what_is_off_for_another_reason_changes_nothing(correction: Correction) -> None:
    """Reads ran ahead in the user's own time between passes, say: link and compute are as they were."""
    assert not any(note(correction, 30, measured(0.5)))
    assert not any(note(correction, 30, measured(3.0)))


def test_short_passes_are_left_alone(correction: Correction) -> None:
    short = Prediction(pass_s=1e-3, compute_s=1e-3, stall_s=0.0, streamed_bytes=1, roofline_s=1e-3)
    assert not any(note(correction, 30, measured(5e-3, compute_s=5e-3), short))


def test_a_pass_that_waits_for_no_read_says_nothing_of_the_link(correction: Correction) -> None:
    assert note(correction, FIRST_PASSES + 1, measured(2.0, compute_s=1.95, bandwidth=1e7))[-1]
    assert correction() == MACHINE
    assert correction.slower(TAPE) == pytest.approx(3.9)


def test_a_machine_that_was_measured_anew_is_believed() -> None:
    machines = [MACHINE]
    correction = Correction(lambda: machines[-1])
    correction.adopted()
    assert note(correction, FIRST_PASSES + 1, measured(2.0, bandwidth=0.5e9))[-1]
    assert correction().link.bandwidth_bytes_per_s == 0.5e9
    machines.append(replace(MACHINE, link=replace(MACHINE.link, bandwidth_bytes_per_s=3e9)))
    assert correction() == machines[-1]


def test_busy_time_counts_each_moment_once() -> None:
    assert busy_s([]) == 0.0
    assert busy_s([(3.0, 4.0), (0.0, 2.0), (1.0, 2.5), (1.1, 1.2)]) == pytest.approx(3.5)


@pytest.mark.alone
def test_a_disk_that_became_slow_is_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_preadv: SetPreadv, caplog: pytest.LogCaptureFixture
) -> None:
    def layers() -> nn.Module:
        return nn.Sequential(*(nn.Linear(512, 512) for _ in range(12)))

    # Measured while something else reads, the disk would seem slow from the start.
    keep_calibration(tmp_path, Link(bandwidth_bytes_per_s=1.5e9, latency_s=1e-4), monkeypatch)
    model, plain = make(layers), make(layers)
    mball.wrap(model, weight_bytes(model) // 2, swap_dir=tmp_path, capture="graphs")
    x = noise(2, 512)
    expected = run(plain, lambda m: m(x))
    preadv = os.preadv

    def slow(descriptor: int, buffers: Any, offset: int) -> int:
        time.sleep(0.025)
        return preadv(descriptor, buffers, offset)

    set_preadv(slow)
    engine = engine_of(model)
    with caplog.at_level(logging.INFO, logger="mball"):
        for _ in range(4):
            run(model, lambda m: m(x))
        report = mball.report(model)
        assert report.predicted_s is not None
        assert report.predicted_s < 0.3 * report.pass_s, "as the disk was when the model was wrapped"
        for _ in range(2 * FIRST_PASSES):
            assert_same(run(model, lambda m: m(x)), expected)
    assert "planning anew with a link of" in caplog.text
    report = mball.report(model)
    assert report.predicted_s is not None
    times = []
    for _ in range(5):
        run(model, lambda m: m(x))
        times.append(mball.report(model).pass_s)
    # Of each request's own delay the model of the link knows little.
    assert 0.4 < report.predicted_s / statistics.median(times) < 1.6
    assert f"predicted {report.predicted_s * 1e3:.1f} ms" in str(report)
    corrected = engine.plans._plan.keywords["machine"]().link.bandwidth_bytes_per_s
    assert corrected < 0.7 * report.link_bytes_per_s, "the report's yardstick stays"


@pytest.mark.alone
def test_a_plan_that_stays_is_predicted_as_the_disk_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_preadv: SetPreadv
) -> None:
    monkeypatch.setattr("mball.run.correction.LARGEST_ERROR", 1e9)
    keep_calibration(tmp_path, Link(bandwidth_bytes_per_s=1.5e9, latency_s=1e-4), monkeypatch)
    model = make(lambda: nn.Sequential(*(nn.Linear(512, 512) for _ in range(12))))
    mball.wrap(model, weight_bytes(model) // 2, swap_dir=tmp_path, capture="graphs")
    x = noise(2, 512)
    preadv = os.preadv

    def slow(descriptor: int, buffers: Any, offset: int) -> int:
        time.sleep(0.025)
        return preadv(descriptor, buffers, offset)

    set_preadv(slow)
    for _ in range(4):
        run(model, lambda m: m(x))
    plan, first_s = engine_of(model).plan, mball.report(model).predicted_s
    times = []
    for _ in range(2 * FIRST_PASSES):
        run(model, lambda m: m(x))
        times.append(mball.report(model).pass_s)
    assert engine_of(model).plan is plan
    now_s = mball.report(model).predicted_s
    assert first_s is not None
    assert now_s is not None
    assert first_s < 0.3 * statistics.median(times)
    assert 0.4 < now_s / statistics.median(times) < 1.6
