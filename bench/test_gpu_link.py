"""What calls of a GPU's driver take, and copies to and from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.gpu import link
from bench.gpu.keep import LINK, Book
from bench.gpu.limit import Limit
from bench.results import Measurement
from bench.speed.rounds import Say
from mball.memory.cuda_driver import CudaDriver

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(90)]

Keep = Callable[[Book, Sequence[Measurement]], None]
Allot = Callable[[float], Limit]


@pytest.fixture
def driver() -> Iterator[CudaDriver]:
    torch.zeros(1, device="cuda:0")
    driver = CudaDriver()
    yield driver
    torch.cuda.synchronize()
    driver.close()


def _busy() -> None:
    torch.cuda._sleep(100_000_000)  # some 50 ms of the GPU's clock


def test_driver_calls(driver: CudaDriver, say: Say, gpu_time: Allot, benchmark: BenchmarkFixture, kept: Keep) -> None:
    gpu_time(30)
    if not driver.has_virtual_memory:
        pytest.skip("GPU 0 has no virtual memory")
    found = benchmark.pedantic(link.driver_calls, args=(driver,), kwargs={"load": _busy}, rounds=1)
    kept(LINK, found)
    for measurement in found:
        say(f"{measurement.description}: {measurement.figure()}")


def test_copies(driver: CudaDriver, say: Say, gpu_time: Allot, benchmark: BenchmarkFixture, kept: Keep) -> None:
    gpu_time(40)
    found = benchmark.pedantic(link.copies, args=(driver,), rounds=1)
    kept(LINK, found)
    for measurement in found:
        say(f"{measurement.description}: {measurement.figure()}")


def test_pinning(driver: CudaDriver, say: Say, gpu_time: Allot, benchmark: BenchmarkFixture, kept: Keep) -> None:
    gpu_time(20)
    found = benchmark.pedantic(link.pinning, args=(driver,), rounds=1)
    kept(LINK, found)
    for measurement in found:
        say(f"{measurement.description}: {measurement.figure()}")
