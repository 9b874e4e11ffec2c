"""The part of the budget that is kept for what operators outside captured graphs allocate."""

from __future__ import annotations

from collections.abc import Hashable

from mball.run.homes import PAGE_BYTES
from mball.units import round_up

# What part of the budget is kept for operators whose tensors were never measured.
UNKNOWN_SHARE = 8
# What is measured is rounded up to this part of the budget, where that fits: a cache of keys and values grows with each
# token, and each new plan takes time and moves weights.
GROWTH_SHARE = 64


class OperatorRoom:
    """What operators were seen to need, for each kind of pass: a prompt takes other room than the tokens after it.

    Args:
        budget_bytes: the budget; see `set_budget`.

    Attributes:
        kind: of the open pass.
        captured: whether the open pass runs graphs that account for themselves.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.kind: Hashable = None
        self.captured = False
        self._budget_bytes = budget_bytes
        self._measured: dict[tuple[Hashable, bool], int] = {}
        self._settled: set[tuple[Hashable, bool]] = set()  # what had to do, with nothing measured

    def set_budget(self, budget_bytes: int) -> None:
        """Says that there is another budget now. What was measured stays known."""
        self._budget_bytes = budget_bytes
        for room in self._settled:
            self._measured.pop(room, None)
        self._settled.clear()

    def begin_pass(self, kind: Hashable) -> None:
        """Says that a pass of this kind begins, without graphs for all that is known."""
        self.kind, self.captured = kind, False

    @property
    def is_measured(self) -> bool:
        """Whether a pass like the open one was measured."""
        return (self.kind, self.captured) in self._measured

    @property
    def needed_bytes(self) -> int:
        """What a plan of the open pass has to keep: what was measured, else what is likely."""
        if self.is_measured:
            return self._measured[self.kind, self.captured]
        alike = (size for (_, captured), size in self._measured.items() if captured == self.captured)
        return max(alike, default=self._budget_bytes // UNKNOWN_SHARE)

    @property
    def wished_bytes(self) -> int:
        """The same with room to grow into."""
        return round_up(self.needed_bytes, max(self._budget_bytes // GROWTH_SHARE, 1))

    def note_live(self, live_bytes: int) -> None:
        """Says that the operators of the open pass hold this much now."""
        if live_bytes > self.needed_bytes:
            self._settled.discard((self.kind, self.captured))
            self._measured[self.kind, self.captured] = _bucket(live_bytes)

    def note_peak(self, peak_bytes: int) -> None:
        """Says what the operators of a whole pass held at most."""
        known = self._measured.get((self.kind, self.captured), 0)
        self._measured[self.kind, self.captured] = max(known, _bucket(peak_bytes))

    def settle_for(self, size_bytes: int) -> None:
        """Says that there is no more than this, and nobody knows what is needed: pass the error on when it is more."""
        assert not self.is_measured
        self._measured[self.kind, self.captured] = size_bytes
        self._settled.add((self.kind, self.captured))


def _bucket(size_bytes: int) -> int:
    """Rounds up so that small changes do not lead to new plans: to 1/8 of the power of two below, a page at least."""
    return round_up(size_bytes, max(PAGE_BYTES, 1 << max(size_bytes.bit_length() - 4, 0)))
