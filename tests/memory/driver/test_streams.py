"""Streams of the stand-in: what is queued runs when events allow it, in the order that a test chose, and not before.

Without these, the tests of a device on it would prove nothing.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mball.errors import DeviceError
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_errors import DriverError, GpuLostError
from mball.memory.cuda_streams import CudaStreams
from tests.memory.driver.standin import CODES, GRANULE_BYTES, Order, StandIn

PAGE = 4096


class Pinned:
    """Four pages of the GPU and four of the host, and how to fill and read them."""

    def __init__(self, driver: CudaDriver, streams: CudaStreams) -> None:
        self.device = driver.allocate(GRANULE_BYTES)
        self.memory = mmap.mmap(-1, 4 * PAGE)
        self._held = ctypes.c_char.from_buffer(self.memory)
        self.host = ctypes.addressof(self._held)
        streams.register(self.host, 2 * PAGE)

    def fill(self, page: int, byte: int) -> None:
        ctypes.memset(self.host + page * PAGE, byte, PAGE)

    def on_device(self, page: int) -> int:
        (byte,) = set(ctypes.string_at(self.device + page * PAGE, PAGE))
        return byte


@contextmanager
def opened() -> Iterator[tuple[CudaDriver, CudaStreams, Pinned]]:
    driver = CudaDriver()
    streams = CudaStreams(driver)
    with driver.current():
        pinned = Pinned(driver, streams)
        yield driver, streams, pinned
        streams.unregister(pinned.host)
        driver.free(pinned.device)
    driver.close()


@pytest.fixture
def late(standin: StandIn) -> Iterator[tuple[CudaDriver, CudaStreams, Pinned]]:
    standin.run_in(Order.LATEST)
    with opened() as all_of_it:
        yield all_of_it


Opened = tuple[CudaDriver, CudaStreams, Pinned]


def test_work_runs_when_somebody_waits_for_it_and_no_more_than_that(late: Opened, standin: StandIn) -> None:
    _, streams, pinned = late
    one, two = streams.create_stream(), streams.create_stream()
    first, second = streams.create_event(), streams.create_event()
    pinned.fill(0, 1)
    streams.copy_in(pinned.device, pinned.host, PAGE, one)
    streams.record(first, one)
    streams.copy_in(pinned.device + PAGE, pinned.host, PAGE, two)
    streams.wait(two, first)
    streams.copy_in(pinned.device + 2 * PAGE, pinned.host, PAGE, two)
    streams.record(second, two)
    assert not streams.is_done(first)
    pinned.fill(0, 2)  # pinned memory is read when the copy runs
    streams.synchronize(first)
    assert (pinned.on_device(0), pinned.on_device(1)) == (2, 0)
    pinned.fill(0, 3)
    streams.drain(two)
    assert [pinned.on_device(page) for page in range(3)] == [2, 3, 3]
    assert streams.is_done(second)
    for event in (first, second):
        streams.destroy_event(event)
    for stream in (one, two):
        streams.destroy_stream(stream)
    assert standin.num_waiting == 0


def test_an_event_recorded_anew_leaves_those_who_wait_already(late: Opened) -> None:
    _, streams, pinned = late
    one, two, three = (streams.create_stream() for _ in range(3))
    event = streams.create_event()
    streams.wait(two, event)  # never recorded: nothing to wait for
    streams.copy_in(pinned.device + PAGE, pinned.host, PAGE, two)
    pinned.fill(0, 1)
    streams.copy_in(pinned.device, pinned.host, PAGE, one)
    streams.record(event, one)
    streams.wait(two, event)
    streams.copy_in(pinned.device + 2 * PAGE, pinned.host, PAGE, two)
    streams.record(event, three)
    streams.synchronize(event)
    assert pinned.on_device(0) == 0, "the work of another stream was waited for"
    streams.drain(two)
    assert (pinned.on_device(0), pinned.on_device(1)) == (1, 1)
    streams.destroy_event(event)
    for stream in (one, two, three):
        streams.destroy_stream(stream)


def test_memory_that_is_not_pinned_is_copied_at_once(late: Opened) -> None:
    _, streams, pinned = late
    stream = streams.create_stream()
    pinned.fill(2, 5)
    streams.copy_in(pinned.device, pinned.host + 2 * PAGE, PAGE, stream)
    pinned.fill(2, 6)
    assert pinned.on_device(0) == 0
    streams.copy_out(pinned.host + 3 * PAGE, pinned.device, PAGE, stream)  # blocks, since it cannot be read later
    assert ctypes.string_at(pinned.host + 3 * PAGE, 2) == b"\5\5"
    streams.copy_out(pinned.host, pinned.device, PAGE, stream)
    assert ctypes.string_at(pinned.host, 2) == b"\0\0"
    streams.drain(stream)
    assert ctypes.string_at(pinned.host, 2) == b"\5\5"
    streams.destroy_stream(stream)


def test_what_the_driver_refuses(late: Opened, standin: StandIn) -> None:
    _, streams, pinned = late
    stream = streams.create_stream()
    with pytest.raises(DriverError, match="INVALID_VALUE"):  # half of it is pinned
        streams.copy_in(pinned.device, pinned.host + PAGE, 2 * PAGE, stream)
    with pytest.raises(DriverError, match=r"ALREADY_REGISTERED.*pin it once"):
        streams.register(pinned.host + PAGE, 2 * PAGE)
    with pytest.raises(DriverError, match="NOT_REGISTERED"):
        streams.unregister(pinned.host + PAGE)
    streams.copy_in(pinned.device, pinned.host, PAGE, stream)
    with pytest.raises(DriverError, match="INVALID_VALUE"):  # a copy still reads it
        streams.unregister(pinned.host)
    streams.destroy_stream(stream)
    with pytest.raises(DriverError, match="INVALID_HANDLE"):
        streams.drain(stream)
    standin.run()
    assert standin.num_waiting == 0
    event = streams.create_event()
    streams.destroy_event(event)
    for call in (streams.destroy_event, streams.synchronize, streams.is_done):
        with pytest.raises(DriverError, match="INVALID_HANDLE"):
            call(event)


def test_whoever_asks_again_and_again_is_answered(late: Opened) -> None:
    _, streams, pinned = late
    stream, event = streams.create_stream(), streams.create_event()
    streams.copy_in(pinned.device, pinned.host, PAGE, stream)
    streams.record(event, stream)
    assert [streams.is_done(event) for _ in range(5)] == [False, False, False, True, True]
    streams.destroy_event(event)
    streams.destroy_stream(stream)


def test_chance_finds_every_order_that_events_allow_and_no_other(standin: StandIn) -> None:
    seen = set()
    for seed in range(200):
        standin.run_in(Order.RANDOM, seed)
        with opened() as (_, streams, pinned):
            one, two, event = streams.create_stream(), streams.create_stream(), streams.create_event()
            pinned.fill(0, 1)
            pinned.fill(1, 2)
            streams.copy_in(pinned.device, pinned.host, PAGE, one)
            streams.record(event, one)
            streams.copy_in(pinned.device + PAGE, pinned.host, PAGE, one)
            streams.wait(two, event)
            streams.copy_in(pinned.device, pinned.host + PAGE, PAGE, two)  # always after the first of the other
            streams.copy_in(pinned.device + PAGE, pinned.host + PAGE, PAGE, two)  # before or after the second
            streams.drain(one)
            streams.drain(two)
            seen.add((pinned.on_device(0), pinned.on_device(1)))
            streams.destroy_event(event)
            streams.destroy_stream(one)
            streams.destroy_stream(two)
    assert seen == {(2, 1), (2, 2)}


def test_a_copy_to_memory_that_is_gone_breaks_the_context(standin: StandIn) -> None:
    standin.run_in(Order.LATEST)
    driver = CudaDriver()
    streams = CudaStreams(driver)
    with driver.current():
        address = driver.allocate(GRANULE_BYTES)
        stream = streams.create_stream()
        streams.copy_in(address, ctypes.addressof(ctypes.create_string_buffer(PAGE)), PAGE, stream)
        driver.free(address)
        with pytest.raises(GpuLostError, match=r"ILLEGAL_ADDRESS.*work in this process is lost.*save"):
            streams.drain(stream)
        with pytest.raises(GpuLostError):
            driver.allocate(GRANULE_BYTES)
        standin.forget()
        streams.destroy_stream(stream)
    driver.close()


@pytest.mark.parametrize("name", ["ILLEGAL_ADDRESS", "LAUNCH_FAILED"])
def test_an_error_that_stays_is_one_of_its_own_kind(late: Opened, standin: StandIn, name: str) -> None:
    _, streams, _ = late
    event = streams.create_event()
    standin.lose(CODES[name])
    for call in (streams.synchronize, streams.is_done, streams.destroy_event):
        with pytest.raises(GpuLostError, match=rf"_{name} .*save what is in host memory.*whole in their homes"):
            call(event)
    standin.forget()
    standin.fail(1, code=CODES["OUT_OF_MEMORY"], function="cuEventSynchronize")
    with pytest.raises(DeviceError, match="OUT_OF_MEMORY") as caught:
        streams.synchronize(event)
    assert not isinstance(caught.value, GpuLostError)
    streams.destroy_event(event)


def test_where_the_gpu_is(standin: StandIn) -> None:
    driver = CudaDriver()
    assert driver.pci_address() == "0000:3b:00.0"
    driver.close()


def test_the_default_stream_is_a_stream_too(late: Opened, standin: StandIn) -> None:
    _, streams, pinned = late
    stream, event = streams.create_stream(), streams.create_event()
    pinned.fill(0, 1)
    streams.copy_in(pinned.device, pinned.host, PAGE, 0)
    streams.record(event, 0)
    streams.wait(stream, event)
    streams.copy_in(pinned.device + PAGE, pinned.host, PAGE, stream)
    streams.drain(stream)
    assert [pinned.on_device(page) for page in range(2)] == [1, 1]
    streams.destroy_event(event)
    streams.destroy_stream(stream)
