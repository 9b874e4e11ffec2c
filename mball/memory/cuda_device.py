"""A GPU behind the device seam: copies on streams of their own, ordered with compute by events.

[Note: who waits for whom] Compute runs on the caller's stream, copies out of pinned homes on one stream, copies that
come from disk on another, so that a late read holds up no home. `after` is waited for by the stream that copies, the
event of a copy by the stream that computes; the host waits for neither. It does wait, in `wait`, for reads from disk,
since a read that failed must be known before anybody computes with its bytes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch

from mball.errors import DeviceError, MballError
from mball.memory import facts
from mball.memory.arena import Arena
from mball.memory.cuda_cap import AllocatorCap
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_errors import GpuLostError
from mball.memory.cuda_events import EventPool, StreamEvent, StreamMoment
from mball.memory.cuda_feed import DiskFeed, order
from mball.memory.cuda_gauge import CudaGauge
from mball.memory.cuda_graphs import CudaGraphs
from mball.memory.cuda_region import CudaRegion
from mball.memory.cuda_segments import SegmentRoom
from mball.memory.cuda_streams import CudaStreams
from mball.memory.device import ArenaRead, CopySource, Donors, Event, Gauge, Graphs, Held, Moment, Pinned
from mball.memory.gds_ring import GdsRing, StraightFile, Watched
from mball.memory.host_level import HostLevel, Staged
from mball.memory.pinned import CHUNK_BYTES, PinnedSlab
from mball.memory.pinned_homes import PinnedHomes
from mball.memory.pinned_ring import PinnedRing
from mball.memory.pinned_tier import PinnedTier
from mball.memory.region import Region
from mball.memory.virtual import VirtualMemory
from mball.units import MIB, format_bytes

_log = logging.getLogger(__name__)

NUM_BUFFERS = 8
BUFFER_BYTES = 8 * MIB


class CudaDevice:
    """One GPU. Copies of pinned homes are given to a stream at once; what is on disk comes through a pinned ring.

    Used by one thread at a time, like the engine that it serves.
    """

    def __init__(
        self,
        driver: CudaDriver,
        memory: VirtualMemory,
        source: CopySource,
        current_stream: Callable[[], int],
        *,
        homes: PinnedHomes | None = None,
        place: torch.device | None = None,
        headroom: Callable[[], int] = facts.headroom_bytes,
        chunk_bytes: int = CHUNK_BYTES,
        num_buffers: int = NUM_BUFFERS,
        buffer_bytes: int = BUFFER_BYTES,
        region: Callable[..., Region] | None = None,
        has_level: bool = False,
        room: AllocatorCap | SegmentRoom | None = None,
    ) -> None:
        """Makes two streams; no thread starts and no host memory is pinned before the first copy from disk.

        Args:
            driver: the GPU's; stays the caller's, to be closed last.
            memory: where the arena is from, see `open_cuda_memory`; stays the caller's too.
            source: reads files; the device's own from now on.
            current_stream: returns the stream that the calling thread computes on, as the driver's handle.
            homes: what is in pinned memory; what is expected is added to it.
            place: where torch has tensors on this memory, if that is not the GPU itself.
            headroom: says how many bytes of host memory may be taken.
            chunk_bytes: how much of it is pinned in one call.
            num_buffers: how many buffers the ring has.
            buffer_bytes: what each takes, a multiple of the page.
            region: makes tensors on the GPU's memory; for memory that is none of torch's.
            has_level: whether plans say what host memory holds, see `below`; else what is expected is kept there.
            room: what passes allocate in; torch's own allocator by default.

        Raises DeviceError.
        """
        self._driver = driver
        self._memory = memory
        self._source = source
        self._current_stream = current_stream
        self._homes = PinnedHomes() if homes is None else homes
        self._place = torch.device("cuda", driver.ordinal) if place is None else place
        self._region = partial(CudaRegion, ordinal=driver.ordinal) if region is None else region
        self._streams = CudaStreams(driver)
        self._pool = EventPool(self._streams)
        self._moments = EventPool(self._streams, has_times=True)
        self._arena: Arena | None = None
        self._stream: int | None = None  # that passes computed on lately
        self._recorded: StreamEvent | None = None  # the end of all that was computed there
        self._room = AllocatorCap(driver.ordinal) if room is None else room
        self._closed = False
        self._own_streams: list[int] = []
        self.pci_address = driver.pci_address()
        node = facts.numa_node(self.pci_address)
        try:
            with driver.current():
                for _ in range(2):
                    self._own_streams.append(self._streams.create_stream())
        except BaseException:
            self._destroy_streams()
            raise
        self._home_stream, disk_stream = self._own_streams
        make_ring = partial(
            PinnedRing, self._pool, source, num_buffers=num_buffers, buffer_bytes=buffer_bytes, node=node
        )
        self._feed = DiskFeed(self._pool, disk_stream, make_ring, buffer_bytes)
        self._num_buffers = num_buffers
        self._buffer_bytes = buffer_bytes
        self._level = (
            HostLevel(self._pool, source, node=node, chunk_bytes=chunk_bytes, headroom=headroom) if has_level else None
        )
        self._tier = PinnedTier(
            self._streams,
            source,
            self._homes,
            self._copied,
            node=node,
            chunk_bytes=chunk_bytes,
            headroom=headroom,
        )

    @property
    def gds_bytes(self) -> int:
        """What a `gds_ring` takes of the GPU's memory."""
        return self._num_buffers * self._buffer_bytes

    def gds_ring(self, find: Callable[[str], StraightFile | None], watched: Watched) -> GdsRing:
        """Returns buffers of this GPU that cuFile reads files into, as large as those of the pinned ring; see there.

        They are the caller's, until `go_straight`.
        """
        return GdsRing(self._pool, find, watched, num_buffers=self._num_buffers, buffer_bytes=self._buffer_bytes)

    def go_straight(self, ring: GdsRing) -> None:
        """Has files that `ring` takes come through it, which is the device's own from now on. Before any copy."""
        self._feed.go_straight(ring)

    @property
    def place(self) -> torch.device:
        return self._place

    @property
    def computes_at_once(self) -> bool:
        return False

    @property
    def reads_mappings(self) -> bool:
        return False

    @property
    def below(self) -> HostLevel | None:
        return self._level

    def arena(self, reserve_bytes: int) -> Arena:
        self._arena = arena = self._reserve(reserve_bytes)
        return arena

    def _reserve(self, reserve_bytes: int) -> Arena:
        if self._driver.has_virtual_memory:  # addresses cost nothing, and a larger budget may be set later
            with self._driver.current():
                _, total_bytes = self._driver.free_and_total_bytes()
            if total_bytes > reserve_bytes:
                with contextlib.suppress(DeviceError):
                    return Arena(self._memory, total_bytes, region=self._region)
        return Arena(self._memory, reserve_bytes, region=self._region)

    def copy(self, reads: Sequence[ArenaRead], after: Event | None) -> Event:
        """Returns an event also where the driver fails, with that error; nothing of the copy is under way then.

        Raises DeviceError when closed, in a forked child, or if a destination is not backed.
        """
        self._driver.refuse_fork()
        self._check_open()
        arena = self._arena
        assert arena is not None, "the arena was not made by device.arena(), so nothing can be copied to it"
        at_home: list[tuple[int, PinnedSlab, int, int]] = []
        on_level: list[tuple[int, Staged]] = []
        on_disk: list[tuple[ArenaRead, int]] = []
        for read in reads:
            if not read.size_bytes:
                continue
            address = arena.address_of(read.arena_offset_bytes, read.size_bytes)
            staged = None if self._level is None else self._level.find(read)
            if staged is not None:
                on_level.append((address, staged))
                continue
            home = self._tier.find(read.file, read.offset_bytes, read.size_bytes)
            if home is None:
                on_disk.append((read, address))
            else:
                at_home.append((address, *home, read.size_bytes))
        event = StreamEvent(self._pool, bool(at_home) + bool(on_level) + bool(on_disk))
        if on_level and self._level is not None:
            self._level.take_out(on_level, after, self._home_stream, event)
        if at_home:
            self._copy_homes(at_home, after, event)
        if on_disk:
            self._feed.submit(on_disk, after, event)
        return event

    def follow(self) -> None:
        """Has the caller's stream wait for the last event of another one. Raises DeviceError."""
        self._follow()
        self._room.begin()

    def _follow(self) -> None:
        stream = self._current_stream()
        if stream != self._stream:
            if self._recorded is not None:
                with self._driver.current():
                    order(stream, self._recorded)
            self._stream = stream

    def make_room(self) -> None:
        """Has torch's allocator give back what no tensor is in."""
        self._room.make_room()

    def cap(self, left_bytes: int | None) -> Held:
        """Binds torch's allocator, in all of this process, or segments; see `AllocatorCap` and `SegmentRoom`."""
        return self._room.set(left_bytes)

    def allocating(self) -> contextlib.AbstractContextManager[None]:
        return self._room.routed()

    def donors(self) -> Donors:
        assert self._arena is not None, "make the arena first"
        return self._room.donors(self._arena)

    def record(self) -> Event:
        """Raises DeviceError when closed, or when the driver refuses.

        Behind all that was computed before on another stream, whoever asks: memory may be given back after it.
        """
        self._check_open()
        self._follow()
        event = StreamEvent(self._pool, 1)
        with self._driver.current():
            event.settle(self._pool.record(self._current_stream()))
        self._recorded = event
        return event

    def moment(self) -> Moment:
        """Raises DeviceError when closed, or when the driver refuses."""
        self._check_open()
        with self._driver.current():
            return StreamMoment(self._moments, self._current_stream())

    def wait(self, event: Event) -> None:
        """The host blocks for reads from disk only, and raises their errors; and for events that are not the GPU's."""
        self._driver.refuse_fork()
        self._follow()
        with self._driver.current():
            order(self._current_stream(), event)

    def discard(self, offset: int, size: int) -> None:
        """Does nothing."""

    def expect(self, reads: Iterable[ArenaRead]) -> None:
        """Brings them into pinned memory in the background, as far as there is room; see `PinnedTier`.

        Nothing where plans say what is there.
        """
        self._driver.refuse_fork()
        self._check_open()
        self._tier.expect(list(reads) if self._level is None else [])  # tables that nobody asks for go, either way

    def changed(self, file: str, offset_bytes: int, size_bytes: int) -> None:
        self._driver.refuse_fork()
        self._tier.changed(file, offset_bytes, size_bytes)

    def rows_of(self, home: torch.Tensor, reads: Sequence[ArenaRead]) -> torch.Tensor | None:
        """Returns a tensor of the GPU on pinned memory, which kernels read over the link, row by row.

        The first time it blocks until the table is there. None, and why is in the log, where the GPU does not read the
        host's memory, or there is none for the table that can be pinned.
        """
        try:
            if not self._driver.reads_pinned_memory():
                raise DeviceError(f"GPU {self._driver.ordinal} does not read the host's memory")
            address = self._tier.table(reads)
        except GpuLostError:
            raise
        except DeviceError as error:
            _log.warning(
                "a table of %s is copied whole, since its rows cannot be read over the link: %s",
                format_bytes(home.nbytes),
                str(error),  # the error itself holds the pass's frames, for as long as somebody keeps the record
            )
            return None
        span = sum((length - 1) * stride for length, stride in zip(home.shape, home.stride(), strict=True)) + 1
        region = self._region(address, span * home.element_size(), _nothing, what="pinned table")
        return region.tensor(0, home.dtype, (span,)).as_strided(home.shape, home.stride())

    def pinned(self) -> Pinned:
        return self._streams.pinned()

    def gauge(self) -> Gauge:
        return CudaGauge(self._driver.ordinal, lambda: 0 if self._arena is None else self._arena.taken_bytes)

    def graphs(self) -> Graphs | None:
        """None where the tensors are none of the GPU's own."""
        return CudaGraphs(self._driver.ordinal) if self._place.type == "cuda" else None

    def synchronize(self) -> None:
        """Raises DeviceError when the driver does not tell: then copies may still write."""
        self._driver.refuse_fork()
        if self._level is not None:
            self._level.synchronize()
        self._feed.drain()
        with self._driver.current():
            for stream in self._own_streams:
                self._streams.drain(stream)
        if self._level is not None:
            self._level.settle()

    def close(self) -> None:
        """Raises DeviceError when the driver does not let go of something: call it again.

        Of a GPU whose work is lost nothing can be given back; it only says so in the log.
        """
        self._closed = True
        if self._driver.is_forked:  # threads, streams and pinned memory are the parent's
            return
        try:
            self._tier.stop()
            if self._level is not None:
                self._level.close()
            self._feed.close()
            if self._own_streams:
                with self._driver.current():
                    for stream in self._own_streams:
                        self._streams.drain(stream)
                    self._pool.close()
                    self._moments.close()
                self._destroy_streams()
            self._tier.close()
            if self._level is not None:
                self._level.memory.unpin()
            self._room.close()
        except GpuLostError as error:
            _log.warning("streams and pinned memory are left to the end of the process: %s", error)
        finally:
            self._source.close()

    def _copied(self) -> Event:
        """Returns what is over once nothing is copied out of pinned homes any more that was asked for until now."""
        self._follow()
        event = StreamEvent(self._pool, 2)
        with self._driver.current():
            event.settle(self._pool.record(self._home_stream))
            event.settle(self._pool.record(self._current_stream()))  # it looks up rows there
        return event

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError("the device is closed, so nothing can be copied to it and no work marked; make another")

    def _copy_homes(
        self, homes: Sequence[tuple[int, PinnedSlab, int, int]], after: Event | None, event: StreamEvent
    ) -> None:
        stream = self._home_stream
        try:
            with self._driver.current():
                if after is not None:
                    order(stream, after)
                for address, source, size in _joined(homes):
                    self._streams.copy_in(address, source, size, stream)
                event.settle(self._pool.record(stream))
        except MballError as error:
            event.fail(error, stream)

    def _destroy_streams(self) -> None:
        if self._own_streams:
            with self._driver.current():
                while self._own_streams:
                    stream = self._own_streams.pop()  # first: an interrupt may lose it, but none is destroyed twice
                    try:
                        self._streams.destroy_stream(stream)
                    except DeviceError:
                        self._own_streams.append(stream)
                        raise


def _nothing() -> None:
    """Of memory that is the tier's nothing is given back."""


def _joined(homes: Sequence[tuple[int, PinnedSlab, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yields (address, source, size) of as few copies as bring these: reads side by side in both places are one."""
    runs: list[tuple[int, PinnedSlab, int, int]] = []
    for address, slab, offset, size in homes:
        if runs:
            start, last_slab, last_offset, last_size = runs[-1]
            if (start + last_size, last_slab, last_offset + last_size) == (address, slab, offset):
                runs[-1] = (start, slab, last_offset, last_size + size)
                continue
        runs.append((address, slab, offset, size))
    for address, slab, offset, size in runs:
        for source, part in slab.spans(offset, size):
            yield address, source, part
            address += part
