"""`mball doctor`: what this machine has and lacks, how fast its disk is, and what to do about the rest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from enum import Enum
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mball.cli.disk_findings import disk
from mball.cli.findings import Finding, Need, State, gpus, software
from mball.cli.host_findings import host_memory, private_torch

_COLOURS = {State.FOUND: "green", State.LIMITED: "yellow", State.MISSING: "yellow"}


def run_doctor(*, directory: str, as_json: bool) -> int:
    """Prints what was found, as tables or JSON; returns 1 where something mandatory is missing, else 0."""
    console = Console()
    findings = [*software(), *host_memory()]
    of_gpus = gpus()
    has_gpu = of_gpus[0].state is State.FOUND
    if as_json:
        found, facts = disk(directory, has_gpu=has_gpu)
    else:
        with console.status(f"reading and writing 256 MiB in {directory}"):
            found, facts = disk(directory, has_gpu=has_gpu)
    findings += [*found, *of_gpus, *private_torch()]
    if as_json:
        document = {
            "findings": [dataclasses.asdict(finding) for finding in findings],
            "directory": None if facts is None else dataclasses.asdict(facts),
        }
        print(json.dumps(document, indent=2, default=_enum_value))
    else:
        for section, group in groupby(findings, key=lambda finding: finding.section):
            console.print(_table(section, list(group)))
        console.print(_verdict(findings))
    return 1 if _fatal(findings) else 0


def _table(section: str, findings: Sequence[Finding]) -> Table:
    table = Table(title=escape(section), title_justify="left", title_style="bold", expand=True)
    table.add_column("what", ratio=3, overflow="fold")
    table.add_column("need", width=9)
    table.add_column("state", width=7)
    table.add_column("found", ratio=5)
    table.add_column("what to do", ratio=5)
    for finding in findings:
        colour = "red" if _fatal([finding]) else _COLOURS[finding.state]
        table.add_row(
            escape(finding.name),
            finding.need.value,
            f"[{colour}]{finding.state.value}[/]",
            escape(finding.value),
            escape(finding.advice),
        )
    return table


def _verdict(findings: Sequence[Finding]) -> str:
    if fatal := _fatal(findings):
        return f"[red]mball does not work here: {', '.join(escape(finding.name) for finding in fatal)}[/]"
    lacking = sum(finding.state is not State.FOUND for finding in findings)
    return f"[green]mball works here.[/] {lacking} optional things are missing or limited; see what to do, if anything."


def _fatal(findings: Sequence[Finding]) -> list[Finding]:
    return [f for f in findings if f.need is Need.MANDATORY and f.state is State.MISSING]


def _enum_value(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{value!r} is no JSON")
