"""Pinned host memory: exact in size, pinned in the background by chunks, given back, and usable where it cannot be."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mball.errors import DeviceError
from mball.memory import facts
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_errors import DriverError
from mball.memory.cuda_streams import CudaStreams
from mball.memory.pinned import PinnedSlab
from mball.memory.pinned_homes import PinnedHomes, PinnedRange
from tests.memory.devices import expect
from tests.memory.driver.standin import CODES, StandIn

PAGE = 4096
CHUNK = 4 * PAGE


@pytest.fixture
def streams(standin: StandIn) -> Iterator[CudaStreams]:
    driver = CudaDriver()
    yield CudaStreams(driver)
    assert standin.registered_bytes == 0
    driver.close()


def is_mapped(address: int) -> bool:
    """Whether the kernel knows memory there."""
    begin = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ", re.MULTILINE)
    ranges = begin.findall(Path("/proc/self/maps").read_text())
    return any(int(first, 16) <= address < int(end, 16) for first, end in ranges)


@pytest.mark.parametrize("num_pages", [1, 3, 4, 5, 9])
def test_a_slab_takes_what_it_holds_and_no_power_of_two(streams: CudaStreams, standin: StandIn, num_pages: int) -> None:
    slab = PinnedSlab(streams, num_pages * PAGE - 5, chunk_bytes=CHUNK)
    assert slab.size_bytes == num_pages * PAGE
    assert standin.registered_bytes == slab.pinned_bytes == 0
    slab.start()
    slab.start()
    slab.finish()
    assert standin.registered_bytes == slab.pinned_bytes == slab.size_bytes
    assert standin.calls("cuMemHostRegister") == -(-num_pages // 4)
    for _ in range(2):
        slab.close()
    assert standin.registered_bytes == 0
    with pytest.raises(DeviceError, match="closed"):
        slab.start()


def test_no_thread_starts_before_it_is_asked_for(streams: CudaStreams) -> None:
    before = threading.active_count()
    PinnedSlab(streams, 9 * PAGE, chunk_bytes=CHUNK).close()
    assert threading.active_count() == before


def test_copies_do_not_wait_for_pinning(streams: CudaStreams, standin: StandIn) -> None:
    """With none, some and all chunks pinned the same bytes come, and no copy crosses from chunk to chunk."""
    driver = streams.driver
    for num_pinned in range(4):
        slab = PinnedSlab(streams, 3 * CHUNK, chunk_bytes=CHUNK)
        slab.view(0, 3 * CHUNK)[:] = content = os.urandom(3 * CHUNK)
        standin.fail(num_pinned + 1, 9, code=CODES["OUT_OF_MEMORY"], function="cuMemHostRegister")
        slab.pin()
        standin.forget()
        assert slab.pinned_bytes == num_pinned * CHUNK
        with driver.current():
            address, stream = driver.allocate(3 * CHUNK), streams.create_stream()
            spans = list(slab.spans(7, 3 * CHUNK - 7))
            to = address
            for source, size in spans:
                streams.copy_in(to, source, size, stream)
                to += size
            streams.drain(stream)
            expect(ctypes.string_at(address, 3 * CHUNK - 7), content[7:])
            streams.destroy_stream(stream)
            driver.free(address)
        assert [size for _, size in spans] == [CHUNK - 7, CHUNK, CHUNK]
        slab.close()
    for offset, size in [(-1, 2), (0, 3 * CHUNK + 1), (0, 1)]:
        with pytest.raises(DeviceError, match="not in the slab"):
            list(slab.spans(offset, size))


def test_where_pinning_fails_the_rest_stays_pageable_and_one_line_says_so(
    streams: CudaStreams, standin: StandIn, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "locked_limit_bytes", lambda: 65536)
    slab = PinnedSlab(streams, 10 * CHUNK, chunk_bytes=CHUNK)
    standin.fail(3, 99, code=CODES["OUT_OF_MEMORY"], function="cuMemHostRegister")
    slab.start()
    slab.finish()
    assert slab.pinned_bytes == standin.registered_bytes == 2 * CHUNK
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert re.match(
        r"32\.00 KiB of 160\.00 KiB of host memory are pinned \(ulimit -l allows 64\.00 KiB\), .*slow", line
    )
    assert "cuMemHostRegister for 16.00 KiB (16384 bytes) failed on GPU 0: CUDA_ERROR_OUT_OF_MEMORY" in line
    slab.close()


def test_pinning_stops_before_the_machine_or_the_control_group_is_full(
    streams: CudaStreams, standin: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    left = iter([10 * CHUNK, CHUNK, CHUNK, CHUNK - 1])
    slab = PinnedSlab(streams, 10 * CHUNK, chunk_bytes=CHUNK, headroom=lambda: next(left))
    slab.pin()
    assert slab.pinned_bytes == 2 * CHUNK
    assert "control group has" in caplog.text
    slab.close()
    with pytest.raises(DeviceError, match=r"40960 bytes\) of host memory are needed, and 4\.00 KiB are left"):
        PinnedSlab(streams, 10 * PAGE, headroom=lambda: PAGE)


def test_memory_goes_when_nobody_looks_at_it_and_is_unpinned_before(streams: CudaStreams, standin: StandIn) -> None:
    slab = PinnedSlab(streams, 8 * PAGE, chunk_bytes=CHUNK)
    slab.pin()
    address = slab.address
    tensor = slab.tensor(PAGE, torch.float32, (1024,)).fill_(3)
    slab.close()
    assert standin.registered_bytes == 0
    assert is_mapped(address)
    assert tensor.eq(3).all()
    del tensor
    gc.collect()
    assert not is_mapped(address)
    slab = PinnedSlab(streams, 8 * PAGE, chunk_bytes=CHUNK)
    slab.pin()
    address = slab.address
    del slab  # without close
    gc.collect()
    assert standin.registered_bytes == 0
    assert not is_mapped(address)


def test_what_the_driver_does_not_unpin_stays_and_is_tried_again(streams: CudaStreams, standin: StandIn) -> None:
    for position in range(1, 4):
        slab = PinnedSlab(streams, 3 * CHUNK, chunk_bytes=CHUNK)
        slab.pin()
        standin.fail(position, code=CODES["INVALID_VALUE"], function="cuMemHostUnregister")
        with pytest.raises(DriverError, match="cuMemHostUnregister"):
            slab.close()
        assert is_mapped(slab.address)
        assert standin.registered_bytes == (4 - position) * CHUNK
        slab.close()
        assert standin.registered_bytes == 0
        standin.forget()


def test_pinned_memory_that_cannot_be_given_back_is_not_given_to_others(
    streams: CudaStreams, standin: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    slab = PinnedSlab(streams, CHUNK, chunk_bytes=CHUNK)
    slab.pin()
    address = slab.address
    standin.fail(1, code=CODES["INVALID_VALUE"], function="cuMemHostUnregister")
    del slab
    gc.collect()
    assert is_mapped(address)
    assert "16.00 KiB of pinned memory stay taken" in caplog.text
    with streams.driver.current():
        streams.unregister(address)


def test_a_forked_child_leaves_the_parents_pinned_memory_alone(streams: CudaStreams, standin: StandIn) -> None:
    slab = PinnedSlab(streams, 8 * PAGE, chunk_bytes=CHUNK)
    slab.view(0, 4)[:] = b"home"
    slab.pin()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with pytest.raises(DeviceError, match="fork"):
                slab.start()
            assert bytes(slab.view(0, 4)) == b"home"
            slab.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert standin.registered_bytes == 8 * PAGE
    slab.close()


def test_pages_are_asked_of_the_gpus_numa_node(streams: CudaStreams, tmp_path: Path) -> None:
    folder = tmp_path / streams.driver.pci_address()
    folder.mkdir()
    for text, node in [("0\n", 0), ("3\n", 3), ("-1\n", None), ("", None)]:
        (folder / "numa_node").write_text(text)
        assert facts.numa_node(streams.driver.pci_address(), tmp_path) == node
    assert facts.numa_node("0000:ff:00.0", tmp_path) is None
    slab = PinnedSlab(streams, 8 * PAGE, chunk_bytes=CHUNK, node=0)
    policies = Path("/proc/self/numa_maps")
    if policies.exists():  # a kernel with NUMA: it says what was asked
        (line,) = [line for line in policies.read_text().splitlines() if line.startswith(f"{slab.address:08x} ")]
        assert line.split()[1].startswith("prefer")
    slab.close()
    PinnedSlab(streams, 8 * PAGE, node=1000).close()  # there is none: as if nothing had been asked


def test_homes_are_found_by_their_stretch_of_a_file(streams: CudaStreams) -> None:
    slab = PinnedSlab(streams, 8 * PAGE, chunk_bytes=CHUNK)
    homes = PinnedHomes()
    ranges = [
        PinnedRange(file=file, offset_bytes=first, size_bytes=PAGE, slab=slab, slab_offset_bytes=place * PAGE)
        for place, (file, first) in enumerate([("a", 5 * PAGE), ("a", 0), ("b", 0), ("a", 2 * PAGE)])
    ]
    for home in ranges:
        homes.put(home)
    assert homes.find("a", 5 * PAGE + 7, PAGE - 7) == (slab, 7)
    assert homes.find("a", 2 * PAGE, PAGE) == (slab, 3 * PAGE)
    assert homes.find("b", 1, 1) == (slab, 2 * PAGE + 1)
    for file, offset, size in [("a", PAGE, 1), ("a", 1, PAGE), ("a", 6 * PAGE, 1), ("b", PAGE, 1), ("c", 0, 1)]:
        assert homes.find(file, offset, size) is None
    with pytest.raises(AssertionError):
        homes.put(ranges[0])
    homes.remove(ranges[3])
    assert homes.find("a", 2 * PAGE, PAGE) is None
    # Stretches may overlap, and one takes the place of those that are parts of it.
    across = PinnedRange(file="a", offset_bytes=PAGE // 2, size_bytes=2 * PAGE, slab=slab, slab_offset_bytes=4 * PAGE)
    assert homes.parts_of(across) == []
    homes.put(across)
    assert homes.find("a", 1, PAGE // 2) == (slab, PAGE + 1)
    assert homes.find("a", PAGE, PAGE) == (slab, 4 * PAGE + PAGE // 2)
    assert homes.find("a", 0, 2 * PAGE) is None
    whole = PinnedRange(file="a", offset_bytes=0, size_bytes=3 * PAGE, slab=slab, slab_offset_bytes=5 * PAGE)
    assert homes.parts_of(whole) == [ranges[1], across]
    with pytest.raises(AssertionError):
        homes.put(whole)
    for part in (ranges[1], across, across):
        homes.remove(part)
    homes.put(whole)
    assert homes.find("a", PAGE, PAGE) == (slab, 6 * PAGE)
    assert sorted(home.file for home in homes.all()) == ["a", "a", "b"]
    slab.close()
