"""SwapAdvisor's swap planning: evict what is used again last, read as early as memory allows.

Source: C.-C. Huang, G. Jin and J. Li, "SwapAdvisor: Pushing Deep Learning Beyond the GPU Memory Limit via Smart
Swapping", ASPLOS 2020, section 4.3: for a given order of operators and a given assignment of tensors to a pool, the
tensor whose next use is furthest away is swapped out, right after its last use before that, and each one is swapped in
as soon as the place it takes is free.

Its genetic search over orders of operators and assignments to pools is out of scope: the order is the trace's, and
places are those of mball's pool. Tensors move in mball's bundles. Weights are never written back.
"""

from __future__ import annotations

from mball.plan.baselines.replacement import FURTHEST_IN_FUTURE, bundled, draft_replacing
from mball.plan.draft import Draft
from mball.plan.problem import Problem
from mball.schema import Machine, Plan, Trace


def plan_swapadvisor(
    trace: Trace, machine: Machine, budget_bytes: int, *, fixed_bytes: int = 0, previous: Plan | None = None
) -> Plan:
    """Returns the plan of SwapAdvisor's swap planning. Arguments and errors: `make_plan`."""
    problem = Problem.of_weights(trace, machine, budget_bytes, fixed_bytes=fixed_bytes, previous=previous)
    return problem.plan(draft_swapadvisor(problem))


def draft_swapadvisor(problem: Problem) -> Draft:
    """Returns the draft of SwapAdvisor's swap planning."""
    return draft_replacing(problem, bundled(problem), FURTHEST_IN_FUTURE, None)
