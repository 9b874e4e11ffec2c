"""What every plan promises, whatever the trace and the budget."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mball.plan
from mball.errors import BudgetError, ConfigError, PlanError, SchemaError
from mball.plan import make_plan, simulate, smallest_budget, validate
from mball.plan.bundles import finest_bundles
from mball.plan.draft import draft_plan
from mball.plan.partition import Partition
from mball.plan.search import best_draft, partitions
from mball.schema import Home, Lane, Machine, Plan, Step, Tier, Trace, Treatment
from mball.units import MIB, round_up
from tests.plan.traces import (
    PAGE_BYTES,
    machines,
    make_chain,
    make_host_machine,
    make_machine,
    make_step,
    make_tied,
    make_weights,
    traces,
)

few = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def total_bytes(trace: Trace) -> int:
    return sum(tensor.size_bytes for _, tensor in trace.homed())


@few
@given(trace=traces(), machine=machines, share=st.floats(0, 1.2), extra=st.integers(0, 9999), fixed=st.integers(0, 999))
def test_every_budget_from_the_smallest_gives_a_valid_plan(
    trace: Trace, machine: Machine, share: float, extra: int, fixed: int
) -> None:
    smallest = smallest_budget(trace, machine, fixed_bytes=fixed).size_bytes
    for budget in (smallest, smallest + int(share * total_bytes(trace)) + extra):
        plan = make_plan(trace, machine, budget, fixed_bytes=fixed)
        validate(trace, plan, machine)
        simulation = simulate(trace, plan, machine)
        assert simulation.peak_arena_bytes <= plan.arena_bytes
        assert plan.fixed_bytes + plan.activation_bytes + plan.arena_bytes <= budget
        assert simulation.prediction == plan.prediction
        assert plan.prediction.pass_s >= plan.prediction.compute_s
        assert Plan.from_json(plan.to_json()) == plan


@few
@given(trace=traces(), machine=machines, fixed=st.integers(0, 999))
def test_the_smallest_budget_is_exact(trace: Trace, machine: Machine, fixed: int) -> None:
    smallest = smallest_budget(trace, machine, fixed_bytes=fixed)
    make_plan(trace, machine, smallest.size_bytes, fixed_bytes=fixed)
    for less in (1, machine.page_bytes):
        with pytest.raises(BudgetError) as caught:
            make_plan(trace, machine, smallest.size_bytes - less, fixed_bytes=fixed)
        assert caught.value.smallest_bytes == smallest.size_bytes
        assert caught.value.limited_by == smallest.limited_by
        assert str(smallest.size_bytes) in str(caught.value)


@few
@given(trace=traces(), machine=machines)
def test_no_budget_below_the_smallest_could_hold_the_weights_of_its_step(trace: Trace, machine: Machine) -> None:
    smallest = smallest_budget(trace, machine)
    movable = dict(trace.movable())
    held = [
        {*needs, *(index for index in step.reads if index in movable)}
        | {index for index, tensor in movable.items() if tensor.live is not None and tensor.live.first == number}
        for number, (needs, step) in enumerate(zip(trace.needs(), trace.steps, strict=True))
    ]
    needs = [sum(trace.tensors[index].size_bytes for index in reads) for reads in held]
    singles = [
        sum(
            round_up(tensor.size_bytes + (tensor.home.offset_bytes % 512 if tensor.home else 0), machine.page_bytes)
            for tensor in (trace.tensors[index] for index in reads)
            if tensor.size_bytes
        )
        for reads in held
    ]
    activations = trace.activation_bytes(movable)
    least = max(needs, default=0) + max(activations, default=0)
    if movable:  # which may stay among the activations, where peaks of different steps do not add up
        least = max(map(sum, zip(needs, activations, strict=True)), default=0)
    assert least <= smallest.size_bytes <= max(singles, default=0) + max(activations, default=0)


def test_the_smallest_budget_names_its_step() -> None:
    trace = Trace(
        name="t",
        tensors=make_weights([10_000, 50_000, 9_000]),
        steps=(make_step("small", 0), make_step("lm_head", 1, 2, scratch=77), make_step("end")),
    )
    smallest = smallest_budget(trace, make_machine(), fixed_bytes=5)
    # Both weights are read by the same step and touch on disk, so they share their pages.
    assert smallest.size_bytes == 5 + 77 + round_up((1234 + 10_000) % 512 + 59_000, PAGE_BYTES)
    assert "'lm_head'" in smallest.limited_by


@few
@given(trace=traces(), machine=machines)
def test_everything_is_resident_when_it_fits(trace: Trace, machine: Machine) -> None:
    # A page and an over-read more for each weight is more than any layout of single weights takes.
    budget = (
        total_bytes(trace)
        + len(list(trace.homed())) * 3 * machine.page_bytes
        + max(trace.activation_bytes(), default=0)
        + len(list(trace.movable())) * machine.page_bytes
    )
    trace = replace(trace, steps=tuple(replace(step, writes=()) for step in trace.steps), cyclic=True)
    plan = make_plan(trace, machine, budget)
    validate(trace, plan, machine)
    assert plan.transfers == ()
    assert plan.prediction.stall_s == 0


def test_a_graph_that_fits_is_one_uncut_step() -> None:
    plan = make_plan(make_chain(12, MIB), make_machine(), 64 * MIB)
    assert [(step.first, step.end) for step in plan.steps] == [(0, 12)]


def test_merged_steps_never_cross_graphs_or_eager_operators() -> None:
    graphs = ["g", "g", "h", None, None, "g", "g"]
    steps = tuple(make_step(f"s{n}", n, graph=graph) for n, graph in enumerate(graphs))
    trace = Trace(name="t", tensors=make_weights([MIB] * 7), steps=steps)
    plan = make_plan(trace, make_machine(), 64 * MIB)
    assert [(step.first, step.end) for step in plan.steps] == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 7)]


@pytest.mark.parametrize("num_residents", [4, 8, 14])
def test_strided_residency_beats_a_resident_prefix(num_residents: int) -> None:
    num_layers = 24
    trace = make_chain(num_layers, MIB, time_s=1e-3)
    # Link and compute are equally busy: any moment in which one waits for the other is lost.
    machine = make_machine(bandwidth=(num_layers - num_residents) * MIB / (num_layers * 1e-3))
    partition = Partition.of(trace, machine, finest_bundles(trace, machine))
    slot = max(bundle.size_bytes for bundle in partition.demand.bundles)
    arena = (num_residents + 2) * slot
    prefix = draft_plan(partition, partition.uses.bundle < num_residents, arena)
    assert prefix is not None
    plan = make_plan(trace, machine, arena)
    assert plan.prediction.pass_s < 0.98 * prefix.prediction.pass_s


def test_residents_are_spread_over_the_pass() -> None:
    trace = make_chain(32, MIB)
    plan = make_plan(trace, make_machine(), 19 * MIB)
    resident = {w for placement in plan.residents for w in plan.bundles[placement.bundle].tensors}
    halves = [len([w for w in resident if w < 16]), len([w for w in resident if w >= 16])]
    assert len(resident) >= 12
    assert abs(halves[0] - halves[1]) <= 2


def test_transfers_run_ahead_across_the_end_of_the_pass() -> None:
    plan = make_plan(make_chain(21, MIB), make_machine(bandwidth=1.2e9), 6 * MIB)
    assert any(transfer.after < 0 for transfer in plan.transfers)
    # Link and compute need about the same time a layer, so a schedule without lead would take twice as long.
    assert plan.prediction.pass_s < 1.25 * plan.prediction.roofline_s


def test_the_link_never_waits_when_it_is_the_bottleneck() -> None:
    plan = make_plan(make_chain(23, MIB, time_s=1e-4), make_machine(latency_s=0.0), 8 * MIB)
    assert plan.prediction.streamed_bytes > 10 * MIB
    assert plan.prediction.pass_s < 1.05 * plan.prediction.roofline_s


def test_a_tied_embedding_stays_over_the_end_of_the_pass_and_comes_once() -> None:
    """The last step of a pass and the first of the next one read it: it may go in between, and comes once a pass."""
    trace, machine = make_tied(30, 4 * MIB, 24 * MIB), make_machine()
    for budget in (30 * MIB, 60 * MIB):
        plan = make_plan(trace, machine, budget)
        validate(trace, plan, machine)
        home = next(number for number, bundle in enumerate(plan.bundles) if 0 in bundle.tensors)
        assert plan.bundles[home].tensors == (0,)
        stays = home in {placement.bundle for placement in plan.residents}
        transfers = [transfer for transfer in plan.transfers if transfer.bundle == home]
        assert stays or [transfer.last_use for transfer in transfers] == [len(plan.steps)], budget
    assert plan.prediction.streamed_bytes < 1.2 * (30 * 4 + 24 - 60) * MIB


def test_what_comes_twice_a_pass_is_kept_before_what_comes_once() -> None:
    steps = [make_step(f"s{number}", number) for number in range(31)]
    steps.insert(16, make_step("again", 0))
    trace = Trace(name="twice", tensors=make_weights([4 * MIB] * 31), steps=tuple(steps))
    plan = make_plan(trace, make_machine(), 30 * MIB)
    assert 0 in {w for placement in plan.residents for w in plan.bundles[placement.bundle].tensors}


def test_one_huge_weight_stays_so_that_the_rest_needs_a_small_pool() -> None:
    steps = tuple(make_step(f"s{n}", n) for n in range(41))
    trace = Trace(name="t", tensors=make_weights([MIB] * 40 + [24 * MIB]), steps=steps)
    assert make_plan(trace, make_machine(), 30 * MIB).prediction.streamed_bytes < 45 * MIB


def test_a_slot_is_free_as_soon_as_its_last_reader_is_done() -> None:
    steps = tuple(make_step(f"s{n}", *([n // 3] if n % 3 == 0 else [])) for n in range(30))
    trace = Trace(name="t", tensors=make_weights([MIB] * 10), steps=steps)
    plan = make_plan(trace, make_machine(), smallest_budget(trace, make_machine()).size_bytes)
    assert plan.transfers
    for transfer in plan.transfers:
        last = plan.steps[transfer.last_use].end - 1
        assert set(trace.steps[last].reads) & set(plan.bundles[transfer.bundle].tensors)


def test_a_weight_comes_twice_when_it_cannot_stay() -> None:
    sizes = [24 * MIB] + [4 * MIB] * 6
    steps = [make_step(f"s{number}", weight) for number, weight in enumerate((0, 1, 2, 3, 0, 4, 5, 6))]
    trace, machine = Trace(name="twice", tensors=make_weights(sizes), steps=tuple(steps)), make_machine()
    plan = make_plan(trace, machine, smallest_budget(trace, machine).size_bytes)
    validate(trace, plan, machine)
    home = next(number for number, bundle in enumerate(plan.bundles) if 0 in bundle.tensors)
    assert len([transfer for transfer in plan.transfers if transfer.bundle == home]) == 2


def test_what_a_step_writes_is_brought_after_that() -> None:
    """As an optimizer's step does beside the device at the end of a pass: no copy is older than what it wrote."""
    steps = [make_step(f"s{number}", number) for number in range(8)]
    steps.append(replace(make_step("optimizer"), writes=(1, 2), lane=Lane.HOST))
    weights = [replace(w, home=Home(tier=Tier.HOST, file="f", offset_bytes=0)) for w in make_weights([MIB] * 8)]
    weights = [replace(w, home=replace(w.home, offset_bytes=n * MIB)) for n, w in enumerate(weights) if w.home]
    trace, machine = Trace(name="written", tensors=tuple(weights), steps=tuple(steps)), make_host_machine()
    for budget in (2 * MIB, 4 * MIB, 64 * MIB):
        plan = make_plan(trace, machine, budget + 8 * PAGE_BYTES)
        validate(trace, plan, machine)
        home = {weight: number for number, bundle in enumerate(plan.bundles) for weight in bundle.tensors}
        residents = {placement.bundle for placement in plan.residents}
        for weight in (1, 2):
            assert home[weight] not in residents
            afters = [transfer.after for transfer in plan.transfers if transfer.bundle == home[weight]]
            assert min(afters) >= -1, "the last step of the pass before writes it"
    assert len(residents) == 6, "the rest stays"
    early = replace(plan.transfers[0], after=-2)
    assert early.bundle in (home[1], home[2])
    with pytest.raises(PlanError, match="writes it"):
        validate(trace, replace(plan, transfers=(early, *plan.transfers[1:])), machine)


