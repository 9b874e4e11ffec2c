"""Has torch allocate in segments that are made of the arena's pages, while passes run: `allocator="mball"`.

[Note: one budget] What compute allocates in a pass comes from a `SegmentAllocator`, whose limit is what the plan
leaves. Pages change owners with the limit: what a smaller arena gives up goes to the segments, and what they have
pooled to an arena that grows. Torch keeps segments that it once had, for the next pass; only a new pool gives them
back. What lies in segments when a pool is new, and what was allocated since and still lives when a pass begins, is the
caller's: it is beside what the plan leaves.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from mball.errors import DeviceError
from mball.memory.allocator.segment_allocator import SegmentAllocator
from mball.memory.arena import Arena
from mball.memory.cuda_cap import unreleasable_bytes
from mball.memory.cuda_donors import CudaDonors
from mball.memory.cuda_virtual import CudaMemory
from mball.memory.device import Donors, Held

_log = logging.getLogger(__name__)

# Those that could not be closed, since tensors of the caller's are in them, by GPU: the next model goes on with them.
_left: dict[int, SegmentAllocator] = {}
_serving: set[int] = set()


class TensorPool(Protocol):
    """What routes the allocations of tensors; torch's, or that of a device of the tests."""

    def enter(self) -> None:
        """Has this thread allocate in segments from now on."""

    def leave(self) -> None:
        """Ends that. Idempotent."""

    def renew(self) -> None:
        """Keeps no segment that no tensor is in; the peak begins anew. Not between `enter` and `leave`."""

    def begin(self) -> int:
        """Begins to measure; returns what tensors of the device take, and what between them cannot be given back."""

    def rise_bytes(self) -> int:
        """Returns how much more tensors took at most since `renew` than at `begin`."""


class TorchPool:
    """A `torch.cuda.MemPool`, exchanged for another when what it keeps shall go."""

    def __init__(self, segments: SegmentAllocator) -> None:
        self._segments = segments
        self._pool: Any = None
        self._entered: Any = None
        self._allocated_bytes = 0  # at `begin`

    def enter(self) -> None:
        if self._pool is None:
            self._pool = self._segments.pool()
        entering = torch.cuda.use_mem_pool(self._pool, device=self._segments.ordinal)
        entering.__enter__()
        self._entered = entering

    def leave(self) -> None:
        entered, self._entered = self._entered, None
        if entered is not None:
            entered.__exit__(None, None, None)

    def renew(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats(self._segments.ordinal)
        if self._pool is not None:
            self._pool = None
            with torch.cuda.device(self._segments.ordinal):
                torch.cuda.empty_cache()

    def begin(self) -> int:
        self._allocated_bytes = (
            torch.cuda.memory_allocated(self._segments.ordinal) if torch.cuda.is_initialized() else 0
        )
        return unreleasable_bytes(self._segments.ordinal)

    def rise_bytes(self) -> int:
        if not torch.cuda.is_initialized():
            return 0
        return torch.cuda.max_memory_allocated(self._segments.ordinal) - self._allocated_bytes


def open_segments(library: ctypes.CDLL, ordinal: int, extent_bytes: int) -> SegmentAllocator:
    """Returns the segments of GPU `ordinal`, with a limit of 0. Raises DeviceError, also if another model has them."""
    if ordinal in _serving:
        raise DeviceError(
            "allocator='mball' serves one model a GPU and process, and another has it on GPU "
            f"{ordinal}: mball.unwrap that one first, or leave it out"
        )
    found = _left.pop(ordinal, None)
    segments = found or SegmentAllocator(library, ordinal, limit_bytes=0, extent_bytes=extent_bytes)
    _serving.add(ordinal)
    return segments


class SegmentRoom:
    """The allocations of one model's passes. One thread at a time, as the device that has it."""

    def __init__(self, segments: SegmentAllocator, memory: CudaMemory, pool: TensorPool, most_bytes: int) -> None:
        """Takes segments and pool over; `memory` has the arena, and `most_bytes` are all that the GPU has."""
        self._segments = segments
        self._memory = memory
        self._pool = pool
        self._most_bytes = most_bytes
        self._before_bytes = 0  # in segments when the pool was new
        self._taken_bytes = 0  # by all tensors of the device then
        self._base_bytes = 0  # what is not the open pass's
        self._left_bytes: int | None = None
        self._is_routed = False
        self._closed = False

    @contextlib.contextmanager
    def routed(self) -> Iterator[None]:
        """What this thread allocates within is in segments."""
        try:
            self._is_routed = True
            self._limit()
            self._pool.enter()
            yield
        finally:
            self._is_routed = False
            self._pool.leave()

    def donors(self, arena: Arena) -> Donors:
        """Returns what takes idle extents of `arena` for segments; nothing is on offer while anything else is called.

        Only so is the limit, which a donor that is taken raises, nobody else's to set.
        """
        return CudaDonors(self._segments, self._memory, arena)

    def begin(self) -> None:
        """Says that a pass begins: what lives now is not the pass's."""
        self._base_bytes = self._before_bytes + max(self._pool.begin() - self._taken_bytes, 0)

    def make_room(self) -> None:
        """Gives the arena's memory what segments do not need."""
        self._pool.leave()
        self._pool.renew()
        self._before_bytes, self._taken_bytes = self._used_bytes, self._pool.begin()
        self._base_bytes = min(self._base_bytes, self._before_bytes)
        if self._is_routed:
            self._pool.enter()
        self._memory.take_from(self._segments)

    def set(self, left_bytes: int | None) -> Held:
        """Lets a pass have so much in segments, None: all there is; between passes what is pooled goes to the driver.

        Returns what is in segments that are not the caller's.
        """
        if self._closed:
            return Held()
        self._memory.give_to(self._segments)
        self._left_bytes = left_bytes
        return Held.of(self._limit() - self._base_bytes, self._pool.rise_bytes())

    def _limit(self) -> int:
        if self._left_bytes is not None:
            return self._segments.fit_limit(self._base_bytes + self._left_bytes)
        return self._segments.fit_limit(self._most_bytes if self._is_routed else 0)

    def close(self) -> None:
        """Gives all back that no tensor is in. Raises DeviceError when the driver refuses something. Idempotent."""
        if self._closed:
            return
        self._pool.leave()
        self._pool.renew()
        if self._segments.statistics().num_segments:
            self._segments.set_limit(self._used_bytes)
            _left[self._segments.ordinal] = self._segments
            _log.info("tensors of the caller's are in %d bytes of segments, which stay with them", self._used_bytes)
        else:
            self._segments.close()
        self._closed = True
        _serving.discard(self._segments.ordinal)

    @property
    def _used_bytes(self) -> int:
        now = self._segments.statistics()
        return now.in_use_bytes + now.leaving_bytes
