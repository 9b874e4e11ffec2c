"""CUDA's memory on machines without a GPU: these tests run in a process of their own, with a stand-in for the driver.

So no other test ever sees a CUDA driver that is none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.memory.driver import standin

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
FILES = [*sorted(FOLDER.glob("test_*conformance.py")), *sorted((FOLDER / "driver").glob("test_*.py"))]


@dataclass(slots=True)
class Outcome:
    """What came of the tests of one file."""

    num_tests: int = 0
    wrong: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := standin.missing():
        pytest.skip(reason)
    return standin.build(tmp_path_factory.mktemp("standin"))


@pytest.fixture(scope="module")
def outcomes(library: Path) -> dict[str, Outcome]:
    """By file. One process runs them all, for importing torch takes longer than most of them."""
    report = library.with_name("report.xml")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", f"--junit-xml={report}"]
    finished = subprocess.run(
        [*command, *map(str, FILES)],
        cwd=ROOT,
        env=os.environ | {standin.LIBRARY_VARIABLE: str(library)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert finished.returncode in (0, 1), finished.stdout + finished.stderr
    outcomes: dict[str, Outcome] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = outcomes.setdefault(case.get("classname", "").rpartition(".")[2], Outcome())
        outcome.num_tests += 1
        outcome.wrong += [f"{case.get('name')}: {part.tag}\n{part.get('message')}\n{part.text}" for part in case]
    return outcomes


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_cuda_memory_on_the_stand_in(outcomes: dict[str, Outcome], file: Path) -> None:
    outcome = outcomes[file.stem]
    assert outcome.num_tests > 0
    assert not outcome.wrong, "\n\n".join(outcome.wrong)


def test_this_process_has_no_stand_in(library: Path) -> None:
    """Not even after others ran with it."""
    assert standin.LIBRARY_VARIABLE not in os.environ
    assert str(library) not in Path("/proc/self/maps").read_text()
