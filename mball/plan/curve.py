"""What more memory would buy: the predicted time of a pass as a function of the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mball.errors import BudgetError
from mball.plan.offloading import check_offload_budget
from mball.plan.planner import make_plan
from mball.plan.simulate import trace_times
from mball.plan.smallest import check_problem, smallest_budget
from mball.plan.smallest_host import smallest_host_budget
from mball.plan.tiers import check_host_budget
from mball.schema import Machine, Prediction, Trace

_ALIKE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class UtilityPoint:
    """What one budget gives: the prediction of a steady pass, None where the pass does not fit."""

    budget_bytes: int
    prediction: Prediction | None


def utility_curve(
    trace: Trace,
    machine: Machine,
    budgets: Iterable[int],
    *,
    host_budget_bytes: int | None = None,
    offload_budget_bytes: int | None = None,
    fixed_bytes: int = 0,
) -> tuple[UtilityPoint, ...]:
    """Returns a point for each budget, by ascending budget.

    More memory never takes longer: a plan for less fits too, so each point is of the fastest plan for its budget or a
    smaller one of the list.

    Args:
        trace: the pass.
        machine: the machine that runs it.
        budgets: bytes, in any order.
        host_budget_bytes, offload_budget_bytes: as for `make_plan`; the same beside each budget.
        fixed_bytes: device memory that never moves (buffers); part of each budget.

    Raises:
        ConfigError: as `make_plan`.
        SchemaError: trace or machine contradict themselves.
    """
    check_problem(trace, machine, fixed_bytes)
    check_offload_budget(machine, offload_budget_bytes)
    check_host_budget(machine, host_budget_bytes)
    smallest = smallest_budget(trace, machine, fixed_bytes=fixed_bytes).size_bytes

    def predict(budget: int) -> Prediction | None:
        if budget < smallest:
            return None
        try:
            plan = make_plan(
                trace,
                machine,
                budget,
                host_budget_bytes=host_budget_bytes,
                offload_budget_bytes=offload_budget_bytes,
                fixed_bytes=fixed_bytes,
            )
        except BudgetError:  # what is below is too small beside so little of the device
            return None
        return plan.prediction

    return _points(trace, budgets, predict)


def host_utility_curve(
    trace: Trace, machine: Machine, budget_bytes: int, host_budgets: Iterable[int], *, fixed_bytes: int = 0
) -> tuple[UtilityPoint, ...]:
    """Returns a point for each budget of host memory beside one of the device, as `utility_curve` does.

    Raises:
        BudgetError: the budget of the device is below the smallest that works, which the error names.
        ConfigError: the machine has no link from disk to host memory, or `fixed_bytes` is negative.
        SchemaError: trace or machine contradict themselves.
    """
    smallest = smallest_host_budget(trace, machine, budget_bytes, fixed_bytes=fixed_bytes).size_bytes

    def predict(budget: int) -> Prediction | None:
        if budget < smallest:
            return None
        return make_plan(trace, machine, budget_bytes, host_budget_bytes=budget, fixed_bytes=fixed_bytes).prediction

    return _points(trace, host_budgets, predict)


def _points(
    trace: Trace, budgets: Iterable[int], predict: Callable[[int], Prediction | None]
) -> tuple[UtilityPoint, ...]:
    """Returns a point for each budget, each of the best so far."""
    least_s = sum(trace_times(trace))
    points: list[UtilityPoint] = []
    best: Prediction | None = None
    for budget in sorted(set(budgets)):
        # Where nothing comes and the steps take what they take alone, more memory buys nothing.
        is_done = best is not None and not best.streamed_bytes and best.pass_s <= least_s * (1 + _ALIKE)
        found = None if is_done else predict(budget)
        if found is not None:
            # Sums of the same times in another order differ in the last digits.
            alike = best is not None and found.pass_s <= best.pass_s * (1 + _ALIKE)
            if best is None or found.pass_s < best.pass_s or (alike and found.streamed_bytes < best.streamed_bytes):
                best = found
        points.append(UtilityPoint(budget_bytes=budget, prediction=best))
    return tuple(points)
