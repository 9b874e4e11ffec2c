"""The bench of readers on a small scale, and its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.readers import compared, table
from bench.readers.compared import CELLS, USUAL, Scale
from bench.readers.course import Whose
from bench.results import RESULTS, Device, Topic, read_results, record
from bench.test_readers import HEADING
from mball.units import MIB
from tests.preads import read_pool

SMALL = Scale(file_bytes=8 * MIB, disk_bytes=4 * MIB, memory_bytes=8 * MIB, cells=CELLS[:3], time_limit_s=0.0)


def test_what_is_measured_is_what_the_page_shows(tmp_path: Path) -> None:
    library = read_pool()
    if library is None:
        pytest.skip("needs a C compiler, cc")
    said: list[str] = []
    found = compared.compare(SMALL, library, tmp_path, said.append)
    assert len(said) == 2
    by_name = {measurement.name: measurement for measurement in found}
    assert not list(tmp_path.iterdir())
    for beside in ("idle", "busy", "compute"):
        for whose in Whose:
            speed = by_name[f"cache_{beside}_{USUAL.name}_{whose.value}"]
            assert speed.minimum > 0.01
            assert speed.num_samples == 2
    # Direct reads may be refused where this runs.
    if f"disk_idle_{USUAL.name}_c" not in by_name:
        pytest.skip("the temporary files are on no disk")
    record(
        name=HEADING.name, topic=Topic.READERS, device=Device.CPU, headline=HEADING.headline, measurements=found,
        directory=tmp_path,
    )  # fmt: skip
    page = table.table(read_results(tmp_path))
    for measurement in found:
        if measurement.name.endswith(("_c", "_python", "_ratio", "_kept", "_cpu")):
            assert measurement.figure() in page


def test_the_page_is_that_of_the_results() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.table(read_results(RESULTS))
