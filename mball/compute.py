"""Where steps run: the CPU, or a GPU whose copies come from pinned memory and from files."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from mball.config import Allocator, Config, calibration_directory, own_cache
from mball.errors import DeviceError
from mball.memory import CpuDevice, Device
from mball.memory.allocator.library import load_library
from mball.memory.allocator.segment_allocator import SegmentAllocator
from mball.memory.cuda_device import BUFFER_BYTES, CudaDevice
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_link import measure_copies
from mball.memory.cuda_plain import PlainCudaMemory
from mball.memory.cuda_present import present_gpu
from mball.memory.cuda_segments import SegmentRoom, TensorPool, TorchPool, open_segments
from mball.memory.cuda_virtual import EXTENT_BYTES, CudaMemory
from mball.memory.gds_ring import GdsRing
from mball.memory.page_pool import PagePool
from mball.memory.region import Region
from mball.schema import Link, Tier
from mball.storage import CheckedReader, FileTable, Reader, ReaderChoice, Threads, calibrated_choice, choose_reader
from mball.trace.graph import ASSUMED_MEMORY_BYTES_PER_S
from mball.units import MIB, PAGE_BYTES

_log = logging.getLogger(__name__)

# Of GPUs of the last years (0.4 to 8 TB/s): operators that were never timed are planned by it.
GPU_BYTES_PER_S = 1e12
# A copy that is long enough to show how fast the link is: some milliseconds.
_MEASURED_BYTES = 128 * MIB


def _no_more() -> None:
    """Nothing is left to close."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """A device, and what reads files for it.

    Attributes:
        device: ends with `device.close`, after which its arena may be closed.
        reader: reads files; the device closes it.
        cuda: the GPU; `device` is it, or something around it.
        gds_ring: that files go straight to the GPU through; the device's.
        way: how they get to the GPU, and why so, in words.
        choice: what kind of reader it is.
        page_bytes: what the device's memory comes in.
        memory_bytes_per_s: about how fast compute reads it.
        link: on which plans bring bundles, where that is not the disk; from host memory if they say what is there.
        closer: gives back what is left when device and arena are closed.
    """

    device: Device
    reader: Reader
    cuda: CudaDevice | None = None
    gds_ring: GdsRing | None = None
    way: str = ""
    choice: ReaderChoice = field(default_factory=ReaderChoice)
    page_bytes: int = PAGE_BYTES
    memory_bytes_per_s: float = ASSUMED_MEMORY_BYTES_PER_S
    link: Link | None = None
    closer: Callable[[], None] = _no_more

    @property
    def rounded_bytes(self) -> int:
        """By how much the arena may be rounded up beyond what plans know."""
        return self.page_bytes - PAGE_BYTES

    @property
    def staging_bytes(self) -> int:
        """What files pass through of the device's memory."""
        return 0 if self.gds_ring is None else self.gds_ring.size_bytes

    @property
    def io_path(self) -> str:
        """How files are read, and why so, in words."""
        parts = [f"{self.reader.path}, by {self.choice} ({self.choice.reason})"]
        if self.way:
            parts.append(self.way)
        if self.gds_ring is not None and (refused := self.gds_ring.refused):
            file, why = next(iter(refused.items()))
            parts.append(f"{len(refused)} of them through pinned memory after all, such as {file}: {why}")
        return "; ".join(parts)

    def close(self) -> None:
        """Ends a device that no engine has taken over. Idempotent."""
        self.device.close()
        self.closer()


OpenCompute = Callable[[Config, FileTable], Compute]


def _choice(config: Config, files: FileTable) -> ReaderChoice:
    threads = Threads.of(config.io)
    if config.io_threads is not None:
        return choose_reader(threads, num_threads=config.io_threads, cache=own_cache())
    return calibrated_choice(calibration_directory(), files, choose_reader(threads, cache=own_cache()))


