"""A GPU's memory where it has no virtual memory: one allocation."""

from __future__ import annotations

import itertools
import logging

from mball.errors import DeviceError
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_errors import DriverError
from mball.memory.virtual import Reservation
from mball.units import MIB, format_bytes, round_up

_log = logging.getLogger(__name__)

# What an allocation is divided by, in the place of a granularity.
_PAGE_BYTES = 2 * MIB


class PlainCudaMemory:
    """A GPU without virtual memory: a reservation is one plain allocation, of one size until it is released."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._serials = itertools.count()
        self._live: set[Reservation] = set()
        self._closing = False
        _log.warning(
            "GPU %d has no virtual memory: what the arena may ever need is allocated at once, and a smaller budget "
            "gives none of it back",
            driver.ordinal,
        )

    @property
    def page_bytes(self) -> int:
        return _PAGE_BYTES

    def reserve(self, size_bytes: int) -> Reservation:
        if size_bytes <= 0:
            raise DeviceError(f"cannot allocate {size_bytes} bytes; ask for more than zero")
        size = round_up(size_bytes, _PAGE_BYTES)
        try:
            with self._driver.current():
                address = self._driver.allocate(size)
        except DriverError as error:
            raise DeviceError(f"cannot allocate {format_bytes(size)} ({size} bytes) at once: {error}") from error
        reservation = Reservation(address=address, size_bytes=size, serial=next(self._serials))
        self._live.add(reservation)
        return reservation

    def back(self, reservation: Reservation, first: int, end: int) -> None:
        self._check(reservation, first, end)

    def populate(self, reservation: Reservation, first: int, end: int) -> None:
        self._check(reservation, first, end)

    def trim(self, reservation: Reservation, first: int, end: int) -> None:
        self._check(reservation, first, end)

    def piece_end(self, reservation: Reservation, offset: int) -> int:
        self._check(reservation, offset, offset)
        return reservation.size_bytes

    def piece_start(self, reservation: Reservation, offset: int) -> int:
        self._check(reservation, offset, offset)
        return offset  # all of it is one piece, which stays

    def release(self, reservation: Reservation) -> None:
        if self._driver.is_forked:  # it belongs to the parent
            return
        try:
            self._live.remove(reservation)
        except KeyError:  # released before, and the address may belong to somebody else by now
            return
        try:
            with self._driver.current():
                self._driver.free(reservation.address)
        except DriverError as error:
            self._live.add(reservation)
            size = reservation.size_bytes
            raise DeviceError(f"cannot free {format_bytes(size)} ({size} bytes): {error}") from error
        if self._closing and not self._live:
            self._driver.close()

    def close(self) -> None:
        """Gives the driver's context up; every reservation was released before. Raises DeviceError."""
        assert not self._live, "release what is reserved first"
        self._driver.close()

    def close_after_use(self) -> None:
        """Closes when the last reservation is released: now, or when the last tensor dies that is left of an arena."""
        self._closing = True
        if not self._live:
            self.close()

    def _check(self, reservation: Reservation, first: int, end: int) -> None:
        assert reservation in self._live, "the reservation was released"
        assert 0 <= first <= end <= reservation.size_bytes, (first, end, reservation.size_bytes)
        assert first % _PAGE_BYTES == end % _PAGE_BYTES == 0, (first, end)
