"""The part of the budget that is kept for what operators outside captured graphs allocate."""

from __future__ import annotations

from collections.abc import Hashable

from mball.units import PAGE_BYTES, round_up

# What part of the budget is kept for operators whose tensors were never measured.
UNKNOWN_SHARE = 8
# What is measured is rounded up to this part of the budget, where that fits: a cache of keys and values grows with each
# token, and each new plan takes time and moves weights.
GROWTH_SHARE = 64

_Room = tuple[Hashable, bool]  # the kind of pass, and whether it runs graphs
# The budget, what is known, what of that had to do, and what more is wished for.
RoomState = tuple[int, dict[_Room, int], set[_Room], dict[_Room, int]]


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
        self._measured: dict[_Room, int] = {}
        self._settled: set[_Room] = set()  # what had to do, with nothing measured
        self._missed: dict[_Room, int] = {}  # what more is wished for, since an operator got no memory

    def set_budget(self, budget_bytes: int) -> None:
        """Says that there is another budget now. What was measured stays known."""
        self._budget_bytes = budget_bytes
        self._measured = {room: size for room, size in self._measured.items() if room not in self._settled}
        self._settled = set()
        self._missed = {}

    def state(self) -> RoomState:
        """Returns what `restore` takes."""
        return self._budget_bytes, dict(self._measured), set(self._settled), dict(self._missed)

    def restore(self, state: RoomState) -> None:
        """Goes back to the budget, and to what was known under it."""
        self._budget_bytes, self._measured, self._settled, self._missed = state

    @property
    def largest_bytes(self) -> int:
        """The most that any pass was measured to need that runs no graphs for all that is known; 0 before any."""
        found = (size for room, size in self._measured.items() if not room[1] and room not in self._settled)
        return max(found, default=0)

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
        """The same with room to grow into, and for what an operator did not get."""
        return round_up(self.needed_bytes + self.missed_bytes, max(self._budget_bytes // GROWTH_SHARE, 1))

    @property
    def missed_bytes(self) -> int:
        """What passes like the open one are wished to have beside that, since an operator got no memory."""
        return self._missed.get((self.kind, self.captured), 0)

    @missed_bytes.setter
    def missed_bytes(self, size_bytes: int) -> None:
        self._missed[self.kind, self.captured] = size_bytes

    def note_live(self, live_bytes: int) -> None:
        """Says that the operators of the open pass hold this much now."""
        if live_bytes > self.needed_bytes:
            self._settled.discard((self.kind, self.captured))
            self._measured[self.kind, self.captured] = _bucket(live_bytes)

    def note_peak(self, peak_bytes: int) -> None:
        """Says what the operators of a whole pass that ended well held at most."""
        self._settled.discard((self.kind, self.captured))
        known = self._measured.get((self.kind, self.captured), 0)
        self._measured[self.kind, self.captured] = now = max(known, _bucket(peak_bytes))
        if missed_bytes := self.missed_bytes:  # of which this is a part
            self.missed_bytes = max(missed_bytes - (now - known), 0)

    def settle_for(self, size_bytes: int) -> None:
        """Says that there is no more than this, and nobody knows what is needed: pass the error on when it is more."""
        assert not self.is_measured
        self._measured[self.kind, self.captured] = size_bytes
        self._settled.add((self.kind, self.captured))


def _bucket(size_bytes: int) -> int:
    """Rounds up so that small changes do not lead to new plans: to 1/8 of the power of two below, a page at least."""
    return round_up(size_bytes, max(PAGE_BYTES, 1 << max(size_bytes.bit_length() - 4, 0)))
