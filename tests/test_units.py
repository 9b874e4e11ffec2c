"""Sizes: what is read, what is refused, what is printed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.errors import ConfigError
from mball.units import GIB, KIB, MIB, format_bytes, format_names, parse_bytes, round_down, round_up


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        ("4096", 4096),
        ("1b", 1),
        ("6GiB", 6 * GIB),
        (" 512 mib ", 512 * MIB),
        ("1.5GB", 1_500_000_000),
        ("0.5 KiB", 512),
        ("2kb", 2000),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_are_read(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "6 GiBs", "-1", "-6GiB", "1e9", "six", "0", "0.0GiB", "0.1", "١", 0, -1, True, None, 1.5]
)
def test_other_sizes_are_refused_with_their_name(text: Any) -> None:
    with pytest.raises(ConfigError, match="budget"):
        parse_bytes(text, what="budget")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.00 KiB"),
        (54 * MIB, "54.00 MiB"),
        (3 * GIB // 2, "1.50 GiB"),
        (-2 * MIB, "-2.00 MiB"),
    ],
)
def test_sizes_are_printed(size: int, text: str) -> None:
    assert format_bytes(size) == text


@given(value=st.integers(0, 1 << 60), multiple=st.integers(1, 1 << 30))
def test_rounding_brackets_the_value(value: int, multiple: int) -> None:
    low, high = round_down(value, multiple), round_up(value, multiple)
    assert low <= value <= high
    assert low % multiple == high % multiple == 0
    assert high - low in (0, multiple)


def test_many_names_are_cut() -> None:
    assert format_names(["a"]) == "a"
    assert format_names(["a", "b", "c"]) == "a + 2 more"
    assert format_names(["a", "b", "c", "d", "e"], 3) == "a, b, c + 2 more"
    assert format_names(["a", "b"], 3) == "a, b"
    assert format_names([]) == ""
