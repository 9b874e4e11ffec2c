"""LRU over bundles: a cache of weights that are read when they are missed.

Source: as `lru_pages`, with mball's bundles in place of pages: neighbours in a bundle come with the one that is missed.
The step that misses waits; the bundle that was used longest ago makes room.

Idealised: bytes have addresses, so where what stays leaves no place for what comes, the cache is made smaller.
"""

from __future__ import annotations

from mball.plan.baselines.layers import just_in_time
from mball.plan.baselines.replacement import LEAST_RECENTLY_USED, bundled, draft_replacing
from mball.plan.problem import Problem
from mball.schema import Machine, Plan, Trace


def plan_lru(
    trace: Trace, machine: Machine, budget_bytes: int, *, fixed_bytes: int = 0, previous: Plan | None = None
) -> Plan:
    """Returns the plan of an LRU cache of bundles. Arguments and errors: `make_plan`."""
    problem = Problem.of_weights(trace, machine, budget_bytes, fixed_bytes=fixed_bytes, previous=previous)
    return problem.plan(draft_replacing(problem, bundled(problem), LEAST_RECENTLY_USED, just_in_time))
