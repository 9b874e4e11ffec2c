"""The plan of a trace under a budget."""

from __future__ import annotations

import numpy as np

from mball.plan.draft import Draft
from mball.plan.partition import Partition
from mball.plan.problem import Problem
from mball.plan.search import MANY_USES, best_draft, fastest_s, partitions
from mball.schema import Machine, Plan, Trace

# A plan with other bundles than those in the arena takes over when it is faster by this factor: all that is there is
# then read again.
WORTH_OTHER_BUNDLES = 1.02
# The finest slots, which take no byte too many, each have a size of their own: nothing else fits in their place.
WORTH_ODD_SIZES = 1.005


def make_plan(
    trace: Trace, machine: Machine, budget_bytes: int, *, fixed_bytes: int = 0, previous: Plan | None = None
) -> Plan:
    """Returns the plan that runs `trace` within `budget_bytes` in the least predicted time.

    Args:
        fixed_bytes: device memory that never moves (buffers); part of the budget.
        previous: the plan whose residents are in the arena now. Its bundles are kept while no others are faster by
            more than 2 %, and so are the places of its residents where they leave room for the others.

    Raises:
        BudgetError: the budget is below the smallest that works, which the error names.
        ConfigError: `fixed_bytes` is negative.
        SchemaError: trace or machine contradict themselves.
    """
    problem = Problem.of(trace, machine, budget_bytes, fixed_bytes=fixed_bytes, previous=previous)
    return problem.plan(_best_draft(problem))


def _best_draft(problem: Problem) -> Draft:
    trace, machine, finest = problem.trace, problem.machine, problem.finest
    arena_bytes, previous = problem.arena_bytes, problem.previous
    kept = None
    same = None if previous is None else Partition.like(trace, machine, previous.bundles)
    if previous is not None and same is not None:
        stayed = np.full(len(previous.bundles), np.iinfo(np.int64).max)
        for placement in previous.residents:
            size_bytes = previous.bundles[placement.bundle].size_bytes
            stayed[placement.bundle] = placement.offset_bytes + size_bytes
        kept = best_draft([same], arena_bytes, stayed)
        if kept is not None and kept.prediction.pass_s <= WORTH_OTHER_BUNDLES * fastest_s(same, arena_bytes):
            return kept
    best = best_draft(partitions(trace, machine, arena_bytes), arena_bytes)
    is_close = best is not None and (
        len(finest.uses) > MANY_USES or best.prediction.pass_s <= WORTH_ODD_SIZES * fastest_s(finest, arena_bytes)
    )
    if not is_close:
        odd = best_draft([finest], arena_bytes)
        if odd is not None and (best is None or odd.prediction.pass_s * WORTH_ODD_SIZES < best.prediction.pass_s):
            best = odd
    if kept is not None and (best is None or kept.prediction.pass_s <= WORTH_OTHER_BUNDLES * best.prediction.pass_s):
        best = kept
    assert best is not None, "the finest bundles, nothing resident and no bridging fit every budget that is allowed"
    return best
