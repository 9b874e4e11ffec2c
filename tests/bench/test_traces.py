"""Recorded traces, and the page that compares policies on them."""

from __future__ import annotations

import gzip
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import traces
from bench.traces import record as recording
from bench.traces.compare import (
    OWN,
    PAGE,
    SETTINGS,
    Comparison,
    Point,
    baselines,
    bound_s,
    budgets,
    compare,
    line,
    page,
    read_bytes,
    slower,
)
from bench.traces.record import portable
from bench.traces.subjects import Subject, decode
from mball.errors import BudgetError, SchemaError
from mball.plan import make_plan, smallest_budget
from mball.schema import Kind, Machine, Plan, Trace
from mball.trace.profile import TimeProfile, _Profile
from tests.plan.traces import make_chain, make_machine, make_step, make_weights

# The one whose plans are made fastest.
QUICKEST = "t5-base-encode"


# -- the fixtures --------------------------------------------------------------------------------------------------


def test_what_was_recorded() -> None:
    assert set(traces.names()) == {
        "convnext-large",
        "gemma3-270m-decode",
        "llama-1b-decode",
        "llama-1b-prefill",
        "mixtral-8x90m-decode",
        "resnet-152",
        "smollm2-135m-decode",
        "swin-large",
        "t5-base-decode",
        "t5-base-encode",
        "vit-large",
    }


@pytest.mark.parametrize("name", traces.names())
def test_a_fixture_is_a_whole_pass_of_measured_graph_steps(name: str) -> None:
    trace = traces.load(name)
    trace.check()
    assert trace.name == name
    assert trace.cyclic
    in_graphs = [step for step in trace.steps if step.graph is not None]
    assert len(in_graphs) == len(trace.steps) > 50, "all of it was captured"
    assert all(step.time_s is not None and step.time_s > 0 for step in in_graphs)
    # Of a mixture of experts torch counts no operations.
    assert sum(step.flops for step in in_graphs) > read_bytes(trace) / 16
    assert any(tensor.kind is Kind.ACTIVATION for tensor in trace.tensors)
    assert read_bytes(trace) > 200e6


@pytest.mark.parametrize("name", traces.names())
def test_a_fixture_is_small_and_says_nothing_of_the_machine(name: str) -> None:
    trace = traces.load(name)
    files = {tensor.home.file for _, tensor in trace.homed() if tensor.home is not None}
    assert files
    assert files <= {"model.safetensors", "swap-0"}, (
        "transformers converts experts, so mball wrote those to its swap file"
    )
    assert (traces.RECORDED / f"{name}.json.gz").stat().st_size < 150_000


def test_loading_needs_no_torch() -> None:
    code = "import sys; from bench import traces; traces.load(traces.names()[0]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PAGE.parent, check=False).returncode == 0


def test_a_trace_is_what_was_saved_and_its_file_always_the_same(tmp_path: Path) -> None:
    trace = make_chain(3, 4096)
    content = traces.save(trace, "one", tmp_path).read_bytes()
    assert traces.names(tmp_path) == ("one",)
    assert traces.load("one", tmp_path) == trace
    assert traces.save(trace, "two", tmp_path).read_bytes() == content


def test_a_trace_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"no trace 'other' was recorded; there are .*swin-large"):
        traces.load("other")
    whole = gzip.compress(b"{}")
    for content in (b"no gzip", whole[:-9], gzip.compress(b"\xff")):
        (tmp_path / "bad.json.gz").write_bytes(content)
        with pytest.raises(SchemaError, match=r"bad\.json\.gz' is damaged"):
            traces.load("bad", tmp_path)


def test_a_recorded_trace_leaves_its_folders_behind() -> None:
    chain = make_chain(2, 4096)
    homes = [replace(tensor.home, file="/home/someone/model.safetensors") for _, tensor in chain.homed() if tensor.home]
    recorded = replace(
        chain, tensors=tuple(replace(t, home=home) for t, home in zip(chain.tensors, homes, strict=True))
    )
    found = portable(recorded, "other")
    assert found.name == "other"
    assert [tensor.home.file for _, tensor in found.homed() if tensor.home] == ["model.safetensors"] * 2
    assert "someone" not in found.to_json()


def test_recording_takes_the_least_of_the_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "TIMING_S", 0.0)
    subject = Subject(
        model_class=LlamaForCausalLM,
        config=lambda: LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=256,
            tie_word_embeddings=True,
        ),
        dtype=torch.bfloat16,
        passes={"tiny": decode(8)},
    )
    # The first time a step is measured it takes 3 s, then 1 s, then 2 s.
    measured: dict[int, int] = {}

    def finish(self: TimeProfile) -> None:
        _Profile.finish(self)
        for step in self.steps:
            measured[id(step)] = measured.get(id(step), -1) + 1
            step.time_s = (3.0, 1.0, 2.0)[measured[id(step)] % 3]

    monkeypatch.setattr(TimeProfile, "finish", finish)
    trace = recording.record(subject, tmp_path)["tiny"]
    assert set(measured.values()) == {recording.LEAST_TIMINGS - 1}
    assert {step.time_s for step in trace.steps} == {1.0}
    assert trace.name == "tiny"
    assert [tensor.home.file for _, tensor in trace.homed() if tensor.home] == ["model.safetensors"] * 20
    embedding = next(number for number, tensor in trace.homed() if "embed" in tensor.name)
    assert [embedding in step.reads for step in trace.steps] == [True, *[False] * (len(trace.steps) - 2), True]


