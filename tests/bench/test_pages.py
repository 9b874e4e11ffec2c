"""Pages are written once, tables keep their shape, and a malformed file is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.pages import markdown_table, rewrite, run_update
from mball.errors import SchemaError


def test_a_cell_ends_where_its_text_ends() -> None:
    table = markdown_table(["what", "how | much"], [["a\nb", "1"], ["c", "2 | 3"]])
    assert table.splitlines() == ["| what | how \\| much |", "| --- | --- |", "| a b | 1 |", "| c | 2 \\| 3 |"]


def test_a_page_that_says_so_already_is_not_written_again(tmp_path: Path) -> None:
    page = tmp_path / "PAGE.md"
    assert rewrite(page, "one – two\n")
    page.chmod(0o444)
    written = page.stat().st_mtime_ns
    assert not rewrite(page, "one – two\n")
    assert page.stat().st_mtime_ns == written
    page.chmod(0o644)
    assert rewrite(page, "three\n")
    assert page.read_text(encoding="utf-8") == "three\n"


@pytest.mark.parametrize(("changed", "said"), [(True, "PAGE.md was rewritten\n"), (False, "PAGE.md is up to date\n")])
def test_what_came_of_an_update_is_said(changed: bool, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_update("PAGE.md", lambda: changed)
    assert capsys.readouterr().out == said


def test_a_malformed_file_ends_the_update_with_its_name() -> None:
    def update() -> bool:
        raise SchemaError("x.json: version 2")

    with pytest.raises(SystemExit, match=r"PAGE\.md was left as it was: x\.json: version 2"):
        run_update("PAGE.md", update)
