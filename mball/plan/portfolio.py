"""Policies of the field as candidates: a plan is no slower than theirs because theirs are looked at too.

Where budgets are tight the best stays are few, and a rule of thumb may hit upon better ones than the search, by a
thousandth of a pass mostly ([POLICIES.md](../../POLICIES.md)). What reads just in time is left out: who reads the same
earlier is no slower.
"""

from __future__ import annotations

from collections.abc import Callable

from mball.plan.baselines.flexgen import draft_flexgen
from mball.plan.baselines.prefetch import draft_prefetch
from mball.plan.baselines.swapadvisor import draft_swapadvisor
from mball.plan.draft import Draft
from mball.plan.problem import Problem
from mball.schema import Lane

POLICIES: tuple[Callable[[Problem], Draft], ...] = (draft_swapadvisor, draft_prefetch, draft_flexgen)


def best_policy(problem: Problem) -> Draft | None:
    """Returns the fastest draft of these policies, None where more is to be done than to read and write weights."""
    if problem.born or any(step.lane is Lane.HOST for step in problem.trace.steps):
        return None
    return min((policy(problem) for policy in POLICIES), key=lambda draft: (draft.prediction.pass_s, draft.cost()))
