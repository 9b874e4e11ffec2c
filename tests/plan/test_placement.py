"""Residents of two plans in a row stay where they are."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mball.plan import make_plan, simulate, smallest_budget, validate
from mball.schema import Machine, Plan, Trace
from mball.units import MIB
from tests.plan.traces import machines, make_chain, make_machine, make_step, make_weights, traces

few = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def places(plan: Plan) -> dict[object, int]:
    return {plan.bundles[placement.bundle]: placement.offset_bytes for placement in plan.residents}


def kept_share(before: Plan, after: Plan) -> float:
    """Returns what part of the bytes that are resident in both lies where it lay."""
    was, now = places(before), places(after)
    both = [bundle for bundle in now if bundle in was]
    moved = sum(bundle.size_bytes for bundle in both if now[bundle] != was[bundle])
    return 1 - moved / sum(bundle.size_bytes for bundle in both)


@few
@given(trace=traces(), machine=machines, first=st.floats(0, 1.2), second=st.floats(0, 1.2))
def test_the_plan_before_costs_little(trace: Trace, machine: Machine, first: float, second: float) -> None:
    smallest = smallest_budget(trace, machine).size_bytes
    total = sum(tensor.size_bytes for _, tensor in trace.homed())
    before = make_plan(trace, machine, smallest + int(first * total))
    plain = make_plan(trace, machine, smallest + int(second * total))
    plan = make_plan(trace, machine, smallest + int(second * total), previous=before)
    validate(trace, plan, machine)
    assert simulate(trace, plan, machine).prediction == plan.prediction
    assert plan.prediction.pass_s <= 1.02 * plain.prediction.pass_s


@few
@given(first=traces(), second=traces(), machine=machines)
def test_a_plan_of_another_model_is_no_use(first: Trace, second: Trace, machine: Machine) -> None:
    before = make_plan(first, machine, smallest_budget(first, machine).size_bytes + 100_000)
    budget = smallest_budget(second, machine).size_bytes + 100_000
    plan = make_plan(second, machine, budget, previous=before)
    validate(second, plan, machine)


@few
@given(trace=traces(), machine=machines, share=st.floats(0, 1.2), other=st.floats(0, 1.2))
def test_the_same_budget_moves_nothing(trace: Trace, machine: Machine, share: float, other: float) -> None:
    smallest = smallest_budget(trace, machine).size_bytes
    total = sum(tensor.size_bytes for _, tensor in trace.homed())
    elsewhere = make_plan(trace, machine, smallest + int(other * total))
    before = make_plan(trace, machine, smallest + int(share * total), previous=elsewhere)
    after = make_plan(trace, machine, smallest + int(share * total), previous=before)
    assert places(after) == places(before)


def test_a_layered_model_moves_little() -> None:
    """Layers of a few sizes: what leaves makes room for what comes."""
    layers = [[MIB, MIB // 2, 3 * MIB, 3 * MIB]] * 24
    sizes = [size for layer in layers for size in layer]
    steps = tuple(make_step(f"s{number}", number) for number in range(len(sizes)))
    trace = Trace(name="layers", tensors=make_weights(sizes), steps=steps)
    machine, plan = make_machine(), None
    for share in (0.5, 0.7, 0.6, 0.9, 0.3, 0.8, 0.4):
        before, plan = plan, make_plan(trace, machine, int(share * sum(sizes)), previous=plan)
        validate(trace, plan, machine)
        if before is not None and plan.budget_bytes > before.budget_bytes:
            assert kept_share(before, plan) > 0.7, share


def test_what_grows_moves_nothing() -> None:
    trace, machine = make_chain(40, MIB), make_machine()
    plan = make_plan(trace, machine, 12 * MIB)
    for budget in (20, 24, 42):
        before, plan = plan, make_plan(trace, machine, budget * MIB, previous=plan)
        assert kept_share(before, plan) == 1
    assert len(plan.residents) == 40


def test_the_same_bundles_are_planned_as_if_there_had_been_no_plan() -> None:
    """A weight that comes twice stays in its slot in between, as it did before."""
    steps = tuple(make_step(f"s{number}", weight) for number, weight in enumerate((0, 1, 0, 2)))
    trace = Trace(name="again", tensors=make_weights([900_000, 100_000, 900_000]), steps=steps)
    machine = make_machine(bandwidth=1e7)
    for budget in range(1_000_000, 1_900_000, 50_000):
        plan = make_plan(trace, machine, budget)
        assert make_plan(trace, machine, budget, previous=plan).prediction == plan.prediction


def test_what_nobody_reads_does_not_become_resident() -> None:
    weights = make_weights([900_000, 900_000, 1000, 1000])
    trace = Trace(name="unread", tensors=weights, steps=(make_step("a", 0), make_step("b", 1)))
    machine = make_machine()
    budget = smallest_budget(trace, machine).size_bytes + 20_000
    plan = make_plan(trace, machine, budget)
    for _ in range(2):
        plan = make_plan(trace, machine, budget, previous=plan)
        assert not {w for placement in plan.residents for w in plan.bundles[placement.bundle].tensors} & {2, 3}
