"""Writes the status table of the README from the result files: `python -m bench.status`, or `make status`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.results import RESULTS, Device, Result, Topic, read_results
from mball.errors import SchemaError

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- status:begin -->", "<!-- status:end -->"

_ROWS = {
    Topic.EQUALITY: "streamed equals unwrapped",
    Topic.MEMORY_CAP: "memory under a cgroup cap",
    Topic.WRITES: "cost of noticing writes",
    Topic.PLANNER: "planning time",
    Topic.SPEED: "speed against the roofline",
    Topic.PEERS: "speed against peers",
    Topic.START: "cold start",
    Topic.DEMO: "the demo",
}
_COLUMNS = {Device.CPU: "CPU", Device.CUDA: "CUDA"}


def table(results: Sequence[Result]) -> str:
    """Returns the Markdown table; the newest result of a topic and device fills their cell."""
    newest = {
        (result.topic, result.device): result for result in sorted(results, key=lambda result: result.machine.date)
    }
    lines = [f"| what | {' | '.join(_COLUMNS.values())} |", "|---" * (1 + len(_COLUMNS)) + "|"]
    for topic, title in _ROWS.items():
        cells = [_cell(newest.get((topic.value, device.value))) for device in _COLUMNS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(result: Result | None) -> str:
    if result is None:
        return "not measured"
    # A bar or a line break would end the cell.
    text = " ".join(f"{result.day()}, {result.hardware()}: {result.summary()}".replace("|", r"\|").split())
    return f"[{text}](bench/results/{result.file_name()})"


def block_of(text: str) -> str:
    """Returns what stands between the two marks of a README.

    Raises:
        SchemaError: the marks are not there exactly once, in order.
    """
    return _split(text)[1].strip("\n")


def with_block(text: str, block: str) -> str:
    """Returns a README's text with `block` between its marks. Raises SchemaError as `block_of`."""
    before, _, after = _split(text)
    return f"{before}\n{block}\n{after}"


def _split(text: str) -> tuple[str, str, str]:
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise SchemaError(f"the README needs one {BEGIN} and after it one {END}; the status table goes between them")
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:start], text[start:stop], text[stop:]


def update(readme: Path = README, directory: Path = RESULTS) -> bool:
    """Rewrites the README's table from the result files; returns whether it changed.

    Raises:
        SchemaError: a result file is malformed, or the README lacks the marks; the README is as it was.
    """
    text = readme.read_text(encoding="utf-8")
    updated = with_block(text, table(read_results(directory)))
    if updated != text:
        readme.write_text(updated, encoding="utf-8")
    return updated != text


def main() -> None:
    """Rewrites this checkout's README."""
    try:
        changed = update()
    except SchemaError as error:
        raise SystemExit(f"the status table was left as it was: {error}") from error
    print(f"{README.name}: the status table {'was rewritten' if changed else 'is up to date'}")


if __name__ == "__main__":
    main()
