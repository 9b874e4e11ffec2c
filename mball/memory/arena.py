"""The arena: one address range on the device whose backed size follows the budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch

from mball.errors import DeviceError
from mball.memory.cuda_errors import GpuLostError
from mball.memory.region import Region
from mball.memory.virtual import Reservation, VirtualMemory
from mball.units import format_bytes, round_up

POISON_BYTE = 0xFF  # all bits set is NaN in every floating-point dtype, 8-bit ones included


_log = logging.getLogger(__name__)


def _release(memory: VirtualMemory, reservation: Reservation) -> None:
    try:
        memory.release(reservation)
    except DeviceError as error:
        if not isinstance(error.__cause__, GpuLostError):
            raise
        _log.warning("memory of a lost GPU is left to the end of the process: %s", error)


class Arena:
    """`[0, backed_bytes)` of a reserved address range is memory; resizing moves no byte.

    Offsets are bytes from the arena's start. Not thread-safe: one thread resizes. Tensors and views
    hold the addresses: they stay readable after `close`, and the memory goes when the last of them goes.
    """

    def __init__(self, memory: VirtualMemory, reserve_bytes: int, *, region: Callable[..., Region] = Region) -> None:
        """Reserves addresses for `reserve_bytes`; backs none. Raises DeviceError.

        `region` makes tensors on them: `Region` of the host's memory, `CudaRegion` of a GPU's.
        """
        self._memory = memory
        self._reservation = memory.reserve(reserve_bytes)
        release = partial(_release, memory, self._reservation)
        self._region = region(self._reservation.address, self._reservation.size_bytes, release, what="arena")
        self._backed_bytes = 0
        self._reach_bytes = 0  # pages may be there up to here: more than is backed if an interrupt came at a bad time
        self._populated_bytes = 0

    @property
    def backed_bytes(self) -> int:
        """Bytes of memory that may be used now."""
        return self._backed_bytes

    @property
    def reach_bytes(self) -> int:
        """Up to where there may be memory, of which what is above `backed_bytes` is to be given back by `resize`."""
        return max(self._reach_bytes, self._backed_bytes)

    @property
    def taken_bytes(self) -> int:
        """Bytes of memory that the arena occupies now: what is backed, and what cannot be split from it.

        More than `backed_bytes` after shrinking on a device whose memory comes in pieces, by less than a piece; and
        on one that cannot give memory back. 0 when closed.
        """
        return self.taken_bytes_at(self._backed_bytes)

    def taken_bytes_at(self, num_bytes: int) -> int:
        """Returns what `taken_bytes` would be after shrinking to `num_bytes`, to be held against a budget before."""
        assert num_bytes <= self._backed_bytes, (num_bytes, self._backed_bytes)
        if self.closed:
            return 0
        return self._memory.piece_end(self._reservation, round_up(num_bytes, self._memory.page_bytes))

    def bytes_of(self, num_bytes: int) -> int:
        """Returns the memory that an arena of `num_bytes` takes, in whole pages."""
        return round_up(num_bytes, self._memory.page_bytes)

    def cut_at(self, num_bytes: int) -> int:
        """Returns how far to shrink first, so that shrinking to `num_bytes` gives back all above: that, or less."""
        return self._memory.piece_start(self._reservation, self.bytes_of(num_bytes))

    @property
    def reserved_bytes(self) -> int:
        """How far the arena can grow."""
        return self._reservation.size_bytes

    @property
    def reservation(self) -> Reservation:
        """Its addresses, for whoever has a hand in its pages."""
        return self._reservation

    @property
    def address(self) -> int:
        """The address of offset 0; it never changes."""
        return self._reservation.address

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._region.closed

    def resize(self, num_bytes: int) -> None:
        """Grows or shrinks to `num_bytes`, rounded up to the page. On the host pages come when they are first written.

        Shrinking loses the content above the new size; nothing may use tensors there any more (on the host
        such a use would quietly take memory again), and what used them on a stream has been waited for, by its event.
        New memory has undefined content.

        Raises:
            DeviceError: closed, more than was reserved, or not enough memory; the size is then as before.
        """
        if self.closed:
            raise DeviceError(f"cannot resize a closed arena to {format_bytes(num_bytes)}; make a new one")
        size = round_up(num_bytes, self._memory.page_bytes)
        if not 0 <= size <= self.reserved_bytes:
            raise DeviceError(
                f"cannot resize the arena to {size} bytes: {self.reserved_bytes} bytes of addresses were reserved, "
                "since this machine has no more memory or limits addresses (ulimit -v, ulimit -d, "
                "vm.overcommit_memory=2): wrap the model with the largest budget that it will get"
            )
        before = self._backed_bytes
        if size < before or self._reach_bytes > before:
            self._reach_bytes = max(self._reach_bytes, before)
            # First, since Ctrl-C may come between any two lines: what is said to be there has to be there.
            self._backed_bytes = min(before, size)
            self._populated_bytes = min(self._populated_bytes, self._backed_bytes)
            try:
                self._memory.trim(self._reservation, self._backed_bytes, self._reach_bytes)
            except DeviceError:
                self._backed_bytes = before
                raise
            self._reach_bytes = self._backed_bytes
        if size > self._backed_bytes:
            self._reach_bytes = size
            try:
                self._memory.back(self._reservation, self._backed_bytes, size)
            except BaseException:
                self._memory.trim(self._reservation, self._backed_bytes, size)
                raise
            self._backed_bytes = size
        self._populated_bytes = min(self._populated_bytes, size)

    def lose(self, num_bytes: int) -> None:
        """Says that a page at `num_bytes` is gone. What is backed ends there; `resize` gives back what lies above."""
        self._reach_bytes = self.reach_bytes
        self._backed_bytes = min(self._backed_bytes, num_bytes)
        self._populated_bytes = min(self._populated_bytes, self._backed_bytes)

    def populate(self) -> None:
        """Blocks until all backed pages are there: then using the arena changes no measurement of memory.

        Raises DeviceError when there is not enough memory.
        """
        if self._populated_bytes < self._backed_bytes:
            self._memory.populate(self._reservation, self._populated_bytes, self._backed_bytes)
            self._populated_bytes = self._backed_bytes

    def address_of(self, offset: int, size: int) -> int:
        """Returns the address of `offset`, for the driver. Raises DeviceError if not all of the bytes are backed."""
        if offset < 0 or size < 0 or self.closed:
            raise DeviceError(f"bytes [{offset}, {offset + size}) are not in the arena, or it is closed")
        self._check_backed(offset, size)
        return self.address + offset

    def holds(self, tensor: torch.Tensor) -> bool:
        """Returns whether the tensor's memory is the arena's."""
        return 0 <= tensor.data_ptr() - self.address < self.reserved_bytes

    def view(self, offset: int, size: int) -> memoryview:
        """Returns `size` bytes from `offset`, writable, format "B". Raises DeviceError if not all are backed."""
        self._check_backed(offset, size)
        return self._region.view(offset, size)

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """Returns a contiguous tensor over the bytes from `offset`; see `Region.tensor`.

        Raises DeviceError if not all of its bytes are backed.
        """
        tensor = self._region.tensor(offset, dtype, shape)
        self._check_backed(offset, tensor.numel() * dtype.itemsize)
        return tensor

    def poison(self, offset: int, size: int) -> None:
        """Fills the range with bytes that read as NaN. Raises DeviceError if not all are backed."""
        self._check_backed(offset, size)
        self._region.fill(offset, size, POISON_BYTE)

    def close(self) -> None:
        """Gives the arena up; addresses and pages go once no tensor or view is left. Idempotent."""
        self._region.close()

    def _check_backed(self, offset: int, size: int) -> None:
        if offset + size > self._backed_bytes and not self.closed:
            raise DeviceError(
                f"bytes [{offset}, {offset + size}) of the arena are used, but only [0, {self._backed_bytes}) is "
                "backed; resize the arena first"
            )
