"""The doctor on GPUs: the same questions as `mball top`, and no answer is no crash."""

from __future__ import annotations

import pytest

from mball.cli import findings
from mball.cli.findings import Need, State
from mball.units import GIB
from tests.observe.nvml.standin import StandIn, slice_of


def test_gpu_and_driver_are_told(driver: StandIn) -> None:
    driver.set(total=80 * GIB, used=GIB, reserved=0, lanes=8)
    driver.name(0, b"Big GPU")
    found = {finding.name: finding for finding in findings.gpus()}
    assert found["NVIDIA driver"].value == "580.65.06, CUDA 13.1"
    assert found["GPU 0"].value == "Big GPU, 80.00 GiB, 79.00 GiB free, PCIe 5 x8"
    assert all(finding.need is Need.OPTIONAL for finding in found.values())


def test_slices_are_told(driver: StandIn) -> None:
    driver.set(slices=0b10)
    driver.set(slice_of(0, 1), total=10 * GIB, reserved=0)
    found = {finding.name: finding.value for finding in findings.gpus()}
    assert found["GPU 0:1"].startswith("stand-in slice, 10.00 GiB, 10.00 GiB free")


@pytest.mark.parametrize(
    ("function", "value"),
    [
        ("nvmlDeviceGetMaxPcieLinkWidth", "stand-in, 80.00 GiB, 79.50 GiB free, PCIe link unknown"),
        ("nvmlDeviceGetMemoryInfo", "stand-in, memory unknown, PCIe 5 x16"),
        ("nvmlDeviceGetName", "name unknown, 80.00 GiB, 79.50 GiB free, PCIe 5 x16"),
        ("nvmlDeviceGetHandleByIndex_v2", "name unknown, memory unknown, PCIe link unknown"),
    ],
)
def test_what_a_gpu_does_not_tell_is_said(driver: StandIn, function: str, value: str) -> None:
    driver.fail(function, "NOT_SUPPORTED")
    if function == "nvmlDeviceGetMemoryInfo":
        driver.fail("nvmlDeviceGetMemoryInfo_v2", "NOT_SUPPORTED")
    (gpu,) = [finding for finding in findings.gpus() if finding.name == "GPU 0"]
    assert gpu.value == value


@pytest.mark.parametrize("function", ["nvmlInitWithFlags", "nvmlDeviceGetCount_v2"])
def test_a_driver_that_does_not_answer_is_missing(driver: StandIn, function: str) -> None:
    driver.fail(function, "DRIVER_NOT_LOADED")
    (finding,) = findings.gpus()
    assert (finding.name, finding.state) == ("NVIDIA driver", State.MISSING)
    assert finding.value == "NVIDIA's driver does not answer (Driver Not Loaded)"
    assert "modprobe" in finding.advice
    assert "CPU" in finding.advice
