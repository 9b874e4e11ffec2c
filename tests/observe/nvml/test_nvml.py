"""Snapshots of GPUs: what the driver tells is told, and what it does not is said so, whichever call fails."""

from __future__ import annotations

import dataclasses
from typing import Any

import pynvml
import pytest

from mball.observe.gpus import Gpu, GpuProcess, GpuSnapshot, Use
from mball.observe.nvml import NoGpuError, Nvml, needs_second_look, open_nvml
from mball.observe.told import NotTold
from mball.units import GIB, KIB, MIB
from tests.observe.nvml.standin import CODES, StandIn, slice_of

NO_NUMBER = 2**64 - 1


def look() -> GpuSnapshot:
    with open_nvml() as nvml:
        return nvml.snapshot()


def why(value: Any) -> str:
    assert isinstance(value, NotTold), value
    return value.why


def busy_machine(driver: StandIn) -> None:
    """Two GPUs, the second in two slices, and processes on all."""
    driver.set(num_gpus=2)
    driver.set(0, total=80 * GIB, used=10 * GIB, reserved=GIB, busy=97, memory_busy=40, pcie_sent=1500)
    driver.set(0, pcie_received=25_000_000, nvlink_sent=1 << 30, nvlink_received=1 << 31)
    driver.list(100, 6 * GIB, name=b"/usr/bin/python3")
    driver.list(100, 6 * GIB, use="graphics")
    driver.list(90, 3 * GIB, name=b"server", use="mps")
    driver.set(1, total=40 * GIB, used=2 * GIB, slices=0b1001)
    driver.set(slice_of(1, 0), total=20 * GIB, used=GIB)
    driver.set(slice_of(1, 3), total=10 * GIB, used=GIB)
    driver.list(200, GIB // 2, name=b"worker", unit=slice_of(1, 3))
    driver.list(200, GIB // 2, unit=1)  # who may ask is told all of them by the GPU, too


def test_what_the_driver_tells(driver: StandIn) -> None:
    busy_machine(driver)
    snapshot = look()
    assert (snapshot.driver_version, snapshot.cuda_version) == ("580.65.06", "13.1")
    first = snapshot.gpus[0]
    assert first == Gpu(
        label="0",
        uuid="GPU-00000000-0000-0000-0000-000000000000",
        name="stand-in",
        total_bytes=80 * GIB,
        used_bytes=10 * GIB,
        free_bytes=69 * GIB,
        reserved_bytes=GIB,
        busy_percent=97,
        memory_busy_percent=40,
        pcie_generation=5,
        pcie_lanes=16,
        pcie_received_bytes_per_s=25_000_000_000,
        pcie_sent_bytes_per_s=1_500_000,
        nvlink_received_bytes_per_s=NotTold(why="a rate needs a second look"),
        nvlink_sent_bytes_per_s=NotTold(why="a rate needs a second look"),
        processes=(
            GpuProcess(pid=90, uses=(Use.MPS,), used_bytes=3 * GIB, name="server"),
            GpuProcess(pid=100, uses=(Use.COMPUTE, Use.GRAPHICS), used_bytes=6 * GIB, name="/usr/bin/python3"),
        ),
        not_listed=(),
    )
    assert first.elsewhere_bytes == GIB


def test_slices_of_a_gpu_have_memory_and_processes_of_their_own(driver: StandIn) -> None:
    busy_machine(driver)
    gpu = look().gpus[1]
    assert [unit.label for unit in gpu.slices] == ["1:0", "1:3"]
    assert [unit.total_bytes for unit in gpu.slices] == [20 * GIB, 10 * GIB]
    assert [[process.pid for process in unit.processes] for unit in gpu.slices] == [[], [200]]
    assert gpu.processes == ()
    assert why(gpu.elsewhere_bytes) == "its processes are with its slices"
    assert all(why(unit.busy_percent) == "Not Supported" for unit in gpu.slices)
    assert [unit.label for unit in look().units()] == ["0", "1", "1:0", "1:3"]


def test_nvlink_rates_are_between_two_looks_and_of_all_links(driver: StandIn) -> None:
    now_s = 100.0
    driver.set(nvlink_sent=5000, nvlink_received=7000)
    with open_nvml():
        nvml = Nvml(clock=lambda: now_s)
        first = nvml.snapshot()
        assert needs_second_look(first)
        assert needs_second_look(nvml.snapshot()), "no time went by"
        now_s += 0.5
        driver.set(nvlink_sent=5000 + 18_000, nvlink_received=7000)
        (gpu,) = nvml.snapshot().gpus
        assert gpu.nvlink_sent_bytes_per_s == 36_000 * KIB
        assert gpu.nvlink_received_bytes_per_s == 0, "nothing came, which the driver does tell"
        now_s += 1
        driver.set(nvlink_sent=3)
        restarted = nvml.snapshot()
        assert why(restarted.gpus[0].nvlink_sent_bytes_per_s) == "the driver's counter began anew"
        assert not needs_second_look(restarted)


def test_without_nvlink_no_second_look_is_needed(driver: StandIn) -> None:
    snapshot = look()
    assert not needs_second_look(snapshot)
    assert why(snapshot.gpus[0].nvlink_sent_bytes_per_s) == "Not Supported"
    driver.set(nvlink_sent=1, nvlink_type=pynvml.NVML_VALUE_TYPE_DOUBLE)
    assert "type 0" in why(look().gpus[0].nvlink_sent_bytes_per_s)


def test_an_old_driver_counts_in_what_is_reserved_and_that_is_said(driver: StandIn) -> None:
    driver.set(used=3 * GIB, reserved=GIB)
    driver.fail("nvmlDeviceGetMemoryInfo_v2", "FUNCTION_NOT_FOUND")
    (gpu,) = look().gpus
    assert gpu.used_bytes == 4 * GIB
    assert why(gpu.reserved_bytes) == "Function Not Found"


def test_a_process_without_number_or_name_is_listed_without(driver: StandIn) -> None:
    driver.list(7, NO_NUMBER)
    driver.list(8, MIB, name=b"\xff\xfe")
    (gpu,) = look().gpus
    assert [process.pid for process in gpu.processes] == [7, 8]
    assert why(gpu.processes[0].used_bytes) == "the driver lists the process without a number"
    assert why(gpu.processes[0].name) == "Not Found"
    assert why(gpu.processes[1].name) == "the driver's answer is no text"
    assert "not what process 7 holds" in why(gpu.elsewhere_bytes)


def test_processes_that_hold_more_than_there_is_are_no_negative_rest(driver: StandIn) -> None:
    driver.set(used=GIB)
    driver.list(7, 2 * GIB)
    assert why(look().gpus[0].elsewhere_bytes) == "processes hold 2.00 GiB, more than the 1.00 GiB in use"


def test_numbers_that_mean_no_number(driver: StandIn) -> None:
    driver.set(used=NO_NUMBER, busy=2**32 - 1, pcie_sent=2**32 - 1, generation=2**32 - 1, lanes=2**32 - 1)
    (gpu,) = look().gpus
    for value in (gpu.used_bytes, gpu.busy_percent, gpu.pcie_sent_bytes_per_s, gpu.pcie_generation, gpu.pcie_lanes):
        assert why(value) == "the driver gives no number"
    assert gpu.memory_busy_percent == 0
    assert why(gpu.elsewhere_bytes) == "the driver gives no number"


# -- every call failing --------------------------------------------------------------------------------


Facts = dict[tuple[Any, ...], Any]


def facts_of(snapshot: GpuSnapshot) -> Facts:
    """Every single value, by what it is of."""
    facts: Facts = {("driver_version",): snapshot.driver_version, ("cuda_version",): snapshot.cuda_version}
    for unit in snapshot.units():
        for name in {field.name for field in dataclasses.fields(Gpu)} - {"label", "processes", "not_listed", "slices"}:
            facts[unit.label, name] = getattr(unit, name)
        for process in unit.processes:
            facts |= {(unit.label, process.pid, use): True for use in process.uses}
            facts |= {(unit.label, process.pid, name): getattr(process, name) for name in ("used_bytes", "name")}
        facts |= {(unit.label, "not listed", what): reason for what, reason in unit.not_listed}
    return facts


def untold(facts: Facts) -> Facts:
    return {what: value for what, value in facts.items() if isinstance(value, NotTold)}


@pytest.mark.parametrize("code", ["NOT_SUPPORTED", "NO_PERMISSION", "GPU_IS_LOST", "UNKNOWN", "OF_TOMORROW"])
def test_each_call_failing_leaves_that_unknown_and_nothing_else_wrong(driver: StandIn, code: str) -> None:
    busy_machine(driver)
    driver.forget_failures()
    good = look()
    calls = driver.calls
    assert len(calls) > 60
    for number, function in enumerate(calls, start=1):
        driver.forget_failures()
        driver.fail("", code, first=number, last=number)
        if function in ("nvmlInitWithFlags", "nvmlDeviceGetCount_v2"):
            with pytest.raises(NoGpuError, match=r"NVIDIA's driver does not answer \(.+\); .+"):
                look()
            assert driver.num_open == 0
            continue
        seen = look()
        if function == "nvmlShutdown":
            assert seen == good
            driver.forget_failures()
            pynvml.nvmlShutdown()  # what failed is not done
            continue
        expected, facts = facts_of(good), facts_of(seen)
        if function == "nvmlDeviceGetMemoryInfo_v2":  # the fallback counts in what is reserved
            expected |= {what: facts[what] for what in facts if what[1:] == ("used_bytes",)}
        if all(unit.label != "1:3" for unit in seen.units()):  # the processes of a hidden slice are with the GPU
            expected |= {
                ("1", *rest): value for (label, *rest), value in expected.items() if (label, rest[:1]) == ("1:3", [200])
            }
        changed = {what: value for what, value in facts.items() if value != expected.get(what)}
        # Nothing is invented: what changed is not told any more, for the reason that there is, or listed no more.
        assert all(isinstance(value, NotTold) for value in changed.values()), (function, changed)
        assert {value.why for value in changed.values()} <= {str(pynvml.NVMLError(CODES[code]))}, (function, changed)
        # Where the answer was "Not Supported" before, it is what it was.
        assert changed or code == "NOT_SUPPORTED", function


def test_a_gpu_that_is_lost_is_a_row_of_unknowns_beside_the_others(driver: StandIn) -> None:
    driver.set(num_gpus=2)
    driver.fail("nvmlDeviceGetHandleByIndex_v2", "GPU_IS_LOST", first=1, last=1)
    lost, other = look().gpus
    assert lost.label == "0"
    assert lost.processes == ()
    assert other.name == "stand-in"
    of_lost = [value for (label, *_), value in facts_of(look_with(lost)).items() if label == "0"]
    assert set(of_lost) == {NotTold(why="GPU is lost")}


def look_with(*gpus: Gpu) -> GpuSnapshot:
    return GpuSnapshot(driver_version="", cuda_version="", gpus=gpus)


def test_every_call_but_three_failing_is_still_a_snapshot(driver: StandIn) -> None:
    """As on a virtual GPU that tells next to nothing."""
    needed = ("nvmlInitWithFlags", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2", "nvmlShutdown")
    with open_nvml() as nvml:
        nvml.snapshot()
    refused = {*driver.calls, "nvmlDeviceGetMemoryInfo"} - {*needed}
    for function in sorted(refused):
        driver.fail(function, "NOT_SUPPORTED")
    snapshot = look()
    facts = facts_of(snapshot)
    assert facts == untold(facts)
    assert snapshot.gpus[0].not_listed == tuple(
        (f"{use} processes", NotTold(why="Not Supported")) for use in ("compute", "graphics", "mps")
    )


@pytest.mark.parametrize(
    ("code", "way_out"),
    [
        ("DRIVER_NOT_LOADED", "modprobe nvidia"),
        ("VERSION_MISMATCH", "reboot"),
        ("NO_PERMISSION", "/dev/nvidia"),
        ("TIMEOUT", "nvidia-smi"),
    ],
)
def test_a_driver_that_does_not_answer_is_one_clear_error(driver: StandIn, code: str, way_out: str) -> None:
    driver.fail("nvmlInitWithFlags", code)
    with pytest.raises(NoGpuError, match=way_out):
        look()


def test_no_gpu_is_one_clear_error(driver: StandIn) -> None:
    driver.set(num_gpus=0)
    with pytest.raises(NoGpuError, match="driver sees no GPU; check"):
        look()


def test_nvml_is_closed_whatever_happens_inside(driver: StandIn) -> None:
    def interrupted() -> None:
        with open_nvml():
            assert driver.num_open == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert driver.num_open == 0
