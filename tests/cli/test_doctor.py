"""The doctor: what is missing is named, with what to do, and decides the exit status. GPUs: tests/observe/nvml."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest

from mball.cli import calibrate, disk_findings, doctor, findings, main
from mball.cli.findings import Need, State
from mball.schema import Calibration, Link
from mball.storage import Effort, file_system_of
from mball.units import MIB
from tests.calibrations import keep_calibration, roomy_directory


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    real = disk_findings.probe_directory
    monkeypatch.setattr(disk_findings, "probe_directory", functools.partial(real, size_bytes=1 << 20))


@pytest.mark.usefixtures("quick_disk")
def test_tables_and_json_say_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor", "--directory", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in document["findings"]}
    assert {"Linux", "Python", "torch", "memory", "cgroup memory limit", "transparent huge pages", "O_DIRECT",
            "directory", "NVIDIA driver"} <= found.keys()  # fmt: skip
    assert any(name.startswith("torch.") for name in found), "private APIs are listed"
    assert found["torch"]["state"] == "found"
    assert found["torch"]["need"] == "mandatory"
    assert document["directory"]["measured_bytes"] == 1 << 20
    assert all(finding["advice"] for finding in document["findings"] if finding["state"] != "found")
    assert not any(finding["advice"] for finding in document["findings"] if finding["state"] == "found")
    assert not list(tmp_path.iterdir()), "the file that was measured is gone"

    monkeypatch.setenv("COLUMNS", "400")
    assert main(["doctor", "--directory", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in found)
    assert "mball works here" in text


def test_a_directory_that_is_not_there_is_fatal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--directory", str(tmp_path / "nowhere")]) == 1
    assert "mball does not work here: directory" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_disk")
def test_too_old_is_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(findings, "TORCH_NEEDED", (99, 0))
    monkeypatch.setattr(findings, "PYTHON_NEEDED", (99, 0))
    assert main(["doctor", "--directory", str(tmp_path)]) == 1
    assert "mball does not work here: Python, torch" in capsys.readouterr().out.replace("\n", " ")


def test_slow_disk_and_no_direct_reads_are_only_said(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = disk_findings.DirectoryFacts(
        directory="/d", file_system="nfs", mount_point="/", free_bytes=1 << 30, direct=False,
        page_cache_reason="nfs is a network's",
        offset_alignment_bytes=None, address_alignment_bytes=None, length_alignment_bytes=None,
        direct_bandwidth_bytes_per_s=None, buffered_bandwidth_bytes_per_s=5e7,
        cached_bandwidth_bytes_per_s=5e9, latency_s=1e-3, measured_bytes=1 << 28,
    )  # fmt: skip
    monkeypatch.setattr(disk_findings, "probe_directory", lambda directory, choice: facts)
    found, raw = disk_findings.disk("/d", has_gpu=True)
    assert raw is facts
    states = {finding.name: finding.state for finding in found}
    assert states["O_DIRECT"] is State.MISSING
    assert states["read through it, cold"] is State.LIMITED
    assert states["read out of it"] is State.FOUND
    assert states["files are read"] is states["GPUDirect Storage"] is State.LIMITED
    values = {finding.name: finding.value for finding in found}
    assert values["files are read"] == "through the page cache: nfs is a network's"
    assert values["GPUDirect Storage"].startswith("could not work here: ")
    assert not doctor._fatal(found)


@pytest.fixture
def quick_calibration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A short measurement, and a cache of its own, whose directory is returned."""
    effort = Effort(
        size_bytes=64 * MIB,
        time_limit_s=0.0,
        sample_s=0.001,
        blocks_bytes=(MIB, 16 * MIB),
        depths=(1, 4),
        requests_s=0.0,
    )
    monkeypatch.setattr(calibrate, "calibrate", functools.partial(calibrate.calibrate, effort=effort))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mball" / "calibration"


def test_a_calibration_is_shown_kept_and_told_of_later(
    quick_calibration: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    where = roomy_directory()
    assert main(["doctor", "--calibrate", where]) == 0
    text = capsys.readouterr().out
    (path,) = quick_calibration.iterdir()
    kept = Calibration.from_json(path.read_text())
    calibrated = kept.links[0]
    for shown in (str(path), kept.place, "16 MiB", "1 MiB", calibrated.reader, calibrate.figures(calibrated)):
        assert shown in text
    for sample in calibrated.samples:
        assert f"{sample.bandwidth_bytes_per_s / 1e9:.2f} ±" in text
        assert f"{sample.latency_s * 1e3:.2f} ms" in text

    assert main(["doctor", "--directory", where, "--calibrate", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["file"] == str(path), "a new one replaces the old one"
    again = Calibration.from_json(path.read_text())
    assert document["calibration"] == json.loads(again.to_json())
    assert kept != again

    found, _ = disk_findings.disk(where, has_gpu=False)
    (finding,) = [each for each in found if each.name == "calibration"]
    assert finding.state is State.FOUND
    assert finding.value == f"{again.day}: {calibrate.figures(again.links[0])}"


@pytest.mark.usefixtures("quick_disk")
def test_the_doctor_says_how_to_calibrate_and_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finding() -> findings.Finding:
        found, _ = disk_findings.disk(tmp_path, has_gpu=False)
        return next(each for each in found if each.name == "calibration")

    assert finding().state is State.MISSING
    assert finding().need is Need.OPTIONAL
    assert f"mball doctor --calibrate {tmp_path}" in finding().advice
    calibration = keep_calibration(tmp_path, Link(bandwidth_bytes_per_s=7.25e9, latency_s=1.5e-4), monkeypatch)
    assert finding().state is State.FOUND
    assert finding().value.startswith(f"{calibration.day}: 7.25 GB/s")
    assert "latency 150 µs; best 4 × 1 MiB in flight" in finding().value
    assert str(file_system_of(str(tmp_path))) == calibration.place


@pytest.mark.usefixtures("quick_disk")
def test_the_doctor_measures_the_requests_that_models_are_read_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Link(bandwidth_bytes_per_s=2e9, latency_s=1e-4)
    keep_calibration(tmp_path, link, monkeypatch, num_threads=16, chunk_bytes=4 * MIB)
    found, _ = disk_findings.disk(tmp_path, has_gpu=False)
    (reader,) = [each.value for each in found if each.name == "reader"]
    assert reader.startswith("16 threads of ")
    assert "4.00 MiB a request" in reader


def test_an_unsteady_disk_is_told(
    quick_calibration: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "UNSTEADY", -1.0)
    assert main(["doctor", "--calibrate", roomy_directory()]) == 0
    assert "calibrate again when it is quieter" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.usefixtures("quick_calibration")
def test_what_cannot_be_calibrated_or_kept_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor", "--calibrate", str(tmp_path / "nowhere")]) == 2
    assert "cannot be calibrated" in capsys.readouterr().err
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["doctor", "--calibrate", roomy_directory(), "--json"]) == 2
    output = capsys.readouterr()
    assert "set XDG_CACHE_HOME to a writable place" in output.err
    assert output.err.count("\n") == 1
    assert not output.out

    def homeless(self: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    assert main(["doctor", "--calibrate", roomy_directory()]) == 2
    assert "no home directory" in capsys.readouterr().err


def test_tests_know_no_calibration_of_this_machine() -> None:
    assert "pytest" in os.environ["XDG_CACHE_HOME"]
