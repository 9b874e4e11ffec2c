"""LRU over pages, as an operating system pages in memory-mapped weights.

Source: R. W. Carr and J. L. Hennessy, "WSClock", SOSP 1981, and P. J. Denning, "Virtual Memory", 1970, for demand
paging with LRU replacement; Linux approximates it with two lists. A page is read when it is touched, whoever touches it
waits, and the page that was touched longest ago makes room.

Idealised: exact LRU; a fault brings the whole weight at the full speed of the link, as if read-ahead never guessed
wrong and no fault took time in the kernel; a weight is evicted whole, so one that is half there counts as gone; a
weight that is in use is never evicted.
"""

from __future__ import annotations

from mball.plan.baselines.layers import just_in_time
from mball.plan.baselines.replacement import LEAST_RECENTLY_USED, draft_replacing
from mball.plan.problem import Problem
from mball.schema import Machine, Plan, Trace


def plan_lru_pages(
    trace: Trace, machine: Machine, budget_bytes: int, *, fixed_bytes: int = 0, previous: Plan | None = None
) -> Plan:
    """Returns the plan of an operating system that pages weights. Arguments and errors: `make_plan`."""
    problem = Problem.of_weights(trace, machine, budget_bytes, fixed_bytes=fixed_bytes, previous=previous)
    return problem.plan(draft_replacing(problem, [problem.finest], LEAST_RECENTLY_USED, just_in_time))
