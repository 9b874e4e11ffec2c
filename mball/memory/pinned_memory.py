"""Host memory below a GPU as the memory of an arena: one slab, pinned in the background as the arena grows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from mball.errors import DeviceError
from mball.memory import facts
from mball.memory.cuda_streams import CudaStreams
from mball.memory.libc import PAGE_BYTES
from mball.memory.pinned import CHUNK_BYTES, PinnedSlab
from mball.memory.virtual import Reservation


class PinnedMemory:
    """A reservation is a `PinnedSlab`. What was backed stays until the end: pinning is too slow to go to and fro."""

    def __init__(
        self,
        streams: CudaStreams,
        *,
        node: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        headroom: Callable[[], int] = facts.headroom_bytes,
    ) -> None:
        self._streams = streams
        self._node = node
        self._chunk_bytes = chunk_bytes
        self._headroom = headroom
        self._serials = itertools.count()
        self._slabs: dict[Reservation, PinnedSlab] = {}

    @property
    def page_bytes(self) -> int:
        return PAGE_BYTES

    @property
    def pinned_bytes(self) -> int:
        """What is pinned by now."""
        return sum(slab.pinned_bytes for slab in self._slabs.values())

    def reserve(self, size_bytes: int) -> Reservation:
        """Raises DeviceError also where the machine or the control group has not so much memory left."""
        if size_bytes <= 0:
            raise DeviceError(f"cannot reserve {size_bytes} bytes; ask for more than zero")
        slab = PinnedSlab(
            self._streams, size_bytes, node=self._node, chunk_bytes=self._chunk_bytes, headroom=self._headroom
        )
        reservation = Reservation(address=slab.address, size_bytes=slab.size_bytes, serial=next(self._serials))
        self._slabs[reservation] = slab
        return reservation

    def back(self, reservation: Reservation, first: int, end: int) -> None:
        """Pins in the background: pages come as they are written, and copies of what is not pinned yet are slower."""
        self._slabs[reservation].start(end)

    def populate(self, reservation: Reservation, first: int, end: int) -> None:
        self._slabs[reservation].finish()

    def trim(self, reservation: Reservation, first: int, end: int) -> None:
        """Does nothing."""

    def piece_end(self, reservation: Reservation, offset: int) -> int:
        return offset

    def piece_start(self, reservation: Reservation, offset: int) -> int:
        return offset

    def spans(self, address: int, size: int) -> Iterator[tuple[int, int]]:
        """Yields `size` bytes from `address`, which are in one reservation, as copies; see `PinnedSlab.spans`."""
        slab = next(slab for slab in self._slabs.values() if 0 <= address - slab.address < slab.size_bytes)
        return slab.spans(address - slab.address, size)

    def unpin(self) -> None:
        """Unpins all for good, whoever still has a view of it. Copies out of it are over. Raises DeviceError."""
        for slab in self._slabs.values():
            slab.unpin()

    def release(self, reservation: Reservation) -> None:
        slab = self._slabs.get(reservation)
        if slab is not None:
            slab.close()
            del self._slabs[reservation]
