"""What is said of a pass is what happened in it, and in no other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import mball
from mball.run.pass_meter import PassEnd
from mball.units import MIB
from tests.run.harness import engine_of, make, run, weight_bytes, wrap_hostile
from tests.run.zoo import noise


def layers() -> nn.Module:
    return nn.Sequential(*(nn.Linear(128, 128) for _ in range(6)))


@pytest.fixture(params=["graphs", "operators"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    model = make(layers)
    wrap_hostile(model, weight_bytes(model) // 2, swap_dir=tmp_path, capture=request.param)
    yield model
    mball.unwrap(model)


def test_passes_add_up_to_what_was_done_in_all(model: Any) -> None:
    engine = engine_of(model)
    counters, meter = engine.execution.counters, engine.meter
    read, stalled, unplanned = 0, 0.0, 0
    for number in range(1, 5):
        began_s = time.perf_counter()
        run(model, lambda m: m(noise(2, 128)))
        assert 0 <= meter.last.stall_s < meter.last.wall_s < time.perf_counter() - began_s
        assert meter.last.bytes_read > 0
        read += meter.last.bytes_read
        stalled += meter.last.stall_s
        unplanned += meter.last.unplanned_fetches
        assert meter.passes == number
    assert (read, unplanned) == (counters.bytes_read, counters.unplanned_fetches)
    assert stalled == pytest.approx(counters.stall_s) != 0


def test_a_pass_that_fails_is_not_counted(model: Any) -> None:
    meter = engine_of(model).meter
    run(model, lambda m: m(noise(2, 128)))
    before = meter.last
    with pytest.raises(RuntimeError, match=r"same reduction dim|cannot be multiplied"):
        run(model, lambda m: m(noise(2, 64)))
    assert meter.passes == 1
    assert meter.last is before


def test_homes_that_were_in_memory_are_counted_in_their_pass_only(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    meter = engine_of(model).meter
    meter.begin()
    meter.note_in_place(3 * MIB)
    meter.note_in_place(MIB)
    meter.end(PassEnd(time.perf_counter(), 2 * MIB))
    assert meter.last.in_place_bytes == 6 * MIB
    assert [message for message in caplog.messages if message.startswith("6.00 MiB of weights were read in place")]
    meter.begin()
    meter.end(PassEnd(time.perf_counter(), 0))
    assert meter.last.in_place_bytes == 0
