"""What tests of segments share: the library, an allocator of small pages, and extents of an arena to be offered."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mball.errors import DeviceError
from mball.memory.allocator.library import load_library
from mball.memory.allocator.segment_allocator import SegmentAllocator
from mball.memory.cuda_driver import CudaDriver
from mball.memory.page_pool import Page
from mball.units import KIB
from tests.memory.driver.standin import StandIn

GRANULE_BYTES = 4 * KIB
EXTENT_BYTES = 4 * GRANULE_BYTES
LIMIT_BYTES = 32 * GRANULE_BYTES
MEMORY_BYTES = 64 * GRANULE_BYTES


@functools.cache
def library() -> ctypes.CDLL:
    """The library of this checkout."""
    folder = tempfile.TemporaryDirectory()
    library = load_library(Path(folder.name))
    library.kept = folder  # as long as it is loaded
    return library


@contextlib.contextmanager
def small_allocator(standin: StandIn, *, limit_bytes: int = LIMIT_BYTES) -> Iterator[SegmentAllocator]:
    """An allocator whose segments and donors have to be gone at the end."""
    standin.configure(granule_bytes=GRANULE_BYTES, memory_bytes=MEMORY_BYTES)
    allocator = SegmentAllocator(library(), limit_bytes=limit_bytes, extent_bytes=EXTENT_BYTES)
    try:
        yield allocator
        allocator.close()
    except BaseException:
        force_closed(standin, allocator)
        raise


def force_closed(standin: StandIn, allocator: SegmentAllocator) -> None:
    """Ends an allocator after a test that failed, so that the next ones have one."""
    for segment in allocator.segments():
        if not segment.is_leaving:
            allocator.free(segment.address)
    for _ in range(3):  # what streams still have to do may break the context again
        standin.run()
        standin.forget()
        with contextlib.suppress(DeviceError):
            allocator.close()


class Extents:
    """Pages of an arena, mapped side by side, as an engine would offer them."""

    def __init__(self, driver: CudaDriver, num_extents: int, *, size_bytes: int = EXTENT_BYTES) -> None:
        self._driver = driver
        self._size_bytes = num_extents * size_bytes
        with driver.current():
            self._first = driver.reserve(self._size_bytes, size_bytes & -size_bytes)
            self.pages: dict[int, Page] = {}  # by address
            for address in range(self._first, self._first + self._size_bytes, size_bytes):
                self.pages[address] = Page(driver.create(size_bytes), size_bytes)
                driver.map(address, size_bytes, self.pages[address].handle)
                driver.allow(address, size_bytes)

    def drop(self, address: int) -> None:
        """Somebody else has taken it."""
        del self.pages[address]

    def close(self) -> None:
        """Gives all up that is left."""
        with self._driver.current():
            for address, page in self.pages.items():
                self._driver.unmap(address, page.size_bytes)
                self._driver.destroy(page.handle)
            self._driver.unreserve(self._first, self._size_bytes)


def fill(address: int, size_bytes: int, seed: int) -> None:
    """Writes the first and the last bytes of every granule."""
    for offset in range(0, size_bytes, GRANULE_BYTES):
        mark = f"{seed}:{offset}".encode().ljust(32, b".")
        ctypes.memmove(address + offset, mark, 32)
        ctypes.memmove(address + offset + GRANULE_BYTES - 32, mark, 32)


def holds(address: int, size_bytes: int, seed: int) -> bool:
    """Whether all is there that `fill` wrote."""
    return all(
        ctypes.string_at(address + offset + place, 32) == f"{seed}:{offset}".encode().ljust(32, b".")
        for offset in range(0, size_bytes, GRANULE_BYTES)
        for place in (0, GRANULE_BYTES - 32)
    )
