"""The host's memory between files and a GPU: what plans stream again and again is kept there, pinned.

[Note: beside passes] Pinning a GiB takes longer than many a pass, so nobody waits for it. A thread takes one stretch of
a file after another, pins memory of its size and reads it; whoever wants to copy a stretch that is not there yet reads
it from the file as before. What the thread has ready changes hands when the engine next asks for something.

[Note: what is kept] Plans take turns: one for prompts and one for tokens stream almost the same. What the next few
expectations do not name goes, and at once where memory for what they do name is short; a table goes that nobody asked
for while as many came.

[Note: what is written] The files' bytes are the truth. `changed` says that some are others now: what has the old ones
is let go, also what is just being read. A slab goes when no stream can copy from it any more.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mball.errors import DeviceError, MballError
from mball.memory import facts
from mball.memory.cuda_streams import CudaStreams
from mball.memory.device import ArenaRead, CopySource, Event
from mball.memory.libc import PAGE_BYTES
from mball.memory.pinned import CHUNK_BYTES, PinnedSlab
from mball.memory.pinned_homes import PinnedHomes, PinnedRange
from mball.units import MIB, format_bytes

_log = logging.getLogger(__name__)

# What is read at one time: passes that read the same disk get their turn in between.
BATCH_BYTES = 32 * MIB
# So many expectations in a row leave out what then goes.
KEPT_FOR = 8
# What of the memory that is left nobody pins: the page cache and whoever else runs here live of it.
SPARED_PART = 8


@dataclass(slots=True, eq=False)
class _Stretch:
    """Bytes `[first, end)` of a file, which a read brings."""

    read: ArenaRead
    file: str
    first: int
    end: int
    is_stale: bool = False

    def meets(self, file: str, first: int, end: int) -> bool:
        return file == self.file and first < self.end and self.first < end


@dataclass(slots=True, eq=False)
class _Shared:
    """What the thread and the engine both use; under `changed`. `worker` says itself that it runs."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    wanted: deque[_Stretch] = field(default_factory=deque)
    coming: _Stretch | None = None
    ready: list[tuple[_Stretch, PinnedRange]] = field(default_factory=list)
    worker: threading.Thread | None = None
    stopping: bool = False
    is_short: bool = False  # there was no room for something


