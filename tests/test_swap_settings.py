"""The settings of swap: what a user writes arrives, and what makes no sense is refused with what would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mball.assembly import Storage
from mball.config import Config, SwapCheck
from mball.errors import ConfigError
from mball.storage import QueueLimits
from mball.units import MIB


def test_what_is_written_arrives(tmp_path: Path) -> None:
    config = Config.of(
        budget="1MiB", swap_dir=tmp_path, swap_limit="3MiB", swap_check="always", swap_writers=2, swap_depth=7,
        swap_high="2MiB", swap_low=4096, swap_share=0.5,
    )  # fmt: skip
    storage = Storage.open(config)
    try:
        settings = storage.swap._settings
        assert (settings.limit_bytes, settings.check) == (3 * MIB, SwapCheck.ALWAYS)
        assert settings.queue == QueueLimits(num_threads=2, depth=7, high_bytes=2 * MIB, low_bytes=4096, share=0.5)
        assert storage.files.swaps == {storage.swap.name: storage.swap}
    finally:
        storage.close()


def test_defaults_are_those_of_a_queue(tmp_path: Path) -> None:
    storage = Storage.open(Config.of(budget="1MiB", swap_dir=tmp_path))
    try:
        assert storage.swap._settings.queue == QueueLimits()
        assert storage.swap.limit_bytes is None
    finally:
        storage.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"swap_limit": "much"}, "swap_limit"),
        ({"swap_limit": -1}, "swap_limit"),
        ({"swap_check": "sometimes"}, "'first', 'always', 'off'"),
        ({"swap_writers": 0}, "give 1 to 64 threads"),
        ({"swap_depth": 0}, "at least 1 request"),
        ({"swap_high": "1MiB", "swap_low": "1MiB"}, "must be less"),
        ({"swap_share": 0}, "more than 0"),
        ({"swap_share": 1.5}, "at most 1"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.of(budget="1MiB", swap_dir=tmp_path, **settings)
