"""What calls of the driver take, by size and in batches; and copies, by size, direction and kind of host memory."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import time
from collections.abc import Callable, Iterator, Sequence

from bench.results import Measurement
from mball.memory import facts
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_streams import CudaStreams
from mball.memory.pinned import PinnedSlab
from mball.units import GIB, KIB, MIB, format_bytes

CALL_SIZES = (2 * MIB, 32 * MIB, 256 * MIB)
NUM_BATCHED = 32
COPY_SIZES = (64 * KIB, 1 * MIB, 8 * MIB, 64 * MIB, 256 * MIB)
# Small copies are timed many at a time, so that what is timed takes a millisecond and more.
LEAST_BYTES = 256 * MIB

Clock = Callable[[], float]


def size_name(size_bytes: int) -> str:
    """Returns a size as names of measurements have it: ``64_kib``."""
    return format_bytes(size_bytes).replace(".00", "").replace(" ", "_").lower()


# -- calls ---------------------------------------------------------------------------------------------------------


def driver_calls(
    driver: CudaDriver,
    *,
    sizes: Sequence[int] = CALL_SIZES,
    num_batched: int = NUM_BATCHED,
    rounds: int = 15,
    load: Callable[[], None] | None = None,
    clock: Clock = time.perf_counter,
) -> list[Measurement]:
    """Returns the seconds of each call, of a piece of each size, and of calls that take many pieces of 32 MiB at once.

    Args:
        driver: of a GPU with virtual memory.
        sizes: of pieces, rounded up to the granularity.
        num_batched: how many pieces are mapped side by side.
        rounds: samples of each.
        load: keeps the GPU busy for a while; the calls are then timed a second time, under load.
        clock: in seconds.

    Raises DeviceError when there is not so much memory.
    """
    found = []
    with driver.current():
        for size_bytes in sizes:
            size = _whole(size_bytes, driver.granularity_bytes)
            found += _calls(driver, size, 1, rounds, size_name(size_bytes), "", None, clock)
        extent = _whole(sizes[min(1, len(sizes) - 1)], driver.granularity_bytes)
        name = f"{num_batched}_of_{size_name(extent)}"
        found += _calls(driver, extent, num_batched, rounds, name, "", None, clock)
        if load is not None:
            found += _calls(driver, extent, num_batched, rounds, f"{name}_busy", ", the GPU busy", load, clock)
    return found


def _calls(
    driver: CudaDriver,
    size: int,
    count: int,
    rounds: int,
    name: str,
    where: str,
    load: Callable[[], None] | None,
    clock: Clock,
) -> list[Measurement]:
    """Times `count` pieces side by side: created, mapped and released one by one, allowed and unmapped all at once."""
    samples: dict[str, list[float]] = {call: [] for call in ("reserve", "create", "map", "access", "unmap", "release")}

    @contextlib.contextmanager
    def timed(call: str) -> Iterator[None]:
        began_s = clock()
        yield
        samples[call].append(clock() - began_s)

    for _ in range(rounds + 1):
        if load is not None:
            load()
        with timed("reserve"):
            address = driver.reserve(count * size, 0)
        with timed("create"):
            handles = [driver.create(size) for _ in range(count)]
        with timed("map"):
            for number, handle in enumerate(handles):
                driver.map(address + number * size, size, handle)
        with timed("access"):
            driver.allow(address, count * size)
        with timed("unmap"):
            driver.unmap(address, count * size)
        with timed("release"):
            for handle in handles:
                driver.destroy(handle)
        driver.unreserve(address, count * size)
    pieces = f"{count} pieces of {format_bytes(size)}" if count > 1 else format_bytes(size)
    return [
        # The first round begins what the driver does once.
        Measurement.of(f"{call}_{name}", times[1:], unit="s", description=f"to {call} {pieces}{where}")
        for call, times in samples.items()
    ]


def _whole(size_bytes: int, granule_bytes: int) -> int:
    return -(-size_bytes // granule_bytes) * granule_bytes


# -- copies --------------------------------------------------------------------------------------------------------


def copies(
    driver: CudaDriver,
    *,
    sizes: Sequence[int] = COPY_SIZES,
    least_bytes: int = LEAST_BYTES,
    rounds: int = 7,
    clock: Clock = time.perf_counter,
) -> list[Measurement]:
    """Returns bytes a second of copies to and from the GPU, of pinned and pageable memory, by size; kinds take turns.

    Args:
        driver: of the GPU.
        sizes: of one copy.
        least_bytes: what is copied between two looks at the clock.
        rounds: samples of each.
        clock: in seconds.

    Raises DeviceError when there is not so much memory.
    """
    streams = CudaStreams(driver)
    largest = max(sizes)
    found = []
    with driver.current(), contextlib.ExitStack() as undo:
        slab = PinnedSlab(streams, largest, node=facts.numa_node(driver.pci_address()))
        undo.callback(slab.close)
        slab.pin()
        pageable = mmap.mmap(-1, largest, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        held = ctypes.c_char.from_buffer(pageable)
        ctypes.memset(ctypes.addressof(held), 1, largest)  # its pages are there
        ctypes.memset(slab.address, 1, largest)
        address = driver.allocate(largest)
        undo.callback(driver.free, address)
        stream = streams.create_stream()
        undo.callback(streams.destroy_stream, stream)
        hosts = {"pinned": slab.address, "pageable": ctypes.addressof(held)}
        for size in sizes:
            count = max(least_bytes // size, 1)
            samples: dict[tuple[str, str], list[float]] = {}
            for number in range(rounds + 1):
                for kind, host in hosts.items():
                    for way in ("in", "out"):
                        seconds = _copy_s(streams, stream, address, host, size, count, way == "in", clock)
                        if number:  # the first round warms
                            samples.setdefault((kind, way), []).append(count * size / seconds)
            for (kind, way), rates in samples.items():
                direction = "to the GPU" if way == "in" else "from the GPU"
                found.append(
                    Measurement.of(
                        f"{kind}_{way}_{size_name(size)}", [rate / 1e9 for rate in rates], unit="GB/s",
                        description=f"copies of {format_bytes(size)} {direction}, {kind} host memory",
                    )
                )  # fmt: skip
        del held
    return found


def _copy_s(
    streams: CudaStreams, stream: int, address: int, host: int, size: int, count: int, is_in: bool, clock: Clock
) -> float:
    """Returns the seconds of `count` copies on one stream, from asking for the first to the end of the last."""
    began_s = clock()
    for _ in range(count):
        if is_in:
            streams.copy_in(address, host, size, stream)
        else:
            streams.copy_out(host, address, size, stream)
    streams.drain(stream)
    return max(clock() - began_s, 1e-9)


def pinning(
    driver: CudaDriver, *, size_bytes: int = 2 * GIB, rounds: int = 2, clock: Clock = time.perf_counter
) -> list[Measurement]:
    """Returns the seconds a GiB that pinning takes, and unpinning. Raises DeviceError without so much host memory."""
    streams = CudaStreams(driver)
    pin_s, unpin_s = [], []
    for _ in range(rounds):
        slab = PinnedSlab(streams, size_bytes, node=facts.numa_node(driver.pci_address()))
        began_s = clock()
        slab.pin()
        pinned_s = clock()
        pinned_bytes = slab.pinned_bytes
        slab.close()
        pin_s.append((pinned_s - began_s) * GIB / max(pinned_bytes, 1))
        unpin_s.append((clock() - pinned_s) * GIB / max(pinned_bytes, 1))
    return [
        Measurement.of("pin_gib", pin_s, unit="s", description="to pin 1 GiB of new host memory, in chunks"),
        Measurement.of("unpin_gib", unpin_s, unit="s", description="to unpin and free 1 GiB"),
    ]


class Yardstick:
    """A bare copy out of pinned memory, for the rounds of a bench that streams: what the link does at this moment."""

    def __init__(self, driver: CudaDriver, *, size_bytes: int = 256 * MIB) -> None:
        """Takes `size_bytes` of pinned memory and of the GPU's. Raises DeviceError."""
        self._driver = driver
        self._streams = CudaStreams(driver)
        self._size_bytes = size_bytes
        self._slab = PinnedSlab(self._streams, size_bytes, node=facts.numa_node(driver.pci_address()))
        self._slab.pin()
        with driver.current():
            self._address = driver.allocate(size_bytes)
            self._stream = self._streams.create_stream()

    def bytes_per_s(self, num_copies: int = 8, clock: Clock = time.perf_counter) -> float:
        """Returns the rate of some copies, one behind the other. Blocks."""
        with self._driver.current():
            seconds = _copy_s(
                self._streams,
                self._stream,
                self._address,
                self._slab.address,
                self._size_bytes,
                num_copies,
                True,
                clock,
            )
        return num_copies * self._size_bytes / seconds

    def close(self) -> None:
        """Gives all back."""
        with self._driver.current():
            self._streams.destroy_stream(self._stream)
            self._driver.free(self._address)
        self._slab.close()