# -- the comparison ------------------------------------------------------------------------------------------------


def test_budgets_rise_from_the_smallest_that_works() -> None:
    trace, machine = make_chain(10, 1 << 20), make_machine()
    found = budgets(trace, machine)
    assert found[0] == smallest_budget(trace, machine).size_bytes
    assert all(one < other for one, other in pairwise(found))
    assert found[-1] == 10 * (1 << 20) * 90 // 100


def test_weights_that_no_step_reads_do_not_count() -> None:
    trace = Trace(name="t", tensors=make_weights([4096, 8192]), steps=(make_step("a", 1), make_step("b", 1)))
    assert read_bytes(trace) == 8192


def test_the_bound_is_compute_or_what_has_to_be_read() -> None:
    trace, machine = make_chain(4, 1_000_000, time_s=1e-3), make_machine(bandwidth=1e9)
    assert bound_s(trace, machine, 10_000_000) == pytest.approx(4e-3)
    assert bound_s(trace, make_machine(bandwidth=1e8), 1_000_000) == pytest.approx(30e-3)


def test_a_faster_machine_computes_faster_and_reads_the_same() -> None:
    setting = next(setting for setting in SETTINGS if setting.faster == 20)
    trace = make_chain(4, 4096, time_s=2e-3)
    assert [step.time_s for step in setting.at_its_speed(trace).steps] == [pytest.approx(1e-4)] * 4
    unmeasured = replace(trace, steps=tuple(replace(step, time_s=None) for step in trace.steps))
    assert setting.at_its_speed(unmeasured) == unmeasured


def _comparison(*times: tuple[float, float | None]) -> Comparison:
    points = [
        Point(budget_bytes=1 << number, bound_s=1.0, pass_s={OWN: own, "other": other})
        for number, (own, other) in enumerate(times)
    ]
    return Comparison(trace=QUICKEST, setting="here", points=tuple(points))


def test_a_line_shows_the_median_and_the_least_margin() -> None:
    found = _comparison((2.0, 2.0), (1.0, 3.0), (4.0, 6.0), (1.0, None))
    assert line(found, ["other"]) == [QUICKEST, "here", "1.50 (4.00)", "1.50 (1.00), 1 of 4 do not fit"]
    assert line(_comparison((2.0, None)), ["other"])[-1] == "1 of 1 do not fit"


def test_where_mball_is_slower_is_said() -> None:
    found = _comparison((2.0, 2.0), (2.0, 1.5), (2.0, 2.0 - 1e-12), (2.0, None))
    ((_, point, planner),) = slower([found], ["other"])
    assert (point.budget_bytes, planner) == (2, "other")
    text = page([found])
    assert "In 1 of 3 pairs of plans." in text
    assert f"| {QUICKEST} | here | 2 B | other | 0.7500 |" in text
    assert "| budget |" not in page([_comparison((1.0, 2.0))])


def test_a_planner_that_refuses_a_budget_does_not_fit_and_one_that_cheats_is_found() -> None:
    def refuse(trace: Trace, machine: Machine, budget_bytes: int) -> Plan:
        if budget_bytes < read_bytes(trace) // 2:
            raise BudgetError("too small", budget_bytes=budget_bytes, smallest_bytes=0, limited_by="")
        return make_plan(trace, machine, budget_bytes)

    found = compare(QUICKEST, SETTINGS[0], {"refuse": refuse})
    margins = [point.margin("refuse") for point in found.points]
    assert None in margins
    assert {margin for margin in margins if margin is not None} == {1.0}

    def cheat(trace: Trace, machine: Machine, budget_bytes: int) -> Plan:
        return make_plan(trace, machine, 2 * budget_bytes)

    with pytest.raises(AssertionError, match="more memory"):
        compare(QUICKEST, SETTINGS[0], {"cheat": cheat})


# -- the page ------------------------------------------------------------------------------------------------------


def _table(text: str, heading: str) -> list[list[str]]:
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [row for row in part.splitlines() if row.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in lines]


def test_the_page_has_a_line_for_each_trace_and_machine_and_a_column_for_each_policy() -> None:
    head, _, *rows = _table(PAGE.read_text(encoding="utf-8"), "Margins")
    assert head == ["trace", "machine", "÷ bound", *sorted(baselines())]
    expected = [(name, setting.name) for name, setting in product(traces.names(), SETTINGS)]
    assert [(row[0], row[1]) for row in rows] == expected, "run `python -m bench.traces.compare`"


def test_the_page_says_what_the_planners_do() -> None:
    _, _, *rows = _table(PAGE.read_text(encoding="utf-8"), "Margins")
    planners = sorted(baselines())
    for setting in SETTINGS:
        expected = line(compare(QUICKEST, setting, baselines()), planners)
        found = next(row for row in rows if row[:2] == expected[:2])
        assert found == expected, "run `python -m bench.traces.compare`; the page is not written by hand"


def test_no_plan_beats_the_bound() -> None:
    for row in _table(PAGE.read_text(encoding="utf-8"), "Margins")[2:]:
        assert float(row[2].split()[0]) >= 1.0
