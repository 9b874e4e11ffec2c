"""The stand-in refuses what the driver refuses: otherwise the tests that use it would prove nothing."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import Any

import pytest

from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_errors import DriverError
from tests.memory.driver.standin import GRANULE_BYTES, MEMORY_BYTES, StandIn

REFUSED = "CUDA_ERROR_INVALID_VALUE"


@pytest.fixture
def driver(standin: StandIn) -> Iterator[CudaDriver]:
    driver = CudaDriver()
    with driver.current():
        yield driver
    driver.close()


def is_accessible(address: int) -> bool:
    """Whether the kernel can read there; a crash would tell as much, less politely."""
    reader, writer = os.pipe()
    try:
        return ctypes.CDLL(None).write(writer, ctypes.c_void_p(address), ctypes.c_size_t(1)) == 1
    finally:
        os.close(reader)
        os.close(writer)


class Mapped:
    """`num_granules` granules, one handle each, side by side and accessible."""

    def __init__(self, driver: CudaDriver, num_granules: int) -> None:
        self.driver, self.size_bytes = driver, num_granules * GRANULE_BYTES
        self.address = driver.reserve(self.size_bytes, 0)
        self.handles = [driver.create(GRANULE_BYTES) for _ in range(num_granules)]
        for number, handle in enumerate(self.handles):
            driver.map(self.address + number * GRANULE_BYTES, GRANULE_BYTES, handle)
        driver.allow(self.address, self.size_bytes)

    def close(self) -> None:
        self.driver.unmap(self.address, self.size_bytes)
        for handle in self.handles:
            self.driver.destroy(handle)
        self.driver.unreserve(self.address, self.size_bytes)


def refused(call: Any, *arguments: int) -> None:
    with pytest.raises(DriverError, match=REFUSED):
        call(*arguments)


def test_sizes_and_addresses_are_whole_granules(driver: CudaDriver) -> None:
    for size_bytes in (0, 1, GRANULE_BYTES + 4096, GRANULE_BYTES // 2):
        refused(driver.create, size_bytes)
        refused(driver.reserve, size_bytes, 0)
    refused(driver.reserve, GRANULE_BYTES, 3)
    address, handle = driver.reserve(4 * GRANULE_BYTES, 0), driver.create(GRANULE_BYTES)
    refused(driver.map, address + 4096, GRANULE_BYTES, handle)
    refused(driver.map, address, 4096, handle)
    refused(driver.map, address, 2 * GRANULE_BYTES, handle)
    refused(driver.map, address + 4 * GRANULE_BYTES, GRANULE_BYTES, handle)
    driver.destroy(handle)
    driver.unreserve(address, 4 * GRANULE_BYTES)


@pytest.mark.parametrize("alignment_bytes", [0, GRANULE_BYTES, 64 * GRANULE_BYTES])
def test_reservations_are_aligned_as_asked(driver: CudaDriver, alignment_bytes: int) -> None:
    addresses = [driver.reserve(3 * GRANULE_BYTES, alignment_bytes) for _ in range(5)]
    assert all(address % max(alignment_bytes, GRANULE_BYTES) == 0 for address in addresses)
    for address in addresses:
        driver.unreserve(address, 3 * GRANULE_BYTES)


def test_mappings_never_overlap(driver: CudaDriver) -> None:
    mapped = Mapped(driver, 2)
    other = driver.create(2 * GRANULE_BYTES)
    refused(driver.map, mapped.address, 2 * GRANULE_BYTES, other)
    refused(driver.map, mapped.address + GRANULE_BYTES, GRANULE_BYTES, mapped.handles[0])
    driver.destroy(other)
    mapped.close()


def test_memory_is_accessible_once_that_is_granted_and_no_more_once_unmapped(driver: CudaDriver) -> None:
    address, handle = driver.reserve(GRANULE_BYTES, 0), driver.create(GRANULE_BYTES)
    assert not is_accessible(address)
    refused(driver.allow, address, GRANULE_BYTES)
    driver.map(address, GRANULE_BYTES, handle)
    assert not is_accessible(address)
    driver.allow(address, GRANULE_BYTES)
    assert is_accessible(address)
    driver.unmap(address, GRANULE_BYTES)
    assert not is_accessible(address)
    driver.map(address, GRANULE_BYTES, handle)
    assert not is_accessible(address), "access is granted to a mapping, not to an address"
    driver.unmap(address, GRANULE_BYTES)
    driver.destroy(handle)
    driver.unreserve(address, GRANULE_BYTES)


def test_whole_mappings_side_by_side_go_in_one_call_and_parts_of_one_do_not(driver: CudaDriver) -> None:
    address, handle = driver.reserve(4 * GRANULE_BYTES, 0), driver.create(4 * GRANULE_BYTES)
    driver.map(address, 4 * GRANULE_BYTES, handle)
    refused(driver.unmap, address, GRANULE_BYTES)
    refused(driver.unmap, address + GRANULE_BYTES, 3 * GRANULE_BYTES)
    refused(driver.allow, address, GRANULE_BYTES)
    driver.unmap(address, 4 * GRANULE_BYTES)
    refused(driver.unmap, address, 4 * GRANULE_BYTES)
    driver.destroy(handle)
    driver.unreserve(address, 4 * GRANULE_BYTES)
    mapped = Mapped(driver, 4)
    driver.unmap(mapped.address + GRANULE_BYTES, GRANULE_BYTES)
    refused(driver.unmap, mapped.address, mapped.size_bytes)
    driver.map(mapped.address + GRANULE_BYTES, GRANULE_BYTES, mapped.handles[1])
    mapped.close()


def test_pages_live_while_they_are_mapped_or_held(driver: CudaDriver, standin: StandIn) -> None:
    mapped = Mapped(driver, 2)
    ctypes.memmove(mapped.address, b"here", 4)
    driver.destroy(mapped.handles[0])
    assert standin.taken_bytes == 2 * GRANULE_BYTES
    assert ctypes.string_at(mapped.address, 4) == b"here"
    driver.unmap(mapped.address, 2 * GRANULE_BYTES)
    assert standin.taken_bytes == GRANULE_BYTES
    driver.destroy(mapped.handles[1])
    assert standin.taken_bytes == 0
    driver.unreserve(mapped.address, mapped.size_bytes)


def test_what_was_given_up_cannot_be_given_up_again(driver: CudaDriver) -> None:
    mapped = Mapped(driver, 2)
    refused(driver.unreserve, mapped.address, mapped.size_bytes)
    refused(driver.unreserve, mapped.address, GRANULE_BYTES)
    mapped.close()
    refused(driver.unreserve, mapped.address, mapped.size_bytes)
    refused(driver.destroy, mapped.handles[0])
    address = driver.allocate(1000)
    refused(driver.free, address + 512)
    driver.free(address)
    refused(driver.free, address)


def test_memory_runs_out(driver: CudaDriver) -> None:
    for take in (driver.create, driver.allocate):
        with pytest.raises(DriverError, match="CUDA_ERROR_OUT_OF_MEMORY"):
            take(MEMORY_BYTES + GRANULE_BYTES)
    handle = driver.create(MEMORY_BYTES)
    with pytest.raises(DriverError, match=r"CUDA_ERROR_OUT_OF_MEMORY.*0 B \(0 bytes\) of its 64.00 MiB are free"):
        driver.create(GRANULE_BYTES)
    driver.destroy(handle)


def test_failures_come_at_the_calls_that_were_named(driver: CudaDriver, standin: StandIn) -> None:
    standin.fail(2, 3, code=2, function="cuMemCreate")
    first = driver.create(GRANULE_BYTES)
    for _ in range(2):
        with pytest.raises(DriverError, match=r"cuMemCreate.*OUT_OF_MEMORY"):
            driver.create(GRANULE_BYTES)
    last = driver.create(GRANULE_BYTES)
    assert standin.calls("cuMemCreate") == 4
    standin.forget()
    standin.fail(2, code=1)
    driver.destroy(first)
    refused(driver.destroy, last)
    driver.destroy(last)
