"""The bench of loading: each way that needs no network, a session of a small file, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.load.child import LoadChild
from bench.load.loaders import TITLES, Way
from bench.load.session import cold, warm
from bench.results import Device, Topic, read_results, record
from bench.speed.contender import ContenderError
from bench.speed.model import SMALL, make_checkpoint, weight_file
from bench.speed.table import table
from tests.bench.here import Here

LOCAL = (Way.BARE, Way.PREFAULTED, Way.MBALL, Way.COPY, Way.MMAP, Way.PREAD)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weight_file(make_checkpoint(SMALL, tmp_path_factory.mktemp("load"), quick=True))


def quiet(text: str) -> None:
    """Shows nothing."""


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.load.session.Contender", Here)


def test_all_ways_find_the_same(weights: Path) -> None:
    child = LoadChild()
    replies = {way: child.load(way.value, str(weights)) for way in LOCAL}
    assert all(reply["sums"] == replies[Way.MMAP]["sums"] for reply in replies.values())
    assert len({*replies[Way.MMAP]["sums"].values()}) > 10
    assert all(reply["load_s"] > 0 and reply["cpu_s"] >= 0 for reply in replies.values())


def test_a_session_and_its_table(weights: Path, tmp_path: Path) -> None:
    ways = (Way.BARE, Way.PREFAULTED, Way.MBALL)
    found = [*cold(weights, ways, 2, None, quiet), *warm(weights, ways[2:], 2, None, quiet)]
    names = {measurement.name for measurement in found}
    assert {
        "cold_mball_s",
        "cold_disk_prefaulted",
        "cold_bare_prefaulted",
        "cold_yardstick_s",
        "warm_mball_cpu_s",
        "size",
    } <= names
    record(
        name="load", topic=Topic.LOAD, device=Device.CPU, headline="{size} at {cold_disk_mball} of the disk",
        measurements=found, directory=tmp_path,
    )  # fmt: skip
    page = table(read_results(tmp_path))
    assert "## Loading a checkpoint" in page
    rows = [line for line in page.splitlines() if line.startswith(tuple(f"| {title} |" for title in TITLES.values()))]
    assert [row.split(" | ")[0] for row in rows] == [f"| {TITLES[way]}" for way in ways]


def test_other_tensors_are_noticed(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LoadChild.load

    def load(self: LoadChild, way: str, path: str) -> dict[str, Any]:
        reply = real(self, way, path)
        reply["sums"]["lm_head.weight"] += way == Way.MMAP.value
        return reply

    monkeypatch.setattr(LoadChild, "load", load)
    with pytest.raises(ContenderError, match=r"loads other tensors"):
        warm(weights, (Way.MBALL, Way.MMAP), 1, None, quiet)
