"""Telemetry on machines without a GPU: these tests run in a process of their own, with a stand-in for NVML."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.observe.nvml import standin

FOLDER = Path(__file__).parent
FILES = sorted((FOLDER / "nvml").glob("test_*.py"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := standin.missing():
        pytest.skip(reason)
    return standin.build(tmp_path_factory.mktemp("standin"))


def test_telemetry_on_the_stand_in(library: Path) -> None:
    """In one process, for importing torch takes longer than all of them."""
    report = library.with_name("report.xml")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
    finished = subprocess.run(
        [*command, *map(str, FILES)],
        cwd=FOLDER.parents[1],
        env=os.environ | {standin.LIBRARY_VARIABLE: str(library)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode in (0, 1), finished.stdout + finished.stderr
    cases = list(ElementTree.parse(report).iter("testcase"))
    wrong = [f"{case.get('name')}: {part.tag}\n{part.get('message')}\n{part.text}" for case in cases for part in case]
    assert not wrong, "\n\n".join(wrong)
    ran = Counter(case.get("classname", "").rpartition(".")[2] for case in cases)
    assert ran.keys() == {file.stem for file in FILES}, "a file without tests"


def test_this_process_has_no_stand_in(library: Path) -> None:
    """Not even after others ran with it."""
    assert standin.LIBRARY_VARIABLE not in os.environ
    assert str(library) not in Path("/proc/self/maps").read_text()
