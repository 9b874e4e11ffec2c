"""Measures by how much torch's memory of a GPU rises within a stretch of work."""

from __future__ import annotations

from collections.abc import Callable

import torch


class CudaGauge:
    """The mark of torch's allocator: what its tensors hold at most. Not what libraries take beside it.

    There is one mark a GPU: `reset` begins anew for whoever else reads it. The arena is none of torch's memory.
    """

    def __init__(self, ordinal: int, arena_bytes: Callable[[], int]) -> None:
        self._ordinal = ordinal
        self._arena_bytes = arena_bytes
        self._at_reset: int | None = None

    def reset(self) -> None:
        """Begins a measurement."""
        self._at_reset = None
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats(self._ordinal)
            self._at_reset = torch.cuda.memory_allocated(self._ordinal)

    def rise_bytes(self) -> int:
        """Returns the highest use since `reset` less the use at `reset`; 0 where torch has not begun to use the GPU."""
        if self._at_reset is None:
            return 0
        return max(torch.cuda.max_memory_allocated(self._ordinal) - self._at_reset, 0)

    def used_bytes(self) -> int:
        """Returns what torch's allocator has reserved, and the arena."""
        reserved_bytes = torch.cuda.memory_reserved(self._ordinal) if torch.cuda.is_initialized() else 0
        return reserved_bytes + self._arena_bytes()
