"""Corrects what plans take the link and the compute to be, by what passes really took."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto
from statistics import median

from mball.schema import Machine, Prediction

logger = logging.getLogger(__name__)

# A plan is made anew when the median of so many steady passes was off by more than this part of what was predicted.
# After each time twice as many passes are looked at: a disk whose speed drifts must not have plans take turns.
FIRST_PASSES, MOST_PASSES = 5, 320
LARGEST_ERROR = 0.15
# What is known now has to differ by this much, or the new plan would be the old one.
WORTHWHILE = 0.05
# A plan that stays is timed anew where the last passes were off by this much.
LARGEST_DRIFT = 0.03
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


class Verdict(Enum):
    """What follows from a pass."""

    AS_PREDICTED = auto()
    ANOTHER_TIME = auto()  # the plan stays, and should be timed anew
    ANOTHER_PLAN = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the last passes tell of the machine.

    Attributes:
        bandwidth_bytes_per_s: of its link.
        longer: how many times longer compute takes than the plan says.
    """

    bandwidth_bytes_per_s: float
    longer: float

    def differs(self, other: Seen, by: float) -> bool:
        """Returns whether either figure is off by more than this part."""
        return (
            abs(self.bandwidth_bytes_per_s / other.bandwidth_bytes_per_s - 1) >= by
            or abs(self.longer / other.longer - 1) >= by
        )


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
        self._seen: Seen | None = None  # lately, under the plan that is executed now
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
        self._seen = None
        self._is_first = True

    def lately(self) -> tuple[Machine, float]:
        """Returns the machine as the last passes show it, and how many times longer compute takes than the plan says.

        Plans are not made for it: they would follow each whim of a disk.
        """
        machine = self()
        if self._seen is None:
            return machine, 1.0
        link = replace(machine.link, bandwidth_bytes_per_s=self._seen.bandwidth_bytes_per_s)
        return replace(machine, link=link), self._seen.longer

    def note(
        self, keys: tuple[Hashable, ...], prediction: Prediction, expected_s: float, measured: Measured
    ) -> Verdict:
        """Takes note of a pass that went as planned; returns what follows from it.

        Args:
            keys: of its segments.
            prediction: of its plan, when it was made.
            expected_s: what it was predicted to take lately; see `lately`.
            measured: what it took.
        """
        if self._is_first:
            self._is_first = False
            return Verdict.AS_PREDICTED
        if max(prediction.pass_s, measured.wall_s) < SHORTEST_PASS_S:
            return Verdict.AS_PREDICTED
        self._lately.append(measured)
        if len(self._lately) % FIRST_PASSES:
            return Verdict.AS_PREDICTED
        last = self._lately[-FIRST_PASSES:]
        if len(self._lately) >= self._patience:
            passes, self._lately = self._lately, []
            if self._is_wrong(keys, prediction, passes):
                return Verdict.ANOTHER_PLAN
        if abs(median(each.wall_s for each in last) - expected_s) <= LARGEST_DRIFT * expected_s:
            return Verdict.AS_PREDICTED
        seen = self._seen_in(prediction, last)
        if not seen.differs(self._seen or self._planned, LARGEST_DRIFT):
            return Verdict.AS_PREDICTED
        self._seen = seen
        return Verdict.ANOTHER_TIME

    def _is_wrong(self, keys: tuple[Hashable, ...], prediction: Prediction, passes: list[Measured]) -> bool:
        """Returns whether plans should be made for other figures than these, which are then known."""
        wall_s = median(each.wall_s for each in passes)
        if abs(wall_s - prediction.pass_s) <= LARGEST_ERROR * prediction.pass_s:
            return False
        seen, before = self._seen_in(prediction, passes), self._planned
        if not seen.differs(before, WORTHWHILE):
            return False
        self._bandwidth = self._machine(), seen.bandwidth_bytes_per_s
        self._slower[keys] = self.slower(keys) * seen.longer
        self._patience = min(2 * self._patience, MOST_PASSES)
        logger.info(
            "passes take %.0f ms instead of the predicted %.0f ms: planning anew with a link of %.2f GB/s instead of "
            "%.2f, and %.2f times the time of compute",
            wall_s * 1e3,
            prediction.pass_s * 1e3,
            seen.bandwidth_bytes_per_s / 1e9,
            before.bandwidth_bytes_per_s / 1e9,
            seen.longer,
        )
        return True

    @property
    def _planned(self) -> Seen:
        """What plans are made for."""
        return Seen(bandwidth_bytes_per_s=self().link.bandwidth_bytes_per_s, longer=1.0)

    def _seen_in(self, prediction: Prediction, passes: list[Measured]) -> Seen:
        bandwidth = self._planned.bandwidth_bytes_per_s
        # Where nothing waits for reads they come one by one, and how fast the link could be does not show.
        waiting = [each for each in passes if each.wall_s - each.compute_s > LEAST_STALL * each.wall_s]
        if speeds := [each.read_bytes / each.busy_s for each in waiting if each.read_bytes and each.busy_s > 0]:
            bandwidth = median(speeds)
        longer = median(each.compute_s for each in passes) / prediction.compute_s if prediction.compute_s else 1.0
        return Seen(bandwidth_bytes_per_s=bandwidth, longer=longer)


def busy_s(times: Iterable[tuple[float, float]]) -> float:
    """Returns how long at least one of these (from, to) lasted."""
    total, until = 0.0, float("-inf")
    for began_s, ended_s in sorted(times):
        total += max(ended_s - max(began_s, until), 0.0)
        until = max(until, ended_s)
    return total
