"""Every device there is, as the conformance tests use it: with compute that may run late."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mball.errors import DeviceError
from mball.gds import straight_file
from mball.memory import Arena, CpuDevice, Device
from mball.memory.cuda_device import CudaDevice
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_plain import PlainCudaMemory
from mball.memory.cuda_streams import CudaStreams
from mball.memory.cuda_virtual import CudaMemory
from mball.memory.cufile import CuFileError
from mball.memory.page_pool import PagePool
from mball.memory.pinned import PinnedSlab
from mball.memory.pinned_homes import PinnedHomes, PinnedRange
from mball.memory.region import Region
from mball.run.file_read import FileRead
from mball.storage import DirectIO, FileTable, ThreadedReader
from mball.storage.watchdog import watched
from mball.units import KIB, MIB
from tests.memory.conftest import LOADED
from tests.memory.driver.standin import EXTENT_BYTES, Order

PAGE = 4096
NUM_PAGES = 64
CHUNK_BYTES = 6 * PAGE
# As few and small as still show a ring that is gone round.
NUM_BUFFERS, BUFFER_BYTES = 2, 3 * PAGE
RESERVE_BYTES = 4 * MIB
_SCRATCH_BYTES = 8 * MIB

Look = Callable[[], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A device, a file that it reads, and compute on it.

    Attributes:
        fill: has compute write a byte to pages `[first, end)` of the arena.
        look: has compute read pages of the arena; what comes back tells what it read, once `finish` was called.
        finish: blocks until all compute is over.
    """

    device: Device
    arena: Arena
    path: Path
    content: bytes
    fill: Callable[[int, int, int], None]
    look: Callable[[int, int], Look]
    finish: Callable[[], None]

    def read(self, offset_bytes: int, size_bytes: int, page: int) -> FileRead:
        """Bytes of the file, to a page of the arena."""
        return FileRead(
            file=str(self.path), offset_bytes=offset_bytes, size_bytes=size_bytes, arena_offset_bytes=page * PAGE
        )


def expect(seen: bytes, wanted: bytes, where: str = "") -> None:
    """Says where bytes differ first: pytest's own comparison of so many takes minutes where it prints it whole."""
    __tracebackhide__ = True
    if seen != wanted:
        pairs = enumerate(zip(seen, wanted, strict=False))
        first = next((at for at, (one, other) in pairs if one != other), min(len(seen), len(wanted)))
        got, expected = (each[first : first + 8].hex() or "the end" for each in (seen, wanted))
        raise AssertionError(f"{where or 'bytes'}: at {first} (page {first // PAGE}) {got} instead of {expected}")


Open = Callable[[Path], Any]


