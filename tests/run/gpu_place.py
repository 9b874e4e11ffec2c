"""A real GPU as the scenes' place: copies and compute are made late by kernels that spin."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mball
from mball.api import _wrap
from mball.config import Config
from mball.memory import ArenaRead, Device, Event
from mball.memory.cuda_device import CudaDevice
from mball.units import MIB
from tests.adaptors import DeviceAdaptor, PoisonedDevice, adapted
from tests.run.scenes import Hostility, Place
from tests.run.wide import WIDE, wide_llama

# Cycles of the GPU's clock: none, and about 50 and 500 µs.
CYCLES = (0, 100_000, 1_000_000)


class PoisonedOnStreams(PoisonedDevice):
    """As `PoisonedDevice`, but the host waits for nothing, so that it is as far ahead of compute as without poison."""

    def copy(self, reads: Sequence[ArenaRead], after: Event | None) -> Event:
        if after is not None:
            self.device.wait(after)
        return super().copy(reads, None)


class Tardy(DeviceAdaptor):
    """Has copies start late, or compute: behind a kernel that spins, as long as the seed says."""

    def __init__(self, device: Device, *, copies: bool, compute: bool, seed: int = 0) -> None:
        super().__init__(device)
        self._random = random.Random(seed)
        self._copies = copies
        self._compute = compute
        self._streams = [torch.cuda.ExternalStream(stream) for stream in gpu_of(device)._own_streams] if copies else []
        self.num_late = 0

    def copy(self, reads: Sequence[ArenaRead], after: Event | None) -> Event:
        for stream in self._streams:
            with torch.cuda.stream(stream):
                self._spin()
        return self.device.copy(reads, after)

    def record(self) -> Event:
        event = self.device.record()
        if self._compute:  # what is issued next comes late, and the event does not stand for it
            self._spin()
        return event

    def _spin(self) -> None:
        if cycles := self._random.choice(CYCLES):
            torch.cuda._sleep(cycles)
            self.num_late += 1


def gpu_of(device: Device) -> CudaDevice:
    """Returns the device inside all adaptors."""
    while isinstance(device, DeviceAdaptor):
        device = device.device
    assert isinstance(device, CudaDevice)
    return device


def hostile(device: Device, hostility: Hostility, seed: int = 0) -> Device:
    """Returns the device with what shows mistakes around it."""
    if hostility is Hostility.NONE:
        return device
    late = Tardy(
        device,
        copies=hostility is not Hostility.LATE_COMPUTE,
        compute=hostility is not Hostility.LATE_COPIES,
        seed=seed,
    )
    return PoisonedOnStreams(late) if hostility is Hostility.POISONED else late


@contextmanager
def wrapped_for_gpu(
    model: nn.Module,
    budget_bytes: int,
    *,
    swap_dir: Path,
    hostility: Hostility = Hostility.POISONED,
    weights: Path | None = None,
    **settings: Any,
) -> Iterator[Any]:
    """Wraps a model for GPU 0; at the end it is unwrapped, and nothing of the arena is left."""
    config = Config.of(budget=budget_bytes, device="cuda:0", swap_dir=swap_dir, **settings)
    _wrap((model,), config, weights, {}, adapted(lambda device: hostile(device, hostility)))
    try:
        yield model
    finally:
        mball.unwrap(model)
        gc.collect()  # graphs and their code are cycles


def gpu_place() -> Place:
    """Returns GPU 0, which torch has begun to use."""
    torch.zeros(1, device="cuda:0")
    side = torch.cuda.Stream()

    @contextmanager
    def other_stream(ordered: bool) -> Iterator[None]:
        before = torch.cuda.current_stream()
        if ordered:
            side.wait_stream(before)
        with torch.cuda.stream(side):
            yield
        if ordered:
            before.wait_stream(side)

    return Place(
        name="cuda:0",
        page_bytes=2 * MIB,
        width=1024,
        specimens=WIDE,
        llama=lambda: wide_llama(torch.float32),
        wrapped=wrapped_for_gpu,
        other_stream=other_stream,
        finish=torch.cuda.synchronize,
        activation_bytes=4 * MIB,
    )
