"""Thousands of random passes under every planner, for `make test-long`."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mball.plan import make_plan, simulate, smallest_budget, validate
from mball.plan.baselines import BASELINES
from mball.schema import Machine, Plan, Trace
from tests.plan.chain_replay import ChainReplay
from tests.plan.replay import replay
from tests.plan.test_baselines import staying
from tests.plan.test_growing import DIGITS
from tests.plan.test_tiers import budgets_of, shares
from tests.plan.test_tiers import machines as two_link_machines
from tests.plan.traces import host_machines, lane_traces, machines, traces

pytestmark = pytest.mark.slow
many = settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PLANNERS = {"mball": make_plan, **BASELINES}


def all_bytes(trace: Trace) -> int:
    return sum(tensor.size_bytes for tensor in trace.tensors)


@many
@given(trace=traces(max_steps=24), machine=machines, share=st.floats(0, 1.1), name=st.sampled_from(sorted(PLANNERS)))
def test_plans_keep_their_promises(trace: Trace, machine: Machine, share: float, name: str) -> None:
    held = trace if name == "mball" else staying(trace)
    budget = smallest_budget(held, machine).size_bytes + int(share * all_bytes(trace))
    plan = PLANNERS[name](trace, machine, budget)
    validate(trace, plan, machine)
    replay(trace, plan, machine)
    assert simulate(trace, plan, machine).prediction == plan.prediction
    assert PLANNERS[name](trace, machine, budget).to_json() == plan.to_json()
    assert Plan.from_json(plan.to_json()) == plan


@many
@given(trace=traces(max_steps=24), machine=machines, shares=st.lists(st.floats(0, 1.1), min_size=2, max_size=5))
def test_growing_never_predicts_a_slower_pass(trace: Trace, machine: Machine, shares: list[float]) -> None:
    smallest = smallest_budget(trace, machine).size_bytes
    plans: list[Plan] = []
    for share in sorted(shares):
        budget = smallest + int(share * all_bytes(trace))
        plans.append(make_plan(trace, machine, budget, previous=plans[-1] if plans else None))
        validate(trace, plans[-1], machine)
    for one, other in pairwise(plans):
        assert other.prediction.pass_s <= one.prediction.pass_s * (1 + DIGITS)


@many
@given(trace=lane_traces(max_steps=20), machine=host_machines, share=st.floats(0, 1.1))
def test_plans_of_two_lanes_keep_their_promises(trace: Trace, machine: Machine, share: float) -> None:
    budget = smallest_budget(trace, machine).size_bytes + int(share * all_bytes(trace))
    plan = make_plan(trace, machine, budget)
    validate(trace, plan, machine)
    replay(trace, plan, machine)
    assert simulate(trace, plan, machine).prediction == plan.prediction
    assert make_plan(trace, machine, budget).to_json() == plan.to_json()


@many
@given(trace=traces(max_steps=16, writing=False), machine=two_link_machines, device=shares, host=shares)
def test_plans_of_two_links_keep_their_promises(trace: Trace, machine: Machine, device: float, host: float) -> None:
    budget, smallest = budgets_of(trace, machine, device, 0)
    host_budget = smallest + int(host * all_bytes(trace))
    plan = make_plan(trace, machine, budget, host_budget_bytes=host_budget)
    validate(trace, plan, machine)
    if trace.steps:  # else there is nothing to follow
        ChainReplay(trace, plan, machine, 3 if trace.cyclic else 1).follow_bytes()
    assert simulate(trace, plan, machine).prediction == plan.prediction
    assert make_plan(trace, machine, budget, host_budget_bytes=host_budget).to_json() == plan.to_json()
