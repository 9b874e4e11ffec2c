"""Where steps of a wrapped model compute on the foreign device, with no driver below: its arena is host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from mball.compute import Compute
from mball.config import Config
from mball.memory import ArenaRead, CopySource, CpuDevice, Event, Gauge, Graphs
from mball.memory.arena import Arena
from mball.memory.device import Held
from mball.storage import CheckedReader, FileTable, ThreadedReader
from tests.foreign import device as foreign
from tests.foreign.graphs import ForeignGraphs
from tests.foreign.region import ForeignRegion


class ForeignGauge:
    """What tensors hold at most; the arena is another's memory."""

    def __init__(self) -> None:
        self._at_reset = 0

    def reset(self) -> None:
        foreign.reset_peak_memory_stats()
        self._at_reset = foreign.memory_allocated()

    def rise_bytes(self) -> int:
        return max(foreign.max_memory_allocated() - self._at_reset, 0)

    def used_bytes(self) -> int:
        return foreign.memory_allocated()


class ForeignCap:
    """The allocator's cap, as `AllocatorCap` is of torch's."""

    def __init__(self) -> None:
        self._base_bytes = self._allocated_bytes = 0
        self.left_bytes: int | None = None
        self.num_passes = 0  # that began under a cap

    def begin(self) -> None:
        self._base_bytes, self._allocated_bytes = foreign.memory_held(), foreign.memory_allocated()

    def make_room(self) -> None:
        foreign.reset_peak_memory_stats()
        foreign.empty_cache()

    def set(self, left_bytes: int | None) -> Held:
        self.num_passes += left_bytes is not None
        self.left_bytes = left_bytes
        foreign.cap_memory(None if left_bytes is None else self._base_bytes + left_bytes)
        taken_bytes = foreign.max_memory_allocated() - self._allocated_bytes
        return Held.of(foreign.memory_reserved() - self._base_bytes, taken_bytes)

    def take(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Makes what is no part of what the pass computes, so that the cap does not count it."""
        foreign.cap_memory(None)
        before_bytes = foreign.memory_allocated()
        made = make()
        more_bytes = foreign.memory_allocated() - before_bytes
        self._base_bytes += more_bytes
        self._allocated_bytes += more_bytes
        foreign.cap_memory(None if self.left_bytes is None else self._base_bytes + self.left_bytes)
        return made


class ForeignDevice(CpuDevice):
    """Compute is over when its call returns, as on the CPU, but its tensors are foreign, and it maps no files."""

    def __init__(self, source: CopySource) -> None:
        super().__init__(source)
        self.allocator = ForeignCap()

    def follow(self) -> None:
        self.allocator.begin()

    def make_room(self) -> None:
        self.allocator.make_room()

    def cap(self, left_bytes: int | None) -> Held:
        return self.allocator.set(left_bytes)

    @property
    def place(self) -> torch.device:
        return torch.device("foreign", 0)

    @property
    def reads_mappings(self) -> bool:
        return False

    @property
    def below(self) -> None:
        """Homes are read from disk straight into the arena."""

    def arena(self, reserve_bytes: int) -> Arena:
        self._arena = arena = Arena(self._memory, reserve_bytes, region=ForeignRegion)
        return arena

    def copy(self, reads: Sequence[ArenaRead], after: Event | None) -> Event:
        if after is not None:
            after.wait()
        arena = self._arena
        assert arena is not None
        there = [arena.address_of(read.arena_offset_bytes, read.size_bytes) for read in reads]
        return self._source.submit(
            [read.into(_memory(address, read.size_bytes)) for read, address in zip(reads, there, strict=True)]
        )

    def rows_of(self, home: torch.Tensor, reads: Sequence[ArenaRead]) -> torch.Tensor:
        table = bytearray(max(read.arena_offset_bytes + read.size_bytes for read in reads))
        views = [memoryview(table)[read.arena_offset_bytes :][: read.size_bytes] for read in reads]
        self._source.submit([read.into(view) for read, view in zip(reads, views, strict=True)]).wait()
        # A GPU has it in the host's memory, pinned.
        flat = self.allocator.take(lambda: torch.frombuffer(table, dtype=home.dtype).to(self.place))
        return flat.as_strided(home.shape, home.stride())

    def gauge(self) -> Gauge:
        return ForeignGauge()

    def graphs(self) -> Graphs:
        return ForeignGraphs()


def _memory(address: int, size_bytes: int) -> memoryview:
    return memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")


def open_foreign(config: Config, files: FileTable) -> Compute:
    """Opens the foreign device, whatever `config` names."""
    foreign.load()
    reader = CheckedReader(ThreadedReader(files, num_threads=config.io_threads or 8), files)
    return Compute(device=ForeignDevice(reader), reader=reader)
