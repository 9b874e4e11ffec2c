"""A budget that grows step by step, each plan made from the one before."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mball.plan import make_plan, smallest_budget, validate
from mball.schema import Machine, Trace
from tests.plan.traces import machines, make_machine, make_step, make_weights, traces

few = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Plans are compared by four digits.
DIGITS = 1e-3


def test_a_plan_that_still_fits_is_better_than_a_slower_one() -> None:
    # With one page more the search alone finds a plan that is 11 % slower.
    reads = [(0, 4), (1,), (2,), (3,), (4,), (5,)]
    times = [1e-5, 1e-5, 0.0, 0.0, 5e-5, 5e-5]
    trace = Trace(
        name="small",
        tensors=make_weights([16384, 8192, 16384, 8192, 16384, 12288], start_bytes=0),
        steps=tuple(make_step(f"s{n}", *reads[n], time_s=time_s) for n, time_s in enumerate(times)),
    )
    machine = make_machine(page_bytes=4096)
    one = make_plan(trace, machine, 45056)
    other = make_plan(trace, machine, 49152, previous=one)
    validate(trace, other, machine)
    assert make_plan(trace, machine, 49152).prediction.pass_s > 1.02 * one.prediction.pass_s
    assert other.prediction.pass_s <= one.prediction.pass_s


@few
@given(trace=traces(), machine=machines, shares=st.lists(st.floats(0, 1.1), min_size=2, max_size=4))
def test_growing_a_budget_never_predicts_a_slower_pass(trace: Trace, machine: Machine, shares: list[float]) -> None:
    smallest = smallest_budget(trace, machine).size_bytes
    total = sum(tensor.size_bytes for _, tensor in trace.homed())
    plans = []
    for share in sorted(shares):
        plans.append(make_plan(trace, machine, smallest + int(share * total), previous=plans[-1] if plans else None))
        validate(trace, plans[-1], machine)
    for one, other in pairwise(plans):
        assert other.prediction.pass_s <= one.prediction.pass_s * (1 + DIGITS)
