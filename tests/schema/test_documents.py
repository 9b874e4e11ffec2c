"""Traces, plans and machines as JSON: round trips, other versions, and contradictions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from mball.errors import SchemaError
from mball.plan import make_plan
from mball.schema import (
    CalibratedLink,
    Calibration,
    Home,
    Lane,
    Link,
    LinkSample,
    LiveRange,
    Machine,
    Plan,
    Tensor,
    Tier,
    Trace,
)
from mball.schema.document import Document
from tests.plan.traces import machines, make_chain, make_machine, traces

TRACE = make_chain(3, 1000)
MACHINE = make_machine()
PLAN = make_plan(TRACE, MACHINE, 5000)
SAMPLE = LinkSample(block_bytes=4096, depth=2, bandwidth_bytes_per_s=1e9, latency_s=1e-5, spread=0.1)
CALIBRATED = CalibratedLink(
    link=Link(bandwidth_bytes_per_s=1e9, latency_s=1e-5),
    reader="r",
    num_threads=8,
    chunk_bytes=1 << 21,
    file_bytes=1 << 20,
    num_rounds=3,
    spread=0.2,
    block_bytes=4096,
    depth=2,
    samples=(SAMPLE,),
)
CALIBRATION = Calibration(host="h", place="p", measured_at="2026-11-21T20:00:00+00:00", links=(CALIBRATED,))
DOCUMENTS: list[Document] = [TRACE, MACHINE, PLAN, CALIBRATION]


def with_link(**changes: Any) -> Calibration:
    return replace(CALIBRATION, links=(replace(CALIBRATED, **changes),))


@settings(max_examples=60, deadline=None)
@given(trace=traces(), machine=machines)
def test_any_trace_and_machine_survive_json(trace: Trace, machine: Machine) -> None:
    assert Trace.from_json(trace.to_json()) == trace
    assert Machine.from_json(machine.to_json()) == machine


def edited(document: Document, **changes: Any) -> str:
    return json.dumps({**json.loads(document.to_json()), **changes})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: type(document).__name__)
class TestEveryDocument:
    def test_equal_documents_give_equal_text(self, document: Document) -> None:
        again = type(document).from_json(document.to_json())
        assert again == document
        assert again.to_json() == document.to_json()

    def test_a_version_from_the_future_is_refused_by_name(self, document: Document) -> None:
        with pytest.raises(SchemaError, match="version 99"):
            type(document).from_json(edited(document, version=99, unknown=1))

    def test_an_unknown_field_is_refused(self, document: Document) -> None:
        with pytest.raises(SchemaError, match=r"unknown fields.*surprise"):
            type(document).from_json(edited(document, surprise=1))

    def test_a_missing_field_is_refused(self, document: Document) -> None:
        data = json.loads(document.to_json())
        data.pop(next(name for name in ("name", "trace_name", "host") if name in data))
        with pytest.raises(SchemaError, match="lacks"):
            type(document).from_json(json.dumps(data))

    @pytest.mark.parametrize("text", ["", "{", "[]", "7", "null"])
    def test_other_text_is_refused(self, document: Document, text: str) -> None:
        with pytest.raises(SchemaError):
            type(document).from_json(text)


def test_a_wrong_type_names_its_place() -> None:
    data = json.loads(TRACE.to_json())
    data["steps"][1]["reads"] = ["0"]
    with pytest.raises(SchemaError, match=r"steps\[1\]\.reads\[0\] must be int"):
        Trace.from_json(json.dumps(data))


def test_a_bool_is_no_number() -> None:
    with pytest.raises(SchemaError, match="must be int"):
        Machine.from_json(edited(MACHINE, page_bytes=True))


def test_a_whole_number_is_a_float_where_one_is_meant() -> None:
    machine = Machine.from_json(edited(MACHINE, link={"bandwidth_bytes_per_s": 5, "latency_s": 0}))
    assert machine.link.bandwidth_bytes_per_s == 5.0


def with_step(**changes: Any) -> Trace:
    return replace(TRACE, steps=(replace(TRACE.steps[0], **changes), *TRACE.steps[1:]))


def with_weight(**changes: Any) -> Trace:
    return replace(TRACE, tensors=(replace(TRACE.tensors[0], **changes), *TRACE.tensors[1:]))


def with_activation(first: int, end: int, size_bytes: int = 1) -> Trace:
    live = LiveRange(first=first, end=end)
    return replace(
        TRACE,
        tensors=(
            *TRACE.tensors,
            Tensor.activation("a", size_bytes=size_bytes, live=live),
        ),
    )


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (with_step(reads=(3,)), "uses tensor 3; there are 3"),
        (with_step(reads=(-1,)), "uses tensor -1"),
        (with_step(reads=(1, 1)), "appears twice"),
        (with_step(scratch_bytes=-1), "must not be negative"),
        (with_step(flops=-1), "must not be negative"),
        (with_step(time_s=-0.1), "must not be negative"),
        (with_step(time_s=float("inf")), "nor infinite"),
        (with_weight(size_bytes=-1), "must not be negative"),
        (with_weight(home=Home(tier=Tier.DISK, file="f", offset_bytes=-1)), "must not be negative"),
        (with_weight(shape=(2, -1)), "must not be negative"),
        (with_weight(name="w1"), "'w1' appears twice"),
        (with_activation(2, 2), r"lives in steps \[2, 2\)"),
        (with_activation(0, 4), r"the pass has steps \[0, 3\)"),
        (with_activation(0, 1, -1), "-1 B"),
        (replace(MACHINE, page_bytes=0), "must divide the page"),
        (replace(MACHINE, alignment_bytes=3000), "must divide the page"),
        (replace(MACHINE, link=replace(MACHINE.link, bandwidth_bytes_per_s=0.0)), "must be positive"),
        (replace(MACHINE, link=replace(MACHINE.link, latency_s=-1.0)), "not negative"),
        (replace(MACHINE, link=replace(MACHINE.link, latency_s=float("inf"))), "all finite"),
        (replace(MACHINE, link=replace(MACHINE.link, bandwidth_bytes_per_s=float("inf"))), "all finite"),
        (replace(MACHINE, host_bandwidth_bytes_per_s=0.0), "must be positive"),
        (replace(PLAN, bundles=()), "names bundle 0 of 0"),
        (replace(PLAN, version=1), "version 1"),
        (replace(TRACE, version=1), "version 1"),
        (replace(MACHINE, version=1), "version 1"),
    ],
)
def test_a_contradiction_is_refused(document: Document, reason: str) -> None:
    with pytest.raises(SchemaError, match=reason):
        document.check()
    with pytest.raises(SchemaError, match=reason):
        type(document).from_json(document.to_json())


def test_activations_are_summed_by_live_range() -> None:
    trace = replace(
        with_step(scratch_bytes=5),
        tensors=(
            Tensor.activation("a", size_bytes=10, live=LiveRange(first=0, end=2)),
            Tensor.activation("b", size_bytes=100, live=LiveRange(first=1, end=3)),
        ),
    )
    assert trace.activation_bytes() == [15, 110, 100]
    assert 1 in LiveRange(first=0, end=2)
    assert 2 not in LiveRange(first=0, end=2)


def test_what_is_on_the_host_lane_takes_no_room_on_the_device() -> None:
    first, *others = with_step(scratch_bytes=5).steps
    trace = replace(
        TRACE,
        steps=(replace(first, lane=Lane.HOST, reads=(0,), writes=(0,)), *others),
        tensors=(
            TRACE.tensors[0],
            Tensor.activation("below", size_bytes=10, live=LiveRange(first=0, end=2)),
            Tensor.activation("above", size_bytes=100, live=LiveRange(first=1, end=3)),
        ),
    )
    assert trace.activation_bytes() == [0, 100, 100]
    assert trace.needs()[0] == ()
    assert [trace.is_born_below(tensor) for tensor in trace.tensors] == [False, True, False]


def test_what_a_step_on_the_device_writes_must_be_there() -> None:
    assert with_step(reads=(1,), writes=(2, 1)).needs()[0] == (1, 2)


def test_a_plan_is_itself_after_json() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (replace(CALIBRATION, measured_at="lately"), "'lately' is no ISO 8601 time"),
        (replace(CALIBRATION, measured_at="2026-11-21T20:00:00"), "with its offset to UTC"),
        (replace(CALIBRATION, links=()), "each of its links joins two tiers"),
        (replace(CALIBRATION, links=(CALIBRATED, CALIBRATED)), "no two links the same two"),
        (with_link(link=Link(bandwidth_bytes_per_s=float("nan"), latency_s=0.0)), "positive number of bytes a second"),
        (with_link(link=Link(bandwidth_bytes_per_s=float("inf"), latency_s=0.0)), "positive number of bytes a second"),
        (with_link(link=Link(bandwidth_bytes_per_s=1.0, latency_s=-1.0)), "latency or spread is negative"),
        (with_link(spread=-0.1), "latency or spread is negative"),
        (with_link(samples=(SAMPLE, SAMPLE)), "no two samples have the same"),
        (with_link(depth=3), "4096 B with 3 in flight, was not measured"),
        (with_link(num_rounds=0), "its rounds cannot be"),
        (with_link(num_threads=65), "no reader makes 65 requests of 2097152 B"),
        (with_link(chunk_bytes=5000), "no reader makes 8 requests of 5000 B"),
    ],
)
def test_what_cannot_have_been_measured_is_refused(calibration: Calibration, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        Calibration.from_json(calibration.to_json())


def test_a_calibration_holds_links_between_several_tiers() -> None:
    written = replace(CALIBRATED.link, source=Tier.DEVICE, target=Tier.DISK)
    both = replace(CALIBRATION, links=(CALIBRATED, replace(CALIBRATED, link=written)))
    again = Calibration.from_json(both.to_json())
    assert again.find_link(Tier.DEVICE, Tier.DISK).link == written
    assert again.find_link(Tier.DISK, Tier.DEVICE) == CALIBRATED
    assert again.find_link(Tier.HOST, Tier.DEVICE) is None
