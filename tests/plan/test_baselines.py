"""Policies of the field: what every one of them promises, and what is each one's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mball.errors import BudgetError, ConfigError
from mball.plan import make_plan, simulate, smallest_budget, validate
from mball.plan.baselines import (
    BASELINES,
    plan_belady,
    plan_flexgen,
    plan_lru,
    plan_lru_pages,
    plan_prefetch,
    plan_prefix,
    plan_swapadvisor,
)
from mball.plan.baselines.flexgen import divide
from mball.plan.baselines.layers import levels
from mball.plan.bundles import finest_bundles
from mball.plan.problem import Problem
from mball.schema import Machine, Plan, Step, Tensor, Trace, Treatment
from mball.units import MIB
from tests.plan.traces import machines, make_chain, make_machine, make_step, make_tied, make_weights, traces

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
each_policy = pytest.mark.parametrize("name", BASELINES)
MACHINE = make_machine()


@st.composite
def passes(draw: st.DrawFn) -> Trace:
    """Any trace, also one that runs once, and one whose steps write weights."""
    trace = draw(traces(max_steps=10))
    homed = [index for index, _ in trace.homed()]
    some = st.lists(st.sampled_from(homed), unique=True, max_size=2) if homed else st.just([])
    writing = draw(st.booleans())
    steps = tuple(replace(step, writes=tuple(draw(some)) if writing else ()) for step in trace.steps)
    return replace(trace, steps=steps, cyclic=draw(st.booleans()))


def staying(trace: Trace) -> Trace:
    """The same with all that is born in the pass staying, as it does under every policy but mball's."""
    return replace(
        trace,
        tensors=tuple(
            tensor if tensor.home else replace(tensor, may=(Treatment.STAY,), recompute_s=None)
            for tensor in trace.tensors
        ),
    )


def weight_bytes(trace: Trace) -> int:
    return sum(tensor.size_bytes for _, tensor in trace.homed())


def layered(num_layers: int = 12) -> Trace:
    """Layers of six weights, a step each, named as transformers names them."""
    weights, steps, offset = [], [], 0
    for layer in range(num_layers):
        for module, size in enumerate((256, 256, 256, 256, 768, 768)):
            name = f"model.layers.{layer}.m{module}.weight"
            size_bytes = size << 10
            weights.append(
                Tensor.weight(
                    name, dtype="uint8", shape=(size_bytes,), size_bytes=size_bytes, file="f", offset_bytes=offset
                )
            )
            offset += size_bytes
            steps.append(make_step(name, len(weights) - 1, time_s=3e-4))
    return Trace(name="layered", tensors=tuple(weights), steps=tuple(steps))


def uneven() -> Trace:
    sizes = [(1 + (7 * number) % 5) * MIB for number in range(30)]
    return Trace(name="uneven", tensors=make_weights(sizes), steps=tuple(make_step(f"s{n}", n) for n in range(30)))


def shared() -> Trace:
    steps = tuple(make_step(f"s{number}", number % 6) for number in range(24))
    return Trace(name="shared", tensors=make_weights([MIB] * 6), steps=steps)


SHAPES: dict[str, Callable[[], Trace]] = {
    "chain": lambda: make_chain(24, MIB),
    "uneven": uneven,
    "tied": lambda: make_tied(24, 2 * MIB, 12 * MIB),
    "shared": shared,
    "layered": layered,
}


def resident_weights(plan: Plan) -> set[int]:
    return {weight for placement in plan.residents for weight in plan.bundles[placement.bundle].tensors}


def leads(plan: Plan) -> list[int]:
    """How many steps before its own each transfer begins; 0: right before it."""
    return [transfer.needed_by - transfer.after - 1 for transfer in plan.transfers]


# -- what all promise ----------------------------------------------------------------------------------------------


