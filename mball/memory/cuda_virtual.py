"""A GPU's virtual memory: pieces that are mapped and taken away.

[Note: pieces] The driver hands out physical pages as handles. A handle is mapped from its start and unmapped whole, so
it is the unit that comes and goes: a piece. Large pieces (extents) cost fewer calls, pieces of one granule fit any
size. So an arena's body is made of extents, each on a multiple of its size, and what is ragged at either end of a
growth is made of granules. Shrinking unmaps the pieces above the new end. The one that the new end cuts stays, since
what lies below is in use and no byte may move: up to an extent less a granule stays taken, which `piece_end` tells
before and after. Growing again takes it as it is. Granules that once were an end stay granules until the arena shrinks
below them.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from mball.errors import DeviceError
from mball.memory.allocator.segment_allocator import SegmentAllocator
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_errors import INVALID_VALUE, DriverError
from mball.memory.cuda_plain import PlainCudaMemory
from mball.memory.page_pool import PagePool
from mball.memory.virtual import Reservation, VirtualMemory
from mball.units import MIB, format_bytes, round_down, round_up

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

EXTENT_BYTES = 32 * MIB


def open_cuda_memory(ordinal: int = 0) -> VirtualMemory:
    """Returns the memory of GPU `ordinal`: its virtual memory, or plain allocations where it has none.

    Raises DeviceError when there is no such GPU, no driver, or no package cuda-bindings.
    """
    driver = CudaDriver(ordinal)
    return CudaMemory(driver) if driver.has_virtual_memory else PlainCudaMemory(driver)


@dataclass(frozen=True, slots=True)
class Piece:
    """A handle's pages at `[offset, offset + size_bytes)` of a reservation."""

    offset: int
    size_bytes: int
    handle: int


@dataclass(slots=True)
class _Space:
    """A reservation and its pieces, side by side from offset 0 on, but where some were lost."""

    reservation: Reservation
    pieces: list[Piece] = field(default_factory=list)
    num_sure: int = 0  # pieces that are mapped for certain; of the others only an unmap can tell

    @property
    def end(self) -> int:
        last = self.pieces[-1:]  # in one go: it may go while another thread asks
        return last[0].offset + last[0].size_bytes if last else 0

    def count_below(self, offset: int) -> int:
        """Returns how many pieces begin below `offset`."""
        count = len(self.pieces)
        while count and self.pieces[count - 1].offset >= offset:
            count -= 1
        return count


