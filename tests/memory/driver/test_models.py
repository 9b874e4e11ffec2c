"""Whole models on the CUDA device, over the stand-in for the driver: what streams computes is what is resident.

Operators are the foreign device's, which compute when they are called; so what compute is told to wait for is waited
for there and then, and copies come as late as that lets them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mball
from mball.api import _wrap
from mball.compute import Compute, cuda_compute
from mball.config import Config
from mball.memory import Device, Event, Gauge
from mball.memory.cuda_device import CudaDevice
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_streams import CudaStreams
from mball.storage import FileTable, ThreadedReader
from mball.units import MIB
from tests.adaptors import DeviceAdaptor, PoisonedDevice
from tests.foreign import device as foreign
from tests.foreign.build import missing
from tests.foreign.compute import ForeignGauge
from tests.foreign.region import ForeignRegion
from tests.memory.driver.standin import Order, StandIn
from tests.run.harness import assert_streamed, engine_of, make, weight_bytes
from tests.run.there import compare
from tests.run.zoo import ZOO

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "it is there")


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

    def __init__(self, device: Device, stream: _Stream) -> None:
        super().__init__(device)
        self._stream = stream

    def wait(self, event: Event) -> None:
        self.device.wait(event)
        self._stream.drain()

    def gauge(self) -> Gauge:
        return ForeignGauge()


@contextmanager
def wrapped(
    model: nn.Module, share: float, *, swap_dir: Path, weights: Path | None = None, **settings: Any
) -> Iterator[Any]:
    foreign.load()
    stream = _Stream()

    def opened(config: Config, files: FileTable) -> Compute:
        reader = ThreadedReader(files, num_threads=config.io_threads)
        compute = cuda_compute(
            reader,
            0,
            lambda: stream.handle,
            measured_bytes=1 * MIB,
            region=ForeignRegion,
            place=torch.device("foreign", 0),
        )
        made = PoisonedDevice(_AtOnce(compute.device, stream))
        return Compute(
            device=made, reader=reader, page_bytes=compute.page_bytes, link=compute.link, closer=compute.closer
        )

    budget = int(weight_bytes(model) * share)
    settings.setdefault("capture", "graphs")
    _wrap((model,), Config.of(budget=budget, swap_dir=swap_dir, **settings), weights, {}, opened)
    try:
        yield model
    finally:
        mball.unwrap(model)
        stream.close()
        gc.collect()  # what is left of the arena: graphs and their code are cycles


def device_of(model: Any) -> CudaDevice:
    device = engine_of(model).execution.device
    while isinstance(device, DeviceAdaptor):
        device = device.device
    assert isinstance(device, CudaDevice)
    return device


KINDS = ["llama-fp32", "llama-bf16-dynamic-cache", "llama-tied-static-cache", "breaks", "convolutions", "t5"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("capture", "order"), [("graphs", Order.LATEST), ("operators", Order.RANDOM)])
def test_streamed_equals_resident(name: str, capture: str, order: Order, standin: StandIn, tmp_path: Path) -> None:
    standin.run_in(order, 5)
    specimen = ZOO[name]
    plain = make(specimen.make)
    share = max(specimen.budget, 0.7) + 0.15  # memory comes in larger pieces
    with wrapped(make(specimen.make), share, swap_dir=tmp_path, capture=capture) as model:
        for attempt in range(3):
            for number, call in enumerate(specimen.runs):
                compare(model, plain, call, f"{name}, attempt {attempt}, call {number}")
            assert_streamed(model)
