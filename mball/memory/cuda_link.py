"""How fast a GPU copies out of pinned memory."""

from __future__ import annotations

import time

from mball.memory import facts
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_streams import CudaStreams
from mball.memory.pinned import PinnedSlab
from mball.schema import Link, Tier

_ROUNDS = 3
# What starting a copy takes beyond its bytes: a small copy shows it, and it is the same on all links of a kind.
_SMALL_BYTES = 4096


def measure_copies(driver: CudaDriver, *, size_bytes: int) -> Link:
    """Returns the link from pinned host memory to the GPU: the best of a few copies of `size_bytes`.

    Takes that much memory of both for some ten milliseconds. Raises DeviceError when there is not so much.
    """
    streams = CudaStreams(driver)
    with driver.current():
        slab = PinnedSlab(streams, size_bytes, node=facts.numa_node(driver.pci_address()), chunk_bytes=size_bytes)
        try:
            slab.pin()
            address = driver.allocate(size_bytes)
            try:
                stream = streams.create_stream()
                try:
                    latency_s = min(_copy_s(streams, stream, address, slab, _SMALL_BYTES) for _ in range(_ROUNDS + 1))
                    seconds = min(_copy_s(streams, stream, address, slab, size_bytes) for _ in range(_ROUNDS))
                finally:
                    streams.destroy_stream(stream)
            finally:
                driver.free(address)
        finally:
            slab.close()
    return Link(
        bandwidth_bytes_per_s=size_bytes / max(seconds - latency_s, seconds / 2),
        latency_s=latency_s,
        source=Tier.HOST,
        target=Tier.DEVICE,
    )


def _copy_s(streams: CudaStreams, stream: int, address: int, slab: PinnedSlab, size_bytes: int) -> float:
    """Returns the seconds that one copy takes, from asking for it to knowing that it is over."""
    began_s = time.perf_counter()
    streams.copy_in(address, slab.address, size_bytes, stream)
    streams.drain(stream)
    return time.perf_counter() - began_s
