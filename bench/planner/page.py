"""Writes `PLANNER.md`, how good plans are and what they take to make: `python -m bench.planner.page`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.pages import markdown_table, rewrite, run_update
from bench.planner.chains import ChainGap, read_chains
from bench.planner.gap import Gap, percentile, read_gaps
from bench.planner.growth import NUM_BUNDLES
from bench.results import RESULTS, Result, read_results
from bench.speed.table import Figures

PAGE = Path(__file__).parents[2] / "PLANNER.md"
# A plan this close to the optimum counts as optimal.
OPTIMAL_PERCENT = 0.01
_HEAD = """# The planner

Written by `python -m bench.planner.page`, from what `python -m bench.planner.gap`, `python -m bench.planner.chains`
and `make bench` found."""
_GAPS = """## Against the optimum

Small random passes (3 to 9 weights, up to 11 uses) under random budgets; every other one on a link with 0.1 ms of
latency, one in four running only once. The gap is by how much the predicted pass of mball's plan is longer than that of
the fastest plan there is, in %: of all choices of what stays over which gap between two uses, and of all places for
them (`tests/plan/exact.py`; weights come in the order in which they are needed, each by itself). The next two columns
are what no plan beats, and many cannot reach: all choices without addresses, and the roofline, which is
max(compute, reads of what the budget cannot hold).

A plan has the same addresses in every pass. Three equal weights that come through two slots, one after another, would
need slots that take turns from pass to pass: that is what a gap without addresses mostly is."""
_GROWTH = """## Growth

CPU seconds to plan a chain of steps that read a weight each, with uneven sizes (32 to 96 MiB) and times, under a
budget of 25 % of the weights; and to plan it again, from that plan, for 5 % more budget. `÷ roofline` is the predicted
pass over max(compute, reads of what the budget cannot hold)."""

_CHAINS = """## Two links

Recorded passes whose weights come from disk (2 GB/s, 0.1 ms) through host memory to the device (20 GB/s, 0.01 ms), with
steps 20 times as fast as they were recorded, for several shares of the weights on the device + in host memory (or the
smallest that works, where that is more). Each cell is the predicted pass over what no plan beats, and many cannot
reach: max(compute, what the device cannot hold on the one link, what neither can hold on the other). In brackets: over
the busiest of the three under this plan; where that is 1.00, it never waits. What lies between are bytes that could
stay if slots took no room: on both levels the largest weights that come pass through slots of their size, and an
embedding that has to come takes its room from all others, twice."""


def page(found: Mapping[str, Sequence[Gap]], chains: Sequence[ChainGap], results: Sequence[Result]) -> str:
    """Returns the page."""
    return "\n\n".join([_HEAD, _GAPS, gap_table(found), _CHAINS, chain_table(chains), *_growth(results)]) + "\n"


def chain_table(chains: Sequence[ChainGap]) -> str:
    """Returns the table of recorded passes over two links: a line a trace."""
    budgets = list(dict.fromkeys((each.device_percent, each.host_percent) for each in chains))
    cells = {
        (each.trace, each.device_percent, each.host_percent): (
            f"{each.planned_s / each.bound_s:.2f} ({each.planned_s / each.busiest_s:.2f})"
        )
        for each in chains
    }
    rows = [
        [trace, *(cells[trace, device, host] for device, host in budgets)]
        for trace in dict.fromkeys(each.trace for each in chains)
    ]
    return markdown_table(["trace", *(f"{device} % + {host} %" for device, host in budgets)], rows)


def gap_table(found: Mapping[str, Sequence[Gap]]) -> str:
    """Returns the table of gaps: a line a class, and one for all."""
    rows = [_gap_row(title, each) for title, each in found.items()]
    rows.append(_gap_row("**all**", [gap for each in found.values() for gap in each]))
    head = ["passes", "instances", "optimal", "median", "95th percentile", "worst"]
    return markdown_table([*head, "without addresses (worst)", "roofline (worst)"], rows)


def _gap_row(title: str, each: Sequence[Gap]) -> list[str]:
    percents = [gap.percent for gap in each]
    optimal = sum(percent <= OPTIMAL_PERCENT for percent in percents)
    figures = [statistics.median(percents), percentile(percents, 95), max(percents)]
    relaxed = [gap.relaxed_percent for gap in each]
    bounds = [gap.bound_percent for gap in each]
    return [
        title,
        str(len(each)),
        str(optimal),
        *(f"{figure:.2f}" for figure in figures),
        f"{statistics.median(relaxed):.2f} ({max(relaxed):.2f})",
        f"{statistics.median(bounds):.2f} ({max(bounds):.2f})",
    ]


def _growth(results: Sequence[Result]) -> list[str]:
    figures = Figures(results, "planner")
    rows = [
        [f"{count:,}", figures.show(f"first_{count}"), figures.show(f"again_{count}"), figures.show(f"gap_{count}")]
        for count in NUM_BUNDLES
        if figures.has(f"first_{count}")
    ]
    head = ["bundles", "first plan", "planned again", "÷ roofline"]
    return [_GROWTH, figures.source(), *([markdown_table(head, rows)] if rows else [])]


def update(path: Path = PAGE, directory: Path = RESULTS) -> bool:
    """Rewrites the page from the files; returns whether it changed. Raises SchemaError for a malformed file."""
    return rewrite(path, page(read_gaps(), read_chains(), read_results(directory)))


def main() -> None:
    """Rewrites this checkout's page."""
    run_update(PAGE.name, update)


if __name__ == "__main__":
    main()
