"""The bench of a GPU's link, over the stand-in: what it calls is there, and all is given back."""

from __future__ import annotations

from bench.gpu.link import Yardstick, copies, driver_calls, pinning
from mball.memory.cuda_driver import CudaDriver
from mball.units import KIB, MIB
from tests.memory.driver.standin import StandIn


def test_driver_calls(standin: StandIn) -> None:
    driver = CudaDriver()
    loads: list[int] = []
    found = driver_calls(driver, sizes=(64 * KIB, 200 * KIB), num_batched=4, rounds=3, load=lambda: loads.append(1))
    names = [measurement.name for measurement in found]
    assert len(names) == len(set(names)) == 4 * 6
    assert {"create_64_kib", "map_4_of_256_kib", "unmap_4_of_256_kib_busy"} <= set(names)
    assert len(loads) == 4
    for measurement in found:
        measurement.check()
        assert measurement.num_samples == 3
    driver.close()


def test_copies(standin: StandIn) -> None:
    driver = CudaDriver()
    found = copies(driver, sizes=(64 * KIB, 1 * MIB), least_bytes=1 * MIB, rounds=2)
    assert len(found) == 2 * 4
    for measurement in found:
        measurement.check()
        assert measurement.minimum > 0
    driver.close()


def test_pinning(standin: StandIn) -> None:
    driver = CudaDriver()
    assert [measurement.name for measurement in pinning(driver, size_bytes=4 * MIB)] == ["pin_gib", "unpin_gib"]
    driver.close()


def test_yardstick(standin: StandIn) -> None:
    driver = CudaDriver()
    yardstick = Yardstick(driver, size_bytes=1 * MIB)
    assert yardstick.bytes_per_s(2) > 0
    yardstick.close()
    driver.close()
