"""The plan of a trace under a budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from mball.errors import PlanError
from mball.plan.draft import Draft, shifted
from mball.plan.leaving import WAYS
from mball.plan.offloading import (
    check_offload_budget,
    drafts_within,
    narrowed,
    offload_error,
    peak_offloaded,
    placed_before,
)
from mball.plan.partition import Partition
from mball.plan.portfolio import best_policy
from mball.plan.problem import Problem
from mball.plan.search import MANY_USES, best_draft, fastest_s, partitions
from mball.plan.simulate import run_plan
from mball.plan.tiers import check_host_budget, plan_tiers
from mball.plan.validate import validate
from mball.schema import Machine, Plan, Trace

# A plan with other bundles than those in the arena takes over when it is faster by this factor: all that is there is
# then read again.
WORTH_OTHER_BUNDLES = 1.02
# The finest slots, which take no byte too many, each have a size of their own: nothing else fits in their place.
WORTH_ODD_SIZES = 1.005
_SAME = 1e-9


def make_plan(
    trace: Trace,
    machine: Machine,
    budget_bytes: int,
    *,
    host_budget_bytes: int | None = None,
    offload_budget_bytes: int | None = None,
    fixed_bytes: int = 0,
    previous: Plan | None = None,
) -> Plan:
    """Returns the plan that runs `trace` within `budget_bytes` in the least predicted time.

    Args:
        host_budget_bytes: host memory for bundles that come from disk through it; needed exactly where the machine has
            a `disk_link`. Tensors that are offloaded take their bytes of it.
        offload_budget_bytes: where the machine has no `disk_link`, the most bytes that offloaded tensors may take at
            one time on the tier below; None if they may take as many as they like.
        fixed_bytes: device memory that never moves (buffers); part of the budget.
        previous: the plan whose residents are in the arena now. Its bundles are kept while no others are faster by
            more than 2 %, and so are the places of its residents where they leave room for the others. Where it still
            fits, no plan is returned that is predicted to be slower than it is now.

    Raises:
        BudgetError: a budget is below the smallest that works, which the error names; of `offload_budget_bytes` it
            names the smallest that is known to.
        ConfigError: `fixed_bytes` or `offload_budget_bytes` is negative, or `host_budget_bytes` is missing, or one of
            the two is of no use.
        SchemaError: trace or machine contradict themselves.
    """
    check_offload_budget(machine, offload_budget_bytes)
    check_host_budget(machine, host_budget_bytes)
    problems = Problem.ways(
        trace,
        machine,
        budget_bytes,
        fixed_bytes=fixed_bytes,
        previous=previous,
        host_budget_bytes=host_budget_bytes,
        offload_budget_bytes=offload_budget_bytes,
    )
    if host_budget_bytes is not None:
        return plan_tiers(problems, _best_draft)
    best: tuple[tuple[float, tuple[float, int, int]], Problem, Draft] | None = None
    least_bytes: int | None = None
    for problem, draft in _drafts(problems):
        offloaded = peak_offloaded(draft)
        least_bytes = offloaded if least_bytes is None else min(least_bytes, offloaded)
        if offload_budget_bytes is not None and offloaded > offload_budget_bytes:
            continue
        # One of them may have the bundles that are in the arena now.
        is_there = previous is not None and draft.bundles == previous.bundles
        worth = 1 / WORTH_OTHER_BUNDLES if is_there else 1.0
        cost = float(f"{draft.prediction.pass_s * worth:.4g}"), draft.cost()
        if best is None or cost < best[0]:
            best = cost, problem, draft
    if best is None:
        assert least_bytes is not None, "there is a problem, or an error was raised"
        raise offload_error(problems[0], least_bytes)
    return best[1].plan(best[2])


def _drafts(problems: Sequence[Problem]) -> Iterator[tuple[Problem, Draft]]:
    """Yields the fastest draft of each problem; where it needs too much below, also those found that do not."""
    for problem in problems:
        draft = _best_draft(problem)
        assert draft is not None, (
            "the finest bundles, nothing resident and no bridging fit every budget that is allowed"
        )
        yield problem, draft
        limit_bytes = problem.offload_budget_bytes
        if limit_bytes is not None and peak_offloaded(draft) > limit_bytes:
            yield from drafts_within(problem, draft, limit_bytes, _best_draft)
    if problems[0].born:
        yield from _draft_before(problems[0])


def _draft_before(problem: Problem) -> Iterator[tuple[Problem, Draft]]:
    """Yields the plan before as it is, if it still fits: other tensors may have had no place in it."""
    previous = problem.previous
    for placed in placed_before(problem):
        narrower = narrowed(problem, placed, problem.offload_budget_bytes)
        if narrower is not None and previous is not None:
            same = Partition.like(narrower.finest, previous.bundles)
            draft = None if same is None else _as_before(narrower, same, previous)
            if draft is not None:
                yield narrower, draft


def _best_draft(problem: Problem) -> Draft | None:
    trace, machine, finest = problem.trace, problem.machine, problem.finest
    arena_bytes, previous = problem.arena_bytes, problem.previous
    kept = None
    same = None if previous is None else Partition.like(finest, previous.bundles)
    if previous is not None and same is not None:
        stayed = np.full(len(previous.bundles), np.iinfo(np.int64).max)
        for placement in previous.residents:
            size_bytes = previous.bundles[placement.bundle].size_bytes
            stayed[placement.bundle] = placement.offset_bytes + size_bytes
        ways = [replace(same, leaving=leaving) for leaving in WAYS] if problem.born else [same]
        kept = _faster(best_draft(ways, arena_bytes, stayed), _as_before(problem, same, previous))
        if kept is not None and kept.prediction.pass_s <= WORTH_OTHER_BUNDLES * fastest_s(same, arena_bytes):
            return kept
    candidates = partitions(trace, machine, arena_bytes, problem.born, problem.host_arena_bytes)
    best = best_draft(candidates, arena_bytes)
    is_close = best is not None and (
        len(finest.uses) > MANY_USES or best.prediction.pass_s <= WORTH_ODD_SIZES * fastest_s(finest, arena_bytes)
    )
    if not is_close:
        odd = best_draft([finest], arena_bytes)
        if odd is not None and (best is None or odd.prediction.pass_s * WORTH_ODD_SIZES < best.prediction.pass_s):
            best = odd
    # What takes over from a plan that is there has to be faster by more than policies were, and where no step was
    # measured a thousandth means nothing.
    is_measured = any(step.time_s is not None for step in trace.steps)
    if previous is None and is_measured and len(finest.uses) <= MANY_USES:
        best = _at_least_as_fast_as_policies(problem, best)
    if kept is not None and (best is None or kept.prediction.pass_s <= WORTH_OTHER_BUNDLES * best.prediction.pass_s):
        best = kept
    return best


def _at_least_as_fast_as_policies(problem: Problem, best: Draft | None) -> Draft | None:
    if best is not None and best.prediction.pass_s <= (1 + _SAME) * fastest_s(problem.finest, problem.arena_bytes):
        return best
    policy = best_policy(problem)
    if policy is None or best is None:
        return best or policy
    # To the last digit: a user who compares them should not have to wonder.
    return policy if policy.prediction.pass_s < best.prediction.pass_s * (1 - _SAME) else best


def _as_before(problem: Problem, partition: Partition, previous: Plan) -> Draft | None:
    """Returns the plan before as it is, timed anew; None where it does not fit any more."""
    there = replace(
        previous,
        budget_bytes=problem.budget_bytes,
        fixed_bytes=problem.fixed_bytes,
        activation_bytes=problem.activation_bytes,
        offload_budget_bytes=problem.offload_budget_bytes,
    )
    try:
        validate(problem.trace, there, problem.machine)
    except PlanError:  # or it is of another pass over the same weights
        return None
    _, prediction = run_plan(problem.trace, problem.machine, there, partition.demand.moved_bytes)
    # In a draft residents lie one behind the other and slots follow; where they lie is said when the plan is made.
    sizes = [previous.bundles[placement.bundle].size_bytes for placement in previous.residents]
    ends = [placement.offset_bytes + size for placement, size in zip(previous.residents, sizes, strict=True)]
    apart_bytes = max(ends, default=0) - sum(sizes)
    return Draft(
        partition=partition,
        steps=previous.steps,
        residents=previous.residents,
        transfers=shifted(previous.transfers, -apart_bytes),
        made=shifted(previous.made, -apart_bytes),
        offloads=shifted(previous.offloads, -apart_bytes),
        arena_bytes=previous.arena_bytes - apart_bytes,
        prediction=prediction,
    )


def _faster(one: Draft | None, other: Draft | None) -> Draft | None:
    if one is None or other is None:
        return other if one is None else one
    return other if other.cost() < one.cost() else one