@each_policy
@few
@given(trace=passes(), machine=machines, share=st.floats(0, 1.2), fixed=st.integers(0, 999))
def test_every_budget_from_the_smallest_gives_a_valid_plan(
    name: str, trace: Trace, machine: Machine, share: float, fixed: int
) -> None:
    smallest = smallest_budget(staying(trace), machine, fixed_bytes=fixed).size_bytes
    previous = None
    for budget in (smallest, smallest + int(share * weight_bytes(trace)), smallest):
        plan = BASELINES[name](trace, machine, budget, fixed_bytes=fixed, previous=previous)
        validate(trace, plan, machine)
        simulation = simulate(trace, plan, machine)
        assert simulation.prediction == plan.prediction
        assert simulation.peak_arena_bytes <= plan.arena_bytes
        assert plan.budget_bytes == budget
        assert plan.fixed_bytes == fixed
        assert plan.fixed_bytes + plan.activation_bytes + plan.arena_bytes <= budget
        previous = plan


@each_policy
@few
@given(trace=passes(), machine=machines, fixed=st.integers(0, 999))
def test_budgets_are_refused_as_mball_refuses_them(name: str, trace: Trace, machine: Machine, fixed: int) -> None:
    trace = staying(trace)
    smallest = smallest_budget(trace, machine, fixed_bytes=fixed).size_bytes
    refused = []
    for plan in (make_plan, BASELINES[name]):
        with pytest.raises(BudgetError) as caught:
            plan(trace, machine, smallest - 1, fixed_bytes=fixed)
        refused.append((str(caught.value), caught.value.smallest_bytes, caught.value.limited_by))
    assert refused[0] == refused[1]


@each_policy
def test_fixed_memory_must_not_be_negative(name: str) -> None:
    with pytest.raises(ConfigError, match="fixed_bytes is -1"):
        BASELINES[name](make_chain(1, 10), MACHINE, MIB, fixed_bytes=-1)


@each_policy
@few
@given(trace=passes(), machine=machines, extra=st.integers(0, 2_000_000))
def test_the_same_input_gives_the_same_bytes(name: str, trace: Trace, machine: Machine, extra: int) -> None:
    budget = smallest_budget(staying(trace), machine).size_bytes + extra
    again = Trace.from_json(trace.to_json())
    assert BASELINES[name](trace, machine, budget).to_json() == BASELINES[name](again, machine, budget).to_json()


@each_policy
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_streamed_when_all_fits(name: str, shape: str) -> None:
    trace = SHAPES[shape]()
    plan = BASELINES[name](trace, MACHINE, weight_bytes(trace) + 2 * MIB)
    assert plan.transfers == ()
    assert plan.prediction.stall_s == 0


def test_residents_stay_in_their_places_under_a_new_plan() -> None:
    trace = make_chain(24, MIB)
    before = plan_prefix(trace, MACHINE, 12 * MIB)
    again = plan_prefix(trace, MACHINE, 18 * MIB, previous=before)
    assert before.residents
    assert set(before.residents) < set(again.residents)
    assert not set(before.residents) <= set(plan_prefix(trace, MACHINE, 18 * MIB).residents)


# -- what mball is held against ------------------------------------------------------------------------------------

BANDWIDTHS = (5e8, 1e9, 1e10)
PERCENTS = (0, 15, 30, 50, 70, 90)


@functools.cache
def own_s(shape: str, bandwidth: float, budget_bytes: int) -> float:
    return make_plan(SHAPES[shape](), make_machine(bandwidth=bandwidth), budget_bytes).prediction.pass_s


