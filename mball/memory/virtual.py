"""Virtual memory: addresses are reserved once, physical pages come and go beneath them."""

from __future__ import annotations

import errno
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mball.errors import DeviceError
from mball.memory import facts, libc
from mball.units import MIB, format_bytes, round_down, round_up

_log = logging.getLogger(__name__)

# One call cannot be interrupted, so pre-faulting goes in pieces of about 0.1 s.
_POPULATE_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A reserved address range. `serial` tells two reservations apart that got the same address in turn."""

    address: int
    size_bytes: int
    serial: int


class VirtualMemory(Protocol):
    """A device's address space and its physical pages.

    Ranges `[first, end)` are bytes relative to the reservation, multiples of `page_bytes`, inside it. What is backed of
    a reservation begins at its start: `back` goes on where that ends, `trim` takes from some point on all there is.
    Nothing here is ordered with compute: the caller has waited for everything that uses the range, on a device
    with streams for the event of the last work that does, never for the whole device.
    """

    @property
    def page_bytes(self) -> int:
        """The unit in which memory is backed and trimmed."""

    def reserve(self, size_bytes: int) -> Reservation:
        """Takes addresses for at least `size_bytes` (more than 0) and no memory. Does not block.

        Raises DeviceError when there is no such range.
        """

    def back(self, reservation: Reservation, first: int, end: int) -> None:
        """Puts pages (of undefined content) under a range that has none; the host may do so as they are first written.

        Raises DeviceError when there is not enough memory; part of the range may then be backed: trim it.
        """

    def populate(self, reservation: Reservation, first: int, end: int) -> None:
        """Blocks until all pages of a backed range are there. Others may write to it meanwhile.

        Raises DeviceError when there is not enough memory.
        """

    def trim(self, reservation: Reservation, first: int, end: int) -> None:
        """Gives the pages of a range back; their content is lost. Backed or not before. May block.

        A piece of memory that begins below `first` stays whole where it cannot be split: see `piece_end`.

        Raises DeviceError; all of the range that was backed is then backed still.
        """

    def piece_end(self, reservation: Reservation, offset: int) -> int:
        """Returns up to where memory stays taken when all from `offset` on is trimmed: `offset`, or a little more.

        `offset` is at most what is backed. Neither blocks nor raises.
        """

    def piece_start(self, reservation: Reservation, offset: int) -> int:
        """Returns up to where all must be trimmed for nothing from `offset` on to stay taken: `offset`, or less.

        `offset` where that would not help. Neither blocks nor raises.
        """

    def release(self, reservation: Reservation) -> None:
        """Gives up addresses and pages. Nothing may use them any more. Idempotent; may block.

        Raises DeviceError.
        """


class HostMemory:
    """Host memory: anonymous and private, in huge pages wherever all of a huge page is backed.

    A huge page of which only a part is wanted would still occupy all of its 2 MiB, so the ragged ends
    of a backed range use small pages, and the kernel is kept from merging them: what is resident is
    what was asked for, to the page.

    Pages come when they are first written. Whoever reads a file into them does that beside the compute; zeroing
    all of them first would keep both waiting.

    `headroom` says how many bytes may still be backed. It is asked first, because running out while
    pages are faulted in does not fail, it gets the process killed. It does not see what was granted and not
    written yet.
    """

    def __init__(self, *, headroom: Callable[[], int] = facts.headroom_bytes) -> None:
        self._headroom = headroom
        self._serials = itertools.count()
        self._live: set[Reservation] = set()
        self._told = False

    @property
    def page_bytes(self) -> int:
        return libc.PAGE_BYTES

    def reserve(self, size_bytes: int) -> Reservation:
        if size_bytes <= 0:
            raise DeviceError(f"cannot reserve {size_bytes} bytes of address space; ask for more than zero")
        size = round_up(size_bytes, libc.HUGE_PAGE_BYTES)
        flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE
        padded = size + libc.HUGE_PAGE_BYTES
        try:
            start = libc.map_memory(None, padded, flags)
        except (OSError, OverflowError) as error:
            raise DeviceError(
                f"cannot reserve {format_bytes(size)} ({size} bytes) of address space: {_cause(error)}; lower the "
                "budget, or raise `ulimit -v` or vm.overcommit_memory if one of them is the limit"
            ) from error
        address = round_up(start, libc.HUGE_PAGE_BYTES)
        for first, end in ((start, address), (address + size, start + padded)):
            if first < end:
                libc.unmap(first, end - first)
        reservation = Reservation(address=address, size_bytes=size, serial=next(self._serials))
        self._live.add(reservation)
        self._advise_page_size(address, size, libc.NOHUGEPAGE)
        return reservation

    def back(self, reservation: Reservation, first: int, end: int) -> None:
        self._check(reservation, first, end)
        headroom = self._headroom()
        if end - first > headroom:
            raise DeviceError(
                f"cannot back {format_bytes(end - first)} ({end - first} bytes) with host memory: "
                f"{format_bytes(headroom)} ({headroom} bytes) are free on this machine and within its cgroup limit; "
                "lower the budget or free memory"
            )
        whole_first, whole_end = round_up(first, libc.HUGE_PAGE_BYTES), round_down(end, libc.HUGE_PAGE_BYTES)
        if whole_first < whole_end:
            self._advise_page_size(reservation.address + whole_first, whole_end - whole_first, libc.HUGEPAGE)
        if first < end and not self._fault_in(reservation, first, first + libc.PAGE_BYTES):
            # Before Linux 5.14 only a write faults a page in, which is safe now that nobody else writes there.
            for begin in range(first, end, _POPULATE_BYTES):
                touch_pages(reservation.address + begin, min(_POPULATE_BYTES, end - begin))

    def populate(self, reservation: Reservation, first: int, end: int) -> None:
        self._check(reservation, first, end)
        self._fault_in(reservation, first, end)

    def _fault_in(self, reservation: Reservation, first: int, end: int) -> bool:
        """Faults pages in; returns False where this kernel cannot. Raises DeviceError."""
        for begin in range(first, end, _POPULATE_BYTES):
            size = min(_POPULATE_BYTES, end - begin)
            try:
                libc.advise(reservation.address + begin, size, libc.POPULATE_WRITE)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return False
                raise DeviceError(
                    f"cannot back {format_bytes(end - first)} ({end - first} bytes) with host memory, stopped after "
                    f"{begin - first} bytes: {_cause(error)}; lower the budget or free memory"
                ) from error
        return True

    def trim(self, reservation: Reservation, first: int, end: int) -> None:
        self._check(reservation, first, end)
        if first == end:
            return
        # A huge page that keeps only a part must not be put together again in the background.
        cut_first, cut_end = round_down(first, libc.HUGE_PAGE_BYTES), round_up(end, libc.HUGE_PAGE_BYTES)
        self._advise_page_size(reservation.address + cut_first, cut_end - cut_first, libc.NOHUGEPAGE)
        try:
            libc.advise(reservation.address + first, end - first, libc.DONTNEED)
        except OSError as error:
            raise DeviceError(
                f"cannot give back {format_bytes(end - first)} ({end - first} bytes) of host memory: {_cause(error)}; "
                "memory that was locked (mlock) cannot be given back: unlock it"
            ) from error

    def piece_end(self, reservation: Reservation, offset: int) -> int:
        self._check(reservation, offset, offset)
        return offset

    def piece_start(self, reservation: Reservation, offset: int) -> int:
        self._check(reservation, offset, offset)
        return offset

    def release(self, reservation: Reservation) -> None:
        try:
            self._live.remove(reservation)
        except KeyError:  # released before, and the address may belong to somebody else by now
            return
        try:
            libc.unmap(reservation.address, reservation.size_bytes)
        except OSError as error:
            raise DeviceError(
                f"cannot unmap {format_bytes(reservation.size_bytes)} ({reservation.size_bytes} bytes): "
                f"{_cause(error)}; raise vm.max_map_count if this process has very many mappings"
            ) from error

    def _check(self, reservation: Reservation, first: int, end: int) -> None:
        assert reservation in self._live, "the reservation was released"
        assert 0 <= first <= end <= reservation.size_bytes, (first, end, reservation.size_bytes)
        assert first % libc.PAGE_BYTES == end % libc.PAGE_BYTES == 0, (first, end)

    def _advise_page_size(self, address: int, size_bytes: int, advice: int) -> None:
        try:
            libc.advise(address, size_bytes, advice)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise DeviceError(
                    f"cannot choose the page size of {format_bytes(size_bytes)} ({size_bytes} bytes): {_cause(error)}; "
                    "raise vm.max_map_count if this process has very many mappings"
                ) from error
            if not self._told:  # a kernel without huge pages: slower reads, the same bytes
                self._told = True
                _log.warning("this kernel has no transparent huge pages; reads into the arena will be slower")


def touch_pages(address: int, size_bytes: int) -> None:
    """Faults in every page of the range by a write that keeps its content."""
    np.frombuffer(memoryview(libc.as_bytes(address, size_bytes)).cast("B"), dtype=np.uint8)[:: libc.PAGE_BYTES] |= 0


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror} (errno {error.errno}, {errno.errorcode.get(error.errno, '?')})"
    return str(error)
