"""Writes `POLICIES.md`, mball's plans against well-known policies on recorded traces: `python -m bench.traces.compare`.

Everything is simulated, so the same code writes the same page on every machine.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from bench import traces
from bench.pages import markdown_table, rewrite, run_update
from bench.results import show
from mball.errors import BudgetError
from mball.plan import make_plan, simulate, smallest_budget, validate
from mball.schema import Link, Machine, Plan, Trace
from mball.units import MIB, format_bytes

PAGE = Path(__file__).parents[2] / "POLICIES.md"
PERCENTS = (0, 10, 25, 50, 75, 90)
OWN = "mball"
# Sums of the same times in another order differ in the last digits.
_ALIKE = 1e-9

_SHARES = ", ".join(str(percent) for percent in PERCENTS[1:])
_HEAD = f"""# Policies

Written by `python -m bench.traces.compare`: simulated passes under mball's plans and those of well-known policies, on
traces that were recorded from real model classes on a CPU (`python -m bench.traces.record`). Every plan passed
`validate`.

Budgets: the smallest that works, and activations + {_SHARES} % of the weights that the pass reads.
`compute × 20` takes steps to be 20 times as fast as they were recorded. Where its own search ends above the
bound, mball also looks at the plans of swapadvisor, prefetch and flexgen, and takes one that is faster
(`mball/plan/portfolio.py`)."""
_MARGINS = """A policy's time over mball's: the median of the budgets, and the least in brackets. `÷ bound` is mball's
time over max(compute, reads of what the budget cannot hold), which no plan beats: the median, and the largest in
brackets."""

Planner = Callable[[Trace, Machine, int], Plan]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A machine, and how many times as fast as recorded it computes."""

    name: str
    machine: Machine
    faster: float = 1.0

    def at_its_speed(self, trace: Trace) -> Trace:
        """Returns the trace as this machine would have recorded it."""
        steps = (
            replace(step, time_s=None if step.time_s is None else step.time_s / self.faster) for step in trace.steps
        )
        return replace(trace, steps=tuple(steps))


def _machine(name: str, *, bandwidth_bytes_per_s: float, latency_s: float, window_bytes: int) -> Machine:
    link = Link(bandwidth_bytes_per_s=bandwidth_bytes_per_s, latency_s=latency_s, window_bytes=window_bytes)
    return Machine(name=name, page_bytes=4096, alignment_bytes=4096, link=link)


