"""What capturing graphs costs: memory of the compiler, which shares the budget with the weights."""

from __future__ import annotations

from mball.memory.arena import Arena
from mball.memory.device import Gauge

# What capture takes is taken from the budget while it is no more than this part of it, else it comes on top.
LARGEST_SHARE = 1 / 4


class CaptureCost:
    """Measures what captures hold once they are over, and what they take besides while they are under way.

    Args:
        gauge: measures the device's memory; whatever else the process allocates during a capture counts too.
        arena: may be resized meanwhile; that is not capture's.

    Attributes:
        held_bytes: what captured graphs hold, the compiler's part included.
        passing_bytes: what capturing one graph took besides, at most: the next one may come at any time.
    """

    def __init__(self, gauge: Gauge, arena: Arena) -> None:
        self.held_bytes = 0
        self.passing_bytes = 0
        self._gauge = gauge
        self._arena = arena
        self._before: tuple[int, int] | None = None  # used without the arena, and the arena, when a capture began

    def begin(self) -> None:
        """Says that a capture begins now. Several in a row count as one."""
        if self._before is None:
            self._arena.populate()
            arena_bytes = self._arena.backed_bytes
            self._before = self._gauge.used_bytes() - arena_bytes, arena_bytes
            self._gauge.reset()

    def end(self) -> None:
        """Says that a graph was captured and what capturing it left behind was freed."""
        if self._before is None:
            return
        self._arena.populate()
        rise_bytes = self._gauge.rise_bytes()
        used_before, arena_before = self._before
        self._before = None
        arena_bytes = self._arena.backed_bytes
        held_bytes = max(self._gauge.used_bytes() - arena_bytes - used_before, 0)
        self.held_bytes += held_bytes
        grown_bytes = max(arena_bytes - arena_before, 0)
        self.passing_bytes = max(self.passing_bytes, rise_bytes - grown_bytes - held_bytes)

    def abandon(self) -> None:
        """Forgets a capture that led to no graph."""
        self._before = None

    def share_of(self, budget_bytes: int) -> int:
        """Returns the bytes of the budget that captures take: 0 when they are too much for it and come on top."""
        total = self.held_bytes + self.passing_bytes
        return total if total <= budget_bytes * LARGEST_SHARE else 0
