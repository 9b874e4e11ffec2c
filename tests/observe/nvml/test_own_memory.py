"""What NVML says of this very process, against the ledger and what CUDA and PyTorch say."""

from __future__ import annotations

import os

import pytest

from mball.memory.ledger import Kind, Ledger
from mball.observe.reconcile import CudaFacts
from mball.observe.told import NotTold
from mball.snapshot import explain_gpu_memory
from mball.units import GIB
from tests.observe.nvml.standin import StandIn, slice_of

SECOND = CudaFacts(ordinal=0, uuid="00000000-0000-0000-0000-000000000001", reserved_bytes=GIB, free_bytes=7 * GIB)


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger(8 * GIB)
    ledger.set(Kind.ARENA, 4 * GIB)
    ledger.set(Kind.ACTIVATIONS, GIB // 2)
    return ledger


def test_the_gpu_is_found_by_its_name_in_cuda(driver: StandIn, ledger: Ledger) -> None:
    driver.set(num_gpus=2)
    driver.set(1, total=16 * GIB, used=8 * GIB, reserved=GIB)
    driver.list(os.getpid(), 1, unit=0)
    driver.list(os.getpid(), 6 * GIB, unit=1)
    explained = explain_gpu_memory(ledger, SECOND, spare_bytes=0)
    assert explained.held_bytes == 6 * GIB
    assert explained.rest_bytes == GIB
    assert explained.free_bytes == {"NVML": 7 * GIB, "CUDA": 7 * GIB}


def test_a_slice_is_found_too(driver: StandIn, ledger: Ledger) -> None:
    driver.set(slices=1)
    unit = slice_of(0, 0)
    driver.list(os.getpid(), 6 * GIB, unit=unit)
    facts = CudaFacts(ordinal=0, uuid=f"00000000-0000-0000-0000-{unit:012}", reserved_bytes=0, free_bytes=0)
    assert explain_gpu_memory(ledger, facts, spare_bytes=0).held_bytes == 6 * GIB


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("", "process {pid} is not listed; a container may hide it"),
        ("nvmlDeviceGetComputeRunningProcesses_v3", "compute processes: Insufficient Permissions"),
        ("nvmlDeviceGetUUID", "no GPU that the driver tells of is 00000000-0000-0000-0000-000000000001"),
        ("nvmlInitWithFlags", "NVIDIA's driver does not answer (Insufficient Permissions)"),
    ],
)
def test_why_nothing_is_told(driver: StandIn, ledger: Ledger, function: str, why: str) -> None:
    driver.set(num_gpus=2)
    driver.list(os.getpid() + 1, 6 * GIB, unit=1)
    if function:
        driver.fail(function, "NO_PERMISSION")
    explained = explain_gpu_memory(ledger, SECOND, spare_bytes=0)
    assert explained.rest_bytes == explained.held_bytes == NotTold(why=why.format(pid=os.getpid()))
    assert explained.known_bytes == 5 * GIB