class PinnedTier:
    """Keeps stretches of files in pinned memory. But for its thread it is used by one thread at a time."""

    def __init__(
        self,
        streams: CudaStreams,
        source: CopySource,
        homes: PinnedHomes,
        mark: Callable[[], Event],
        *,
        node: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        headroom: Callable[[], int] = facts.headroom_bytes,
    ) -> None:
        """Takes nothing yet.

        Args:
            streams: of the GPU.
            source: reads files; stays the caller's.
            homes: where copies look for what is here.
            mark: returns what is over once no copy that was asked for until now reads pinned memory.
            node: the NUMA node to take memory from.
            chunk_bytes: what is pinned in one call.
            headroom: says how many bytes this process may still take from the machine or its control group.
        """
        self._streams = streams
        self._source = source
        self._homes = homes
        self._mark = mark
        self._node = node
        self._chunk_bytes = chunk_bytes
        self._headroom = headroom
        self._shared = _Shared()
        self._tables: dict[tuple[tuple[str, int, int], ...], PinnedSlab] = {}
        self._not_asked: dict[tuple[tuple[str, int, int], ...], int] = {}  # in how many expectations, of each table
        self._retired: list[tuple[PinnedSlab, Event]] = []
        self._left_out: dict[PinnedRange, int] = {}  # by how many of the last expectations
        self._is_full = False  # that is said once
        self._spared_bytes = headroom() // SPARED_PART

    def expect(self, reads: Sequence[ArenaRead]) -> None:
        """Says what is copied again and again from now on. Does not block."""
        self._settle()
        stretches = _stretches(reads)
        self._let_go(stretches)
        self._let_tables_go()
        missing = [s for s in stretches if self._homes.find(s.file, s.first, s.end - s.first) is None]
        shared = self._shared
        with shared.changed:
            under_way = [stretch for stretch, _ in shared.ready] + ([shared.coming] if shared.coming else [])
            shared.is_short = False
            there = [stretch for stretch in under_way if not stretch.is_stale]
            shared.wanted = deque(s for s in missing if not any(_is_same(s, other) for other in there))
            if shared.wanted and shared.worker is None and not shared.stopping:
                threading.Thread(target=self._work, name="mball-pin", daemon=True).start()
                while shared.worker is None:
                    shared.changed.wait()
            shared.changed.notify_all()

    def changed(self, file: str, offset_bytes: int, size_bytes: int) -> None:
        """Says that the file has other bytes there now: what has the old ones is let go."""
        end = offset_bytes + size_bytes
        shared = self._shared
        with shared.changed:
            for stretch in [stretch for stretch, _ in shared.ready] + ([shared.coming] if shared.coming else []):
                stretch.is_stale |= stretch.meets(file, offset_bytes, end)
        self._settle()
        for home in self._homes.all():
            if home.file == file and home.offset_bytes < end and offset_bytes < home.end_bytes:
                self._retire(home.slab)
                self._homes.remove(home)
        for key in list(self._tables):
            if any(name == file and first < end and offset_bytes < first + size for name, first, size in key):
                self._retire(self._tables[key])
                del self._tables[key]
                self._not_asked.pop(key, None)

    def find(self, file: str, offset_bytes: int, size_bytes: int) -> tuple[PinnedSlab, int] | None:
        """Returns the slab that has all of these bytes by now, and where in it; None if there is none."""
        if self._shared.ready:
            self._settle()
        return self._homes.find(file, offset_bytes, size_bytes)

    def table(self, reads: Sequence[ArenaRead]) -> int:
        """Returns the address of pinned memory with what these reads bring, one behind the other. Blocks at first.

        Raises StorageError, or DeviceError when there is not so much memory, or it is not pinned.
        """
        key = tuple((read.file, read.offset_bytes, read.size_bytes) for read in reads)
        first = min(reads, key=lambda read: read.arena_offset_bytes)
        shift = first.offset_bytes % PAGE_BYTES
        slab = self._tables.get(key)
        if slab is None:
            size = max(read.arena_offset_bytes + read.size_bytes for read in reads) - first.arena_offset_bytes
            slab = self._slab(shift + size)
            try:
                if slab.pinned_bytes < slab.size_bytes:
                    raise DeviceError(
                        f"only {format_bytes(slab.pinned_bytes)} of {format_bytes(size)} of a table could be pinned, "
                        "so the GPU cannot look up rows of it; allow more (ulimit -l), or free host memory"
                    )
                offsets = [shift + read.arena_offset_bytes - first.arena_offset_bytes for read in reads]
                self._read([(read, offset) for read, offset in zip(reads, offsets, strict=True)], slab)
            except BaseException:
                slab.close()
                raise
            self._tables[key] = slab
        self._not_asked[key] = 0
        return slab.address + shift

    def finish(self) -> None:
        """Blocks until all that was expected is there, or cannot be."""
        shared = self._shared
        with shared.changed:
            while not shared.stopping and (shared.wanted or shared.coming):
                shared.changed.wait()
        self._settle()

    def stop(self) -> None:
        """Ends the thread. Then call `close` when no stream copies any more. Idempotent."""
        shared = self._shared
        with shared.changed:
            shared.stopping = True
            shared.changed.notify_all()
        # The collector may drop a model in any thread.
        if shared.worker is not None and shared.worker is not threading.current_thread():
            shared.worker.join()

    def close(self) -> None:
        """Unpins and frees all. Raises DeviceError when the driver does not unpin: call it again."""
        self.stop()
        shared = self._shared
        for home in self._homes.all():
            home.slab.close()
            self._homes.remove(home)
        while shared.ready:
            shared.ready[-1][1].slab.close()
            shared.ready.pop()
        while self._retired:
            self._retired[-1][0].close()
            self._retired.pop()
        for key in list(self._tables):
            self._tables[key].close()
            del self._tables[key]

    # -- on the engine's thread --------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Takes over what the thread has ready, and gives back what nobody copies from any more."""
        shared = self._shared
        while shared.ready:
            stretch, home = shared.ready[0]
            found = self._homes.find(home.file, home.offset_bytes, home.size_bytes)
            if stretch.is_stale or (found is not None and found[0] is not home.slab):
                self._retire(home.slab)
            elif found is None:  # else an interrupt came after it was put
                for inside in self._homes.parts_of(home):
                    self._retire(inside.slab)
                    self._homes.remove(inside)
                self._homes.put(home)
            with shared.changed:
                del shared.ready[0]
        for retired in [each for each in self._retired if each[1].done()]:
            try:
                retired[0].close()
            except DeviceError as error:  # no reason not to go on; the next time it is tried again
                _log.warning("pinned memory that nobody uses stays taken: %s", error)
            else:
                self._retired.remove(retired)

    def _let_go(self, stretches: Sequence[_Stretch]) -> None:
        """Retires what these and those expected before leave out."""
        left_out: dict[PinnedRange, int] = {}
        for home in self._homes.all():
            if not any(stretch.meets(home.file, home.offset_bytes, home.end_bytes) for stretch in stretches):
                left_out[home] = self._left_out.get(home, 0) + 1
                if left_out[home] > KEPT_FOR or self._shared.is_short:
                    self._retire(home.slab)
                    self._homes.remove(home)
        self._left_out = {home: count for home, count in left_out.items() if count <= KEPT_FOR}

    def _let_tables_go(self) -> None:
        """Retires tables that nobody asked for while several plans came and went."""
        for key in list(self._tables):
            self._not_asked[key] = self._not_asked.get(key, 0) + 1
            if self._not_asked[key] > KEPT_FOR:
                self._retire(self._tables[key])
                del self._tables[key]
                self._not_asked.pop(key, None)

    def _retire(self, slab: PinnedSlab) -> None:
        """Has a slab go after its last copy. First of all: what lets go of it first would have it go at once."""
        self._retired.append((slab, self._mark()))

    # -- on either ---------------------------------------------------------------------------------------------------

    def _slab(self, size_bytes: int) -> PinnedSlab:
        slab = PinnedSlab(
            self._streams,
            size_bytes,
            node=self._node,
            chunk_bytes=self._chunk_bytes,
            headroom=lambda: max(self._headroom() - self._spared_bytes, 0),
        )
        slab.pin()
        return slab

    def _read(self, parts: Sequence[tuple[ArenaRead, int]], slab: PinnedSlab) -> None:
        """Reads each to an offset of the slab. Blocks. Raises StorageError."""
        for batch in _batches(parts):
            if self._shared.stopping:
                raise DeviceError("the device is closed, so nothing more is read for it")
            self._source.submit(
                [read.into(slab.view(offset + first, size), first) for read, offset, first, size in batch]
            ).wait()

    # -- on the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        shared = self._shared
        with shared.changed:
            if shared.worker is not None:  # an interrupt had another one started
                return
            shared.worker = threading.current_thread()
            shared.changed.notify_all()
        try:
            while (stretch := self._next()) is not None:
                home = self._bring(stretch)
                with shared.changed:
                    shared.coming = None
                    if home is not None:
                        shared.ready.append((stretch, home))
                    shared.changed.notify_all()
        finally:
            with shared.changed:  # should it die: nobody waits for it, and files are read as before
                shared.stopping = True
                shared.changed.notify_all()

    def _next(self) -> _Stretch | None:
        """Returns what to bring next, once there is something; None when that is over."""
        shared = self._shared
        with shared.changed:
            while not (shared.wanted or shared.stopping):
                shared.changed.wait()
            if shared.stopping:
                return None
            shared.coming = shared.wanted.popleft()
            return shared.coming

    def _bring(self, stretch: _Stretch) -> PinnedRange | None:
        """Returns a stretch in pinned memory, or None where there is no room or it cannot be read."""
        # Where the bytes lie in a page as they do in their file, O_DIRECT takes them.
        shift, size = stretch.first % PAGE_BYTES, stretch.end - stretch.first
        slab = None
        try:
            slab = self._slab(shift + size)
            self._read([(stretch.read, shift)], slab)
        except MballError as error:
            if not self._is_full:
                self._is_full = True
                _log.warning(
                    "%s of %s stay on disk and are read from there in each pass: %s",
                    format_bytes(size),
                    stretch.file,
                    error,
                )
            if slab is not None:
                slab.close()
            self._shared.is_short = True
            return None
        return PinnedRange(
            file=stretch.file, offset_bytes=stretch.first, size_bytes=size, slab=slab, slab_offset_bytes=shift
        )