def test_a_small_weight_that_is_written_spoils_no_bundles() -> None:
    """Norms and biases share a bundle that stays. With one that a step writes it comes anew; the rest is as ever."""
    steps = [make_step(f"s{number}", number, number + 12) for number in range(12)]
    steps[-1] = replace(steps[-1], writes=(12,))
    trace = Trace(name="small", tensors=make_weights([MIB] * 12 + [1000] * 12), steps=tuple(steps))
    machine = make_machine()
    candidates = list(partitions(trace, machine, 8 * MIB))
    assert all(partition.demand.pooled for partition in candidates)
    assert best_draft(candidates, 8 * MIB) is not None
    validate(trace, make_plan(trace, machine, 8 * MIB), machine)


def test_homes_elsewhere_are_refused() -> None:
    trace, machine = make_chain(3, MIB), make_machine()
    stuck = replace(trace.tensors[0], may=(Treatment.STAY,))
    with pytest.raises(SchemaError, match="'w0' may stay; this mball plans tensors that may stay and stream"):
        make_plan(replace(trace, tensors=(stuck, *trace.tensors[1:])), machine, 8 * MIB)
    pinned = replace(trace.tensors[0], home=Home(tier=Tier.HOST, file="f", offset_bytes=0))
    with pytest.raises(SchemaError, match=r"home on tier host; the link .* begins at disk"):
        make_plan(replace(trace, tensors=(pinned, *trace.tensors[1:])), machine, 8 * MIB)


