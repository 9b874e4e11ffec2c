"""A bench writes a result file when it is told to and ran whole, and nothing otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.results import RESULTS, read_results

ROOT = Path(__file__).parents[2]
BENCH = """
from bench.findings import Findings, Heading
from bench.results import Device, Measurement, Topic

HEADING = Heading(name="toy", topic=Topic.WRITES, device=Device.CPU, headline="{one} and {two}")

def test_one(findings: Findings) -> None:
    findings.add(Measurement.of("one", [1.0, 2.0], unit="s", description="one"))

def test_two(findings: Findings) -> None:
    findings.add(Measurement.of("two", [3.0], unit="s", description="two"))
    assert OUTCOME
"""


def run_bench(directory: Path, *options: str, passes: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a bench of two tests in a copy of the harness; results go to `directory / "results"`."""
    (directory / "toy").mkdir()
    (directory / "toy" / "test_toy.py").write_text(BENCH.replace("OUTCOME", str(passes)))
    command = (
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.conftest", str(directory / "toy"),
        "--rootdir", str(directory), "--results-dir", str(directory / "results"), *options,
    )  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_whole_run_is_written(tmp_path: Path) -> None:
    finished = run_bench(tmp_path, "--save-results", "--note", "busy machine")
    assert finished.returncode == 0, finished.stdout
    (found,) = read_results(tmp_path / "results")
    assert found.summary() == "1.5 s and 3 s"
    assert (found.name, found.topic, found.device, found.note) == ("toy", "writes", "cpu", "busy machine")


def test_a_mere_test_run_writes_nothing(tmp_path: Path) -> None:
    before = sorted(RESULTS.iterdir())
    finished = run_bench(tmp_path)
    assert finished.returncode == 0, finished.stdout
    assert not (tmp_path / "results").exists()
    assert sorted(RESULTS.iterdir()) == before


@pytest.mark.parametrize(("options", "passes"), [((), False), (("-k", "test_two"), True)])
def test_half_a_run_is_not_written(options: tuple[str, ...], passes: bool, tmp_path: Path) -> None:
    finished = run_bench(tmp_path, "--save-results", *options, passes=passes)
    assert finished.returncode == (0 if passes else 1), finished.stdout
    assert not (tmp_path / "results").exists()
    assert "no result was written" in finished.stdout