def piece_sizes(first: int, end: int, *, granule_bytes: int, extent_bytes: int) -> list[int]:
    """Returns the sizes of pieces that fill `[first, end)`: extents on multiples of their size, else granules.

    All arguments are multiples of `granule_bytes`.
    """
    body_first = min(round_up(first, extent_bytes), end)
    body_end = max(round_down(end, extent_bytes), body_first)
    head, body, tail = body_first - first, body_end - body_first, end - body_end
    return (
        [granule_bytes] * (head // granule_bytes)
        + [extent_bytes] * (body // extent_bytes)
        + [granule_bytes] * (tail // granule_bytes)
    )


class CudaMemory:
    """A GPU's virtual memory. Pages are zeroed by nobody, and all are there as soon as a range is backed.

    What is backed of a reservation is `[0, n)`. No call waits for the GPU, and none is ordered with its streams: before
    `trim` and `release` the caller waits for the event of the last work that uses what goes (`Device.record`), and
    never for the whole device. A step that fails undoes those before it.

    Memory that is given back is pooled, up to the pool's limit, until no reservation is left.

    Thread-safe: the last tensor on a reservation may die on any thread, or while a call is under way.
    """

    def __init__(self, driver: CudaDriver, *, pool: PagePool | None = None, extent_bytes: int = EXTENT_BYTES) -> None:
        """`pool` is the memory's own from now on; extents are `extent_bytes` rounded up to the granularity."""
        assert driver.has_virtual_memory
        self._driver = driver
        self._granule_bytes = driver.granularity_bytes
        self._extent_bytes = round_up(extent_bytes, self._granule_bytes)
        self._pool = PagePool(driver) if pool is None else pool
        self._serials = itertools.count()
        self._spaces: dict[Reservation, _Space] = {}
        self._lock = threading.Lock()
        self._dropped: deque[Reservation] = deque()
        self._interrupted = False
        self._closing = False

    @property
    def page_bytes(self) -> int:
        return self._granule_bytes

    @property
    def extent_bytes(self) -> int:
        """Of the large pieces."""
        return self._extent_bytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes of all pieces of all reservations."""
        return sum(space.end for space in list(self._spaces.values()))

    @property
    def pooled_bytes(self) -> int:
        """Bytes that are kept for the next growth. They are on the GPU too."""
        return self._pool.pooled_bytes

    @property
    def created_bytes(self) -> int:
        """Bytes that this memory occupies on the GPU: mapped and pooled."""
        return self._pool.created_bytes

    def reserve(self, size_bytes: int) -> Reservation:
        if size_bytes <= 0:
            raise DeviceError(f"cannot reserve {size_bytes} bytes of address space; ask for more than zero")
        size = round_up(size_bytes, self._extent_bytes)
        # The largest power of two that extents are multiples of, so that large mappings lie on their own multiple.
        alignment = self._extent_bytes & -self._extent_bytes
        made: list[Reservation] = []
        try:
            self._exclusively(
                f"reserve {format_bytes(size)} ({size} bytes) of addresses",
                partial(self._reserve, size, alignment, made),
            )
        except BaseException:
            self._dropped.extend(made)  # interrupted: the caller never has it
            raise
        return made[0]

    def back(self, reservation: Reservation, first: int, end: int) -> None:
        self._check(reservation, first, end)
        self._exclusively(
            f"back {format_bytes(end - first)} ({end - first} bytes) with memory of GPU {self._driver.ordinal}",
            partial(self._back, self._spaces[reservation], first, end),
        )

    def populate(self, reservation: Reservation, first: int, end: int) -> None:
        self._check(reservation, first, end)

    def trim(self, reservation: Reservation, first: int, end: int) -> None:
        self._check(reservation, first, end)
        if first < end:
            self._exclusively(
                f"take back {format_bytes(end - first)} ({end - first} bytes)",
                partial(self._trim, self._spaces[reservation], first, end),
            )

    def piece_end(self, reservation: Reservation, offset: int) -> int:
        self._check(reservation, offset, offset)
        space = self._spaces[reservation]
        count = space.count_below(offset)
        if not count:
            return offset
        piece = space.pieces[count - 1]
        return max(offset, piece.offset + piece.size_bytes)

    def piece_start(self, reservation: Reservation, offset: int) -> int:
        self._check(reservation, offset, offset)
        space = self._spaces[reservation]
        count = space.count_below(offset)
        if not count or space.pieces[count - 1].offset + space.pieces[count - 1].size_bytes <= offset:
            return offset
        return space.pieces[count - 1].offset

    def release(self, reservation: Reservation) -> None:
        if self._driver.is_forked:  # all of it belongs to the parent
            return
        # Without a look at who is there: others append meanwhile. What is there twice is released once.
        self._dropped.append(reservation)
        self._release_dropped()

    def trim_pool(self, keep_bytes: int = 0) -> int:
        """Gives pooled memory to whoever else uses the GPU, until `keep_bytes` are left; returns how many bytes went.

        Raises DeviceError; what the driver did not take stays pooled.
        """
        size = self.pooled_bytes
        return self._exclusively(
            f"give back {format_bytes(size)} ({size} bytes) that are pooled", partial(self._pool.trim, keep_bytes)
        )

    def give_to(self, segments: SegmentAllocator) -> int:
        """Hands all that is pooled over to segments; returns how many bytes that are. Raises DeviceError."""
        size = self.pooled_bytes
        if not size:
            return 0
        return self._exclusively(
            f"hand over {format_bytes(size)} ({size} bytes)", partial(segments.lend_from, self._pool, size)
        )

    def take_from(self, segments: SegmentAllocator) -> int:
        """Takes over what segments have pooled; returns how many bytes that are. Raises DeviceError."""
        size = segments.statistics().pooled_bytes
        if not size:
            return 0
        return self._exclusively(
            f"take over {format_bytes(size)} ({size} bytes)", partial(segments.return_to, self._pool, size)
        )

    def extents(self, reservation: Reservation) -> list[Piece]:
        """Returns the extents of a reservation that are mapped for certain, by their offsets."""
        space = self._spaces[reservation]
        return [piece for piece in space.pieces[: space.num_sure] if piece.size_bytes == self._extent_bytes]

    def lose(self, reservation: Reservation, pieces: Collection[Piece]) -> None:
        """Forgets pieces that segments have taken, which are mapped no more. Trim what lies above the first next.

        Idempotent: after an interrupt do it again.
        """
        with self._lock:
            space = self._spaces[reservation]
            for piece in pieces:
                self._pool.disown([piece.handle])
                if piece in space.pieces:
                    space.num_sure -= space.pieces.index(piece) < space.num_sure
                    space.pieces.remove(piece)

    def close(self) -> None:
        """Gives the driver's context up; every reservation was released before. Idempotent. Raises DeviceError."""
        assert not self._spaces, "release what is reserved first"
        self._driver.close()

    def close_after_use(self) -> None:
        """Closes when the last reservation is released: now, or when the last tensor dies that is left of an arena."""
        self._closing = True
        if not self._spaces:
            self.close()

    def _exclusively(self, what: str, work: Callable[[], _Result]) -> _Result:
        """Works while no other thread does, in the GPU's context; a failure says what could not be done."""
        self._driver.refuse_fork()  # before the lock, which another thread may have had when the child was forked
        try:
            # By a bare `with`, here and below: only so can no interrupt come between taking a lock and minding it.
            with self._lock:
                try:
                    with self._driver.current():
                        if self._interrupted:
                            self._reclaim()
                        return work()
                except DriverError as error:
                    raise DeviceError(f"cannot {what}: {error}") from error
                except DeviceError:
                    raise
                except BaseException:
                    self._interrupted = True
                    raise
        finally:
            try:
                self._release_dropped()
            except DeviceError as error:  # somebody else's: this call did what it was asked
                _log.warning("memory that nobody uses is still taken: %s", error)

    def _release_dropped(self) -> None:
        """Releases what was dropped while a call was under way, on another thread or by the collector on this one.

        Whoever has the lock does it, so that nobody waits here (but for somebody who takes it in this very moment), and
        nothing happens within another call. What an interrupt cuts short goes on in the next call. Raises
        DeviceError; what it is about can be released again.
        """
        while self._dropped and not self._lock.locked():
            with self._lock:
                try:
                    if self._dropped:
                        self._release(self._dropped[0])
                        self._dropped.popleft()
                except DeviceError:
                    self._dropped.popleft()
                    raise
                except BaseException:
                    self._interrupted = True
                    raise

    def _reserve(self, size_bytes: int, alignment_bytes: int, made: list[Reservation]) -> None:
        address = self._driver.reserve(size_bytes, alignment_bytes)
        reservation = Reservation(address=address, size_bytes=size_bytes, serial=next(self._serials))
        self._spaces[reservation] = _Space(reservation)
        made.append(reservation)

    def _back(self, space: _Space, first: int, end: int) -> None:
        start, before = space.end, len(space.pieces)
        assert space.count_below(first) == before == space.num_sure, "trim what is above first"
        assert start >= first, "memory is backed from the start, without a gap"
        if start >= end:
            return
        sizes = piece_sizes(start, end, granule_bytes=self._granule_bytes, extent_bytes=self._extent_bytes)
        handles = self._pool.take(sizes)
        address = space.reservation.address
        try:
            for size, handle in zip(sizes, handles, strict=True):
                # Noted first: if an interrupt comes in the call, nobody knows whether the piece is mapped.
                piece = Piece(space.end, size, handle)
                space.pieces.append(piece)
                self._driver.map(address + piece.offset, size, handle)
                space.num_sure += 1
            self._driver.allow(address + start, end - start)
        except BaseException:
            self._pool.give(handles[len(space.pieces) - before :])
            self._unmap(space, before)
            raise

    def _trim(self, space: _Space, first: int, end: int) -> None:
        assert space.count_below(end) == len(space.pieces), "memory is given back from the end"
        self._unmap(space, space.count_below(first))

    def _release(self, reservation: Reservation) -> None:
        space = self._spaces.get(reservation)
        if space is None:  # released before, and the address may belong to somebody else by now
            return
        try:
            with self._driver.current():
                if self._interrupted:
                    self._reclaim()
                self._unmap(space, 0)
                if len(self._spaces) == 1:  # nobody is left to use what is pooled
                    self._pool.trim()
                # Forgotten first: an interrupt may then lose addresses, but nobody's are ever given up twice.
                del self._spaces[reservation]
                try:
                    self._driver.unreserve(reservation.address, reservation.size_bytes)
                except DriverError:
                    self._spaces[reservation] = space
                    raise
            if self._closing and not self._spaces:
                self._driver.close()
        except DriverError as error:
            size = reservation.size_bytes
            raise DeviceError(f"cannot release {format_bytes(size)} ({size} bytes) of addresses: {error}") from error

    def _unmap(self, space: _Space, keep: int) -> None:
        """Takes all pieces but the first `keep` out; their pages go to the pool.

        Pieces of which only the driver knows whether they are mapped are unmapped one at a time. Raises DriverError;
        those that were mapped for certain are then as before.
        """
        address = space.reservation.address
        while len(space.pieces) > max(keep, space.num_sure):
            piece = space.pieces[-1]
            try:
                self._driver.unmap(address + piece.offset, piece.size_bytes)
            except DriverError as error:
                if error.code_name != INVALID_VALUE:
                    raise
            space.pieces.pop()
            self._pool.give([piece.handle])
        while len(space.pieces) > keep:
            first, end = len(space.pieces) - 1, space.end
            while first > keep and space.pieces[first - 1].offset + space.pieces[first - 1].size_bytes == (
                space.pieces[first].offset
            ):
                first -= 1
            gone = space.pieces[first:]
            space.num_sure = first
            try:
                self._driver.unmap(address + gone[0].offset, end - gone[0].offset)
            except DriverError:
                space.num_sure = len(space.pieces)
                raise
            del space.pieces[first:]
            self._pool.give([piece.handle for piece in gone])

    def _reclaim(self) -> None:
        self._pool.reclaim({piece.handle for space in self._spaces.values() for piece in space.pieces})
        self._interrupted = False

    def _check(self, reservation: Reservation, first: int, end: int) -> None:
        assert reservation in self._spaces, "the reservation was released"
        assert 0 <= first <= end <= reservation.size_bytes, (first, end, reservation.size_bytes)
        assert first % self._granule_bytes == end % self._granule_bytes == 0, (first, end)
