"""Belady's MIN: the fewest misses that demand paging can have.

Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2),
1966: of what is in memory, evict what is used again last. A bundle is read when it is missed, and the step that misses
waits.

MIN is optimal for slots of one size. For bundles of several sizes, and for a schedule that repeats after one pass, the
optimum is hard to find and this is MIN's rule made to fit (see `replacement.py`); memory that this leaves over goes to
the shortest gaps.
"""

from __future__ import annotations

from mball.plan.baselines.layers import just_in_time
from mball.plan.baselines.replacement import FURTHEST_IN_FUTURE, bundled, draft_replacing
from mball.plan.problem import Problem
from mball.schema import Machine, Plan, Trace


def plan_belady(
    trace: Trace, machine: Machine, budget_bytes: int, *, fixed_bytes: int = 0, previous: Plan | None = None
) -> Plan:
    """Returns the plan of Belady's MIN over bundles. Arguments and errors: `make_plan`."""
    problem = Problem.of_weights(trace, machine, budget_bytes, fixed_bytes=fixed_bytes, previous=previous)
    return problem.plan(draft_replacing(problem, bundled(problem), FURTHEST_IN_FUTURE, just_in_time))