def open_compute(config: Config, files: FileTable) -> Compute:
    """Returns the device that `config` names.

    Raises:
        ConfigError: this torch knows no such device.
        DeviceError: there is none, or it lacks something that is needed; or threads of C are asked for, and their
            library is not there.
    """
    kind, _, number = config.device.partition(":")
    choice = _choice(config, files)
    reader = CheckedReader(choice.open(files), files)
    try:
        if kind == "cpu":
            return Compute(device=CpuDevice(reader), reader=reader, choice=choice)
        return replace(_open_cuda(reader, int(number) if number else None, config), choice=choice)
    except BaseException:
        reader.close()
        raise


def _open_cuda(reader: Reader, ordinal: int | None, config: Config) -> Compute:
    ordinal = present_gpu(ordinal)
    current_stream = torch.cuda.current_stream
    return cuda_compute(
        reader,
        ordinal,
        lambda: int(current_stream(ordinal).cuda_stream),
        has_level=config.host_budget_bytes is not None,
        make_pool=TorchPool if config.allocator is Allocator.MBALL else None,
    )


def cuda_compute(
    reader: Reader,
    ordinal: int,
    current_stream: Callable[[], int],
    *,
    measured_bytes: int = _MEASURED_BYTES,
    extent_bytes: int = EXTENT_BYTES,
    region: Callable[..., Region] | None = None,
    place: torch.device | None = None,
    has_level: bool = False,
    make_pool: Callable[[SegmentAllocator], TensorPool] | None = None,
    buffer_bytes: int = BUFFER_BYTES,
) -> Compute:
    """Returns a GPU, its arena in extents; see `CudaDevice`. Copies `measured_bytes` to see how fast its link is.

    With `make_pool` passes allocate in segments of the arena's pages.

    Raises:
        DeviceError: there is no such GPU, no driver, or no package cuda-bindings; or segments are asked for, and there
            is no virtual memory, no library for them, or another model has them.
    """
    with contextlib.ExitStack() as undo:
        driver = CudaDriver(ordinal)
        undo.callback(driver.close)
        memory: CudaMemory | PlainCudaMemory
        room = None
        link = measure_copies(driver, size_bytes=measured_bytes)
        if make_pool is not None:
            memory, room = _in_segments(driver, extent_bytes, make_pool)
            undo.callback(room.close)
        elif driver.has_virtual_memory:
            # What an arena gives up is for activations, and counts: so nothing is pooled.
            memory = CudaMemory(driver, pool=PagePool(driver, limit_bytes=0), extent_bytes=extent_bytes)
        else:
            memory = PlainCudaMemory(driver)
        device = CudaDevice(
            driver,
            memory,
            reader,
            current_stream,
            region=region,
            place=place,
            has_level=has_level,
            room=room,
            buffer_bytes=buffer_bytes,
        )
        undo.pop_all()
    _log.info("GPU %d copies %.1f GB/s out of pinned memory", ordinal, link.bandwidth_bytes_per_s / 1e9)
    return Compute(
        device=device,
        cuda=device,
        reader=reader,
        page_bytes=memory.page_bytes,
        memory_bytes_per_s=GPU_BYTES_PER_S,
        # Without a budget of host memory plans know this link only: what is not pinned yet comes more slowly.
        link=link if has_level else replace(link, source=Tier.DISK),
        closer=memory.close_after_use,
    )


def _in_segments(
    driver: CudaDriver, extent_bytes: int, make_pool: Callable[[SegmentAllocator], TensorPool]
) -> tuple[CudaMemory, SegmentRoom]:
    if not driver.has_virtual_memory:
        raise DeviceError(
            f"allocator='mball' needs virtual memory, which GPU {driver.ordinal} does not have: leave it out"
        )
    library = load_library(own_cache())
    with driver.current():
        _, total_bytes = driver.free_and_total_bytes()
    # What is pooled goes to the segments as soon as they are told what they may have.
    memory = CudaMemory(driver, pool=PagePool(driver, limit_bytes=total_bytes), extent_bytes=extent_bytes)
    segments = open_segments(library, driver.ordinal, memory.extent_bytes)
    return memory, SegmentRoom(segments, memory, make_pool(segments), total_bytes)
