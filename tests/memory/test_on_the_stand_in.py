"""CUDA's memory on machines without a GPU: these tests run in a process of their own, with a stand-in for the driver.

So no other test ever sees a CUDA driver that is none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.memory.driver import standin

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
FILES = [*sorted(FOLDER.glob("test_*conformance.py")), *sorted((FOLDER / "driver").glob("test_*.py"))]


# Importing torch takes longer than most files do, so a process runs several; and there are as many processes as let
# tests that run side by side share them.
NUM_PROCESSES = 4
# For each of them: some fifty times what it takes on a quiet machine.
LIMIT_S = 900


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := standin.missing():
        pytest.skip(reason)
    return standin.build(tmp_path_factory.mktemp("standin"))


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("number", range(NUM_PROCESSES))
def test_cuda_memory_on_the_stand_in(library: Path, tmp_path: Path, number: int) -> None:
    files = FILES[number::NUM_PROCESSES]
    assert run(library, tmp_path, files, "not gpu and not slow") == {file.stem for file in files}


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S + 60)
def test_campaigns_on_the_stand_in(library: Path, tmp_path: Path) -> None:
    files = [file for file in FILES if "mark.slow" in file.read_text()]
    assert run(library, tmp_path, files, "slow and not gpu") == {file.stem for file in files}


def run(library: Path, tmp_path: Path, files: Sequence[Path], chosen: str) -> set[str]:
    """Runs the chosen tests of these files in a process of its own; returns the files that had some."""
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen, f"--junit-xml={report}"]
    finished = subprocess.run(
        [*command, *map(str, files)],
        cwd=ROOT,
        env=os.environ | {standin.LIBRARY_VARIABLE: str(library)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S if "not slow" in chosen else 2 * LIMIT_S,
        check=False,
    )
    assert finished.returncode in (0, 1), finished.stdout + finished.stderr
    cases = list(ElementTree.parse(report).iter("testcase"))
    # Of those that pass the report says nothing; one that is skipped is as wrong as one that fails.
    wrong = [
        f"{case.get('classname')}.{case.get('name')}: {part.tag}\n{part.get('message')}\n{part.text}"
        for case in cases
        for part in case
    ]
    assert not wrong, "\n\n".join(wrong)
    return {case.get("classname", "").rpartition(".")[2] for case in cases}


def test_this_process_has_no_stand_in(library: Path) -> None:
    """Not even after others ran with it."""
    assert standin.LIBRARY_VARIABLE not in os.environ
    assert str(library) not in Path("/proc/self/maps").read_text()
