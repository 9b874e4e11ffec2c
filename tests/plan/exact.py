"""The optimum of a small pass, by trying everything: what the planner's plans are held against.

[Note: a lower bound]
A plan decides which weight stays over which gap between two of its uses, and where each lies. Here all choices of the
first kind are tried, and nothing has an address: bytes fit as long as their sum does. Each choice is timed by replaying
it step by step, every transfer as early as memory allows; so no plan with addresses over bundles of one weight is
faster, as long as it brings weights in the order in which they are needed. That order is an assumption: a plan that
fills a gap on the link with what is needed later might be faster, and would show as a gap below zero.

Nothing here uses the planner's own search or its timing. Exponential in the number of uses: for a dozen at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from mball.schema import Machine, Tensor, Trace

MOST_PASSES = 64
# Where passes go on differing, the mean of so many of the last.
MEAN_OF = 32
_SAME = 1e-11


@dataclass(frozen=True, slots=True)
class Stay:
    """A weight comes for step `first` of a pass and leaves before step `end`, which may lie in the pass after."""

    weight: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Replay:
    """How a choice goes in the steady state, or in the only pass.

    Attributes:
        stays: in the order in which they come.
        after: for each stay the step that must have been left before its transfer starts, counted from its pass.
        pass_s: how long a pass takes.
    """

    stays: tuple[Stay, ...]
    after: tuple[int, ...]
    pass_s: float


@dataclass(frozen=True, slots=True)
class Optimum:
    """The fastest choice.

    Attributes:
        pass_s: how long a pass takes.
        keep: for each gap, by weight and then by use, whether the weight stays over it.
        stays: what comes.
        residents: the weights that stay over all their gaps.
    """

    pass_s: float
    keep: tuple[bool, ...]
    stays: tuple[Stay, ...]
    residents: tuple[int, ...]


class Exact:
    """All choices for one pass.

    Args:
        trace: steps have measured times and write nothing.
        machine: requests do not share its link (`window_bytes` is 0).
    """

    def __init__(self, trace: Trace, machine: Machine) -> None:
        assert machine.link.window_bytes == 0, "requests that share the link are not replayed"
        self.uses: dict[int, list[int]] = {}
        self._compute_s: list[float] = []
        for number, step in enumerate(trace.steps):
            assert step.time_s is not None
            assert not step.writes
            self._compute_s.append(step.time_s)
            for weight in step.reads:
                self.uses.setdefault(weight, []).append(number)
        self.uses = dict(sorted(self.uses.items()))
        self._slot_bytes = {weight: slot_bytes(trace.tensors[weight], machine) for weight in self.uses}
        self._link_s = {
            weight: _read_bytes(trace.tensors[weight], machine.alignment_bytes) / machine.link.bandwidth_bytes_per_s
            for weight in self.uses
        }
        self._latency_s = machine.link.latency_s
        self._cyclic = trace.cyclic

    def optimum(self, arena_bytes: int) -> Optimum | None:
        """Returns the fastest choice, the first of equally fast ones; None if no choice fits."""
        best: Optimum | None = None
        for bound_s, keep, residents, stays in sorted(self._choices(), key=lambda choice: (choice[0], choice[1])):
            if best is not None and bound_s >= best.pass_s:
                break
            replay = self.replay(stays, arena_bytes - sum(self._slot_bytes[weight] for weight in residents))
            if replay is not None and (best is None or replay.pass_s < best.pass_s):
                best = Optimum(replay.pass_s, keep, replay.stays, residents)
        return best

    def _choices(self) -> Iterator[tuple[float, tuple[bool, ...], tuple[int, ...], list[Stay]]]:
        """Yields each choice with a time that it cannot beat: that of its steps, and that of its link."""
        options = []
        for steps in self.uses.values():
            # Nothing is left for a next pass where there is none.
            options += [(False, True)] * (len(steps) - 1) + [(False, True) if self._cyclic else (False,)]
        for keep in product(*options):
            residents, stays = self.stays(keep)
            link_s = sum(self._link_s[stay.weight] for stay in stays)
            yield max(sum(self._compute_s), link_s), keep, residents, stays

    def stays(self, keep: Sequence[bool]) -> tuple[tuple[int, ...], list[Stay]]:
        """Returns the residents and the stays of the others, for a choice for each gap."""
        residents: list[int] = []
        stays: list[Stay] = []
        count, at = len(self._compute_s), 0
        for weight, steps in self.uses.items():
            kept = keep[at : at + len(steps)]
            at += len(steps)
            if all(kept):
                residents.append(weight)
                continue
            for start in range(len(steps)):
                if kept[start - 1]:
                    continue
                last = start
                while kept[last % len(steps)]:
                    last += 1
                passes, within = divmod(last, len(steps))
                stays.append(Stay(weight, steps[start], steps[within] + passes * count + 1))
        return tuple(residents), stays

    def replay(self, stays: Sequence[Stay], pool_bytes: int) -> Replay | None:
        """Returns how these stays go through a pool of so many bytes, None if they do not fit."""
        if pool_bytes < 0:
            return None
        order = sorted(stays, key=lambda stay: (stay.first, stay.weight))
        count, num = len(self._compute_s), len(order)
        # What stays over the end of the pass is there already in the steady state.
        over = [stay for stay in order if stay.end > count]
        leaves: dict[int, int] = {}
        for stay in over:
            leaves[stay.end - count] = leaves.get(stay.end - count, 0) + self._slot_bytes[stay.weight]
        free = pool_bytes - sum(leaves.values())
        # One copy of a weight at a time: a stay begins once that of the pass before has ended.
        ends = {(-1, number): stay.end - count for number, stay in enumerate(order)}
        landed: dict[tuple[int, int], float] = {}
        issued_at: dict[tuple[int, int], int] = {}
        following, now, link = 0, 0.0, 0.0
        ended: list[float] = []
        states: list[tuple[float, ...]] = []
        for number in range(MOST_PASSES if self._cyclic else 1):
            for step in range(count):
                reached = number * count + step  # steps that have been left
                free += leaves.pop(reached, 0)
                while num and (self._cyclic or following < num):
                    key = divmod(following, num)
                    stay = order[key[1]]
                    size = self._slot_bytes[stay.weight]
                    if size > free or ends.get((key[0] - 1, key[1]), 0) > reached:
                        break
                    free -= size
                    ends[key] = key[0] * count + stay.end
                    leaves[ends[key]] = leaves.get(ends[key], 0) + size
                    link = max(link, now + self._latency_s) + self._link_s[stay.weight]
                    landed[key] = link
                    issued_at[key] = reached - 1 - key[0] * count
                    following += 1
                for other, stay in enumerate(order):
                    if stay.first == step:
                        if (number, other) not in landed:
                            return None
                        now = max(now, landed[number, other])
                now += self._compute_s[step]
            ended.append(now)
            begun = ended[-2] if number else 0.0
            ahead = [time - now for key, time in sorted(landed.items()) if key[0] > number]
            states.append((now - begun, max(link - now, 0.0), *ahead))
            if number and _alike(states[-2], states[-1]):
                break
        last = len(ended) - 1
        if not self._cyclic or len(ended) < MOST_PASSES:
            pass_s = states[last][0]
        else:
            pass_s = (ended[last] - ended[last - MEAN_OF]) / MEAN_OF
        return Replay(tuple(order), tuple(issued_at[last, other] for other in range(num)), pass_s)


def _alike(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return len(one) == len(other) and all(
        abs(a - b) <= _SAME * max(one[0], 1e-9) for a, b in zip(one, other, strict=True)
    )


def slot_bytes(weight: Tensor, machine: Machine) -> int:
    """Returns the bytes of whole pages that hold a weight together with what is read around it."""
    return -(-_read_bytes(weight, machine.alignment_bytes) // machine.page_bytes) * machine.page_bytes


def _read_bytes(weight: Tensor, alignment_bytes: int) -> int:
    assert weight.home is not None
    if not weight.size_bytes:
        return 0
    begin = weight.home.offset_bytes // alignment_bytes
    end = -(-(weight.home.offset_bytes + weight.size_bytes) // alignment_bytes)
    return (end - begin) * alignment_bytes
