"""PLANNER.md says what the files say."""

from __future__ import annotations

from bench.planner.gap import read_gaps
from bench.planner.page import PAGE, page
from bench.results import read_results


def test_the_page_says_what_the_files_say() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(read_gaps(), read_results()), "run `make status`; it is not written by hand"
