"""Corrects what plans take the link and the compute to be, by what passes really took."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, replace
from statistics import median

from mball.schema import Machine, Prediction

logger = logging.getLogger(__name__)

# A plan is made anew when the median of so many steady passes was off by more than this part of what was predicted.
# After each time twice as many passes are looked at: a disk whose speed drifts must not have plans take turns.
FIRST_PASSES, MOST_PASSES = 5, 320
LARGEST_ERROR = 0.15
# What is known now has to differ by this much, or the new plan would be the old one.
WORTHWHILE = 0.05
# A pass that waits less does not show how fast the link is.
LEAST_STALL = 0.1
# In shorter passes what takes time is neither the link nor the compute.
SHORTEST_PASS_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A steady pass.

    Attributes:
        wall_s: from its begin to its end.
        compute_s: of that, without waits for reads.
        read_bytes: what its reads brought.
        busy_s: how long at least one of them was under way.
    """

    wall_s: float
    compute_s: float
    read_bytes: int
    busy_s: float


class Correction:
    """The machine with the link as it was lately, and how much longer compute takes than steps were measured to take.

    Args:
        machine: as it was measured before anything ran.
    """

    def __init__(self, machine: Callable[[], Machine]) -> None:
        self._machine = machine
        self._bandwidth: tuple[Machine, float] | None = None  # what it corrects, and to what
        self._slower: dict[tuple[Hashable, ...], float] = {}
        self._lately: list[Measured] = []
        self._is_first = True
        self._patience = FIRST_PASSES

    def __call__(self) -> Machine:
        """Returns the machine to plan for."""
        machine = self._machine()
        # A machine that was measured anew since needs no correction.
        if self._bandwidth is None or self._bandwidth[0] != machine:
            return machine
        return replace(machine, link=replace(machine.link, bandwidth_bytes_per_s=self._bandwidth[1]))

    def slower(self, keys: tuple[Hashable, ...]) -> float:
        """Returns how many times longer than measured the steps of a pass of these segments take."""
        return self._slower.get(keys, 1.0)

    def forget(self, keys: Collection[Hashable]) -> None:
        """Says that steps of these segments were measured anew."""
        for tape in [tape for tape in self._slower if not set(tape).isdisjoint(keys)]:
            del self._slower[tape]

    def adopted(self) -> None:
        """Says that another plan is executed now; its first pass brings the residents."""
        self._lately.clear()
        self._is_first = True

    def note(self, keys: tuple[Hashable, ...], prediction: Prediction, measured: Measured) -> bool:
        """Takes note of a pass that went as planned; returns whether plans should be made anew.

        Args:
            keys: of its segments.
            prediction: of its plan.
            measured: what it took.
        """
        if self._is_first:
            self._is_first = False
            return False
        if max(prediction.pass_s, measured.wall_s) < SHORTEST_PASS_S:
            return False
        self._lately.append(measured)
        if len(self._lately) < self._patience:
            return False
        lately, self._lately = self._lately, []
        wall_s = median(each.wall_s for each in lately)
        if abs(wall_s - prediction.pass_s) <= LARGEST_ERROR * prediction.pass_s:
            return False
        bandwidth = now = self().link.bandwidth_bytes_per_s
        # Where nothing waits for reads they come one by one, and how fast the link could be does not show.
        waiting = [each for each in lately if each.wall_s - each.compute_s > LEAST_STALL * each.wall_s]
        if speeds := [each.read_bytes / each.busy_s for each in waiting if each.read_bytes and each.busy_s > 0]:
            bandwidth = median(speeds)
        longer = median(each.compute_s for each in lately) / prediction.compute_s if prediction.compute_s else 1.0
        if abs(bandwidth / now - 1) < WORTHWHILE and abs(longer - 1) < WORTHWHILE:
            return False
        self._bandwidth = self._machine(), bandwidth
        self._slower[keys] = self.slower(keys) * longer
        self._patience = min(2 * self._patience, MOST_PASSES)
        logger.info(
            "passes take %.0f ms instead of the predicted %.0f ms: planning anew with a link of %.2f GB/s instead of "
            "%.2f, and %.2f times the time of compute",
            wall_s * 1e3,
            prediction.pass_s * 1e3,
            bandwidth / 1e9,
            now / 1e9,
            longer,
        )
        return True


def busy_s(times: Iterable[tuple[float, float]]) -> float:
    """Returns how long at least one of these (from, to) lasted."""
    total, until = 0.0, float("-inf")
    for began_s, ended_s in sorted(times):
        total += max(ended_s - max(began_s, until), 0.0)
        until = max(until, ended_s)
    return total