@pytest.mark.parametrize("percent", PERCENTS)
@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
@each_policy
def test_no_policy_is_faster_than_mball(name: str, shape: str, bandwidth: float, percent: int) -> None:
    trace, machine = SHAPES[shape](), make_machine(bandwidth=bandwidth)
    budget = max(smallest_budget(trace, machine).size_bytes, weight_bytes(trace) * percent // 100)
    plan = BASELINES[name](trace, machine, budget)
    assert own_s(shape, bandwidth, budget) <= plan.prediction.pass_s * (1 + 1e-9)


@settings(few, max_examples=200)
@given(trace=passes(), machine=machines, extra=st.integers(0, 2_000_000))
def test_no_policy_is_faster_in_a_random_pass(trace: Trace, machine: Machine, extra: int) -> None:
    assume(any(step.time_s is not None for step in trace.steps))  # else a thousandth means nothing
    trace = staying(trace)
    budget = smallest_budget(trace, machine).size_bytes + extra
    own = make_plan(trace, machine, budget).prediction.pass_s
    for name, plan in BASELINES.items():
        # Who caches what was used, or reads just in time, is not among the candidates, and may hit upon a page less. Of
        # the others' a plan may wait as long elsewhere: sums differ in their ends.
        slack = 1e-4 if name in ("swapadvisor", "prefetch", "flexgen") else 0.05
        assert own <= plan(trace, machine, budget).prediction.pass_s * (1 + slack), name


def test_where_steps_write_policies_are_candidates_too() -> None:
    """Two weights that do not fit together, the last step writes one of them: a random pass of the test above."""
    weights = tuple(
        Tensor.weight(f"w{number}", dtype="uint8", shape=(size,), size_bytes=size, file="a", offset_bytes=offset)
        for number, (size, offset) in enumerate([(1, 0), (60000, 1), (1, 60001), (60000, 60002)])
    )
    reads: tuple[tuple[int, ...], ...] = ((), (), (), (), (), (0, 1), (0, 1, 2), (0,), (1, 2, 3))
    steps = tuple(
        Step(
            name=f"s{number}",
            graph=None,
            reads=read,
            writes=(1,) if number == len(reads) - 1 else (),
            scratch_bytes=0,
            flops=0,
            time_s=0.0,
        )
        for number, read in enumerate(reads)
    )
    trace = Trace(name="written last", tensors=weights, steps=steps, cyclic=False)
    machine = make_machine(page_bytes=512, bandwidth=1e7, latency_s=0.0)
    budget = smallest_budget(trace, machine).size_bytes
    own = make_plan(trace, machine, budget).prediction.pass_s
    for name, plan in BASELINES.items():
        assert own <= plan(trace, machine, budget).prediction.pass_s * (1 + 1e-4), name


# -- resident prefix, prefetch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [plan_prefix, plan_prefetch])
@pytest.mark.parametrize("shape", ["chain", "uneven", "layered"])
@pytest.mark.parametrize("percent", [30, 50, 80])
def test_a_prefix_stays(plan: Callable[..., Plan], shape: str, percent: int) -> None:
    trace = SHAPES[shape]()
    kept = resident_weights(plan(trace, MACHINE, weight_bytes(trace) * percent // 100))
    assert 0 < len(kept) < len(trace.tensors)
    assert kept == set(range(len(kept))), "weights are numbered in the order of their first use"


def test_the_longest_prefix_leaves_room_for_the_largest_other_layer() -> None:
    trace = make_chain(12, MIB)
    slot = max(bundle.size_bytes for bundle in finest_bundles(trace, MACHINE))
    for slots in range(1, 12):
        assert len(resident_weights(plan_prefix(trace, MACHINE, slots * slot))) == slots - 1
        assert len(resident_weights(plan_prefetch(trace, MACHINE, slots * slot))) == max(slots - 2, 0)
        assert len(resident_weights(plan_prefetch(trace, MACHINE, slots * slot, depth=3))) == max(slots - 4, 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prefix_is_all_that_is_there_early(shape: str) -> None:
    trace = SHAPES[shape]()
    plan = plan_prefix(trace, MACHINE, weight_bytes(trace) // 2)
    assert plan.transfers
    assert set(leads(plan)) == {0}


def test_a_layer_comes_as_a_whole_and_goes_as_a_whole() -> None:
    trace = layered()
    plan = plan_prefix(trace, make_machine(latency_s=1e-2), weight_bytes(trace) // 2)
    for transfer in plan.transfers:
        first, end = plan.steps[transfer.needed_by].first, plan.steps[transfer.last_use].end
        assert (first % 6, end - first) == (0, 6)
        assert plan.bundles[transfer.bundle].tensors == tuple(range(first, end))


def test_before_the_only_pass_the_prefix_is_read_and_nothing_else() -> None:
    trace = replace(make_chain(12, MIB), cyclic=False)
    plan = plan_prefix(trace, MACHINE, 6 * MIB + 6 * 4096)
    validate(trace, plan, MACHINE)
    early = [transfer for transfer in plan.transfers if transfer.after < transfer.needed_by - 1]
    assert [transfer.needed_by for transfer in early] == [1, 2, 3, 4]
    assert {transfer.after for transfer in early} == {-1}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_more_than_depth_visits_are_ahead(depth: int, shape: str) -> None:
    trace = SHAPES[shape]()
    plan = plan_prefetch(trace, MACHINE, weight_bytes(trace) * 3 // 4, depth=depth)
    count = len(plan.steps)
    firsts = {transfer.needed_by for transfer in plan.transfers}
    ahead = [
        sum(step % count in firsts for step in range(transfer.after + 2, transfer.needed_by + 1))
        for transfer in plan.transfers
    ]
    assert max(ahead) == depth


def test_depth_is_one_unless_it_is_given_and_never_less() -> None:
    trace = make_chain(12, MIB)
    assert plan_prefetch(trace, MACHINE, 8 * MIB) == plan_prefetch(trace, MACHINE, 8 * MIB, depth=1)
    with pytest.raises(ConfigError, match="depth is 0"):
        plan_prefetch(trace, MACHINE, 8 * MIB, depth=0)


def test_a_layer_ahead_is_faster_than_just_in_time() -> None:
    trace, machine = make_chain(24, MIB), make_machine(bandwidth=1.2e9)
    times = [plan(trace, machine, 12 * MIB).prediction.pass_s for plan in (plan_prefetch, plan_prefix)]
    assert times[0] < 0.8 * times[1]


def test_layers_are_read_off_names_coarse_to_fine() -> None:
    names = ("embed.weight", "stages.0.blocks.0.a.w", "stages.0.blocks.0.b.w", "stages.0.blocks.1.a.w", "w", "never.w")
    weights = tuple(replace(each, name=name) for each, name in zip(make_weights([10] * 6), names, strict=True))
    trace = Trace(name="t", tensors=weights, steps=tuple(make_step(f"s{n}", n) for n in (1, 2, 0, 3, 4)))
    assert list(levels(trace)) == [
        [[1, 2, 3], [0], [4], [5]],
        [[1, 2], [0], [3], [4], [5]],
        [[1], [2], [0], [3], [4], [5]],
    ]


# -- replacement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [plan_lru, plan_lru_pages])
@pytest.mark.parametrize("slots", [1, 5, 11])
def test_lru_hits_nothing_in_a_scan_that_does_not_fit(plan: Callable[..., Plan], slots: int) -> None:
    trace = make_chain(12, MIB)
    slot = max(bundle.size_bytes for bundle in finest_bundles(trace, MACHINE))
    found = plan(trace, MACHINE, slots * slot)
    assert not found.residents
    assert len(found.transfers) == 12
    assert set(leads(found)) == {0}


def test_lru_hits_what_is_used_again_soon() -> None:
    order = (0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 0)
    trace = Trace(
        name="t", tensors=make_weights([MIB] * 8), steps=tuple(make_step(f"s{n}", w) for n, w in enumerate(order))
    )
    plan = plan_lru(trace, MACHINE, 4 * MIB)
    brought = [plan.bundles[transfer.bundle].tensors for transfer in plan.transfers]
    # Weight 0 is still there from the end of the pass before, and weight 1 comes once for two uses.
    assert sorted(brought) == [(weight,) for weight in range(8)]
    (first,) = [transfer for transfer in plan.transfers if plan.bundles[transfer.bundle].tensors == (0,)]
    assert plan.steps[first.needed_by].first == 10
    assert plan.steps[first.last_use - len(plan.steps)].end == 3


@pytest.mark.parametrize("slots", [2, 5, 8, 11])
def test_belady_misses_a_scan_as_rarely_as_can_be(slots: int) -> None:
    """One slot is for what comes; what the others hold is hit."""
    trace = make_chain(12, MIB)
    slot = max(bundle.size_bytes for bundle in finest_bundles(trace, MACHINE))
    plan = plan_belady(trace, MACHINE, slots * slot)
    assert len(plan.transfers) == 12 - (slots - 1)
    assert set(leads(plan)) == {0}


@pytest.mark.parametrize("percent", [10, 30, 50, 70, 90])
@pytest.mark.parametrize("shape", SHAPES)
def test_belady_streams_no_more_than_lru(shape: str, percent: int) -> None:
    trace = SHAPES[shape]()
    budget = max(smallest_budget(trace, MACHINE).size_bytes, weight_bytes(trace) * percent // 100)
    streamed = [plan(trace, MACHINE, budget).prediction.streamed_bytes for plan in (plan_belady, plan_lru)]
    assert streamed[0] <= streamed[1]


@few
@given(order=st.lists(st.integers(0, 7), min_size=1, max_size=20), slots=st.integers(1, 8))
def test_belady_streams_no_more_than_lru_in_any_order_of_equal_weights(order: list[int], slots: int) -> None:
    steps = tuple(make_step(f"s{number}", weight) for number, weight in enumerate(order))
    trace = Trace(name="t", tensors=make_weights([MIB] * 8), steps=steps)
    budget = slots * (MIB + 4096)
    streamed = [plan(trace, MACHINE, budget).prediction.streamed_bytes for plan in (plan_belady, plan_lru)]
    assert streamed[0] <= streamed[1]


@pytest.mark.parametrize("shape", ["chain", "tied", "shared", "layered"])
def test_swapadvisor_streams_what_belady_does_and_waits_less(shape: str) -> None:
    trace = SHAPES[shape]()
    budget = weight_bytes(trace) * 55 // 100
    ours, belady = plan_swapadvisor(trace, MACHINE, budget), plan_belady(trace, MACHINE, budget)
    assert ours.residents == belady.residents
    assert ours.prediction.streamed_bytes == belady.prediction.streamed_bytes
    assert max(leads(ours)) > 0
    assert ours.prediction.stall_s < belady.prediction.stall_s


# -- FlexGen -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", [40, 60, 80])
def test_every_layer_keeps_the_same_share(percent: int) -> None:
    trace = layered()
    kept = resident_weights(plan_flexgen(trace, MACHINE, weight_bytes(trace) * percent // 100))
    shares = [sum(trace.tensors[w].size_bytes for w in kept if w // 6 == layer) for layer in range(12)]
    layer_bytes = weight_bytes(trace) // 12
    assert len(set(shares)) == 1
    # Beside what stays there is room for the rest of two layers, and a weight is rounded to all or nothing.
    assert 0 <= layer_bytes * percent / 100 - shares[0] <= 768 << 10


def test_the_rest_of_a_layer_comes_while_the_one_before_computes() -> None:
    trace = layered()
    plan = plan_flexgen(trace, MACHINE, weight_bytes(trace) * 6 // 10)
    layers = set()
    for transfer in plan.transfers:
        first = plan.steps[transfer.needed_by].first
        after_pass, after = divmod(transfer.after, len(plan.steps))
        begins = plan.steps[after].end + after_pass * len(trace.steps)
        layer = first // 6
        layers.add(layer)
        assert begins >= 6 * (layer - 1)
    assert layers == set(range(12))
    assert max(leads(plan)) > 0


def test_a_share_fits_beside_two_layers_that_follow_each_other() -> None:
    """The first layer follows the last one where the pass repeats; a layer that is not read follows none."""
    sizes = [3 * MIB, MIB, MIB, 2 * MIB]
    trace = Trace(
        name="t",
        tensors=make_weights([*sizes, 9 * MIB]),
        steps=tuple(make_step(f"s{number}", number) for number in range(4)),
    )
    for cyclic, most in ((True, 5 * MIB), (False, 4 * MIB)):
        problem = Problem.of(replace(trace, cyclic=cyclic), MACHINE, 32 * MIB, fixed_bytes=0)
        divided = divide(problem, [[weight] for weight in range(5)], 0)
        # A weight that begins in the midst of a page touches one more.
        assert divided.fits(most + 2 * MACHINE.page_bytes)
        assert not divided.fits(most)


def test_layers_of_a_single_weight_take_turns() -> None:
    kept = resident_weights(plan_flexgen(make_chain(24, MIB), MACHINE, 14 * MIB + 24 * 4096))
    # Never are two streamed that follow each other, so one slot is enough for what comes.
    assert len(kept) == 13
    assert {weight - 1 for weight in range(1, 24) if weight not in kept} <= kept


def test_a_depth_beyond_the_pass_is_a_pass() -> None:
    trace, machine = make_chain(8, MIB), make_machine()
    budget = 5 * MIB
    leads_of = {depth: leads(plan_prefetch(trace, machine, budget, depth=depth)) for depth in (1, 8, 9, 40)}
    assert sum(leads_of[1]) < sum(leads_of[8]) == sum(leads_of[9]) == sum(leads_of[40])
