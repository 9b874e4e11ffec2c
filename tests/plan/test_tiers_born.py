"""What is born in a pass and leaves over two links: it is offloaded to host memory, beside what comes from disk."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mball.errors import BudgetError, PlanError
from mball.plan import explain, make_plan, simulate, smallest_budget, smallest_host_budget, validate
from mball.plan.chain import run_chain
from mball.plan.simulate import offloaded_bytes
from mball.schema import LiveRange, Machine, Plan, Tensor, Trace, Treatment
from mball.units import KIB, MIB
from tests.plan.chain_replay import ChainReplay
from tests.plan.test_tiers import machines, one_link, two_links
from tests.plan.traces import PAGE_BYTES, make_machine, make_step, make_training, make_weights

OFFLOAD = (Treatment.STAY, Treatment.OFFLOAD)
ANEW = (Treatment.STAY, Treatment.RECOMPUTE)
BOTH = (Treatment.STAY, Treatment.OFFLOAD, Treatment.RECOMPUTE)


def planned(trace: Trace, machine: Machine, budget: int, host_bytes: int, previous: Plan | None = None) -> Plan:
    plan = make_plan(trace, machine, budget, host_budget_bytes=host_bytes, previous=previous)
    validate(trace, plan, machine)
    host = plan.host
    assert host is not None
    assert max(offloaded_bytes(plan)) == host.offloaded_bytes
    assert host.arena_bytes + host.offloaded_bytes <= host_bytes
    assert simulate(trace, plan, machine).prediction == plan.prediction
    if host.transfers:
        chain = run_chain(trace, plan, machine)
        follow = ChainReplay(trace, plan, machine, len(chain.pass_ends_s) + trace.cyclic)
        assert follow.pass_ends_s[: len(chain.pass_ends_s)] == pytest.approx(chain.pass_ends_s, rel=1e-9)
        follow.follow_bytes()
        steady = len(chain.pass_ends_s) - 1
        start_s = chain.pass_ends_s[-2] if steady else 0.0
        for number, timing in enumerate(chain.writes):
            span = follow.spans["write"][steady * len(plan.offloads) + number]
            assert (timing.start_s + start_s, timing.end_s + start_s) == pytest.approx(span, rel=1e-9, abs=1e-12)
    return plan


@st.composite
def trainings(draw: st.DrawFn) -> Trace:
    may = draw(st.sampled_from([OFFLOAD, OFFLOAD, ANEW, BOTH]))
    trace = make_training(
        draw(st.integers(1, 5)),
        draw(st.sampled_from([0, 100_000, 400_000])),
        draw(st.sampled_from([50_000, 300_000])),
        time_s=draw(st.sampled_from([0.0, 1e-4, 2e-3])),
        may=may,
        recompute_s=draw(st.sampled_from([1e-5, 1e-2])) if Treatment.RECOMPUTE in may else None,
    )
    return replace(trace, cyclic=draw(st.sampled_from([True, True, False])))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trace=trainings(), machine=machines, device=st.floats(0, 0.8), host=st.floats(0, 0.8), more=st.floats(0, 0.5))
def test_training_over_two_links(trace: Trace, machine: Machine, device: float, host: float, more: float) -> None:
    total = sum(tensor.size_bytes for tensor in trace.tensors)
    budget = smallest_budget(trace, machine).size_bytes + int(device * total)
    host_bytes = smallest_host_budget(trace, machine, budget).size_bytes + int(host * total)
    plan = planned(trace, machine, budget, host_bytes)
    assert make_plan(trace, machine, budget, host_budget_bytes=host_bytes) == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.host is not None
    event(f"offloads: {bool(plan.offloads)}, reads from disk: {bool(plan.host.transfers)}")
    # More memory at either level is no worse from there on.
    for other in ((budget, host_bytes + int(more * total)), (budget + int(more * total), host_bytes)):
        grown = planned(trace, machine, *other, previous=plan)
        assert grown.prediction.pass_s <= plan.prediction.pass_s * (1 + 1e-3)


# Worked out by hand: a step takes 10 ms, and a page 1 ms over the link, which copies and writes share, and from disk.
PAGE = 4096
BY_HAND = Trace(
    name="t",
    tensors=(
        *make_weights([2 * PAGE, PAGE], start_bytes=0),
        replace(Tensor.activation("a", size_bytes=PAGE, live=LiveRange(first=0, end=3)), may=OFFLOAD),
    ),
    steps=(make_step("s0", time_s=10e-3), make_step("s1", 0, time_s=10e-3), make_step("s2", 1, 2, time_s=10e-3)),
)
SLOW = two_links(link=PAGE / 1e-3, disk=PAGE / 1e-3, link_latency_s=0.0, disk_latency_s=0.0)


def test_a_write_takes_its_turn_on_the_link_and_its_room_in_host_memory() -> None:
    plan = planned(BY_HAND, SLOW, 2 * PAGE, 3 * PAGE)
    assert plan.host is not None
    # One page for the tensor, and the rest is the slot through which both weights come.
    assert (plan.host.offloaded_bytes, plan.host.arena_bytes) == (PAGE, 2 * PAGE)
    assert offloaded_bytes(plan) == [0, PAGE, PAGE]
    simulation = simulate(BY_HAND, plan, SLOW)
    # The tensor leaves from 10 to 11 ms, the first weight comes until 13, the other and the tensor from 23 to 25.
    assert [(step.start_s, step.end_s) for step in simulation.steps] == [
        pytest.approx((0.0, 10e-3)),
        pytest.approx((13e-3, 23e-3)),
        pytest.approx((25e-3, 35e-3)),
    ]
    assert [(write.start_s, write.end_s) for write in simulation.offloads] == [pytest.approx((10e-3, 11e-3))]
    assert simulation.steps[0].write_s == pytest.approx(1e-3)
    assert simulation.pass_s == pytest.approx(35e-3)
    assert plan.prediction.stall_s == pytest.approx(5e-3)
    assert simulation.peak_offloaded_bytes == PAGE
    assert explain(BY_HAND, plan, SLOW).below is not None


def test_too_little_host_memory_names_what_is_offloaded_and_what_works() -> None:
    assert smallest_host_budget(BY_HAND, SLOW, 2 * PAGE).size_bytes == 3 * PAGE
    with pytest.raises(BudgetError, match=r"12288 B\) of host memory, because 4\.00 KiB of what is born") as caught:
        make_plan(BY_HAND, SLOW, 2 * PAGE, host_budget_bytes=3 * PAGE - 1)
    assert caught.value.smallest_bytes == 3 * PAGE
    # With another page on the device the tensor stays beside the first weight.
    assert smallest_host_budget(BY_HAND, SLOW, 3 * PAGE).size_bytes < 3 * PAGE


def test_what_can_be_made_anew_needs_no_host_memory() -> None:
    tensor = replace(BY_HAND.tensors[2], may=BOTH, recompute_s=3e-3)
    trace = replace(BY_HAND, tensors=(*BY_HAND.tensors[:2], tensor))
    assert smallest_host_budget(trace, SLOW, 2 * PAGE).size_bytes == 2 * PAGE
    plan = planned(trace, SLOW, 2 * PAGE, 2 * PAGE)
    assert not plan.offloads
    assert [made.step for made in plan.made if made.is_anew] == [2]
    offloading = planned(trace, SLOW, 2 * PAGE, 3 * PAGE)
    assert offloading.offloads, "a millisecond each way is less than three"
    assert offloading.prediction.pass_s < plan.prediction.pass_s


@pytest.mark.parametrize("write", [None, 1e10])
def test_host_memory_goes_to_weights_where_tensors_can_stay(write: float | None) -> None:
    # With the tensors that would leave at will there are 2 MiB for weights, and each pass would wait for the disk.
    trace = make_training(12, MIB, 2 * MIB)
    machine = two_links(link=1e10, disk=1e9, write=write)
    free = planned(trace, machine, 20 * MIB, 40 * MIB)
    tight = planned(trace, machine, 20 * MIB, 10 * MIB)
    assert free.host is not None
    assert tight.host is not None
    assert tight.host.offloaded_bytes < free.host.offloaded_bytes
    assert tight.prediction.pass_s <= 1.05 * free.prediction.pass_s


def test_a_disk_that_is_not_read_changes_nothing() -> None:
    trace = make_training(8, 512 * KIB, MIB)
    machine = two_links(link=2e9, link_latency_s=0.0)
    plan = planned(trace, machine, 6 * MIB, 64 * MIB)
    alone = make_plan(trace, one_link(machine), 6 * MIB)
    assert plan.host is not None
    assert not plan.host.transfers
    assert plan.offloads
    assert (plan.transfers, plan.made, plan.offloads) == (alone.transfers, alone.made, alone.offloads)
    assert plan.prediction == alone.prediction


def test_the_smallest_device_is_that_of_one_link() -> None:
    trace = make_training(8, MIB, MIB)
    machine = two_links()
    smallest = smallest_budget(trace, machine).size_bytes
    assert smallest == smallest_budget(trace, one_link(machine)).size_bytes <= 2 * MIB + 4 * PAGE_BYTES
    plan = planned(trace, machine, smallest, smallest_host_budget(trace, machine, smallest).size_bytes)
    assert len(plan.offloads) == 7  # the last one is read at once


def test_an_explanation_says_what_host_memory_is_for() -> None:
    trace, machine = make_training(12, MIB, 2 * MIB), two_links(link=1e10, disk=1e9)
    plan = planned(trace, machine, 14 * MIB, 20 * MIB)
    found = explain(trace, plan, machine)
    assert plan.host is not None
    assert found.below is not None
    assert found.below.offloaded_bytes == found.offloaded_peak_bytes == plan.host.offloaded_bytes > 0
    assert len(found.offloaded) == len(plan.offloads)
    assert sum(stall.stall_s for stall in found.stalls) == pytest.approx(found.prediction.stall_s)


def test_room_that_is_missing_or_too_much_is_refused() -> None:
    trace, machine = make_training(6, MIB, 2 * MIB), two_links(link=1e10, disk=1e9)
    plan = planned(trace, machine, 8 * MIB, 12 * MIB)
    host = plan.host
    assert host is not None
    assert host.offloaded_bytes
    less = replace(host, offloaded_bytes=host.offloaded_bytes - 1)
    with pytest.raises(PlanError, match=f"take {host.offloaded_bytes} B of host memory"):
        validate(trace, replace(plan, host=less), machine)
    tight = replace(host, budget_bytes=host.arena_bytes + host.offloaded_bytes - 1)
    with pytest.raises(PlanError, match="exceed the budget of host memory by 1 B"):
        validate(trace, replace(plan, host=tight), machine)


def test_what_was_offloaded_is_on_no_disk() -> None:
    trace, machine = make_training(6, MIB, 2 * MIB), two_links(link=1e10, disk=1e9)
    plan = planned(trace, machine, 8 * MIB, 12 * MIB)
    host = plan.host
    assert host is not None
    number = next(number for number, each in enumerate(plan.transfers) if not plan.bundles[each.bundle].extents)
    read = replace(host.transfers[0], bundle=plan.transfers[number].bundle, after=number - 1, needed_by=number)
    read = replace(read, last_use=number)
    reads = tuple(sorted((*host.transfers, read), key=lambda each: (each.after, each.needed_by)))
    with pytest.raises(PlanError, match="nothing on disk that could fill it"):
        validate(trace, replace(plan, host=replace(host, transfers=reads)), machine)


def test_machines_of_one_link_have_no_room_of_host_memory_to_set_aside() -> None:
    plan = make_plan(make_training(6, MIB, 2 * MIB), make_machine(), 8 * MIB)
    assert plan.offloads
    assert plan.host is None
