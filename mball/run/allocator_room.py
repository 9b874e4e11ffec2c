"""Holds the allocator of a device to what plans leave it.

[Note: what an allocator keeps] An allocator takes more than tensors do: it rounds sizes up, and keeps blocks that lie
between others. Nobody knows how much before it was seen, and a pass must not fail for that. So the first pass under a
plan that knows all else runs without a cap, from an allocator that keeps nothing. What is held at its end is enough for
passes like it. Does the plan leave what is kept, they run under the cap from then on; else plans leave more, and if no
plan can, what is kept comes on top of the budget. On the CPU, whose allocator is the system's, nothing of this is seen.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable

from mball.memory import Device
from mball.memory.device import Held
from mball.run.step_graphs import StepGraphs
from mball.units import format_bytes

_log = logging.getLogger(__name__)

# What is kept beside tensors is taken from the budget while it is no more than this part of it, else it comes on top.
LARGEST_SHARE = 1 / 4
# So many kinds of passes are remembered.
MAX_KINDS = 64


class AllocatorRoom:
    """Caps passes of one engine; knows what the allocator keeps, but for what it keeps for recorded steps (`graphs`).

    Attributes:
        kept_bytes: what plans leave for what it keeps beside tensors.
    """

    def __init__(self, device: Device, graphs: StepGraphs | None = None) -> None:
        self._device = device
        self._graphs = graphs
        self._open_bytes = 0  # what could still be taken for them when the pass began
        self.kept_bytes = 0
        self._kept: OrderedDict[Hashable, int] = OrderedDict()  # beside tensors, in passes of each kind
        self._kind: Hashable = None
        self._left_bytes: int | None = None  # by the plan that is active
        self._planned_bytes = 0  # of that, for tensors
        self._is_affordable = True
        self._is_open = False
        self._stays_capped = False  # the open pass does
        self._was_capped = False
        self._said = False  # that it does not fit

    def share_of(self, budget_bytes: int) -> int:
        """Returns the bytes of the budget that are for what is kept: 0 when they are too much and come on top."""
        return self.kept_bytes if self.kept_bytes <= budget_bytes * LARGEST_SHARE else 0

    @property
    def was_capped(self) -> bool:
        """Whether the pass that is open is, or the last one was when it ended."""
        return self.is_capped if self._is_open else self._was_capped

    @property
    def left_bytes(self) -> int | None:
        """What the active plan leaves to the allocator; None before any."""
        return self._left_bytes

    @property
    def is_capped(self) -> bool:
        """Whether the passes of the active plan are capped."""
        if self._left_bytes is None or self._stays_capped:
            return self._stays_capped
        kept_bytes = self._kept.get(self._kind)
        return kept_bytes is not None and self._planned_bytes + kept_bytes <= self._left_bytes

    @property
    def _is_measuring(self) -> bool:
        return not self.is_capped and self._is_affordable

    def begin(self) -> None:
        """Says that a pass begins."""
        if self._is_measuring:
            self._device.make_room()
        self._device.follow()
        self._is_open = True
        self._open_bytes = 0 if self._graphs is None else self._graphs.open_bytes
        self._apply()

    def adopt(self, kind: Hashable, *, left_bytes: int, planned_bytes: int, is_affordable: bool) -> None:
        """Says that a plan is executed from now on.

        Args:
            kind: equal for passes whose allocations are alike.
            left_bytes: what it leaves beside the arena.
            planned_bytes: what of that is planned for tensors.
            is_affordable: whether that has room for what the allocator was seen to keep.
        """
        self._kind, self._left_bytes, self._planned_bytes = kind, left_bytes, planned_bytes
        self._is_affordable = is_affordable
        if self._is_open:
            if self._is_measuring:
                self._device.make_room()
            self._apply()
        else:  # another budget, which holds from now on
            self._device.make_room()
            self._device.cap(None)
        if not is_affordable and not self._said:
            self._said = True
            _log.warning(
                "the allocator keeps %s beside tensors, which does not fit the budget: it is on top",
                format_bytes(self.kept_bytes),
            )

    def hold(self) -> None:
        """Says that the open pass stays capped if it is, whatever plan comes: what finds no memory runs again."""
        self._stays_capped = self.is_capped

    def end(self, *, is_steady: bool) -> bool:
        """Says that the pass ended well; returns whether plans have to leave more than they do.

        `is_steady` says that it ran under one plan, which knew all else that it takes.
        """
        # After residents have yielded the peak is of a larger arena's time.
        tells_more = self._is_measuring
        held, pool_bytes = self.lift(), 0
        if self._graphs is not None:
            pool_bytes = self._graphs.pool_bytes
            is_steady &= self._graphs.open_bytes == self._open_bytes
        if not (is_steady and tells_more) or self._left_bytes is None:
            return False
        # Also what tensors took that nobody planned for.
        kept_bytes = max(held.kept_bytes - pool_bytes, 0) + max(held.tensor_bytes - self._planned_bytes, 0)
        more_bytes = self._planned_bytes + kept_bytes - self._left_bytes
        if more_bytes > 0:
            self.kept_bytes = max(self.kept_bytes, kept_bytes)
            return True
        self._kept[self._kind] = kept_bytes
        self._kept.move_to_end(self._kind)
        while len(self._kept) > MAX_KINDS:
            self._kept.popitem(last=False)
        return False

    def forget(self) -> None:
        """Says that what was measured does not hold any more: an allocation failed. It is measured anew."""
        self._kept.clear()

    def lift(self) -> Held:
        """Ends the cap, whatever became of the pass; returns what the allocator holds for it."""
        if self._is_open:
            self._was_capped = self.is_capped
        self._is_open = self._stays_capped = False
        return self._device.cap(None)

    def _apply(self) -> None:
        left_bytes = self._left_bytes if self.is_capped else None
        if left_bytes is not None and self._graphs is not None:
            left_bytes += self._graphs.open_bytes + self._graphs.pool_bytes
        self._device.cap(left_bytes)