@contextmanager
def opened_file(folder: Path) -> Iterator[tuple[Path, bytes, ThreadedReader, FileTable]]:
    """A file of pages that all differ, a reader of it, and the table it is in."""
    path = folder / "weights"
    halves = [bytes([first + number]) * (PAGE // 2) for number in range(NUM_PAGES) for first in (1, 101)]
    content = b"".join(halves)
    path.write_bytes(content)
    files = FileTable(direct=DirectIO.ALWAYS)
    files.add_path(str(path))
    yield path, content, ThreadedReader(files, num_threads=2), files
    files.close()


@contextmanager
def cpu(folder: Path) -> Iterator[Bench]:
    """Host memory, where compute is over when its call returns."""
    with opened_file(folder) as (path, content, reader, _):
        device = CpuDevice(reader)
        arena = device.arena(RESERVE_BYTES)
        arena.resize(NUM_PAGES * PAGE)

        def fill(first: int, end: int, byte: int) -> None:
            arena.view(first * PAGE, (end - first) * PAGE)[:] = bytes([byte]) * ((end - first) * PAGE)

        def look(first: int, end: int) -> Look:
            seen = bytes(arena.view(first * PAGE, (end - first) * PAGE))
            return lambda: seen

        yield Bench(device=device, arena=arena, path=path, content=content, fill=fill, look=look, finish=lambda: None)
        device.close()
        arena.close()


class Compute:
    """A stream of the stand-in that computes: it writes and reads pages, as late as any other."""

    def __init__(self, streams: CudaStreams) -> None:
        self.streams, self.driver = streams, streams.driver
        self._memory = mmap.mmap(-1, _SCRATCH_BYTES)
        self._held = ctypes.c_char.from_buffer(self._memory)
        self._address = ctypes.addressof(self._held)
        self._used = 0
        with self.driver.current():
            self.stream = streams.create_stream()
            streams.register(self._address, _SCRATCH_BYTES)

    def _take(self, size: int) -> int:
        assert self._used + size <= _SCRATCH_BYTES, "what was seen would be overwritten"
        self._used += size
        return self._used - size

    def fill(self, arena: Arena, first: int, end: int, byte: int) -> None:
        size = (end - first) * PAGE
        source = self._take(size)
        self._memory[source : source + size] = bytes([byte]) * size
        with self.driver.current():
            self.streams.copy_in(arena.address_of(first * PAGE, size), self._address + source, size, self.stream)

    def look(self, arena: Arena, first: int, end: int) -> Look:
        size = (end - first) * PAGE
        place = self._take(size)
        with self.driver.current():
            self.streams.copy_out(self._address + place, arena.address_of(first * PAGE, size), size, self.stream)
        return lambda: self._memory[place : place + size]

    def finish(self) -> None:
        with self.driver.current():
            self.streams.drain(self.stream)

    def close(self) -> None:
        self.finish()
        with self.driver.current():
            self.streams.unregister(self._address)
            self.streams.destroy_stream(self.stream)


@contextmanager
def cuda_on_the_stand_in(
    folder: Path,
    *,
    order: Order,
    seed: int = 0,
    home_pages: range = range(0),
    plain: bool = False,
    has_level: bool = False,
    straight: bool = False,
) -> Iterator[Bench]:
    """A GPU of the stand-in, with these pages of the file pinned; the others come `straight`, by cuFile, or not."""
    assert LOADED
    LOADED.run_in(order, seed)
    driver = CudaDriver()
    streams = CudaStreams(driver)
    memory = (
        PlainCudaMemory(driver)
        if plain
        else CudaMemory(driver, pool=PagePool(driver, limit_bytes=0), extent_bytes=EXTENT_BYTES)
    )
    with opened_file(folder) as (path, content, reader, files), ExitStack() as stack:
        stack.callback(driver.close)
        stack.callback(memory.close)
        homes = PinnedHomes()
        if home_pages:
            first, size = home_pages.start * PAGE, len(home_pages) * PAGE
            slab = PinnedSlab(streams, size, chunk_bytes=CHUNK_BYTES)
            slab.view(0, size)[:] = content[first : first + size]
            slab.pin()
            assert slab.pinned_bytes == size
            homes.put(PinnedRange(file=str(path), offset_bytes=first, size_bytes=size, slab=slab, slab_offset_bytes=0))
            stack.callback(slab.close)
        compute = Compute(streams)
        stack.callback(compute.close)
        device = CudaDevice(
            driver,
            memory,
            reader,
            lambda: compute.stream,
            homes=homes,
            num_buffers=NUM_BUFFERS,
            buffer_bytes=BUFFER_BYTES,
            region=Region,  # its memory is the host's
            has_level=has_level,
            chunk_bytes=CHUNK_BYTES,
        )
        stack.callback(device.close)
        if straight:
            device.go_straight(device.gds_ring(partial(straight_file, files), watched))
        arena = device.arena(RESERVE_BYTES)
        stack.callback(arena.close)
        stack.callback(device.close)
        arena.resize(NUM_PAGES * PAGE)
        yield Bench(
            device=device,
            arena=arena,
            path=path,
            content=content,
            fill=partial(compute.fill, arena),
            look=partial(compute.look, arena),
            finish=compute.finish,
        )


@contextmanager
def cuda(folder: Path, *, home_pages: range = range(0), straight: bool = False) -> Iterator[Bench]:
    """GPU 0, with torch's work as compute, which a long kernel makes late.

    Pages are pinned, or come `straight`, by cuFile, which skips the test where it does not read files there.
    """
    import torch

    torch.zeros(1, device="cuda:0")
    driver = CudaDriver()
    memory = CudaMemory(driver) if driver.has_virtual_memory else PlainCudaMemory(driver)
    streams = CudaStreams(driver)
    with opened_file(folder) as (path, content, reader, files), ExitStack() as stack:
        stack.callback(driver.close)
        stack.callback(memory.close)
        homes = PinnedHomes()
        if home_pages:
            first, size = home_pages.start * PAGE, len(home_pages) * PAGE
            slab = PinnedSlab(streams, size, chunk_bytes=CHUNK_BYTES)
            slab.view(0, size)[:] = content[first : first + size]
            slab.pin()
            assert slab.pinned_bytes == size
            homes.put(PinnedRange(file=str(path), offset_bytes=first, size_bytes=size, slab=slab, slab_offset_bytes=0))
            stack.callback(slab.close)
        device = CudaDevice(
            driver,
            memory,
            reader,
            lambda: torch.cuda.current_stream().cuda_stream,
            homes=homes,
            # What is registered with cuFile comes in the GPU's own pages.
            num_buffers=32 if straight else NUM_BUFFERS,
            buffer_bytes=64 * KIB if straight else BUFFER_BYTES,
        )
        stack.callback(device.close)
        ring = None
        if straight:
            try:
                ring = device.gds_ring(partial(straight_file, files), watched)
            except DeviceError as error:
                pytest.skip(f"cuFile does not read straight into this GPU: {error}")
            device.go_straight(ring)
            if not ring.takes(str(path)):
                pytest.skip(f"cuFile does not read files of {folder}")
            try:
                ring.bytes_per_s(str(path), PAGE)
            except CuFileError as error:
                pytest.skip(f"cuFile takes files of {folder}, and does not read them: {error}")
        arena = device.arena(RESERVE_BYTES)
        stack.callback(arena.close)
        stack.callback(device.close)
        arena.resize(NUM_PAGES * PAGE)

        def late() -> None:
            torch.cuda._sleep(2_000_000)  # about a millisecond of the GPU's clock

        def fill(first: int, end: int, byte: int) -> None:
            late()
            arena.tensor(first * PAGE, torch.uint8, ((end - first) * PAGE,)).fill_(byte)

        def look(first: int, end: int) -> Look:
            late()
            seen = arena.tensor(first * PAGE, torch.uint8, ((end - first) * PAGE,)).clone()
            return lambda: bytes(seen.cpu().numpy())

        yield Bench(
            device=device,
            arena=arena,
            path=path,
            content=content,
            fill=fill,
            look=look,
            finish=torch.cuda.synchronize,
        )
        was_cut_off = path.stat().st_size < len(content)  # by the test, so that cuFile's read fails
        assert ring is None or not ring.refused or was_cut_off, "what was tested did not come straight"


_ON_DISK, _AT_HOME, _BOTH = range(0), range(NUM_PAGES), range(NUM_PAGES // 3, NUM_PAGES // 2)


def _named(name: str, function: Callable[..., Any], *, gpu: bool = False, **settings: Any) -> Any:
    return pytest.param(partial(function, **settings), id=name, marks=[pytest.mark.gpu] if gpu else [])


PLACES = {"disk": _ON_DISK, "home": _AT_HOME, "both": _BOTH}
DEVICES = (
    [
        *(
            _named(f"{place}-{order.name}{seed}", cuda_on_the_stand_in, order=order, seed=seed, home_pages=pages)
            for place, pages in PLACES.items()
            for order, seed in ((Order.LATEST, 0), (Order.RANDOM, 0), (Order.RANDOM, 1))
        ),
        _named("disk-EARLIEST", cuda_on_the_stand_in, order=Order.EARLIEST),
        *(
            _named(f"disk-straight-{order.name}", cuda_on_the_stand_in, order=order, straight=True)
            for order in (Order.EARLIEST, Order.LATEST, Order.RANDOM)
        ),
        _named("both-straight", cuda_on_the_stand_in, order=Order.LATEST, home_pages=_BOTH, straight=True),
        _named("plain", cuda_on_the_stand_in, order=Order.LATEST, home_pages=_BOTH, plain=True),
    ]
    if LOADED
    else [
        _named("cpu", cpu),
        *(_named(f"cuda-{place}", cuda, gpu=True, home_pages=pages) for place, pages in PLACES.items()),
        _named("cuda-straight", cuda, gpu=True, straight=True),
    ]
)
