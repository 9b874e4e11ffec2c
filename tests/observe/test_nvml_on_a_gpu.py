"""Telemetry of a real GPU, against what CUDA and PyTorch say of it."""

from __future__ import annotations

import pytest
import torch

from mball.cli import main
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_virtual import CudaMemory
from mball.memory.ledger import Kind, Ledger
from mball.observe.nvml import open_nvml
from mball.observe.told import NotTold
from mball.snapshot import take_gpu_memory
from mball.units import GIB, MIB

pytestmark = pytest.mark.gpu


@pytest.mark.alone
def test_nvml_and_cuda_see_the_same_gpu() -> None:
    torch.zeros(1, device="cuda:0")
    properties = torch.cuda.get_device_properties(0)
    with open_nvml() as nvml:
        gpu = nvml.snapshot().find(str(properties.uuid))
    assert gpu is not None, properties.uuid
    assert gpu.name == properties.name or gpu.label.count(":"), "a slice's name has its size, too"
    free_bytes, _ = torch.cuda.mem_get_info(0)
    if not isinstance(gpu.free_bytes, NotTold):
        assert abs(gpu.free_bytes - free_bytes) < 256 * MIB
    for percent in (gpu.busy_percent, gpu.memory_busy_percent):
        assert isinstance(percent, NotTold) or 0 <= percent <= 100


def test_this_process_is_explained() -> None:
    """What grows inside grows outside by as much."""
    ledger = Ledger(8 * GIB)
    torch.zeros(1, device="cuda:0")
    before = take_gpu_memory(ledger)
    if isinstance(before.held_bytes, NotTold):
        pytest.skip(f"NVML does not tell what this process holds: {before.held_bytes.why}")
    assert isinstance(before.rest_bytes, int), before
    kept = torch.empty(GIB, dtype=torch.uint8, device="cuda:0")
    driver = CudaDriver()
    if driver.has_virtual_memory:
        memory = CudaMemory(driver)
        reservation = memory.reserve(GIB)
        memory.back(reservation, 0, GIB)
        ledger.set(Kind.ARENA, GIB)
    after = take_gpu_memory(ledger)
    if driver.has_virtual_memory:
        memory.release(reservation)
        memory.close()
    assert isinstance(after.held_bytes, int)
    assert isinstance(after.rest_bytes, int), after
    grown_bytes = after.known_bytes - before.known_bytes
    assert grown_bytes >= GIB
    assert abs((after.held_bytes - before.held_bytes) - grown_bytes) < 64 * MIB, (str(before), str(after))
    del kept


def test_top_shows_this_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once"]) == 0
    shown = capsys.readouterr().out
    assert "no GPU can be seen" not in shown
    assert "GPUs (driver" in shown
