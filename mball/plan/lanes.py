"""Predicts a plan with steps on the host lane: two lanes of steps beside a link each way.

[Note: four lanes]
Device, host and links each do one thing at a time. The device takes its steps in the order of the plan, and so does the
host lane; a link serves requests in the order in which they become possible, which is known only once the times of
the other lanes are. So events are followed in the order of time, pass after pass, until two passes are alike. A lane is
never more than a pass ahead of the other one: a pass ends when the host lane has ended the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Protocol

from mball.errors import PlanError
from mball.plan.at_home import AtHome, last_of
from mball.plan.link_queue import LinkQueue
from mball.schema import Bundle, Lane, Link, Offload, PlanStep, Trace, Transfer

# A lane that is a little faster than the other one takes many passes to be a whole pass ahead of it.
MAX_PASSES = 32
_SAME = 1e-9
_STEP, _HOST, _READ, _WRITE = range(4)

# A step or a write, and how many passes before this one.
_Earlier = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LanePass:
    """The steady pass of a plan, or the only one; seconds from its begin.

    Attributes:
        begins_s, ends_s: of each plan step, on its lane; on the host lane it may end after the pass.
        reached_s: of each plan step when the device had left the one before.
        left_s: of each plan step when the device has left it: after its writes, and at once on the host lane.
        reads, writes: when the bytes of each transfer, and of each write, were on their link, from the begin of the
            pass that asked.
        pass_s: from the end of one pass to the end of the next.
        pass_ends_s: the end of each pass that was followed, the first from a cold start.
    """

    begins_s: tuple[float, ...]
    ends_s: tuple[float, ...]
    reached_s: tuple[float, ...]
    left_s: tuple[float, ...]
    reads: tuple[tuple[float, float], ...]
    writes: tuple[tuple[float, float], ...]
    pass_s: float
    pass_ends_s: tuple[float, ...]


class _Movement(Protocol):
    @property
    def bundles(self) -> tuple[Bundle, ...]: ...
    @property
    def steps(self) -> tuple[PlanStep, ...]: ...
    @property
    def transfers(self) -> tuple[Transfer, ...]: ...
    @property
    def offloads(self) -> tuple[Offload, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """What waits for what below the device, by plan step and by write.

    Attributes:
        on_host: whether each step runs on the host lane.
        writes: for each step on the host lane the writes that it waits for.
        rows: for each step on the device the step on the host lane that writes what it reads rows of.
        guard: for each write the last step on the host lane before it that uses what is written.
    """

    on_host: tuple[bool, ...]
    writes: tuple[tuple[_Earlier, ...], ...]
    rows: tuple[_Earlier | None, ...]
    guard: tuple[_Earlier | None, ...]

    @classmethod
    def of(cls, trace: Trace, plan: _Movement, gathered: Sequence[Sequence[int]]) -> Waits:
        """Returns the waits of a plan.

        Args:
            trace: the pass.
            plan: of it.
            gathered: for each trace step the bundles of which it reads rows at home.
        """
        at_home, count, cyclic = AtHome.of(trace, plan.bundles, plan.steps), len(plan.steps), trace.cyclic

        def earlier(steps: Sequence[int], before: int) -> _Earlier | None:
            found = last_of(steps, before - 1, count, cyclic=cyclic)
            return None if found is None else (found % count, -(found // count))

        leaving: dict[int, list[tuple[int, int]]] = {}
        for number, offload in enumerate(plan.offloads):
            leaving.setdefault(offload.bundle, []).append((offload.after, number))
        writes: list[list[_Earlier]] = [[] for _ in plan.steps]
        for bundle, steps in at_home.host_uses.items():
            offloads = sorted(leaving.get(bundle, ()))
            for host_step in steps:
                last = earlier([after for after, _ in offloads], host_step)
                if last is not None:
                    writes[host_step] += [(number, last[1]) for after, number in offloads if after == last[0]]
        rows: list[_Earlier | None] = []
        for number, step in enumerate(plan.steps):
            asked = {bundle for each in gathered[step.first : step.end] for bundle in each}
            ends = [earlier(at_home.host_writes.get(bundle, ()), number) for bundle in sorted(asked)]
            rows.append(min((end for end in ends if end is not None), key=lambda end: (end[1], -end[0]), default=None))
        return cls(
            on_host=tuple(trace.steps[step.first].lane is Lane.HOST for step in plan.steps),
            writes=tuple(map(tuple, writes)),
            rows=tuple(rows),
            guard=tuple(earlier(at_home.host_uses.get(each.bundle, ()), each.after) for each in plan.offloads),
        )


def run_lanes(
    plan: _Movement,
    waits: Waits,
    seconds: Sequence[float],
    read_bytes: Sequence[int],
    written_bytes: Sequence[int],
    link: Link,
    write_link: Link | None,
    *,
    cyclic: bool,
) -> LanePass:
    """Returns the steady pass.

    Args:
        plan: its steps, transfers and writes.
        waits: of these.
        seconds: of each plan step, on its lane.
        read_bytes: of each transfer.
        written_bytes: of each write.
        link: brings bundles.
        write_link: takes what leaves; None if writes take turns with transfers.
        cyclic: whether the pass repeats; the only pass ends when both lanes have.

    Raises:
        PlanError: in the plan, which is not valid, something waits for itself.
    """
    read_s = [size / link.bandwidth_bytes_per_s for size in read_bytes]
    out = write_link or link
    write_s = [size / out.bandwidth_bytes_per_s for size in written_bytes]
    return _Events(plan, waits, seconds, read_s, write_s, link, write_link, cyclic=cyclic).run()


@dataclass(slots=True)
class _Times:
    """Of all passes so far, numbered on from pass to pass."""

    begins_s: list[float] = field(default_factory=list)
    ends_s: list[float] = field(default_factory=list)
    reached_s: list[float] = field(default_factory=list)
    left_s: list[float] = field(default_factory=list)


class _Requests:
    """Transfers or writes, numbered on from pass to pass, and when they have landed."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.of_pass = list(seconds)
        self.landed_s: dict[int, float] = {}
        self.is_done: set[int] = set()

    def span(self, number: int, start_s: float) -> tuple[float, float]:
        """Returns when a request was served, from `start_s` on."""
        end_s = self.landed_s[number] - start_s
        return end_s - self.of_pass[number % len(self.of_pass)], end_s