def test_weights_that_are_never_read_take_no_memory() -> None:
    trace = Trace(name="t", tensors=make_weights([MIB, 3 * MIB, MIB]), steps=(make_step("s", 0),))
    plan = make_plan(trace, make_machine(), 2 * MIB)
    validate(trace, plan, make_machine())
    used = {b for step in plan.steps for b in step.reads} | {p.bundle for p in plan.residents}
    assert {w for b in used for w in plan.bundles[b].tensors} == {0}


def test_shared_layers_are_bundled_and_used_again() -> None:
    steps = tuple(make_step(f"s{n}", n % 4) for n in range(24))
    trace = Trace(name="albert", tensors=make_weights([MIB] * 4), steps=steps)
    machine = make_machine()
    for budget in range(smallest_budget(trace, machine).size_bytes, 6 * MIB, MIB // 2):
        validate(trace, make_plan(trace, machine, budget), machine)


def test_more_memory_never_costs_much_time() -> None:
    trace, machine = make_chain(40, MIB), make_machine()
    times = [make_plan(trace, machine, mib * MIB).prediction.pass_s for mib in range(2, 46, 2)]
    assert all(later <= 1.05 * earlier for earlier, later in pairwise(times))
    assert times[-1] < times[0]


@few
@given(trace=traces(), machine=machines, extra=st.integers(0, 2_000_000))
def test_the_same_input_gives_the_same_bytes(trace: Trace, machine: Machine, extra: int) -> None:
    budget = smallest_budget(trace, machine).size_bytes + extra
    again = Trace.from_json(trace.to_json())
    assert make_plan(trace, machine, budget).to_json() == make_plan(again, machine, budget).to_json()


def test_fixed_memory_must_not_be_negative() -> None:
    with pytest.raises(ConfigError, match="fixed_bytes is -1"):
        make_plan(make_chain(1, 10), make_machine(), MIB, fixed_bytes=-1)


def test_what_has_no_bytes_is_in_nobodys_way() -> None:
    steps = [make_step("s0"), make_step("s1", 1, 3), make_step("s2", 0, 1, 2)]
    trace = Trace(name="t", tensors=make_weights([0, 60_000, 60_000, 1]), steps=tuple(steps), cyclic=False)
    changed = replace(trace, steps=(replace(steps[0], writes=(0,)), *steps[1:]))
    machine = make_machine(page_bytes=512, bandwidth=1e7, latency_s=0.0)
    budget = smallest_budget(trace, machine).size_bytes
    assert smallest_budget(changed, machine).size_bytes == budget
    plan = make_plan(changed, machine, budget)
    validate(changed, plan, machine)
    assert plan.prediction.streamed_bytes == make_plan(trace, machine, budget).prediction.streamed_bytes


def test_unmeasured_steps_are_planned() -> None:
    steps = tuple(Step(name=f"s{n}", graph="g", reads=(n,), scratch_bytes=0, flops=0, time_s=None) for n in range(9))
    trace = Trace(name="t", tensors=make_weights([MIB] * 9), steps=steps)
    plan = make_plan(trace, make_machine(), 4 * MIB)
    assert 0 < plan.prediction.compute_s < plan.prediction.pass_s


@pytest.mark.alone
@pytest.mark.usefixtures("settled_heap")
def test_a_large_trace_is_planned_in_seconds() -> None:
    trace = make_chain(1500, 300_000)
    start = time.process_time()
    plan = make_plan(trace, make_machine(), 150 * MIB)
    assert time.process_time() - start < 5
    validate(trace, plan, make_machine())


@pytest.mark.alone
@pytest.mark.usefixtures("settled_heap")
def test_planning_time_grows_about_as_the_trace_does() -> None:
    def planning_s(num_layers: int) -> float:
        # Uneven sizes, each too large to share a bundle, under a budget of a quarter.
        sizes = [32 * MIB + 4096 * (number * 7919 % 9973) for number in range(num_layers)]
        steps = [make_step(f"s{number}", number, time_s=5e-4 + number % 7 * 5e-4) for number in range(num_layers)]
        trace = Trace(name="t", tensors=make_weights(sizes, start_bytes=0), steps=tuple(steps))
        machine = make_machine(bandwidth=20e9)
        start = time.process_time()
        plan = make_plan(trace, machine, sum(sizes) // 4)
        make_plan(trace, machine, sum(sizes) * 26 // 100, previous=plan)
        assert len(plan.bundles) == num_layers
        return time.process_time() - start

    # Five times as many layers; what is quadratic takes 25 times as long. The shortest of a few, since others run too.
    few_s = min(planning_s(3000) for _ in range(3))
    assert min(planning_s(15_000) for _ in range(3)) < 10 * few_s


# What planning must do without: it runs on a laptop or in CI where torch is not installed.
WITHOUT_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is blocked in this test")
sys.meta_path.insert(0, Block())
import mball.schema, mball.plan
from tests.plan.traces import make_chain, make_machine
trace, machine = make_chain(8, 300_000), make_machine()
plan = mball.plan.make_plan(trace, machine, 1_000_000)
mball.plan.validate(trace, plan, machine)
assert mball.plan.simulate(trace, plan, machine).prediction == plan.prediction
assert plan.transfers and "torch" not in sys.modules
print(plan.to_json())
"""


def test_planning_and_simulation_need_no_torch_and_no_hash_seed() -> None:
    root = Path(mball.plan.__file__).parents[2]
    outputs = [
        subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH],
            cwd=root,
            env={"PYTHONPATH": str(root), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] == make_plan(make_chain(8, 300_000), make_machine(), 1_000_000).to_json() + "\n"
