"""Host memory and the device planned together, for bundles that come from disk through host memory."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mball.errors import BudgetError, ConfigError, SchemaError
from mball.plan import lay_out_bundle, make_plan, simulate, smallest_budget, smallest_host_budget, validate
from mball.plan.baselines import BASELINES
from mball.plan.chain import disk_bytes, run_chain
from mball.plan.host import host_partition
from mball.plan.problem import Problem
from mball.plan.search import CLOSE, best_draft, partitions
from mball.plan.simulate import simulate as simulate_link
from mball.schema import HostPlan, Link, Machine, Plan, Tier, Trace, Treatment
from mball.units import KIB, MIB
from tests.plan.chain_replay import ChainReplay
from tests.plan.traces import (
    PAGE_BYTES,
    make_chain,
    make_gathering,
    make_machine,
    make_step,
    make_tied,
    make_training,
    make_weights,
    traces,
)

few = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])

Chance = random.Random


def two_links(
    *,
    page_bytes: int = PAGE_BYTES,
    link: float = 20e9,
    disk: float = 2e9,
    link_latency_s: float = 1e-5,
    disk_latency_s: float = 1e-4,
    disk_window_bytes: int = 0,
    write: float | None = None,
) -> Machine:
    """`write` is of a link of its own for what is offloaded; None: it shares the one from host memory."""
    out = None
    if write is not None:
        out = Link(bandwidth_bytes_per_s=write, latency_s=link_latency_s, source=Tier.DEVICE, target=Tier.HOST)
    return replace(
        make_machine(page_bytes=page_bytes),
        write_link=out,
        link=Link(bandwidth_bytes_per_s=link, latency_s=link_latency_s, source=Tier.HOST),
        disk_link=Link(
            bandwidth_bytes_per_s=disk,
            latency_s=disk_latency_s,
            window_bytes=disk_window_bytes,
            source=Tier.DISK,
            target=Tier.HOST,
        ),
    )


def streamed_weights(trace: Trace) -> Trace:
    """The same pass if no rows were read at home, which take as long as the disk takes, and nothing were written."""
    tensors = tuple(
        replace(tensor, may=(Treatment.STAY, Treatment.STREAM)) if tensor.home else tensor for tensor in trace.tensors
    )
    return replace(trace, tensors=tensors, steps=tuple(replace(step, writes=()) for step in trace.steps))


def one_link(machine: Machine) -> Machine:
    """The same machine if homes were where host memory is."""
    out = machine.write_link and replace(machine.write_link, target=Tier.DISK)
    return replace(machine, link=replace(machine.link, source=Tier.DISK), write_link=out, disk_link=None)


machines = st.builds(
    two_links,
    page_bytes=st.sampled_from([512, 4096, 65536]),
    link=st.sampled_from([3e7, 1e9, 2e10]),
    disk=st.sampled_from([1e7, 1e9, 5e10]),
    link_latency_s=st.sampled_from([1e-6, 1e-4]),
    disk_latency_s=st.sampled_from([1e-6, 1e-3]),
    write=st.sampled_from([None, None, 1e8]),
)
shares = st.floats(0, 1.1)


def total_bytes(trace: Trace) -> int:
    return sum(tensor.size_bytes for _, tensor in trace.homed())


def budgets_of(trace: Trace, machine: Machine, device: float, host: float) -> tuple[int, int]:
    budget = smallest_budget(trace, machine).size_bytes + int(device * total_bytes(trace))
    return budget, smallest_host_budget(trace, machine, budget).size_bytes + int(host * total_bytes(trace))


def bound_s(trace: Trace, machine: Machine, budget_bytes: int, host_bytes: int) -> float:
    """A time that no plan beats: what neither level can hold on its link."""
    read = {index for step in trace.steps for index in step.reads}
    weights = sum(tensor.size_bytes for index, tensor in trace.homed() if index in read)
    stays = max(trace.activation_bytes({index for index, _ in trace.movable()}), default=0)
    left = weights - budget_bytes + stays if trace.cyclic else weights
    below = left - host_bytes if trace.cyclic else weights
    assert machine.disk_link is not None
    return max(left / machine.link.bandwidth_bytes_per_s, below / machine.disk_link.bandwidth_bytes_per_s)


# -- what every plan promises --------------------------------------------------------------------------------------


@few
@given(trace=traces(writing=False), machine=machines, device=shares, host=shares)
def test_every_pair_of_budgets_gives_a_valid_plan(trace: Trace, machine: Machine, device: float, host: float) -> None:
    budget, host_bytes = budgets_of(trace, machine, device, host)
    plan = make_plan(trace, machine, budget, host_budget_bytes=host_bytes)
    validate(trace, plan, machine)
    validate(trace, plan)
    assert plan.host is not None
    assert plan.host.arena_bytes + plan.host.offloaded_bytes <= host_bytes
    simulation = simulate(trace, plan, machine)
    assert simulation.prediction == plan.prediction
    assert simulation.host is not None
    assert simulation.host.peak_arena_bytes <= plan.host.arena_bytes
    assert simulation.peak_offloaded_bytes == plan.host.offloaded_bytes
    assert simulation.peak_arena_bytes <= plan.arena_bytes
    assert simulation.host.streamed_bytes == disk_bytes(plan)
    assert len(simulation.host.transfers) == len(plan.host.transfers)
    assert len(simulation.transfers) == len(plan.transfers)
    prediction = plan.prediction
    write_s = sum(each.end_s - each.start_s for each in simulation.offloads)
    lanes_s = [simulation.link_s + write_s] if machine.write_link is None else [simulation.link_s, write_s]
    assert prediction.roofline_s == pytest.approx(max(prediction.compute_s, *lanes_s, simulation.host.disk_s))
    assert prediction.pass_s >= bound_s(trace, machine, budget, host_bytes) * (1 - 1e-9)
    assert Plan.from_json(plan.to_json()) == plan
    assert make_plan(trace, machine, budget, host_budget_bytes=host_bytes) == plan
    event(f"reads from disk: {bool(plan.host.transfers)}, offloads: {bool(plan.offloads)}")


@few
@given(trace=traces(max_steps=9, writing=False), machine=machines, device=shares, host=shares)
def test_a_replay_of_the_bytes_agrees_with_the_simulation(
    trace: Trace, machine: Machine, device: float, host: float
) -> None:
    budget, host_bytes = budgets_of(trace, machine, device * 0.7, host * 0.5)
    plan = make_plan(trace, machine, budget, host_budget_bytes=host_bytes)
    assert plan.host is not None
    if not plan.host.transfers:
        return
    chain = run_chain(trace, plan, machine)
    replay = ChainReplay(trace, plan, machine, len(chain.pass_ends_s) + trace.cyclic)
    assert replay.pass_ends_s[: len(chain.pass_ends_s)] == pytest.approx(chain.pass_ends_s, rel=1e-9)
    replay.follow_bytes()
    event(f"offloads: {bool(plan.offloads)}, on the link of the copies: {machine.write_link is None}")
    # The steady pass and its transfers are those of the replay too.
    steady = len(chain.pass_ends_s) - 1
    start_s = chain.pass_ends_s[-2] if steady else 0.0
    for number, (transfer, copy) in enumerate(zip(plan.transfers, chain.copies, strict=True)):
        turn = steady + (transfer.after < 0 and trace.cyclic)
        begin_s, end_s = replay.spans["copy"][turn * len(plan.transfers) + number]
        assert (copy.start_s + start_s, copy.end_s + start_s) == pytest.approx((begin_s, end_s), rel=1e-9, abs=1e-12)
    for number, (each, read) in enumerate(zip(plan.host.transfers, chain.reads, strict=True)):
        turn = steady + (plan.transfers[each.needed_by].after < 0 and trace.cyclic)
        begin_s, end_s = replay.spans["read"][turn * len(plan.host.transfers) + number]
        assert (read.start_s + start_s, read.end_s + start_s) == pytest.approx((begin_s, end_s), rel=1e-9, abs=1e-12)
        assert read.end_s <= chain.copies[each.needed_by].start_s + 1e-9, "a copy begins when its bundle is there"


@few
@given(trace=traces(writing=False), machine=machines, device=shares)
def test_host_memory_that_holds_all_weights_is_as_good_as_a_home(trace: Trace, machine: Machine, device: float) -> None:
    trace = replace(streamed_weights(trace), cyclic=True)
    budget, _ = budgets_of(trace, machine, device, 0)
    ample = sum(tensor.size_bytes for tensor in trace.tensors) + 3 * machine.page_bytes * len(trace.tensors)
    plan = make_plan(trace, machine, budget, host_budget_bytes=max(ample, budget))
    alone = make_plan(trace, one_link(machine), budget)
    assert plan.host is not None
    assert plan.host.transfers == ()
    if any(trace.movable()):  # more ways are tried over two links, until one is close to what no plan beats
        assert plan.prediction.pass_s <= CLOSE * alone.prediction.pass_s
    else:
        assert (plan.residents, plan.transfers, plan.prediction) == (alone.residents, alone.transfers, alone.prediction)


@few
@given(trace=traces(writing=False), machine=machines, host=shares)
def test_a_device_that_holds_all_reads_nothing(trace: Trace, machine: Machine, host: float) -> None:
    trace = replace(streamed_weights(trace), cyclic=True)
    budget = total_bytes(trace) + 3 * machine.page_bytes * len(trace.tensors) + max(trace.activation_bytes(), default=0)
    assert smallest_host_budget(trace, machine, budget).size_bytes == 0
    plan = make_plan(trace, machine, budget, host_budget_bytes=int(host * total_bytes(trace)))
    assert plan.transfers == ()
    assert plan.host == HostPlan(budget_bytes=int(host * total_bytes(trace)), arena_bytes=0, residents=(), transfers=())


@few
@given(trace=traces(writing=False), machine=machines, device=shares)
def test_the_smallest_host_budget_is_exact(trace: Trace, machine: Machine, device: float) -> None:
    budget, smallest = budgets_of(trace, machine, device, 0)
    plan = make_plan(trace, machine, budget, host_budget_bytes=smallest)
    validate(trace, plan, machine)
    if not smallest:
        return
    for less in (1, machine.page_bytes):
        with pytest.raises(BudgetError, match="of host memory") as caught:
            make_plan(trace, machine, budget, host_budget_bytes=smallest - less)
        assert caught.value.smallest_bytes == smallest
        assert str(smallest) in str(caught.value)


@few
@given(trace=traces(writing=False), machine=machines, device=shares)
def test_no_smaller_host_budget_could_hold_what_has_to_come(trace: Trace, machine: Machine, device: float) -> None:
    budget, smallest = budgets_of(trace, machine, device, 0)
    movable = {index for index, _ in trace.movable()}
    room = budget - max(trace.activation_bytes(movable), default=0)
    alone = budget - max(trace.activation_bytes(), default=0)

    def least(sizes: list[int], room_bytes: int) -> int:
        """The largest that comes if as many of the largest as possible stay, whatever else it takes."""
        for limit in sorted({0, *sizes}):
            read = {index for needs in trace.needs() for index in needs}
            stay = {index for index in read if sizes[index] > limit}
            if stay and not trace.cyclic:
                continue
            comes = [sum(sizes[index] for index in needs if index not in stay) for needs in trace.needs()]
            if sum(sizes[index] for index in stay) + max(comes, default=0) <= room_bytes:
                return limit
        raise AssertionError("all may come")

    data = [tensor.size_bytes if tensor.home else 0 for tensor in trace.tensors]
    assert least(data, room) <= smallest, "not even without pages"
    slots = [lay_out_bundle([n], trace, machine).size_bytes if t.home else 0 for n, t in enumerate(trace.tensors)]
    needs = max((sum(slots[index] for index in needs) for needs in trace.needs()), default=0)
    if needs <= alone // machine.page_bytes * machine.page_bytes:
        assert smallest <= least(slots, alone // machine.page_bytes * machine.page_bytes), "each weight by itself fits"


@few
@given(trace=traces(writing=False), machine=machines, device=shares, window=st.sampled_from([0, 200_000]))
def test_a_disk_that_takes_no_time_is_as_good_as_none(
    trace: Trace, machine: Machine, device: float, window: int
) -> None:
    """Of passes that run once all comes from disk: with room for all, before its copy is asked for."""
    machine = replace(machine, link=replace(machine.link, window_bytes=window))
    assert machine.disk_link is not None
    machine = replace(machine, disk_link=replace(machine.disk_link, bandwidth_bytes_per_s=1e30, latency_s=0.0))
    trace = replace(streamed_weights(trace), cyclic=False)
    budget, _ = budgets_of(trace, machine, device, 0)
    ample = 20 * (total_bytes(trace) + 3 * machine.page_bytes * len(trace.tensors))
    plan = make_plan(trace, machine, budget, host_budget_bytes=ample)
    alone = simulate(trace, replace(plan, host=None), one_link(machine))
    chained = simulate(trace, plan, machine)
    assert chained.pass_s == pytest.approx(alone.pass_s)
    assert [each.end_s for each in chained.transfers] == pytest.approx([each.end_s for each in alone.transfers])
    assert [each.stall_s for each in chained.steps] == pytest.approx([each.stall_s for each in alone.steps], abs=1e-12)
    event(f"reads: {bool(plan.host and plan.host.transfers)}")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trace=traces(writing=False), machine=machines, device=shares, growing=st.lists(shares, min_size=2, max_size=4))
def test_growing_the_host_budget_never_predicts_a_slower_pass(
    trace: Trace, machine: Machine, device: float, growing: list[float]
) -> None:
    budget, smallest = budgets_of(trace, machine, device, 0)
    plans: list[Plan] = []
    for share in sorted(growing):
        host_bytes = smallest + int(share * total_bytes(trace))
        previous = plans[-1] if plans else None
        plans.append(make_plan(trace, machine, budget, host_budget_bytes=host_bytes, previous=previous))
        validate(trace, plans[-1], machine)
    for one, other in pairwise(plans):
        assert other.prediction.pass_s <= one.prediction.pass_s * (1 + 1e-3), "plans are compared by four digits"


# -- where the time goes -------------------------------------------------------------------------------------------

LAYER = 512 * KIB - PAGE_BYTES  # a page more for what begins within one
CHAIN = make_chain(600, LAYER, time_s=1e-6)


@pytest.mark.parametrize(("device", "host"), [(60, 200), (200, 60), (30, 30), (100, 250)])
def test_where_the_disk_is_slow_a_pass_takes_what_neither_level_holds(device: int, host: int) -> None:
    machine = two_links(link=20e9, disk=1e9, disk_latency_s=1e-5)
    plan = make_plan(CHAIN, machine, device * MIB // 2, host_budget_bytes=host * MIB // 2)
    at_best_s = bound_s(CHAIN, machine, device * MIB // 2, host * MIB // 2)
    assert at_best_s <= plan.prediction.pass_s <= 1.06 * at_best_s
    assert plan.host is not None
    # What stays is spread over the pass, on both levels: the disk has something to do in each part of it.
    steps = [plan.transfers[each.needed_by].needed_by * 5 // len(plan.steps) for each in plan.host.transfers]
    counts = Counter(steps)
    assert max(counts.values()) <= 1.25 * min(counts[fifth] for fifth in range(5))


@pytest.mark.parametrize(("device", "host"), [(60, 400), (200, 300)])
def test_where_the_link_is_slow_a_pass_takes_what_the_device_does_not_hold(device: int, host: int) -> None:
    machine = two_links(link=5e9, disk=4e9, disk_latency_s=1e-5)
    plan = make_plan(CHAIN, machine, device * MIB // 2, host_budget_bytes=host * MIB // 2)
    assert plan.host is not None
    assert plan.host.transfers
    at_best_s = bound_s(CHAIN, machine, device * MIB // 2, host * MIB // 2)
    assert at_best_s <= plan.prediction.pass_s <= 1.03 * at_best_s


def test_a_slot_in_host_memory_is_free_once_its_copy_has_ended() -> None:
    """Two weights, one slot of each memory, worked out by hand: a step takes 10 ms, a copy 1 ms, a read 5 ms."""
    trace = Trace(
        name="t",
        tensors=make_weights([4096, 4096], start_bytes=0),
        steps=(make_step("a", 0, time_s=10e-3), make_step("b", 1, time_s=10e-3)),
    )
    machine = two_links(link=4096 / 1e-3, disk=4096 / 5e-3, link_latency_s=0.0, disk_latency_s=0.0)
    plan = make_plan(trace, machine, 4096, host_budget_bytes=4096)
    simulation = simulate(trace, plan, machine)
    # While a step computes, the next bundle is read; only its copy has to wait for the step.
    assert simulation.pass_s == pytest.approx(22e-3)
    assert [step.stall_s for step in simulation.steps] == pytest.approx([1e-3, 1e-3])
    assert simulation.link_s == pytest.approx(2e-3)
    assert simulation.host is not None
    assert simulation.host.disk_s == pytest.approx(10e-3)
    assert simulation.host.peak_arena_bytes == 4096
    assert plan.prediction.roofline_s == pytest.approx(20e-3)
    slow = two_links(link=4096 / 1e-3, disk=4096 / 15e-3, link_latency_s=0.0, disk_latency_s=0.0)
    again = simulate(trace, make_plan(trace, slow, 4096, host_budget_bytes=4096), slow)
    assert again.pass_s == pytest.approx(32e-3), "read, copy, read, copy"


def test_reads_that_share_the_disk_land_later() -> None:
    machine = two_links(disk=1e9, disk_latency_s=1e-5)
    plan = make_plan(CHAIN, machine, 30 * MIB, host_budget_bytes=30 * MIB)
    shared = two_links(disk=1e9, disk_latency_s=1e-5, disk_window_bytes=4 * MIB)
    alone_s, shared_s = simulate(CHAIN, plan, machine).pass_s, simulate(CHAIN, plan, shared).pass_s
    assert alone_s <= shared_s <= 1.1 * alone_s


def test_the_same_budgets_move_nothing() -> None:
    machine = two_links()
    trace = make_tied(40, MIB, 5 * MIB)
    one = make_plan(trace, machine, 14 * MIB, host_budget_bytes=20 * MIB)
    other = make_plan(trace, machine, 14 * MIB, host_budget_bytes=20 * MIB, previous=one)
    assert one.host is not None
    assert other.host is not None
    assert one.residents
    assert one.host.residents
    assert other.residents == one.residents
    assert other.host.residents == one.host.residents


def test_what_was_in_host_memory_stays_there_first() -> None:
    machine = two_links()
    trace = make_chain(40, MIB)
    one = make_plan(trace, machine, 10 * MIB, host_budget_bytes=20 * MIB)
    other = make_plan(trace, machine, 10 * MIB, host_budget_bytes=21 * MIB, previous=one)
    validate(trace, other, machine)
    assert one.host is not None
    assert other.host is not None
    assert len(one.host.residents) >= 12
    assert set(one.host.residents) <= set(other.host.residents), "same bundles in the same places"


def test_less_host_memory_than_before_does_not_narrow_the_search() -> None:
    # Bundles of the plan before are larger than all of host memory now. Were they kept on the device, all would come
    # through one slot, 2.6 % slower.
    trace, machine = make_chain(40, 70 * KIB, time_s=1e-5), two_links(disk=5e9)
    ample = make_plan(trace, machine, 280 * KIB, host_budget_bytes=80 * 70 * KIB)
    largest = max(bundle.size_bytes for bundle in ample.bundles)
    few_bytes = smallest_host_budget(trace, machine, 280 * KIB).size_bytes
    assert few_bytes < largest
    fresh = make_plan(trace, machine, 280 * KIB, host_budget_bytes=few_bytes)
    after = make_plan(trace, machine, 280 * KIB, host_budget_bytes=few_bytes, previous=ample)
    validate(trace, after, machine)
    assert after.prediction.pass_s <= 1.01 * fresh.prediction.pass_s


# -- what is refused -----------------------------------------------------------------------------------------------


def test_a_host_budget_belongs_to_a_machine_with_a_link_from_disk() -> None:
    trace, machine = make_chain(4, MIB), two_links()
    with pytest.raises(ConfigError, match="has a disk_link: say how many bytes"):
        make_plan(trace, machine, 2 * MIB)
    with pytest.raises(ConfigError, match="has a disk_link"):
        make_plan(trace, machine, 2 * MIB, host_budget_bytes=-1)
    with pytest.raises(ConfigError, match="has no disk_link"):
        make_plan(trace, one_link(machine), 2 * MIB, host_budget_bytes=MIB)
    with pytest.raises(ConfigError, match="has no disk_link"):
        smallest_host_budget(trace, one_link(machine), 2 * MIB)


@pytest.mark.parametrize("name", BASELINES)
def test_policies_of_one_link_refuse_two(name: str) -> None:
    with pytest.raises(SchemaError, match="plans one link only"):
        BASELINES[name](make_chain(4, MIB), two_links(), 2 * MIB)


def test_homes_are_on_disk_where_bundles_come_from_there() -> None:
    trace, machine = make_chain(4, MIB), two_links()
    in_host = [replace(t, home=t.home and replace(t.home, tier=Tier.HOST)) for t in trace.tensors]
    with pytest.raises(SchemaError, match="begins at disk"):
        make_plan(replace(trace, tensors=tuple(in_host)), machine, 2 * MIB, host_budget_bytes=MIB)


def test_too_small_a_host_budget_names_the_one_that_works() -> None:
    trace = make_tied(6, MIB, 3 * MIB)
    machine = two_links()
    with pytest.raises(BudgetError, match=r"host budget 1\.00 MiB .* 3\.01 MiB on the device") as caught:
        make_plan(trace, machine, 3 * MIB + 2 * PAGE_BYTES, host_budget_bytes=MIB)
    assert caught.value.smallest_bytes >= 3 * MIB
    # With more on the device, the large one stays there.
    roomy = 4 * MIB + 6 * PAGE_BYTES
    assert smallest_host_budget(trace, machine, roomy).size_bytes < 2 * MIB
    plan = make_plan(trace, machine, roomy, host_budget_bytes=MIB + 2 * PAGE_BYTES)
    validate(trace, plan, machine)


def test_copies_have_the_time_that_rows_take_and_what_is_made_anew() -> None:
    machine = two_links(link=1e9, disk=1e8)
    rows = make_gathering(8, MIB, 64 * MIB, 8 * MIB)
    anew = make_training(8, MIB, MIB, may=(Treatment.STAY, Treatment.RECOMPUTE), recompute_s=5e-3)
    for trace, share in ((rows, 3), (anew, 6)):
        problem = Problem.of(trace, machine, share * MIB, fixed_bytes=0, moves_born=True, host_budget_bytes=64 * MIB)
        found = partitions(trace, machine, problem.arena_bytes, problem.born, problem.host_arena_bytes)
        draft = best_draft(found, problem.arena_bytes)
        assert draft is not None
        pass_s = simulate_link(trace, problem.plan(draft), machine).pass_s
        compute_s = sum(step.time_s or 0.0 for step in trace.steps)
        assert pass_s > compute_s + 0.02, "rows, or what is made anew"
        copies = host_partition(draft, machine).trace.steps
        assert sum(copy.time_s or 0.0 for copy in copies) == pytest.approx(pass_s)
