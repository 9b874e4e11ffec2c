"""The plan of a trace under a budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mball.errors import BudgetError, PlanError
from mball.plan.draft import Draft
from mball.plan.partition import Partition
from mball.plan.problem import Problem
from mball.plan.search import MANY_USES, best_draft, fastest_s, partitions
from mball.plan.simulate import simulate
from mball.plan.tiers import check_host_budget, plan_tiers
from mball.plan.validate import validate
from mball.schema import Machine, Plan, Trace

# A plan with other bundles than those in the arena takes over when it is faster by this factor: all that is there is
# then read again.
WORTH_OTHER_BUNDLES = 1.02
# The finest slots, which take no byte too many, each have a size of their own: nothing else fits in their place.
WORTH_ODD_SIZES = 1.005


def make_plan(
    trace: Trace,
    machine: Machine,
    budget_bytes: int,
    *,
    host_budget_bytes: int | None = None,
    fixed_bytes: int = 0,
    previous: Plan | None = None,
) -> Plan:
    """Returns the plan that runs `trace` within `budget_bytes` in the least predicted time.

    Args:
        host_budget_bytes: host memory for bundles that come from disk through it; needed exactly where the machine has
            a `disk_link`.
        fixed_bytes: device memory that never moves (buffers); part of the budget.
        previous: the plan whose residents are in the arena now. Its bundles are kept while no others are faster by
            more than 2 %, and so are the places of its residents where they leave room for the others. Where it still
            fits, no plan is returned that is predicted to be slower than it is now.

    Raises:
        BudgetError: a budget is below the smallest that works, which the error names.
        ConfigError: `fixed_bytes` is negative, or `host_budget_bytes` is missing or of no use.
        SchemaError: trace or machine contradict themselves.
    """
    check_host_budget(machine, host_budget_bytes)
    if host_budget_bytes is not None:
        problem = Problem.of(
            trace,
            machine,
            budget_bytes,
            fixed_bytes=fixed_bytes,
            previous=previous,
            host_budget_bytes=host_budget_bytes,
        )
        return plan_tiers(problem, _best_draft)
    problems: list[Problem] = []
    errors: list[BudgetError] = []
    for moves_born in (True, False) if any(trace.movable()) else (False,):
        try:
            problems.append(
                Problem.of(
                    trace, machine, budget_bytes, fixed_bytes=fixed_bytes, previous=previous, moves_born=moves_born
                )
            )
        except BudgetError as error:
            errors.append(error)
    if not problems:
        raise min(errors, key=lambda error: error.smallest_bytes)
    best: tuple[tuple[float, tuple[float, int, int]], Problem, Draft] | None = None
    for problem in problems:
        draft = _best_draft(problem)
        assert draft is not None, (
            "the finest bundles, nothing resident and no bridging fit every budget that is allowed"
        )
        # One of them may have the bundles that are in the arena now.
        is_there = previous is not None and draft.partition.demand.bundles == previous.bundles
        worth = 1 / WORTH_OTHER_BUNDLES if is_there else 1.0
        cost = float(f"{draft.prediction.pass_s * worth:.4g}"), draft.cost()
        if best is None or cost < best[0]:
            best = cost, problem, draft
    assert best is not None, "there is a problem, or an error was raised"
    return best[1].plan(best[2])


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
        kept = _faster(best_draft([same], arena_bytes, stayed), _as_before(problem, same, previous))
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
    if kept is not None and (best is None or kept.prediction.pass_s <= WORTH_OTHER_BUNDLES * best.prediction.pass_s):
        best = kept
    return best


def _as_before(problem: Problem, partition: Partition, previous: Plan) -> Draft | None:
    """Returns the plan before as it is, timed anew; None where it does not fit any more."""
    there = replace(
        previous,
        budget_bytes=problem.budget_bytes,
        fixed_bytes=problem.fixed_bytes,
        activation_bytes=problem.activation_bytes,
    )
    try:
        validate(problem.trace, there, problem.machine)
    except PlanError:  # or it is of another pass over the same weights
        return None
    # In a draft residents lie one behind the other and slots follow; where they lie is said when the plan is made.
    sizes = [previous.bundles[placement.bundle].size_bytes for placement in previous.residents]
    ends = [placement.offset_bytes + size for placement, size in zip(previous.residents, sizes, strict=True)]
    apart_bytes = max(ends, default=0) - sum(sizes)
    return Draft(
        partition=partition,
        steps=previous.steps,
        residents=previous.residents,
        transfers=tuple(replace(each, offset_bytes=each.offset_bytes - apart_bytes) for each in previous.transfers),
        made=tuple(replace(each, offset_bytes=each.offset_bytes - apart_bytes) for each in previous.made),
        offloads=tuple(replace(each, offset_bytes=each.offset_bytes - apart_bytes) for each in previous.offloads),
        arena_bytes=previous.arena_bytes - apart_bytes,
        prediction=simulate(problem.trace, there, problem.machine).prediction,
    )


def _faster(one: Draft | None, other: Draft | None) -> Draft | None:
    if one is None or other is None:
        return other if one is None else one
    return other if other.cost() < one.cost() else one
