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

# One search for places in hundreds takes more.
MOST_NODES = 20_000
GAPS = Path(__file__).parent / "gaps.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The predicted pass of mball's plan, and what it is held against, in seconds.

    Attributes:
        planned_s: mball's plan.
        optimal_s: the fastest plan there is.
        relaxed_s: the fastest one if bytes had no addresses.
        bound_s: the roofline.
    """

    planned_s: float
    optimal_s: float
    relaxed_s: float
    bound_s: float

    @classmethod
    def of(cls, instance: Instance) -> Self:
        """Plans an instance and finds its optimum. Raises PlanError for a plan that breaks a promise."""
        trace, machine = instance.trace, instance.machine
        plan = make_plan(trace, machine, instance.budget_bytes)
        validate(trace, plan, machine)
        exact, arena_bytes = Exact(trace, machine), round_down(instance.budget_bytes, machine.page_bytes)
        relaxed = exact.optimum(arena_bytes)
        assert relaxed is not None, "every budget of an instance holds the weights of its largest step"
        placed = exact.placed(arena_bytes, plan.prediction.pass_s, MOST_NODES)
        return cls(
            planned_s=plan.prediction.pass_s,
            # What was not searched to its end is held against what cannot be beaten.
            optimal_s=placed.pass_s if placed.is_complete else relaxed.pass_s,
            relaxed_s=relaxed.pass_s,
            bound_s=bound_s(trace, machine, instance.budget_bytes),
        )

    @property
    def percent(self) -> float:
        """By how much the plan is slower than the optimum."""
        return self._beyond_percent(self.optimal_s)

    @property
    def relaxed_percent(self) -> float:
        """By how much the plan is slower than one without addresses."""
        return self._beyond_percent(self.relaxed_s)

    @property
    def bound_percent(self) -> float:
        """By how much the plan is slower than the roofline."""
        return self._beyond_percent(self.bound_s)

    def _beyond_percent(self, other_s: float) -> float:
        # Sums of the same times in another order differ in the last digits.
        return round((self.planned_s / other_s - 1) * 100, 5)


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
        title: [
            Gap(planned_s=planned, optimal_s=optimal, relaxed_s=relaxed, bound_s=bound)
            for planned, optimal, relaxed, bound in each
        ]
        for title, each in document.items()
    }


def write_gaps(found: Mapping[str, Sequence[Gap]], path: Path = GAPS) -> None:
    """Writes the gaps of each class."""
    classes = [
        f"{json.dumps(title)}: [\n  " + ",\n  ".join(json.dumps(_digits(gap)) for gap in each) + "\n]"
        for title, each in found.items()
    ]
    path.write_text("{\n" + ",\n".join(classes) + "\n}\n", encoding="utf-8")


def _digits(gap: Gap) -> list[float]:
    return [float(f"{value:.9g}") for value in (gap.planned_s, gap.optimal_s, gap.relaxed_s, gap.bound_s)]


def main() -> None:
    """Rewrites this checkout's gaps and the page."""
    from bench.planner import page

    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = dict(zip([kind.title() for kind in KINDS], pool.map(gaps, KINDS), strict=True))
    write_gaps(found)
    percents = [gap.percent for each in found.values() for gap in each]
    print(f"{len(percents)} instances: median {statistics.median(percents):.2f} %, worst {max(percents):.2f} %")
    page.main()


if __name__ == "__main__":
    main()
