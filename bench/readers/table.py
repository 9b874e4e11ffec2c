"""Writes `bench/results/READERS.md` from the newest result file: `python -m bench.readers.table`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.pages import markdown_table, rewrite, run_update
from bench.readers.compared import CELLS, USUAL
from bench.readers.course import Beside, Cell, Medium, Whose
from bench.results import RESULTS, Result, read_results
from bench.speed.table import Figures
from mball.units import format_bytes

PAGE = RESULTS / "READERS.md"
_HEAD = (
    "# Readers\n\nWritten by `python -m bench.readers.table` from the files here; `make bench ARGS='-k readers'` "
    "measures.\n\nThe same reads by threads of C and of Python, in every round one after the other. All of a sample is "
    "asked for at once; then the main thread waits (idle), works on Python's objects (busy), or multiplies matrices on "
    "all cores (compute). Disk: `O_DIRECT`, past the page cache. Cache: a file that is in the page cache. Medians; "
    "of ratios with the 95 % interval of the median."
)
_MEDIA = {Medium.DISK: "Disk", Medium.CACHE: "Page cache", Medium.TMPFS: "tmpfs"}


def table(results: Sequence[Result]) -> str:
    """Returns the page."""
    figures = Figures(results, "readers")
    parts = [_HEAD, figures.source()]
    if figures.result is None:
        return "\n\n".join(parts) + "\n"
    for medium, title in _MEDIA.items():
        rows = [
            [_title(cell), *_row(figures, medium, Beside.IDLE, cell), *_row(figures, medium, Beside.PYTHON, cell)]
            for cell in CELLS
        ]
        head = ["threads × request", *(f"{beside}: {what}" for beside in ("idle", "busy") for what in _COLUMNS)]
        parts += [f"## {title}", markdown_table(head, rows)]
    rows = []
    for medium, title in _MEDIA.items():
        name = f"{medium.value}_{Beside.COMPUTE.value}_{USUAL.name}"
        idle = f"{medium.value}_{Beside.IDLE.value}_{USUAL.name}"
        for whose, called in _WHOSE.items():
            ratio = figures.interval(f"{name}_ratio") if whose is Whose.C else ""
            speeds = [figures.show(f"{name}_{whose.value}"), ratio, figures.show(f"{name}_{whose.value}_kept")]
            rows.append([title, called, *speeds, figures.show(f"{idle}_{whose.value}_cpu")])
    head = ["", "threads of", "beside compute", "C ÷ Python", "compute, of what it is alone", "CPU time of 1 GB, idle"]
    parts += [f"## Beside compute, {_title(USUAL)}", markdown_table(head, rows)]
    return "\n\n".join(parts) + "\n"


_COLUMNS = ("Python", "C", "C ÷ Python")
_WHOSE = {Whose.PYTHON: "Python", Whose.C: "C"}


def _title(cell: Cell) -> str:
    return f"{cell.num_threads} × {format_bytes(cell.block_bytes)}"


def _row(figures: Figures, medium: Medium, beside: Beside, cell: Cell) -> list[str]:
    name = f"{medium.value}_{beside.value}_{cell.name}"
    return [figures.show(f"{name}_python"), figures.show(f"{name}_c"), figures.interval(f"{name}_ratio")]


def update(page: Path = PAGE, directory: Path = RESULTS) -> bool:
    """Rewrites the page from the result files; returns whether it changed. Raises SchemaError for a malformed file."""
    return rewrite(page, table(read_results(directory)))


def main() -> None:
    """Rewrites this checkout's page."""
    run_update(PAGE.name, update)


if __name__ == "__main__":
    main()
