"""The doctor: what is missing is named, with what to do, and decides the exit status."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from mball.cli import doctor, findings, main
from mball.cli.findings import Need, State


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    real = findings.probe_directory
    monkeypatch.setattr(findings, "probe_directory", lambda directory: real(directory, size_bytes=1 << 20))


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
    facts = findings.DirectoryFacts(
        directory="/d", file_system="nfs", mount_point="/", free_bytes=1 << 30, direct=False,
        offset_alignment_bytes=None, address_alignment_bytes=None, length_alignment_bytes=None,
        direct_bandwidth_bytes_per_s=None, buffered_bandwidth_bytes_per_s=5e7, latency_s=1e-3, measured_bytes=1 << 28,
    )  # fmt: skip
    monkeypatch.setattr(findings, "probe_directory", lambda directory: facts)
    found, raw = findings.disk("/d")
    assert raw is facts
    states = {finding.name: finding.state for finding in found}
    assert states["O_DIRECT"] is State.MISSING
    assert states["read through it, cold"] is State.LIMITED
    assert not doctor._fatal(found)


def test_gpu_and_driver_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(handle: Any) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    answers: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlSystemGetCudaDriverVersion": lambda: 13010,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=80 << 30, free=79 << 30),
        "nvmlDeviceGetName": lambda handle: "Big GPU",
        "nvmlDeviceGetMaxPcieLinkGeneration": hidden,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    found = {finding.name: finding for finding in findings.gpus()}
    assert found["NVIDIA driver"].value == "580.1, CUDA 13.1"
    assert found["GPU 0"].value == "Big GPU, 80.00 GiB, 79.00 GiB free, PCIe link unknown"
    assert all(finding.need is Need.OPTIONAL for finding in found.values())
