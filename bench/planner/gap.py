"""Plans small random passes and finds the optimum of each: `python -m bench.planner.gap` (some minutes).

Writes `gaps.json`, from which `bench.planner.page` makes the table. Everything is predicted, nothing is timed: the same
code writes the same file on every machine.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.planner.instances import KINDS, Instance, Kind, instances
from bench.traces.compare import bound_s
from mball.plan import make_plan, validate
from mball.units import round_down
from tests.plan.exact import Exact

GAPS = Path(__file__).parent / "gaps.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The predicted pass of mball's plan, the fastest that can be, and the roofline, in seconds."""

    planned_s: float
    optimal_s: float
    bound_s: float

    @classmethod
    def of(cls, instance: Instance) -> Self:
        """Plans an instance and finds its optimum. Raises PlanError for a plan that breaks a promise."""
        trace, machine = instance.trace, instance.machine
        plan = make_plan(trace, machine, instance.budget_bytes)
        validate(trace, plan, machine)
        optimum = Exact(trace, machine).optimum(round_down(instance.budget_bytes, machine.page_bytes))
        assert optimum is not None, "every budget of an instance holds the weights of its largest step"
        return cls(
            planned_s=plan.prediction.pass_s,
            optimal_s=optimum.pass_s,
            bound_s=bound_s(trace, machine, instance.budget_bytes),
        )

    @property
    def percent(self) -> float:
        """By how much the plan is slower than the optimum."""
        # Sums of the same times in another order differ in the last digits.
        return round((self.planned_s / self.optimal_s - 1) * 100, 6)

    @property
    def bound_percent(self) -> float:
        """By how much the plan is slower than the roofline."""
        return round((self.planned_s / self.bound_s - 1) * 100, 6)


def gaps(kind: Kind) -> list[Gap]:
    """Returns the gaps of all instances of a class, in order."""
    return [Gap.of(instance) for instance in instances(kind)]


def percentile(percents: Sequence[float], rank: int) -> float:
    """Returns the smallest of these that `rank` % of them do not exceed."""
    ordered = sorted(percents)
    return ordered[max(-(-len(ordered) * rank // 100) - 1, 0)]


def read_gaps(path: Path = GAPS) -> dict[str, list[Gap]]:
    """Returns the gaps of each class, by its title."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return {
        title: [Gap(planned_s=planned, optimal_s=optimal, bound_s=bound) for planned, optimal, bound in each]
        for title, each in document.items()
    }


def write_gaps(found: Mapping[str, Sequence[Gap]], path: Path = GAPS) -> None:
    """Writes the gaps of each class."""
    classes = [
        f"{json.dumps(title)}: [\n"
        + ",\n".join(f"  [{gap.planned_s:.9g}, {gap.optimal_s:.9g}, {gap.bound_s:.9g}]" for gap in each)
        + "\n]"
        for title, each in found.items()
    ]
    path.write_text("{\n" + ",\n".join(classes) + "\n}\n", encoding="utf-8")


def main() -> None:
    """Rewrites this checkout's gaps and the page."""
    from bench.planner import page

    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = dict(zip([kind.title() for kind in KINDS], pool.map(gaps, KINDS), strict=True))
    write_gaps(found)
    percents = [gap.percent for each in found.values() for gap in each]
    print(
        f"{len(percents)} instances: median {statistics.median(percents):.2f} %, worst {max(percents):.2f} %; "
        f"{page.PAGE.name} {'was rewritten' if page.update() else 'is up to date'}"
    )


if __name__ == "__main__":
    main()
