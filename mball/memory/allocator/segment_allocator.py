"""Gives PyTorch's caching allocator its memory, in segments that share an arena's pages, through the C library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from mball.errors import DeviceError
from mball.memory.allocator.records import (
    HISTORY,
    Entry,
    EntryRecord,
    Failure,
    FailureRecord,
    Offer,
    Segment,
    SegmentRecord,
    Statistics,
    StatisticsRecord,
)
from mball.memory.allocator.snapshot import torch_snapshot
from mball.memory.cuda_errors import DriverError, error_type, way_out
from mball.memory.page_pool import Page, PagePool
from mball.units import MIB, format_bytes

EXTENT_BYTES = 32 * MIB

_TAKEN = "MBALL_TAKEN"
# By code, as in segments.c: the name, and what it means.
_OWN = {
    -1: ("MBALL_NOT_OPEN", "the allocator is closed"),
    -2: ("MBALL_FORKED", "CUDA does not survive a fork: start processes with the method 'spawn'"),
    -3: ("MBALL_BUSY", "it is in use: free what is in it (torch.cuda.empty_cache, and the tensors), then ask again"),
    -4: ("MBALL_OVER_LIMIT", "more than the limit allows: raise it, or free something"),
    -5: ("MBALL_NO_HOST_MEMORY", "the host has no memory left"),
    -6: ("MBALL_NO_DRIVER", "install or update NVIDIA's driver"),
    -7: ("MBALL_INVALID", "an argument is wrong: sizes are multiples of the granularity, pages come once"),
    -8: (_TAKEN, "the donor was taken"),
    -9: ("MBALL_UNKNOWN", "there is no such thing, or not any more"),
}


class SegmentAllocator:
    """The segments of one GPU. There is one in a process: the library's state is the process's.

    `allocate` and `free` are what PyTorch calls through `pool()`, in C. All else is the engine's: it lends pages and
    takes pooled ones back, offers extents of the arena that may be taken when memory runs dry (donors), and reads what
    came of it. What is held never exceeds the limit, which moves with pages that change owners.

    Thread-safe. No call but `allocate` and `close` waits for the GPU, but each may wait for one of these. Nothing is
    done in a forked child: calls raise DeviceError there, or find nothing.
    """

    def __init__(
        self, library: ctypes.CDLL, ordinal: int = 0, *, limit_bytes: int, extent_bytes: int = EXTENT_BYTES
    ) -> None:
        """Serves GPU `ordinal` with at most `limit_bytes`; starts CUDA there, where nobody did.

        `library` comes from `load_library`. Extents are `extent_bytes`, rounded up to the granularity: as large as the
        arena's, so that pages fit both.

        Raises:
            DeviceError: no driver, no such GPU, no virtual memory there, or it is open already.
        """
        self._library = library
        self._ordinal = ordinal
        self._is_open = False
        self._pluggable: Any = None  # PyTorch knows it by its address only
        self._check("open", library.mball_open(ordinal, limit_bytes, extent_bytes), limit_bytes)
        self._is_open = True
        self._generation = ctypes.c_uint64.from_address(library.mball_generation(ordinal))

    @property
    def ordinal(self) -> int:
        """Which GPU."""
        return self._ordinal

    @property
    def generation(self) -> int:
        """How many donors were ever taken in this process. Read without a call: look at it before each pass."""
        return self._generation.value

    def allocate(self, size_bytes: int, stream: int = 0) -> int:
        """Returns the address of a new segment of at least `size_bytes`, as PyTorch would get it.

        Waits for work of streams where nothing else is left to do.

        Raises:
            DeviceError: the limit or the GPU's memory does not suffice, even with all donors. What was pooled, or taken
                from donors on the way, is pooled then.
        """
        address: int | None = self._library.mball_malloc(size_bytes, self._ordinal, stream)
        if address is None:
            failure = self.last_failure()
            raise self._error(f"allocate {format_bytes(size_bytes)} ({size_bytes} bytes)", failure)
        return address

    def free(self, address: int, stream: int = 0) -> None:
        """Frees a segment: its pages are pooled as soon as what `stream` was given until now is over."""
        self._library.mball_free(address, 0, self._ordinal, stream)

    def set_limit(self, limit_bytes: int) -> None:
        """Makes the limit `limit_bytes`; pooled pages over it go to the driver.

        Withdraw what is offered first: a donor that is taken raises the limit, and that would be undone.

        Raises:
            DeviceError: segments in use, or leaving, are larger; the limit is as before.
        """
        self._check("set the limit to", self._library.mball_set_limit(self._ordinal, limit_bytes), limit_bytes)

    def fit_limit(self, limit_bytes: int) -> int:
        """Makes the limit `limit_bytes`, or what segments take if that is more; returns what they take.

        Pooled pages over it go to the driver. Withdraw what is offered first, as before `set_limit`. Raises DeviceError
        when the driver does not take them; the limit is as before.
        """
        used = ctypes.c_size_t()
        code = self._library.mball_fit_limit(self._ordinal, limit_bytes, ctypes.byref(used))
        self._check("set the limit to", code, limit_bytes)
        return used.value

    def lend(self, pages: Sequence[Page]) -> None:
        """Takes over pages that are mapped nowhere, all of them, and may map, lend on and destroy them from now on.

        The limit rises by their size. Raises DeviceError; they are the caller's then.
        """
        handles = (ctypes.c_uint64 * len(pages))(*(page.handle for page in pages))
        sizes = (ctypes.c_size_t * len(pages))(*(page.size_bytes for page in pages))
        size_bytes = sum(page.size_bytes for page in pages)
        self._check("take over", self._library.mball_lend(self._ordinal, len(pages), handles, sizes), size_bytes)

    def take_back(self, num_bytes: int) -> list[Page]:
        """Returns pooled pages of at most `num_bytes` together, the largest first; they are the caller's from now on.

        The limit sinks by their size.
        """
        pages: list[Page] = []
        self._take_back(num_bytes, pages)
        return pages

    def lend_from(self, pool: PagePool, num_bytes: int) -> int:
        """Lends what `pool` has pooled, at most `num_bytes`; returns how many bytes changed owners.

        Made in the driver's context and under the lock of the pool's owner. Raises DeviceError; the pool has them then.
        """
        pages = pool.hand_over(num_bytes)
        try:
            self.lend(pages)
        except BaseException:  # an interrupt comes before the call or after it
            pool.adopt([page for page in pages if not self.owns(page.handle)])
            raise
        return sum(page.size_bytes for page in pages)

    def return_to(self, pool: PagePool, num_bytes: int) -> int:
        """Gives pooled pages to `pool`, at most `num_bytes`; returns how many bytes changed owners.

        Made in the driver's context and under the lock of the pool's owner.
        """
        pages: list[Page] = []
        try:
            self._take_back(num_bytes, pages)
        finally:
            pool.adopt(pages)
        return sum(page.size_bytes for page in pages)

    def owns(self, handle: int) -> bool:
        """Returns whether a handle's pages are held here. A donor's are once it is taken."""
        return bool(self._library.mball_owns(self._ordinal, handle))

    def offer(self, address: int, page: Page, event: int = 0, *, note: Offer | None = None) -> int:
        """Offers the extent that is mapped at `address`; returns the donor's number. Those offered first go first.

        It may be unmapped and used for segments from now on, on any thread, once `event` is over (0: at once); then the
        limit rises by its size. Until `withdraw`, the engine keeps the event as it is, has no work use the extent that
        is not before the event, and neither maps nor unmaps there.

        What became of it is in `note`, also where an interrupt comes. Raises DeviceError; nothing is offered then.
        """
        note = note or Offer()
        code = self._library.mball_offer(
            self._ordinal, address, page.size_bytes, page.handle, event, ctypes.byref(note)
        )
        self._check("offer", code, page.size_bytes)
        return int(note.number)

    def withdraw(self, donor: int, *, note: Offer | None = None) -> bool:
        """Ends an offer. Returns whether the extent is as it was; if not, its mapping and its page are gone.

        Raises DeviceError if there is no such offer.
        """
        code = self._library.mball_withdraw(self._ordinal, ctypes.byref(note or Offer(donor)))
        if code < 0 and _OWN[code][0] == _TAKEN:
            return False
        self._check("withdraw a donor", code)
        return True

    def taken(self) -> list[int]:
        """Returns the numbers of donors that were taken and are not withdrawn yet."""
        capacity = 0
        while True:
            numbers = (ctypes.c_uint64 * capacity)()
            count = self._library.mball_taken(self._ordinal, capacity, numbers)
            if count <= capacity:
                return list(numbers[:count])
            capacity = count

    def trim(self, num_bytes: int) -> int:
        """Gives pooled pages to the driver until `num_bytes` went or none is left; returns how many bytes went.

        The limit stays: what went may be taken anew. Raises DriverError; what the driver did not take stays pooled.
        """
        released = ctypes.c_size_t()
        code = self._library.mball_trim(self._ordinal, num_bytes, ctypes.byref(released))
        self._check("give back", code, num_bytes)
        return released.value

    def statistics(self) -> Statistics:
        """Returns what is held and what was done, of one moment. Raises DeviceError."""
        record = StatisticsRecord()
        self._check("tell", self._library.mball_statistics(self._ordinal, ctypes.byref(record)))
        return Statistics.read(record)

    def segments(self) -> list[Segment]:
        """Returns the segments that PyTorch has, and those that it freed and that are leaving."""
        capacity = 64
        while True:
            records = (SegmentRecord * capacity)()
            count = self._library.mball_list(self._ordinal, capacity, records)
            if count <= capacity:
                return [Segment.read(record) for record in records[:count]]
            capacity = 2 * count

    def history(self) -> list[Entry]:
        """Returns the last things that happened, at most 4096, the oldest first."""
        records = (EntryRecord * HISTORY)()
        count = self._library.mball_history(self._ordinal, HISTORY, records)
        return [Entry.read(record) for record in records[:count]]

    def last_failure(self) -> Failure:
        """Returns the last thing that went wrong on this GPU, even if there was a way around it; count 0: nothing."""
        record = FailureRecord()
        self._library.mball_failure(self._ordinal, ctypes.byref(record))
        return Failure.read(record)

    def snapshot(self) -> dict[str, Any]:
        """Returns segments and history in PyTorch's form: pickle it, and open it at pytorch.org/memory_viz."""
        now = self.statistics()
        return torch_snapshot(
            self._ordinal, self.segments(), self.history(), available_bytes=now.limit_bytes - now.in_use_bytes
        )

    def pool(self) -> Any:
        """Returns a `torch.cuda.MemPool` whose segments come from here: `with torch.cuda.use_mem_pool(pool): ...`.

        That routes the calling thread only: what backward allocates on its own threads comes from elsewhere. While it
        is in use PyTorch frees no cached blocks before it runs out of memory, and segments come back only when the pool
        is gone and `torch.cuda.empty_cache()` was called: let a pool go, and make another, to have its memory back.
        PyTorch's expandable segments do not go with such a pool; memory from it cannot be handed to other processes
        (CUDA IPC) or read by other GPUs.

        A graph that was captured into the pool goes after its last replay is over: see [Note: leaving] in segments.c.
        Close the allocator after the pool and its tensors are gone.

        Raises:
            DeviceError: this torch has no CUDA.
        """
        import torch

        if torch.version.cuda is None:
            raise DeviceError(
                f"torch {torch.__version__} was built without CUDA, so it has no torch.cuda.MemPool; install one with "
                "CUDA, or leave the allocator as it is"
            )
        if self._pluggable is None:
            self._pluggable = torch.cuda.memory.CUDAPluggableAllocator(
                self._library._name, "mball_malloc", "mball_free"
            )
        with torch.cuda.device(self._ordinal):
            return torch.cuda.MemPool(self._pluggable.allocator())

    def close(self) -> None:
        """Waits for what leaves, and gives all memory to the driver. Donors are the engine's again. Idempotent.

        Raises:
            DeviceError: segments are in use, or the driver refuses something; what could be given back was.
        """
        if self._is_open:
            self._check("close the allocator", self._library.mball_close(self._ordinal))
            self._is_open = False

    def _take_back(self, num_bytes: int, pages: list[Page]) -> None:
        """Appends what is taken to `pages`, also when an interrupt comes."""
        capacity = 256
        handles, sizes = (ctypes.c_uint64 * capacity)(), (ctypes.c_size_t * capacity)()
        count = ctypes.c_size_t(capacity)
        while count.value == capacity:
            left_bytes = num_bytes - sum(page.size_bytes for page in pages)
            count.value = 0
            try:
                code = self._library.mball_take_back(
                    self._ordinal, left_bytes, capacity, handles, sizes, ctypes.byref(count)
                )
                self._check("take back", code, num_bytes)
            finally:
                pages += [Page(handle, size) for handle, size in zip(handles[: count.value], sizes, strict=False)]

    def _check(self, what: str, code: int, size_bytes: int = 0) -> None:
        if not code:
            return
        asked = f" {format_bytes(size_bytes)} ({size_bytes} bytes)" if size_bytes else ""
        failure = self.last_failure()
        if failure.code != code:  # another thread's
            name = _OWN[code][0] if code < 0 else "unknown"
            failure = Failure(call="a call", name=name, code=code, size_bytes=0, count=0)
        raise self._error(f"{what}{asked}", failure)

    def _error(self, what: str, failure: Failure) -> DeviceError:
        said = f"cannot {what} on GPU {self._ordinal}: {failure.call or 'a call'} said {failure.name}"
        if failure.code in _OWN:
            return DeviceError(f"{said}, {_OWN[failure.code][1]}")
        kind: type[DriverError] = error_type(failure.name)
        return kind(f"{said} ({failure.code}); {way_out(failure.name)}", code_name=failure.name)
