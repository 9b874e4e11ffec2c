"""Whole models on the CUDA device, over the stand-in for the driver, with operators of the foreign device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mball
from mball.api import _wrap
from mball.compute import Compute, cuda_compute
from mball.config import Config
from mball.memory import Device, Event, Gauge, Graphs
from mball.memory.allocator.segment_allocator import SegmentAllocator
from mball.memory.cuda_device import BUFFER_BYTES
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_streams import CudaStreams
from mball.memory.device import Held
from mball.storage import CheckedReader, FileTable, ThreadedReader
from mball.units import MIB
from tests.adaptors import DeviceAdaptor
from tests.foreign import device as foreign
from tests.foreign.compute import ForeignCap, ForeignGauge
from tests.foreign.graphs import ForeignGraphs
from tests.foreign.region import ForeignRegion
from tests.memory.conftest import LOADED
from tests.memory.driver.standin import EXTENT_BYTES
from tests.run.there import PLACE


class _Stream:
    """A stream of the stand-in that stands for what operators are issued on."""

    def __init__(self) -> None:
        self.driver = CudaDriver()
        self.streams = CudaStreams(self.driver)
        with self.driver.current():
            self.handle = self.streams.create_stream()

    def drain(self) -> None:
        with self.driver.current():
            self.streams.drain(self.handle)

    def close(self) -> None:
        with self.driver.current():
            self.streams.destroy_stream(self.handle)
        self.driver.close()


class _AtOnce(DeviceAdaptor):
    """Operators compute when they are called, so the stream that they stand for has come there before."""

    def __init__(self, device: Device, stream: _Stream, *, has_segments: bool) -> None:
        super().__init__(device)
        self._stream = stream
        self._allocator = None if has_segments else ForeignCap()

    def follow(self) -> None:
        self.device.follow()
        if self._allocator is not None:
            self._allocator.begin()

    def make_room(self) -> None:
        self.device.make_room()
        if self._allocator is not None:
            self._allocator.make_room()

    def cap(self, left_bytes: int | None) -> Held:
        return self.device.cap(left_bytes) if self._allocator is None else self._allocator.set(left_bytes)

    def wait(self, event: Event) -> None:
        self.device.wait(event)
        self._stream.drain()

    def gauge(self) -> Gauge:
        return ForeignGauge()

    def graphs(self) -> Graphs:
        return ForeignGraphs()


class SegmentPool:
    """Has foreign tensors lie in segments, each in one of its own, which are kept for others of about the size."""

    def __init__(self, segments: SegmentAllocator) -> None:
        library = segments._library
        self._functions = library.mball_malloc, library.mball_free
        self._allocated_bytes = 0

    def enter(self) -> None:
        foreign.route_memory(*self._functions)

    def leave(self) -> None:
        foreign.route_memory()

    def renew(self) -> None:
        foreign.reset_peak_memory_stats()
        foreign.empty_cache()

    def begin(self) -> int:
        self._allocated_bytes = foreign.memory_allocated()
        return foreign.memory_held()

    def rise_bytes(self) -> int:
        return foreign.max_memory_allocated() - self._allocated_bytes


@contextmanager
def wrapped_over_the_driver(
    model: nn.Module,
    budget_bytes: int,
    around: Callable[[Device], Device],
    *,
    swap_dir: Path,
    weights: Path | None = None,
    extent_bytes: int = EXTENT_BYTES,
    buffer_bytes: int = BUFFER_BYTES,
    **settings: Any,
) -> Iterator[Any]:
    """A model on the device that `around` puts around that of the stand-in; its order says how late copies are."""
    stream = _Stream()
    has_segments = settings.pop("allocator", "torch") == "mball"

    def opened(config: Config, files: FileTable) -> Compute:
        reader = CheckedReader(ThreadedReader(files, num_threads=config.io_threads or 8), files)
        compute = cuda_compute(
            reader,
            0,
            lambda: stream.handle,
            measured_bytes=1 * MIB,
            extent_bytes=extent_bytes,
            region=ForeignRegion,
            place=torch.device(PLACE),
            has_level=config.host_budget_bytes is not None,
            make_pool=SegmentPool if has_segments else None,
            buffer_bytes=buffer_bytes,
        )
        return replace(compute, device=around(_AtOnce(compute.device, stream, has_segments=has_segments)))

    config = Config.of(budget=budget_bytes, swap_dir=swap_dir, device="cuda", **settings)
    try:
        _wrap((model,), config, weights, {}, opened)
        try:
            yield model
        finally:
            mball.unwrap(model)
    finally:
        assert LOADED
        LOADED.forget()
        stream.close()
        gc.collect()  # what is left of the arena: graphs and their code are cycles
