"""What more memory would buy: the predicted time of a pass as a function of the budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mball.plan.planner import make_plan
from mball.plan.smallest import check_problem, smallest_budget
from mball.schema import Machine, Prediction, Trace

_ALIKE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class UtilityPoint:
    """What one budget gives: the prediction of a steady pass, None where the pass does not fit."""

    budget_bytes: int
    prediction: Prediction | None


def utility_curve(
    trace: Trace, machine: Machine, budgets: Iterable[int], *, fixed_bytes: int = 0
) -> tuple[UtilityPoint, ...]:
    """Returns a point for each budget, by ascending budget.

    More memory never takes longer: a plan for less fits too, so each point is of the fastest plan for its budget or a
    smaller one of the list.

    Args:
        trace: the pass.
        machine: the machine that runs it.
        budgets: bytes, in any order.
        fixed_bytes: device memory that never moves (buffers); part of each budget.

    Raises:
        ConfigError: `fixed_bytes` is negative.
        SchemaError: trace or machine contradict themselves.
    """
    check_problem(trace, machine, fixed_bytes)
    smallest = smallest_budget(trace, machine, fixed_bytes=fixed_bytes).size_bytes
    points: list[UtilityPoint] = []
    best: Prediction | None = None
    for budget in sorted(set(budgets)):
        if budget >= smallest and (best is None or best.streamed_bytes):
            found = make_plan(trace, machine, budget, fixed_bytes=fixed_bytes).prediction
            # Sums of the same times in another order differ in the last digits.
            alike = best is not None and found.pass_s <= best.pass_s * (1 + _ALIKE)
            if best is None or found.pass_s < best.pass_s or (alike and found.streamed_bytes < best.streamed_bytes):
                best = found
        points.append(UtilityPoint(budget_bytes=budget, prediction=best))
    return tuple(points)
