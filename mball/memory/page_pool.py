"""Physical pages of a GPU that nobody uses now, kept for whoever needs some next."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import NamedTuple

from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_errors import OUT_OF_MEMORY, DriverError
from mball.units import MIB, format_bytes

_log = logging.getLogger(__name__)

# Enough for what an arena gives up and takes back as activations come and go.
POOL_BYTES = 256 * MIB


class Page(NamedTuple):
    """Physical pages that change owners: whoever has it may map them, hand them on or destroy them, and nobody else."""

    handle: int
    size_bytes: int


class PagePool:
    """Handles of physical pages, by size. Creating one takes the driver as long as many mappings, so they are kept.

    What is pooled is memory that nobody else can use: `pooled_bytes` belongs to somebody's budget, at most
    `limit_bytes`. Every call is made in the driver's context. Not thread-safe: the owner has a lock.
    Only the bytes may be asked for beside a call, of which they may show a part.
    """

    def __init__(self, driver: CudaDriver, *, limit_bytes: int = POOL_BYTES) -> None:
        self._driver = driver
        self._limit_bytes = limit_bytes
        self._sizes: dict[int, int] = {}  # of every handle that was created and not destroyed
        self._pooled: dict[int, list[int]] = {}  # by size, the last one given first

    @property
    def created_bytes(self) -> int:
        """Bytes of all pages that the driver has given out: pooled ones and lent ones."""
        return sum(self._sizes.values())

    @property
    def pooled_bytes(self) -> int:
        """Bytes of pages that nobody uses."""
        # A size stays once it is known, and the list of them is made in one go: others may come meanwhile.
        return sum(size * len(self._pooled[size]) for size in list(self._pooled))

    def take(self, sizes: Sequence[int]) -> list[int]:
        """Returns a handle for each size, pooled ones first. When memory runs out, pooled ones of other sizes go.

        Raises DriverError; none is taken then.
        """
        taken: list[int] = []
        try:
            for size_bytes in sizes:
                taken.append(self._take(size_bytes))
        except BaseException:
            self.give(taken)
            raise
        return taken

    def give(self, handles: Sequence[int]) -> None:
        """Takes back what was taken and is mapped nowhere. What is over the limit goes to the driver.

        Never fails: what the driver does not take stays pooled, is logged, and is tried again the next time.
        """
        for handle in handles:
            self._pooled.setdefault(self._sizes[handle], []).append(handle)
        try:
            self.trim(self._limit_bytes)
        except DriverError as error:
            _log.warning("%s are pooled, over the limit: %s", format_bytes(self.pooled_bytes), error)

    def trim(self, keep_bytes: int = 0) -> int:
        """Gives pooled pages to the driver until at most `keep_bytes` are left; returns how many bytes went.

        Raises DriverError; what it did not take stays pooled.
        """
        over_bytes = excess_bytes = max(self.pooled_bytes - keep_bytes, 0)
        for size_bytes in sorted(self._pooled, reverse=True):
            handles = self._pooled[size_bytes]
            while handles and over_bytes > 0:
                # Out of the books first: an interrupt may then lose a handle, but nobody is ever given a dead one.
                handle = handles.pop(0)
                del self._sizes[handle]
                try:
                    self._driver.destroy(handle)
                except DriverError:
                    self._sizes[handle] = size_bytes
                    handles.append(handle)
                    raise
                over_bytes -= size_bytes
        return excess_bytes - over_bytes

    def hand_over(self, num_bytes: int) -> list[Page]:
        """Returns pooled pages of at most `num_bytes` together, the largest first; they are the caller's then."""
        pages: list[Page] = []
        for size_bytes in sorted(self._pooled, reverse=True):
            handles = self._pooled[size_bytes]
            while handles and size_bytes <= num_bytes:
                handle = handles.pop()
                del self._sizes[handle]
                pages.append(Page(handle, size_bytes))
                num_bytes -= size_bytes
        return pages

    def adopt(self, pages: Sequence[Page]) -> None:
        """Takes over pages that are mapped nowhere; they are pooled, and what is over the limit goes to the driver."""
        assert not any(page.handle in self._sizes for page in pages), "a page has one owner"
        self._sizes.update({page.handle: page.size_bytes for page in pages})
        self.give([page.handle for page in pages])

    def disown(self, handles: Sequence[int]) -> None:
        """Forgets pages that were lent and are somebody else's now, such as a donor's that was taken. Idempotent."""
        for handle in handles:
            self._sizes.pop(handle, None)

    def reclaim(self, used: Collection[int]) -> None:
        """Takes back what was lent and is not in `used`: an interrupt came while it changed hands."""
        pooled = {handle for handles in self._pooled.values() for handle in handles}
        self.give([handle for handle in self._sizes if handle not in pooled and handle not in used])

    def _take(self, size_bytes: int) -> int:
        if handles := self._pooled.get(size_bytes):
            return handles.pop()
        try:
            handle = self._driver.create(size_bytes)
        except DriverError as error:
            if error.code_name != OUT_OF_MEMORY or not self.trim():
                raise
            handle = self._driver.create(size_bytes)
        self._sizes[handle] = size_bytes
        return handle
