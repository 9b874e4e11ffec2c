"""The plan of a trace under a budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mball.errors import BudgetError
from mball.plan.bundles import finest_bundles
from mball.plan.draft import Draft
from mball.plan.partition import Partition
from mball.plan.placement import keep_in_place
from mball.plan.search import MANY_USES, best_draft, fastest_s, partitions
from mball.plan.smallest import check_problem, smallest_for
from mball.schema import Machine, Plan, Trace
from mball.units import format_bytes, round_down

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
    check_problem(trace, machine, fixed_bytes)
    finest = Partition.of(trace, machine, finest_bundles(trace, machine))
    smallest = smallest_for(trace, finest.demand, fixed_bytes)
    if budget_bytes < smallest.size_bytes:
        raise BudgetError(
            f"budget {format_bytes(budget_bytes)} ({budget_bytes} B) is too small for {trace.name!r}: the smallest "
            f"that works is {format_bytes(smallest.size_bytes)} ({smallest.size_bytes} B), because "
            f"{smallest.limited_by}; raise the budget to at least {smallest.size_bytes} B",
            budget_bytes=budget_bytes,
            smallest_bytes=smallest.size_bytes,
            limited_by=smallest.limited_by,
        )
    activation_bytes = smallest.activation_bytes
    arena_bytes = round_down(budget_bytes - fixed_bytes - activation_bytes, machine.page_bytes)
    best = _best_draft(trace, machine, finest, arena_bytes, previous)
    residents, transfers, moved_bytes = best.residents, best.transfers, 0
    if previous is not None:
        residents, moved_bytes = keep_in_place(
            best.partition.demand, residents, previous, arena_bytes - best.arena_bytes
        )
        transfers = tuple(replace(each, offset_bytes=each.offset_bytes + moved_bytes) for each in transfers)
    return Plan(
        trace_name=trace.name,
        budget_bytes=budget_bytes,
        fixed_bytes=fixed_bytes,
        activation_bytes=activation_bytes,
        arena_bytes=best.arena_bytes + moved_bytes,
        bundles=best.partition.demand.bundles,
        steps=best.steps,
        residents=residents,
        transfers=transfers,
        prediction=best.prediction,
    )


def _best_draft(trace: Trace, machine: Machine, finest: Partition, arena_bytes: int, previous: Plan | None) -> Draft:
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