def _is_same(one: _Stretch, other: _Stretch) -> bool:
    return (one.file, one.first, one.end) == (other.file, other.first, other.end)


def _stretches(reads: Sequence[ArenaRead]) -> list[_Stretch]:
    """Returns the stretches that these reads bring, in the order of the reads; none is a part of another."""
    # Of those that begin alike the longest goes first.
    ordered = sorted(range(len(reads)), key=lambda n: (reads[n].file, reads[n].offset_bytes, -reads[n].size_bytes))
    kept: list[tuple[int, _Stretch]] = []
    for number in ordered:
        read = reads[number]
        end = read.offset_bytes + read.size_bytes
        if read.size_bytes and not (kept and kept[-1][1].file == read.file and end <= kept[-1][1].end):
            kept.append((number, _Stretch(read, read.file, read.offset_bytes, end)))
    return [stretch for _, stretch in sorted(kept, key=lambda each: each[0])]


def _batches(parts: Sequence[tuple[ArenaRead, int]]) -> Iterator[list[tuple[ArenaRead, int, int, int]]]:
    """Yields what is read at one time: each read, its offset, the first byte of it, and how many."""
    batch: list[tuple[ArenaRead, int, int, int]] = []
    room = BATCH_BYTES
    for read, offset in parts:
        first = 0
        while first < read.size_bytes:
            size = min(room, read.size_bytes - first)
            batch.append((read, offset, first, size))
            first += size
            room -= size
            if not room:
                yield batch
                batch, room = [], BATCH_BYTES
    if batch:
        yield batch
