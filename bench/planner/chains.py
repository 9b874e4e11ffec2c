"""Plans recorded passes whose weights come through host memory: `python -m bench.planner.chains` (some minutes).

Writes `chains.json`, from which `bench.planner.page` makes the table. Everything is predicted, nothing is timed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from bench import traces
from bench.traces.compare import read_bytes
from mball.plan import make_plan, simulate, smallest_budget, smallest_host_budget, validate
from mball.schema import Link, Machine, Tier, Trace
from mball.units import MIB

CHAINS = Path(__file__).parent / "chains.json"
MACHINE = Machine(
    name="20 GB/s from host memory, 2 GB/s from disk",
    page_bytes=4096,
    alignment_bytes=4096,
    link=Link(bandwidth_bytes_per_s=20e9, latency_s=1e-5, source=Tier.HOST),
    disk_link=Link(bandwidth_bytes_per_s=2e9, latency_s=1e-4, window_bytes=8 * MIB, source=Tier.DISK, target=Tier.HOST),
)
# The traces are of a CPU; so much faster is what they feed.
FASTER = 20
# Shares of the weights on the device and in host memory, in %.
PERCENTS = ((10, 30), (10, 75), (25, 25), (25, 60), (50, 25), (50, 40))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainGap:
    """The predicted pass of a recorded trace under one budget of each level, in seconds.

    Attributes:
        planned_s: mball's plan.
        busiest_s: compute or link, whichever is busier under that plan.
        bound_s: what no plan beats: compute, or what neither level can hold on its link.
    """

    trace: str
    device_percent: int
    host_percent: int
    planned_s: float
    busiest_s: float
    bound_s: float


def chain_gap(name: str, percents: tuple[int, int]) -> ChainGap:
    """Plans a recorded trace. Raises PlanError for a plan that breaks a promise."""
    recorded = traces.load(name)
    trace = replace(
        recorded, steps=tuple(replace(step, time_s=(step.time_s or 0.0) / FASTER) for step in recorded.steps)
    )
    weights, activations = read_bytes(trace), max(trace.activation_bytes(), default=0)
    budget = max(smallest_budget(trace, MACHINE).size_bytes, activations + weights * percents[0] // 100)
    host = max(smallest_host_budget(trace, MACHINE, budget).size_bytes, weights * percents[1] // 100)
    plan = make_plan(trace, MACHINE, budget, host_budget_bytes=host)
    validate(trace, plan, MACHINE)
    prediction = simulate(trace, plan, MACHINE).prediction
    return ChainGap(
        trace=name,
        device_percent=percents[0],
        host_percent=percents[1],
        planned_s=prediction.pass_s,
        busiest_s=prediction.roofline_s,
        bound_s=_bound_s(trace, budget - activations, host),
    )


def _bound_s(trace: Trace, arena_bytes: int, host_bytes: int) -> float:
    """Reads as a whole only: a trace with gathers may be faster."""
    assert MACHINE.disk_link is not None, "it has one"
    assert trace.cyclic, "the recorded passes repeat"
    whole = {index for step in trace.steps for index in step.reads}
    comes = sum(tensor.size_bytes for index, tensor in trace.homed() if index in whole) - arena_bytes
    return max(
        sum(step.time_s or 0.0 for step in trace.steps),
        comes / MACHINE.link.bandwidth_bytes_per_s,
        (comes - host_bytes) / MACHINE.disk_link.bandwidth_bytes_per_s,
    )


def read_chains(path: Path = CHAINS) -> list[ChainGap]:
    """Returns the gaps as they were written."""
    return [
        ChainGap(
            trace=trace,
            device_percent=device,
            host_percent=host,
            planned_s=planned_s,
            busiest_s=busiest_s,
            bound_s=bound_s,
        )
        for trace, device, host, planned_s, busiest_s, bound_s in json.loads(path.read_text(encoding="utf-8"))
    ]


def write_chains(found: Sequence[ChainGap], path: Path = CHAINS) -> None:
    """Writes the gaps."""
    rows = [
        [
            each.trace,
            each.device_percent,
            each.host_percent,
            *(float(f"{value:.9g}") for value in (each.planned_s, each.busiest_s, each.bound_s)),
        ]
        for each in found
    ]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


def main() -> None:
    """Rewrites this checkout's gaps and the page."""
    from bench.planner import page

    names, percents = zip(*product(traces.names(), PERCENTS), strict=True)
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = list(pool.map(chain_gap, names, percents))
    write_chains(found)
    print(f"{len(found)} plans")
    page.main()


if __name__ == "__main__":
    main()
