"""Rounds: one burst of each contender in turn, so that whatever disturbs the machine disturbs all of them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from bench.speed.contender import Contender
from bench.speed.workload import Burst, Kind

# Returns the seconds of a step.
Sample = Callable[[], float]
Say = Callable[[str], None]
SEED = 20261


def interleave(sources: Mapping[str, Sample], num_rounds: int, say: Say, title: str) -> dict[str, list[float]]:
    """Returns the samples of each source; each round has an order of its own, so that none always follows the same.

    A disk that was idle reads faster for a while, and with two orders in turn its readers would share that unevenly.
    """
    order, generator = list(sources), random.Random(SEED)
    samples: dict[str, list[float]] = {name: [] for name in sources}
    for number in range(num_rounds):
        generator.shuffle(order)
        for name in order:
            samples[name].append(sources[name]())
        shown = ", ".join(f"{name} {samples[name][-1]:.3f}" for name in sources)
        say(f"{title}: round {number + 1} of {num_rounds}: {shown} s")
    return samples


def steps_of(contender: Contender, kind: Kind, burst: Burst, reports: list[dict[str, Any]] | None = None) -> Sample:
    """Returns a source: the mean step of a burst. mball's report after each burst is added to `reports`."""

    def sample() -> float:
        reply = contender.tell("burst", kind=kind.value, warm=burst.warm, timed=burst.timed)
        if reports is not None:
            reports.append(reply["report"])
        # The mean: a stall in one step of a burst counts.
        return float(statistics.mean(reply["steps_s"]))

    return sample


def reads_of(disk: Contender, name: str) -> Sample:
    """Returns a source: one bare read of the yardstick that was prepared under this name."""
    return lambda: float(disk.tell("read", name=name)["steps_s"][0])


def larger(samples: Mapping[str, list[float]], names: list[str]) -> str:
    """Returns which of the sources takes longer by its median."""
    return max(names, key=lambda name: statistics.median(samples[name]))


def smaller(samples: Mapping[str, list[float]], names: list[str]) -> str:
    """Returns which of the sources takes less time by its median."""
    return min(names, key=lambda name: statistics.median(samples[name]))