_DISK = _machine("disk", bandwidth_bytes_per_s=2e9, latency_s=1e-4, window_bytes=8 * MIB)
_PCIE = _machine("pcie", bandwidth_bytes_per_s=20e9, latency_s=1e-5, window_bytes=0)
SETTINGS = (
    Setting(name="disk, 2 GB/s", machine=_DISK),
    Setting(name="link, 20 GB/s", machine=_PCIE),
    # The traces are of a CPU. What feeds an accelerator has less time to hide behind.
    Setting(name="link, 20 GB/s, compute × 20", machine=_PCIE, faster=20.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One trace under one budget.

    Attributes:
        bound_s: no plan is faster.
        pass_s: the simulated pass of each planner, None where its plan does not fit.
    """

    budget_bytes: int
    bound_s: float
    pass_s: Mapping[str, float | None]

    def margin(self, planner: str) -> float | None:
        """Returns the planner's time over mball's, None where its plan does not fit."""
        other = self.pass_s[planner]
        return None if other is None else other / self._own_s()

    def gap(self) -> float:
        """Returns mball's time over the bound."""
        return self._own_s() / self.bound_s

    def _own_s(self) -> float:
        own = self.pass_s[OWN]
        assert own is not None, "mball plans every budget that is compared"
        return own


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One trace on one machine, under budgets in ascending order."""

    trace: str
    setting: str
    points: tuple[Point, ...]

    def margins(self, planner: str) -> list[float]:
        """Returns the margins under the budgets that the planner's plans fit."""
        return [margin for point in self.points if (margin := point.margin(planner)) is not None]

    def gaps(self) -> list[float]:
        """Returns mball's times over the bounds."""
        return [point.gap() for point in self.points]


def baselines() -> Mapping[str, Planner]:
    """Returns the planners that mball is held against, by name; none where there are none yet."""
    if importlib.util.find_spec("mball.plan.baselines") is None:
        return {}
    found: Mapping[str, Planner] = importlib.import_module("mball.plan.baselines").BASELINES
    return found


def read_bytes(trace: Trace) -> int:
    """Returns the bytes of what the pass reads from homes, each tensor once."""
    read = {index for step in trace.steps for index in (*step.reads, *(gather.tensor for gather in step.gathers))}
    return sum(tensor.size_bytes for index, tensor in trace.homed() if index in read)


def budgets(trace: Trace, machine: Machine) -> list[int]:
    """Returns activations and shares of the weights that are read, none below the smallest budget that works."""
    smallest = smallest_budget(trace, machine).size_bytes
    activation_bytes, weight_bytes = max(trace.activation_bytes(), default=0), read_bytes(trace)
    return sorted({max(smallest, activation_bytes + weight_bytes * percent // 100) for percent in PERCENTS})


def bound_s(trace: Trace, machine: Machine, budget_bytes: int) -> float:
    """Returns a time that no plan beats: all compute, or all reads of what the budget cannot hold beside activations.

    Reads as a whole only: a trace with gathers may be faster.
    """
    whole = {index for step in trace.steps for index in step.reads}
    weight_bytes = sum(tensor.size_bytes for index, tensor in trace.homed() if index in whole)
    room_bytes = budget_bytes - max(trace.activation_bytes(), default=0)
    compute_s = sum(step.time_s or 0.0 for step in trace.steps)
    return max(compute_s, (weight_bytes - room_bytes) / machine.link.bandwidth_bytes_per_s)


def compare(name: str, setting: Setting, planners: Mapping[str, Planner]) -> Comparison:
    """Returns what mball and `planners` make of a recorded trace.

    Raises:
        PlanError: a plan breaks a promise.
    """
    trace = setting.at_its_speed(traces.load(name))
    points = []
    for budget in budgets(trace, setting.machine):
        found = {planner: _pass_s(make, trace, setting.machine, budget) for planner, make in planners.items()}
        found[OWN] = _pass_s(make_plan, trace, setting.machine, budget)
        bound = bound_s(trace, setting.machine, budget)
        points.append(Point(budget_bytes=budget, bound_s=bound, pass_s=found))
    return Comparison(trace=name, setting=setting.name, points=tuple(points))


def _pass_s(make: Planner, trace: Trace, machine: Machine, budget_bytes: int) -> float | None:
    try:
        plan = make(trace, machine, budget_bytes)
    except BudgetError:
        return None
    validate(trace, plan, machine)
    assert plan.budget_bytes <= budget_bytes, "a plan for more memory than was given is no competitor"
    return simulate(trace, plan, machine).pass_s


def page(comparisons: Sequence[Comparison]) -> str:
    """Returns the page; `comparisons` have the same planners."""
    planners = sorted({planner for each in comparisons for point in each.points for planner in point.pass_s} - {OWN})
    parts = [
        _HEAD,
        "## Traces",
        markdown_table(
            ["trace", "steps", "weights read", "activations", "compute"], [_about(n) for n in _names(comparisons)]
        ),
        "## Margins",
        _MARGINS,
        markdown_table(["trace", "machine", "÷ bound", *planners], [line(each, planners) for each in comparisons]),
        *_verdict(comparisons, planners),
    ]
    return "\n\n".join(parts) + "\n"


def line(comparison: Comparison, planners: Sequence[str]) -> list[str]:
    """Returns the cells of a comparison's line of the table."""
    gaps = comparison.gaps()
    cells = [comparison.trace, comparison.setting, f"{statistics.median(gaps):.2f} ({max(gaps):.2f})"]
    for planner in planners:
        margins = comparison.margins(planner)
        text = f"{statistics.median(margins):.2f} ({min(margins):.2f})" if margins else ""
        missing = len(comparison.points) - len(margins)
        unfit = f"{missing} of {len(comparison.points)} do not fit" if missing else ""
        cells.append(", ".join(part for part in (text, unfit) if part))
    return cells


def slower(comparisons: Iterable[Comparison], planners: Sequence[str]) -> list[tuple[Comparison, Point, str]]:
    """Returns where mball's plan takes longer than another."""
    return [
        (comparison, point, planner)
        for comparison in comparisons
        for point, planner in product(comparison.points, planners)
        if (margin := point.margin(planner)) is not None and margin < 1 - _ALIKE
    ]


def _verdict(comparisons: Sequence[Comparison], planners: Sequence[str]) -> list[str]:
    if not planners:
        return ["No policies to compare with."]
    lost = slower(comparisons, planners)
    total = sum(len(comparison.margins(planner)) for comparison in comparisons for planner in planners)
    parts = ["## Where mball is slower", f"In {len(lost)} of {total} pairs of plans."]
    if lost:
        rows = [
            [comparison.trace, comparison.setting, format_bytes(point.budget_bytes), planner, f"{margin:.4f}"]
            for comparison, point, planner in lost
            if (margin := point.margin(planner)) is not None
        ]
        parts.append(markdown_table(["trace", "machine", "budget", "policy", "its time over mball's"], rows))
    return parts


def _names(comparisons: Sequence[Comparison]) -> list[str]:
    return list(dict.fromkeys(comparison.trace for comparison in comparisons))


def _about(name: str) -> list[str]:
    trace = traces.load(name)
    return [
        name,
        str(len(trace.steps)),
        format_bytes(read_bytes(trace)),
        format_bytes(max(trace.activation_bytes(), default=0)),
        show(sum(step.time_s or 0.0 for step in trace.steps), "s"),
    ]


def _compare_named(name: str, setting: Setting) -> Comparison:
    # Planners cross no process: each finds them itself.
    return compare(name, setting, baselines())


def update(path: Path = PAGE) -> bool:
    """Rewrites the page; returns whether it changed."""
    names, settings = zip(*product(traces.names(), SETTINGS), strict=True)
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        text = page(list(pool.map(_compare_named, names, settings)))
    return rewrite(path, text)


def main() -> None:
    """Rewrites this checkout's page."""
    run_update(PAGE.name, update)


if __name__ == "__main__":
    main()
