"""Holds torch's allocator of a GPU to what the budgets of the passes that run there leave it.

[Note: at the cap] When torch's allocator reaches it, it frees the blocks that it keeps and no tensor is in, tries
again, and then raises torch.OutOfMemoryError, as where the GPU is full. There is one cap a GPU and process, and it
binds whoever allocates; so it holds while a pass runs and no longer: what the caller does in between is the caller's.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field

import torch

from mball.memory.arena import Arena
from mball.memory.device import NO_DONORS, Donors, Held


@dataclass(slots=True)
class _Shared:
    """What all caps of a GPU share, under `_lock`: who has one, and the fraction that was there before."""

    before: float = 1.0
    allowed: dict[AllocatorCap, tuple[int, int]] = field(default_factory=dict)  # what was there before, and beside it


_lock = threading.Lock()
_gpus: dict[int, _Shared] = {}


class AllocatorCap:
    """The cap of one model's passes. Where several run at one time, what is left to each adds up."""

    def __init__(self, ordinal: int) -> None:
        self._ordinal = ordinal
        self._base_bytes = 0
        self._allocated_bytes = 0  # when the pass began

    def routed(self) -> contextlib.AbstractContextManager[None]:
        """Does nothing: torch's allocator is what is used anyway."""
        return contextlib.nullcontext()

    def donors(self, arena: Arena) -> Donors:
        """Returns nobody: torch's allocator knows nothing of the arena."""
        return NO_DONORS

    def make_room(self) -> None:
        """Has the allocator give back the blocks that no tensor is in, where there are any; its peak begins anew."""
        ordinal = self._ordinal
        if not torch.cuda.is_initialized():
            return
        torch.cuda.reset_peak_memory_stats(ordinal)
        if torch.cuda.memory_reserved(ordinal) > torch.cuda.memory_allocated(ordinal):
            with torch.cuda.device(ordinal):
                torch.cuda.empty_cache()

    def close(self) -> None:
        """Lifts the cap, which an interrupt may have left."""
        self.set(None)

    def begin(self) -> None:
        """Says that a pass begins: what tensors hold now, and what lies between them, is not the pass's."""
        self._base_bytes = unreleasable_bytes(self._ordinal)
        self._allocated_bytes = torch.cuda.memory_allocated(self._ordinal) if torch.cuda.is_initialized() else 0

    def set(self, left_bytes: int | None) -> Held:
        """Lets the allocator hold so much beside what it held when the pass began; None lifts the cap.

        Returns what it holds beside that now.
        """
        if not torch.cuda.is_initialized():
            return Held()
        with _lock:
            shared = _gpus.setdefault(self._ordinal, _Shared())
            if left_bytes is not None:
                if not shared.allowed:
                    shared.before = torch.cuda.get_per_process_memory_fraction(self._ordinal)
                # What passes that began before had then is no base of this one: it is theirs.
                base_bytes = min([self._base_bytes, *(base for base, _ in shared.allowed.values())])
                shared.allowed[self] = base_bytes, left_bytes
                _apply(self._ordinal, shared)
            elif self in shared.allowed:
                # Last of all: after an interrupt it is lifted again.
                others = {cap: allowed for cap, allowed in shared.allowed.items() if cap is not self}
                _apply(self._ordinal, _Shared(shared.before, others))
                shared.allowed = others
        taken_bytes = torch.cuda.max_memory_allocated(self._ordinal) - self._allocated_bytes
        return Held.of(torch.cuda.memory_reserved(self._ordinal) - self._base_bytes, taken_bytes)


def _apply(ordinal: int, shared: _Shared) -> None:
    fraction = shared.before
    if shared.allowed:
        allowed = shared.allowed.values()
        most_bytes = max(base_bytes for base_bytes, _ in allowed) + sum(left_bytes for _, left_bytes in allowed)
        total_bytes = torch.cuda.get_device_properties(ordinal).total_memory
        # Torch multiplies, and rounds down.
        fraction = min((most_bytes + 0.5) / total_bytes, fraction)
    torch.cuda.set_per_process_memory_fraction(fraction, ordinal)


def unreleasable_bytes(ordinal: int) -> int:
    """Returns what the allocator cannot give back now: what tensors are in, and free blocks beside them."""
    if not torch.cuda.is_initialized():
        return 0
    told = torch.cuda.memory_stats_as_nested_dict(ordinal)
    kinds = (told.get("active_bytes"), told.get("inactive_split_bytes"))
    return sum(int(kind["all"]["current"]) for kind in kinds if kind is not None)