class _Events:
    """Follows events in the order of time."""

    def __init__(
        self,
        plan: _Movement,
        waits: Waits,
        seconds: Sequence[float],
        read_s: Sequence[float],
        write_s: Sequence[float],
        link: Link,
        write_link: Link | None,
        *,
        cyclic: bool,
    ) -> None:
        self._plan, self._waits, self._seconds = plan, waits, seconds
        self._cyclic = cyclic
        self._count = count = len(seconds)
        self._host = [number for number, is_host in enumerate(waits.on_host) if is_host]
        self._rank = {step: rank for rank, step in enumerate(self._host)}
        self._needed: list[list[int]] = [[] for _ in seconds]
        self._asked: list[list[_Earlier]] = [[] for _ in seconds]
        for number, each in enumerate(plan.transfers):
            self._needed[each.needed_by].append(number)
            if each.after >= 0 or cyclic:
                self._asked[each.after % count].append((number, each.after // count))
        for asks in self._asked:  # those of this pass first
            asks.sort(key=lambda ask: (-ask[1], ask[0]))
        self._leaving: list[list[int]] = [[] for _ in seconds]
        self._awaited: list[list[_Earlier]] = [[] for _ in seconds]
        for number, offload in enumerate(plan.offloads):
            self._leaving[offload.after].append(number)
            self._awaited[offload.until % count].append((number, offload.until // count))
        self._reads, self._writes = _Requests(read_s), _Requests(write_s)
        # Both kinds of request may share a link, so each queue numbers what it serves by itself.
        self._links = [_Server(link), _Server(write_link or link)]
        if write_link is None:
            self._links[1] = self._links[0]
        self._times = _Times()
        self._events: list[tuple[float, int, int]] = []
        self._is_running = self._host_is_running = False
        self._num_host_begun = self._num_host_ended = 0
        self._host_begins_s: list[float] = []
        self._host_ends_s: list[float] = []
        # What may start once the host lane has ended so many steps.
        self._held: dict[int, list[tuple[int, int]]] = {}

    def run(self) -> LanePass:
        """Returns the steady pass."""
        for number, each in enumerate(self._plan.transfers):
            if each.after < 0:
                self._issue(_READ, number, 0.0)
        if not self._cyclic:
            self._follow(self._count, len(self._host))
            return self._found(0)
        before: list[float] = []
        for passes in range(1, MAX_PASSES + 1):
            self._follow(passes * self._count, 0)
            if passes < 2:
                continue
            # All that the pass before this one asked for has ended by now.
            state = self._state(passes - 2)
            scale = max(state[0], 1e-12) * _SAME
            if before and all(abs(a - b) <= scale for a, b in zip(before, state, strict=True)):
                break
            before = state
        return self._found(passes - 2)

    def _begin_s(self, number: int) -> float:
        """Returns when pass `number` begins."""
        return self._times.left_s[number * self._count - 1] if number > 0 else 0.0

    def _state(self, number: int) -> list[float]:
        begin_s, first, end = self._begin_s(number), number * self._count, (number + 1) * self._count
        times = self._times
        found = [times.left_s[end - 1] - begin_s]
        found += [at - begin_s for at in (*times.begins_s[first:end], *times.left_s[first:end])]
        hosts = len(self._host)
        found += [at - begin_s for at in self._host_ends_s[number * hosts : (number + 1) * hosts]]
        for requests in (self._reads, self._writes):
            count = len(requests.of_pass)
            found += [requests.landed_s[each] - begin_s for each in range(number * count, (number + 1) * count)]
        return found

    def _found(self, number: int) -> LanePass:
        count, hosts = self._count, len(self._host)
        first, begin_s = number * count, self._begin_s(number)
        times = self._times
        begins, ends = list(times.begins_s[first : first + count]), list(times.ends_s[first : first + count])
        for step, rank in self._rank.items():
            begins[step] = self._host_begins_s[number * hosts + rank]
            ends[step] = self._host_ends_s[number * hosts + rank]
        end_s = times.left_s[first + count - 1] if count else 0.0
        if not self._cyclic:
            end_s = max([end_s, *ends])
        # What is asked for ahead is asked for by the pass before.
        asked = [self._begin_s(number - (each.after < 0)) for each in self._plan.transfers]
        reads = len(asked)
        writes = len(self._plan.offloads)
        return LanePass(
            begins_s=tuple(at - begin_s for at in begins),
            ends_s=tuple(at - begin_s for at in ends),
            reached_s=tuple(at - begin_s for at in times.reached_s[first : first + count]),
            left_s=tuple(at - begin_s for at in times.left_s[first : first + count]),
            reads=tuple(self._reads.span(number * reads + each, asked_s) for each, asked_s in enumerate(asked)),
            writes=tuple(self._writes.span(number * writes + each, begin_s) for each in range(writes)),
            pass_s=end_s - begin_s,
            pass_ends_s=tuple(times.left_s[count - 1 :: count]) if self._cyclic else (end_s,),
        )

    def _follow(self, goal: int, host_goal: int) -> None:
        """Follows events until so many steps have been left, and so many have ended on the host lane."""
        now = self._times.left_s[-1] if self._times.left_s else 0.0
        self._advance(now, goal)
        while len(self._times.left_s) < goal or self._num_host_ended < host_goal:
            if not self._events:
                raise PlanError(
                    f"step {len(self._times.left_s) % self._count} waits for what waits for it: the plan is wrong, "
                    "make it again"
                )
            now, kind, number = heappop(self._events)
            if kind == _STEP:
                self._end_step(now)
            elif kind == _HOST:
                self._end_host_step(now)
            else:
                requests = self._reads if kind == _READ else self._writes
                landed_s = self._links[kind == _WRITE].landed_s(kind, number)
                if landed_s > now:  # others came that share the link with it
                    heappush(self._events, (landed_s, kind, number))
                    continue
                requests.landed_s[number] = landed_s
                requests.is_done.add(number)
            self._advance(now, goal)

    def _advance(self, now: float, goal: int) -> None:
        """Begins whatever may begin."""
        while self._leave(now) or self._begin(now, goal) or self._begin_on_host(now):
            pass

    def _begin(self, now: float, goal: int) -> bool:
        """Begins the next step of the device, or passes one that is on the host lane."""
        times = self._times
        step = len(times.ends_s)
        if self._is_running or step > len(times.left_s) or step >= goal:
            return False
        if len(times.reached_s) == step:
            times.reached_s.append(now)
        passes, within = divmod(step, self._count)
        if self._waits.on_host[within]:
            times.begins_s.append(now)
            times.ends_s.append(now)
            return True
        rows = self._waits.rows[within]
        if not all(
            passes * len(self._reads.of_pass) + number in self._reads.is_done for number in self._needed[within]
        ):
            return False
        if rows is not None and not self._host_has_ended(rows[0], passes - rows[1]):
            return False
        times.begins_s.append(now)
        self._is_running = True
        heappush(self._events, (now + self._seconds[within], _STEP, step))
        return True

    def _end_step(self, now: float) -> None:
        passes, within = divmod(len(self._times.ends_s), self._count)
        self._times.ends_s.append(now)
        self._is_running = False
        for number in self._leaving[within]:
            guard = self._waits.guard[number]
            host = None if guard is None else (guard[0], passes - guard[1])
            self._ask(_WRITE, passes * len(self._writes.of_pass) + number, host, now)

    def _leave(self, now: float) -> bool:
        """Leaves the step that the device has ended once its writes are done."""
        step = len(self._times.left_s)
        if len(self._times.ends_s) == step:
            return False
        passes, within = divmod(step, self._count)
        for number, over in self._awaited[within]:
            write = (passes - over) * len(self._writes.of_pass) + number
            if write >= 0 and write not in self._writes.is_done:
                return False
        if within == self._count - 1 and self._num_host_ended < passes * len(self._host):
            return False
        self._times.left_s.append(now)
        for number, passes_on in self._asked[within]:
            transfer = self._plan.transfers[number]
            reader = passes - passes_on
            host = None
            if transfer.after_host is not None:
                over, at = divmod(transfer.after_host, self._count)
                host = at, reader + over
            self._ask(_READ, reader * len(self._reads.of_pass) + number, host, now)
        return True

    def _begin_on_host(self, now: float) -> bool:
        if self._host_is_running or not self._host:
            return False
        passes, rank = divmod(self._num_host_begun, len(self._host))
        within = self._host[rank]
        if len(self._times.ends_s) <= passes * self._count + within:
            return False
        for number, earlier in self._waits.writes[within]:
            write = (passes - earlier) * len(self._writes.of_pass) + number
            if write >= 0 and write not in self._writes.is_done:
                return False
        self._num_host_begun += 1
        self._host_is_running = True
        self._host_begins_s.append(now)
        heappush(self._events, (now + self._seconds[within], _HOST, self._num_host_begun))
        return True

    def _end_host_step(self, now: float) -> None:
        self._num_host_ended += 1
        self._host_is_running = False
        self._host_ends_s.append(now)
        for kind, number in self._held.pop(self._num_host_ended, ()):
            self._issue(kind, number, now)

    def _host_has_ended(self, step: int, passes: int) -> bool:
        return self._num_host_ended >= self._ended_with(step, passes)

    def _ended_with(self, step: int, passes: int) -> int:
        """Returns how many steps the host lane has ended with this one; none is before the first pass."""
        return max(passes * len(self._host) + self._rank[step] + 1, 0)

    def _ask(self, kind: int, number: int, host: tuple[int, int] | None, now: float) -> None:
        """Makes a request now, or once a step of the host lane (and its pass) has ended."""
        if host is None or self._host_has_ended(*host):
            self._issue(kind, number, now)
        else:
            self._held.setdefault(self._ended_with(*host), []).append((kind, number))

    def _issue(self, kind: int, number: int, now: float) -> None:
        requests = self._reads if kind == _READ else self._writes
        server = self._links[kind == _WRITE]
        server.add(kind, number, requests.of_pass[number % len(requests.of_pass)], now)
        heappush(self._events, (server.landed_s(kind, number), kind, number))


class _Server:
    """A link that serves transfers, writes, or both."""

    def __init__(self, link: Link) -> None:
        self._landed_s: list[float] = []
        self._seconds: list[float] = []
        self._queue = LinkQueue(self._landed_s, self._seconds, link)
        self._place: dict[tuple[int, int], int] = {}

    def add(self, kind: int, number: int, seconds: float, now_s: float) -> None:
        """Serves a request, made now."""
        self._place[kind, number] = len(self._seconds)
        self._seconds.append(seconds)
        self._landed_s.append(0.0)
        self._queue.add(len(self._seconds) - 1, now_s)

    def landed_s(self, kind: int, number: int) -> float:
        """Returns when a request has landed, as far as is known."""
        return self._landed_s[self._place[kind, number]]
