"""The simulation against schedules worked out by hand."""

from __future__ import annotations

import pytest

from mball.plan import make_plan, simulate
from mball.schema import Bundle, Extent, Link, Plan, PlanStep, Prediction, Trace, Transfer
from tests.plan.traces import make_machine, make_step, make_weights

NOTHING = Prediction(pass_s=0.0, compute_s=0.0, stall_s=0.0, streamed_bytes=0, roofline_s=0.0)


def two_steps(first_after: int, second_after: int, *, offset: int) -> tuple[Trace, Plan]:
    """Two steps of 10 ms, each with a bundle that takes 4 ms + 1 ms latency."""
    trace = Trace(
        name="t",
        tensors=make_weights([4096, 4096]),
        steps=(make_step("a", 0, time_s=10e-3), make_step("b", 1, time_s=10e-3)),
    )
    bundles = tuple(
        Bundle(
            tensors=(n,),
            offsets_bytes=(0,),
            extents=(Extent(file="f", offset_bytes=n * 4096, size_bytes=4096, slot_offset_bytes=0),),
            size_bytes=4096,
        )
        for n in range(2)
    )
    transfers = [
        Transfer(bundle=0, offset_bytes=0, after=first_after, needed_by=0, last_use=0),
        Transfer(bundle=1, offset_bytes=offset, after=second_after, needed_by=1, last_use=1),
    ]
    plan = Plan(
        trace_name="t",
        budget_bytes=8192,
        fixed_bytes=0,
        activation_bytes=0,
        arena_bytes=offset + 4096,
        bundles=bundles,
        steps=(PlanStep(first=0, end=1, reads=(0,)), PlanStep(first=1, end=2, reads=(1,))),
        residents=(),
        transfers=tuple(transfers),
        prediction=NOTHING,
    )
    return trace, plan


SLOW = make_machine(bandwidth=4096 / 4e-3, latency_s=1e-3)


def test_synchronous_transfers_add_to_the_compute() -> None:
    trace, plan = two_steps(-1, 0, offset=0)
    simulation = simulate(trace, plan, SLOW)
    assert simulation.pass_s == pytest.approx(30e-3)
    assert [(step.start_s, step.end_s, step.stall_s) for step in simulation.steps] == [
        pytest.approx((5e-3, 15e-3, 5e-3)),
        pytest.approx((20e-3, 30e-3, 5e-3)),
    ]
    assert simulation.peak_arena_bytes == 4096
    prediction = simulation.prediction
    assert (prediction.compute_s, prediction.stall_s) == (pytest.approx(20e-3), pytest.approx(10e-3))
    assert prediction.streamed_bytes == 8192
    assert prediction.roofline_s == pytest.approx(20e-3)


def test_transfers_with_lead_hide_behind_the_compute() -> None:
    trace, plan = two_steps(-2, -1, offset=4096)
    simulation = simulate(trace, plan, SLOW)
    assert simulation.pass_s == pytest.approx(20e-3)
    assert simulation.peak_arena_bytes == 8192


def test_a_link_slower_than_the_compute_sets_the_pace() -> None:
    trace, plan = two_steps(-2, -1, offset=4096)
    machine = make_machine(bandwidth=4096 / 40e-3, latency_s=0.0)
    simulation = simulate(trace, plan, machine)
    # Each slot is filled (40 ms), used (10 ms) and filled again; the one link serves the two in turn.
    assert simulation.pass_s == pytest.approx(80e-3)
    assert simulation.prediction.roofline_s == pytest.approx(80e-3)


def test_the_end_of_a_transfer_waits_for_what_shares_the_link_with_it() -> None:
    trace, plan = two_steps(-2, -1, offset=4096)
    busy = make_machine(bandwidth=4096 / 20e-3, latency_s=0.0)
    assert simulate(trace, plan, busy).pass_s == pytest.approx(40e-3)
    # Three quarters of a bundle share the link. While `a` runs the second bundle is served; the first one, asked for at
    # the end of `a`, delays it by 15 ms. `b` then ends 5 ms after the first bundle is served: the link idles so long.
    shared = make_machine(bandwidth=4096 / 20e-3, latency_s=0.0, window_bytes=3072)
    assert simulate(trace, plan, shared).pass_s == pytest.approx(45e-3)
    alone = make_machine(bandwidth=4096 / 4e-3, latency_s=1e-3, window_bytes=1024)
    one_by_one = two_steps(-1, 0, offset=0)
    assert simulate(*one_by_one, alone).pass_s == simulate(*one_by_one, SLOW).pass_s, "nothing is behind a bundle"


def test_transfers_queue_on_one_link() -> None:
    trace = Trace(name="t", tensors=make_weights([4096] * 2, gap_bytes=100_000), steps=(make_step("s", 0, 1),))
    machine = make_machine(bandwidth=1e6, latency_s=0.0)
    plan = make_plan(trace, machine, 16384 + 4096)
    assert plan.transfers == ()
    assert simulate(trace, plan, machine).pass_s == pytest.approx(1e-3)
    assert Link(bandwidth_bytes_per_s=1e6, latency_s=1e-3).transfer_s(1000) == pytest.approx(2e-3)


def test_an_empty_pass_takes_no_time() -> None:
    trace = Trace(name="t", tensors=make_weights([10]), steps=())
    plan = make_plan(trace, SLOW, 1)
    assert simulate(trace, plan, SLOW).pass_s == 0
