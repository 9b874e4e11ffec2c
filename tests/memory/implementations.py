"""Every virtual memory there is, as the conformance tests use it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_plain import PlainCudaMemory
from mball.memory.cuda_virtual import CudaMemory
from mball.memory.page_pool import PagePool
from mball.memory.virtual import HostMemory, Reservation, VirtualMemory
from mball.units import GIB, MIB
from tests.memory.conftest import LOADED
from tests.memory.driver.standin import EXTENT_BYTES, MEMORY_BYTES
from tests.memory.residency import resident_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """A memory, and how a test looks beneath it.

    Attributes:
        memory: the one under test.
        limit_bytes: more than this there is not.
        taken_bytes: how much of the device's memory a reservation takes, as the device says.
        write: puts bytes at an address.
        read: returns so many bytes from an address.
    """

    memory: VirtualMemory
    limit_bytes: int
    taken_bytes: Callable[[Reservation], int]
    write: Callable[[int, bytes], None]
    read: Callable[[int, int], bytes]


def _write(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


@contextmanager
def host() -> Iterator[Implementation]:
    """Host memory, capped by its headroom."""
    limit = 16 * MIB
    yield Implementation(
        memory=HostMemory(headroom=lambda: limit),
        limit_bytes=limit,
        taken_bytes=lambda reservation: resident_bytes(reservation.address, reservation.size_bytes),
        write=_write,
        read=ctypes.string_at,
    )


@contextmanager
def cuda_on_the_stand_in() -> Iterator[Implementation]:
    """CUDA's virtual memory; nothing is pooled, so what is trimmed is gone."""
    assert LOADED
    driver = CudaDriver()
    memory = CudaMemory(driver, pool=PagePool(driver, limit_bytes=0), extent_bytes=EXTENT_BYTES)
    yield _on_the_stand_in(memory, MEMORY_BYTES)
    memory.close()


@contextmanager
def plain_cuda_on_the_stand_in() -> Iterator[Implementation]:
    """One plain allocation, on a device that says it has no virtual memory."""
    assert LOADED
    LOADED.configure(virtual_memory=False, memory_bytes=GIB)
    memory = PlainCudaMemory(CudaDriver())
    yield _on_the_stand_in(memory, GIB)
    memory.close()


def _on_the_stand_in(memory: VirtualMemory, limit_bytes: int) -> Implementation:
    assert LOADED
    standin = LOADED

    def taken_bytes(reservation: Reservation) -> int:
        return standin.taken_bytes

    return Implementation(
        memory=memory, limit_bytes=limit_bytes, taken_bytes=taken_bytes, write=_write, read=ctypes.string_at
    )


@contextmanager
def cuda() -> Iterator[Implementation]:
    """CUDA's virtual memory on GPU 0."""
    from cuda.bindings import driver as calls

    driver = CudaDriver()
    if not driver.has_virtual_memory:
        pytest.skip("GPU 0 has no virtual memory")
    with driver.current():
        total_bytes = driver.free_and_total_bytes()[1]
    memory = CudaMemory(driver, pool=PagePool(driver, limit_bytes=0))

    def checked(function: Callable[..., Any], *arguments: Any) -> None:
        with driver.current():
            (code,) = function(*arguments)
        assert int(code) == 0, code

    def read(address: int, size: int) -> bytes:
        data = bytearray(size)
        checked(calls.cuMemcpyDtoH, ctypes.addressof(ctypes.c_char.from_buffer(data)), address, size)
        return bytes(data)

    yield Implementation(
        memory=memory,
        limit_bytes=total_bytes,
        # What is free on a GPU that others may use tells nothing to the byte.
        taken_bytes=lambda reservation: memory.created_bytes,
        write=lambda address, data: checked(calls.cuMemcpyHtoD, address, data, len(data)),
        read=read,
    )
    memory.close()


IMPLEMENTATIONS = (
    [cuda_on_the_stand_in, plain_cuda_on_the_stand_in] if LOADED else [host, pytest.param(cuda, marks=pytest.mark.gpu)]
)
