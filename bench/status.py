"""Writes the status table of the README from the result files: `python -m bench.status`, or `make status`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.pages import markdown_table, rewrite, run_update
from bench.results import RESULTS, Device, Result, Topic, read_results
from mball.errors import SchemaError

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- status:begin -->", "<!-- status:end -->"

_ROWS = {
    Topic.EQUALITY: "streamed equals unwrapped",
    Topic.MEMORY_CAP: "memory under a cgroup cap",
    Topic.WRITES: "cost of noticing writes",
    Topic.PLANNER: "planning time",
    Topic.READERS: "reading files",
    Topic.LINK: "driver calls, and copies to the device",
    Topic.SPEED: "speed against the roofline",
    Topic.PLANS: "plans, predicted and executed",
    Topic.PEERS: "speed against peers",
    Topic.START: "cold start",
    Topic.FIRST_TOKEN: "first token, several shards",
    Topic.SWAP: "swap against the disk",
    Topic.LOAD: "loading a checkpoint",
    Topic.DEMO: "the demo",
}
_COLUMNS = {Device.CPU: "CPU", Device.CUDA: "CUDA"}


def table(results: Sequence[Result]) -> str:
    """Returns the Markdown table; the newest result of a topic and device fills their cell."""
    newest = {
        (result.topic, result.device): result for result in sorted(results, key=lambda result: result.machine.date)
    }
    rows = [
        [title, *(_cell(newest.get((topic.value, device.value))) for device in _COLUMNS)]
        for topic, title in _ROWS.items()
    ]
    return markdown_table(["what", *_COLUMNS.values()], rows)


def _cell(result: Result | None) -> str:
    if result is None:
        return "not measured"
    return f"[{result.day()}, {result.hardware()}: {result.summary()}](bench/results/{result.file_name()})"


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
    return rewrite(readme, with_block(readme.read_text(encoding="utf-8"), table(read_results(directory))))


def main() -> None:
    """Rewrites this checkout's README."""
    run_update(f"the status table of {README.name}", update)


if __name__ == "__main__":
    main()
