"""PLANNER.md says what the files say."""

from __future__ import annotations

import pytest

from bench.planner.chains import chain_gap, read_chains
from bench.planner.gap import read_gaps
from bench.planner.page import PAGE, page
from bench.results import read_results


def test_the_page_says_what_the_files_say() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(read_gaps(), read_chains(), read_results()), "run `make status`; it is not written by hand"


def test_plans_over_two_links_are_no_worse_than_the_page_says() -> None:
    recorded = [each for each in read_chains() if each.trace in ("llama-1b-decode", "vit-large")]
    assert len(recorded) == 12
    for each in recorded[::4]:
        found = chain_gap(each.trace, (each.device_percent, each.host_percent))
        assert found.bound_s == pytest.approx(each.bound_s)
        assert found.bound_s <= found.busiest_s * (1 + 1e-9) <= found.planned_s * (1 + 2e-9)
        assert found.planned_s <= each.planned_s * 1.01
