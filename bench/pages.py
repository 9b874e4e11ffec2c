"""Pages that are written from files: Markdown tables, and files that are rewritten only where their text changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mball.errors import SchemaError


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns the table; what would end a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    # So would a line break.
    return " ".join(text.replace("|", r"\|").split())


def rewrite(path: Path, text: str) -> bool:
    """Writes a page unless it says so already; returns whether it changed."""
    changed = not path.is_file() or path.read_text(encoding="utf-8") != text
    if changed:
        path.write_text(text, encoding="utf-8")
    return changed


def run_update(name: str, update: Callable[[], bool]) -> None:
    """Runs `update`, which returns whether the page changed, and says what came of it.

    Raises:
        SystemExit: a file that the page is written from is malformed; the page was left as it was.
    """
    try:
        changed = update()
    except SchemaError as error:
        raise SystemExit(f"{name} was left as it was: {error}") from error
    print(f"{name} {'was rewritten' if changed else 'is up to date'}")
