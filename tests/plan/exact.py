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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from mball.schema import Machine, Tensor, Trace

MOST_PASSES = 64
# Where passes go on differing, the mean of so many of the last.
MEAN_OF = 32
_SAME = 1e-11
_WORTHWHILE = 1e-7


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
        is_steady: whether passes become alike. Some alternate for ever; then `pass_s` is the mean.
    """

    stays: tuple[Stay, ...]
    after: tuple[int, ...]
    pass_s: float
    is_steady: bool


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


@dataclass(frozen=True, slots=True)
class Placed:
    """The fastest plan with addresses.

    Attributes:
        pass_s: how long a pass takes; the time that was asked to be beaten where nothing is faster.
        replay: what comes when; None where nothing is faster.
        offsets_bytes: where each stay lies beside the residents.
        residents: the weights that stay over all their gaps.
        is_complete: whether everything was tried.
    """

    pass_s: float
    replay: Replay | None
    offsets_bytes: tuple[int, ...]
    residents: tuple[int, ...]
    is_complete: bool


class Exact:
    """All choices for one pass.

    Args:
        trace: steps have measured times, write nothing and read whole weights.
        machine: requests do not share its link (`window_bytes` is 0).
    """

    def __init__(self, trace: Trace, machine: Machine) -> None:
        assert machine.link.window_bytes == 0, "requests that share the link are not replayed"
        self.uses: dict[int, list[int]] = {}
        self._compute_s: list[float] = []
        for number, step in enumerate(trace.steps):
            assert step.time_s is not None
            assert not step.writes
            assert not step.gathers
            self._compute_s.append(step.time_s)
            for weight in step.reads:
                self.uses.setdefault(weight, []).append(number)
        self.uses = dict(sorted(self.uses.items()))
        self.slot_bytes = {weight: slot_bytes(trace.tensors[weight], machine) for weight in self.uses}
        self._link_s = {
            weight: _read_bytes(trace.tensors[weight], machine.alignment_bytes) / machine.link.bandwidth_bytes_per_s
            for weight in self.uses
        }
        self._latency_s = machine.link.latency_s
        self.cyclic = trace.cyclic

    def optimum(self, arena_bytes: int) -> Optimum | None:
        """Returns the fastest choice, the first of equally fast ones; None if no choice fits."""
        best: Optimum | None = None
        for bound_s, keep, residents, stays in sorted(self._choices(), key=lambda choice: (choice[0], choice[1])):
            if best is not None and bound_s >= best.pass_s:
                break
            replay = self.replay(stays, arena_bytes - sum(self.slot_bytes[weight] for weight in residents))
            if replay is not None and (best is None or replay.pass_s < best.pass_s):
                best = Optimum(replay.pass_s, keep, replay.stays, residents)
        return best

    def _choices(self) -> Iterator[tuple[float, tuple[bool, ...], tuple[int, ...], list[Stay]]]:
        """Yields each choice with a time that it cannot beat: that of its steps, and that of its link."""
        options = []
        for steps in self.uses.values():
            # Nothing is left for a next pass where there is none.
            options += [(False, True)] * (len(steps) - 1) + [(False, True) if self.cyclic else (False,)]
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

    def placed(self, arena_bytes: int, below_s: float, most_nodes: int) -> Placed:
        """Looks for a plan with addresses that is faster than `below_s`.

        Choices of what stays are tried in the order of how fast they are without addresses; of each, all places. Pushed
        towards the start of the pool, each weight lies where one that is below it ends, so at a sum of sizes. A branch
        is left once what is placed already makes it too slow. Weights come in the order in which they are needed.
        """
        faster = []
        for bound_s, keep, residents, stays in self._choices():
            pool_bytes = arena_bytes - sum(self.slot_bytes[weight] for weight in residents)
            replay = self.replay(stays, pool_bytes) if bound_s < below_s * (1 - _WORTHWHILE) else None
            if replay is not None and replay.pass_s < below_s * (1 - _WORTHWHILE):
                faster.append((replay.pass_s, keep, residents, pool_bytes, replay))
        search = _Search(self, below_s, most_nodes)
        for pass_s, _, residents, pool_bytes, replay in sorted(faster, key=lambda choice: choice[:2]):
            if pass_s >= search.best_s * (1 - _WORTHWHILE):
                break
            search.place(replay, residents, pool_bytes)
        is_complete = search.num_nodes <= most_nodes
        return Placed(search.best_s, search.replay, search.offsets_bytes, search.residents, is_complete)

    def after(self, stay: Stay, other: Stay) -> int | None:
        """Returns the last step before `stay` of `other` where both lie on the same bytes; None where they meet."""
        count = len(self._compute_s)
        if not self.cyclic:
            if other.end <= stay.first:
                return other.end - 1
            return -1 if stay.end <= other.first else None
        passes = (stay.first - other.end) // count
        if other.first + (passes + 1) * count < stay.end:
            return None
        return other.end + passes * count - 1

    def own(self, stay: Stay) -> int:
        """Returns the last step of `stay` in the pass before."""
        return stay.end - 1 - len(self._compute_s) if self.cyclic else -1

    @staticmethod
    def _before(order: Sequence[Stay], number: int) -> tuple[int, int]:
        """Returns pass, counted from this one, and number of the stay of the same weight that comes before one."""
        alike = [other for other, stay in enumerate(order) if stay.weight == order[number].weight]
        at = alike.index(number)
        return (0, alike[at - 1]) if at else (-1, alike[-1])

    def replay(self, stays: Sequence[Stay], pool_bytes: int, after: Mapping[Stay, int] | None = None) -> Replay | None:
        """Returns how these stays go through a pool of so many bytes, None if they do not fit.

        With `after`, none starts before the step that is given for it has been left.
        """
        if pool_bytes < 0:
            return None
        after = after or {}
        order = sorted(stays, key=lambda stay: (stay.first, stay.weight))
        count, num = len(self._compute_s), len(order)
        # What stays over the end of the pass is there already in the steady state.
        over = [stay for stay in order if stay.end > count]
        leaves: dict[int, int] = {}
        for stay in over:
            leaves[stay.end - count] = leaves.get(stay.end - count, 0) + self.slot_bytes[stay.weight]
        free = pool_bytes - sum(leaves.values())
        # One copy of a weight at a time: a stay begins once the one before, in this pass or the last, has ended.
        ends = {(-1, number): stay.end - count for number, stay in enumerate(order)}
        before = [self._before(order, number) for number in range(num)]
        landed: dict[tuple[int, int], float] = {}
        issued_at: dict[tuple[int, int], int] = {}
        following, now, link = 0, 0.0, 0.0
        ended: list[float] = []
        states: list[tuple[float, ...]] = []
        for number in range(MOST_PASSES if self.cyclic else 1):
            for step in range(count):
                reached = number * count + step  # steps that have been left
                free += leaves.pop(reached, 0)
                while num and (self.cyclic or following < num):
                    key = divmod(following, num)
                    stay = order[key[1]]
                    size = self.slot_bytes[stay.weight]
                    passes, other = before[key[1]]
                    if size > free or ends.get((key[0] + passes, other), 0) > reached:
                        break
                    if stay in after and key[0] * count + after[stay] >= reached:
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
        is_steady = not self.cyclic or len(ended) < MOST_PASSES
        pass_s = states[last][0] if is_steady else (ended[last] - ended[last - MEAN_OF]) / MEAN_OF
        return Replay(tuple(order), tuple(issued_at[last, other] for other in range(num)), pass_s, is_steady)


class _Search:
    """Branch and bound over the places of the stays of one choice after another."""

    def __init__(self, exact: Exact, below_s: float, most_nodes: int) -> None:
        self.best_s = below_s
        self.replay: Replay | None = None
        self.offsets_bytes: tuple[int, ...] = ()
        self.residents: tuple[int, ...] = ()
        self.num_nodes = 0
        self._exact = exact
        self._most_nodes = most_nodes

    def place(self, replay: Replay, residents: tuple[int, ...], pool_bytes: int) -> None:
        """Tries the places of these stays beside these residents."""
        stays = replay.stays
        sizes = [self._exact.slot_bytes[stay.weight] for stay in stays]
        sums = {0}
        for size in sizes:
            sums |= {at + size for at in sums if at + size <= pool_bytes}
        places = [[at for at in sorted(sums) if at + size <= pool_bytes] for size in sizes]
        after = {stay: self._exact.own(stay) for stay in stays}
        found = self.replay
        self._branch(stays, sizes, places, pool_bytes, [], after)
        if self.replay is not found:
            self.residents = residents

    def _branch(
        self,
        stays: tuple[Stay, ...],
        sizes: list[int],
        places: list[list[int]],
        pool_bytes: int,
        offsets: list[int],
        after: dict[Stay, int],
    ) -> None:
        number = len(offsets)
        if number == len(stays):
            return
        # Slots of one size are alike: the next one that is new stands for all of them.
        new = max((at + size for at, size in zip(offsets, sizes, strict=False)), default=0)
        for offset in places[number]:
            if self.num_nodes > self._most_nodes or (len(set(sizes)) == 1 and offset > new):
                return
            later = self._meeting(stays, sizes, offsets, number, offset, after)
            if later is None:
                continue
            self.num_nodes += 1
            replay = self._exact.replay(stays, pool_bytes, later)
            if replay is None or replay.pass_s >= self.best_s * (1 - _WORTHWHILE):
                continue
            if number + 1 == len(stays):
                self.best_s, self.replay, self.offsets_bytes = replay.pass_s, replay, (*offsets, offset)
            self._branch(stays, sizes, places, pool_bytes, [*offsets, offset], later)

    def _meeting(
        self,
        stays: tuple[Stay, ...],
        sizes: list[int],
        offsets: list[int],
        number: int,
        offset: int,
        after: dict[Stay, int],
    ) -> dict[Stay, int] | None:
        """Returns when stays may begin with the next one at `offset`, None where it would lie on another in use."""
        stay, later = stays[number], dict(after)
        for other, at, size in zip(stays, offsets, sizes, strict=False):
            if at < offset + sizes[number] and offset < at + size:
                one, reverse = self._exact.after(stay, other), self._exact.after(other, stay)
                if one is None or reverse is None:
                    return None
                later[stay] = max(later[stay], one)
                later[other] = max(later[other], reverse)
        return later


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
