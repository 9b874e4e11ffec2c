"""Predicts what a plan does where bundles come over two links: from disk to host memory, from there to the device.

[Note: three lanes]
Disk, link and device each do one thing at a time, in the order of the plan. A copy to the device begins once its slot
there is free and its bundle is in host memory; a read from disk begins once the copy out of its slot has ended. What is
offloaded goes to host memory by a lane of its own, or by that of the copies in the order in which both are asked for;
its copy back finds it there, because a step was left only when it was written. What waits for whom is known, how long
is not, so events are followed in the order of time, pass after pass, until two passes are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import repeat

from mball.errors import PlanError
from mball.plan.host import copies_between, copies_by_bundle
from mball.plan.link_queue import LinkQueue
from mball.plan.simulate import (
    MAX_SIMULATED_PASSES,
    HostSimulation,
    Simulation,
    StepTiming,
    TransferTiming,
    busy_times,
    gathered_bytes,
    peak_bytes,
)
from mball.plan.simulate import simulate as simulate_link
from mball.schema import HostTransfer, Link, Machine, Offload, Plan, Trace, Transfer

_SAME = 1e-9
_STEP, _COPY, _READ, _WRITE = range(4)


def simulate(trace: Trace, plan: Plan, machine: Machine) -> Simulation:
    """Returns how `plan` runs in the steady state on `machine`.

    Transfers are served in the order in which they are issued, each for ``bytes / bandwidth``, and none sooner than
    ``latency`` after it may start; those within a link's window share it. Where the plan has a host part, a transfer
    to the device waits for its bundle to be in host memory, and those behind it wait too. The first pass starts cold,
    residents apart; passes repeat until two are alike.

    Raises:
        PlanError: in the plan, which is not valid, something waits for itself.
    """
    found = simulate_link(trace, plan, machine)
    if plan.host is None or machine.disk_link is None:
        return found
    peak, link = peak_bytes(plan.below()), machine.disk_link
    if not plan.host.transfers:
        return replace(found, host=HostSimulation(transfers=(), disk_s=0.0, streamed_bytes=0, peak_arena_bytes=peak))
    chain = run_chain(trace, plan, machine)
    read_bytes = disk_bytes(plan)
    disk_s = read_bytes / link.bandwidth_bytes_per_s
    stall_s = sum(timing.stall_s + timing.write_s for timing in chain.steps)
    prediction = replace(
        found.prediction,
        pass_s=found.prediction.compute_s + stall_s,
        stall_s=stall_s,
        roofline_s=max(found.prediction.roofline_s, disk_s),
    )
    return replace(
        found,
        steps=chain.steps,
        transfers=chain.copies,
        offloads=chain.writes,
        pass_s=prediction.pass_s,
        prediction=prediction,
        host=HostSimulation(transfers=chain.reads, disk_s=disk_s, streamed_bytes=read_bytes, peak_arena_bytes=peak),
    )


def disk_bytes(plan: Plan) -> int:
    """Returns what comes from disk to host memory in a pass; 0 for a plan without a host part."""
    reads = () if plan.host is None else plan.host.transfers
    return sum(plan.bundles[each.bundle].moved_bytes for each in reads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Passes over two links.

    Attributes:
        steps: of the steady pass.
        copies, reads: the transfers to the device that this pass asks for, and the transfers from disk that first serve
            these, both from the start of the pass.
        writes: what is offloaded in it, likewise.
        pass_ends_s: the end of each pass that was followed, the first from a cold start.
    """

    steps: tuple[StepTiming, ...]
    copies: tuple[TransferTiming, ...]
    reads: tuple[TransferTiming, ...]
    writes: tuple[TransferTiming, ...]
    pass_ends_s: tuple[float, ...]


def run_chain(trace: Trace, plan: Plan, machine: Machine) -> Chain:
    """Follows the passes of a plan that reads from disk on a machine with both links.

    Raises:
        PlanError: in the plan, which is not valid, something waits for itself.
    """
    assert plan.host is not None, "asked only of plans with a host part"
    assert machine.disk_link is not None, "asked only where there are two links"
    gathered = gathered_bytes(trace, plan.bundles, {placement.bundle for placement in plan.residents})
    compute = busy_times(trace, machine, plan, gathered)
    copies, reads, offloads = plan.transfers, plan.host.transfers, plan.offloads
    wire = _Wire(machine.link)
    return _Lanes(
        compute,
        copies,
        _Lane([plan.bundles[each.bundle].moved_bytes for each in copies], wire),
        reads,
        _Lane([plan.bundles[each.bundle].moved_bytes for each in reads], _Wire(machine.disk_link)),
        offloads,
        _Lane(
            [plan.bundles[each.bundle].moved_bytes for each in offloads],
            wire if machine.write_link is None else _Wire(machine.write_link),
        ),
        passes=MAX_SIMULATED_PASSES if trace.cyclic else 1,
        cyclic=trace.cyclic,
    ).run()


class _Wire:
    """A link, which serves in the order in which it is asked."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._seconds: list[float] = []
        self.landed_s: list[float] = []
        self.queue = LinkQueue(self.landed_s, self._seconds, link)

    def ask(self, seconds: float, now_s: float) -> int:
        """Serves a request, made now; returns its number."""
        self._seconds.append(seconds)
        self.landed_s.append(0.0)
        self.queue.add(len(self._seconds) - 1, now_s)
        return len(self._seconds) - 1


class _Lane:
    """What is asked of a link for one purpose, numbered on from pass to pass."""

    def __init__(self, moved_bytes: Sequence[int], wire: _Wire) -> None:
        self._pass_seconds = [size / wire.link.bandwidth_bytes_per_s for size in moved_bytes]
        self._wire = wire
        self._issued: list[int] = []  # by their numbers on the wire
        self.is_done: list[bool] = []

    @property
    def num_issued(self) -> int:
        """How many requests were made."""
        return len(self._issued)

    @property
    def num_known(self) -> int:
        """How many there will be in the passes that are followed."""
        return len(self.is_done)

    def add_pass(self) -> None:
        """Makes room for the requests of one more pass."""
        self.is_done += repeat(False, len(self._pass_seconds))

    def issue(self, now_s: float) -> float:
        """Makes the next request; returns when it will have landed."""
        seconds = self._pass_seconds[len(self._issued) % len(self._pass_seconds)]
        self._issued.append(self._wire.ask(seconds, now_s))
        return self.landed_s(len(self._issued) - 1)

    def landed_s(self, number: int) -> float:
        """Returns when a request lands, if no other comes that shares the link with it."""
        return self._wire.landed_s[self._issued[number]]

    def state(self, num_passes: int, now_s: float) -> list[float]:
        """Returns what the rest of time depends on, counted from now."""
        count = len(self._pass_seconds)
        recent = range(self.num_issued - count, self.num_issued)
        ahead = self.num_issued - num_passes * count
        landed = [max(self.landed_s(number) - now_s, 0.0) if number >= 0 else 0.0 for number in recent]
        return [float(ahead), max(self._wire.queue.free_s - now_s, 0.0), *landed]

    def timing(self, number: int, start_s: float) -> TransferTiming:
        """Returns when a request was served, from the start of a pass."""
        end_s = self.landed_s(number) - start_s
        return TransferTiming(start_s=end_s - self._pass_seconds[number % len(self._pass_seconds)], end_s=end_s)


class _Lanes:
    """Follows events in the order of time. Steps, copies, reads and writes count on from pass to pass."""

    def __init__(
        self,
        compute_s: Sequence[float],
        copies: Sequence[Transfer],
        link: _Lane,
        reads: Sequence[HostTransfer],
        disk: _Lane,
        offloads: Sequence[Offload],
        out: _Lane,
        *,
        passes: int,
        cyclic: bool,
    ) -> None:
        self._compute_s = compute_s
        self._copies, self._link = copies, link
        self._reads, self._disk = reads, disk
        self._offloads, self._out = offloads, out
        self._passes = passes
        self._cyclic = cyclic
        self._needed: list[list[int]] = [[] for _ in compute_s]
        for number, copy in enumerate(copies):
            self._needed[copy.needed_by].append(number)
        # The read that serves each copy, counted back by passes where its slot stays over the end of one.
        self._served_by: list[int | None] = [None] * len(copies)
        copies_of = copies_by_bundle(copies)
        for number, read in enumerate(reads):
            served = copies_between(copies_of[read.bundle], read.needed_by, read.last_use, len(copies))
            for passes_on, copy_number in served:
                self._served_by[copy_number] = number - passes_on * len(reads)
        self._awaited: list[list[int]] = [[] for _ in compute_s]
        for number, offload in enumerate(offloads):
            self._awaited[offload.until].append(number)
        self._events: list[tuple[float, int, int]] = []
        self._starts_s: list[float] = []
        self._computed_s: list[float] = []
        # When each step was left.
        self._ends_s: list[float] = []

    def run(self) -> Chain:
        """Returns the steady pass, and how long each pass took until then."""
        count = len(self._compute_s)
        ends: list[float] = []
        state: list[float] = []
        for number in range(self._passes):
            self._follow(number + 1)
            now = self._ends_s[-1]
            ends.append(now)
            taken = now - (ends[-2] if number else 0.0)
            before, state = (
                state,
                [taken, *self._link.state(number + 1, now), *self._disk.state(number + 1, now)],
            )
            scale = max(taken, 1e-12) * _SAME
            if len(before) == len(state) and all(abs(a - b) <= scale for a, b in zip(before, state, strict=True)):
                break
        steady = len(ends) - 1
        if self._cyclic:  # what this pass asks for is served by the end of the next one
            self._follow(steady + 2)
        first, start_s = steady * count, ends[-2] if steady else 0.0
        steps = []
        for number in range(first, first + count):
            waited_s = self._starts_s[number] - (self._ends_s[number - 1] if number else 0.0)
            steps.append(
                StepTiming(
                    start_s=self._starts_s[number] - start_s,
                    end_s=self._computed_s[number] - start_s,
                    stall_s=waited_s,
                    write_s=self._ends_s[number] - self._computed_s[number],
                )
            )
        asks = [steady + (copy.after < 0 and self._cyclic) for copy in self._copies]
        copies = [
            self._link.timing(asks[number] * len(self._copies) + number, start_s) for number in range(len(self._copies))
        ]
        reads = [
            self._disk.timing(asks[read.needed_by] * len(self._reads) + number, start_s)
            for number, read in enumerate(self._reads)
        ]
        writes = [
            self._out.timing(steady * len(self._offloads) + number, start_s) for number in range(len(self._offloads))
        ]
        return Chain(
            steps=tuple(steps),
            copies=tuple(copies),
            reads=tuple(reads),
            writes=tuple(writes),
            pass_ends_s=tuple(ends),
        )

    def _follow(self, passes: int) -> None:
        """Follows events until so many passes have ended."""
        goal = passes * len(self._compute_s)
        # Copies are up to one pass ahead of the steps, and reads another one of them.
        known = passes + 2 if self._cyclic else 1
        while self._disk.num_known < known * len(self._reads):
            for lane in (self._link, self._disk, self._out):
                lane.add_pass()
        now = self._ends_s[-1] if self._ends_s else 0.0
        self._advance(now, goal)
        while len(self._ends_s) < goal:
            if not self._events:
                raise PlanError(
                    f"step {len(self._ends_s) % len(self._compute_s)} waits for what waits for it: the plan is wrong, "
                    "make it again"
                )
            now, kind, number = heappop(self._events)
            if kind == _STEP:
                self._computed_s.append(now)
            else:
                lane = {_COPY: self._link, _READ: self._disk, _WRITE: self._out}[kind]
                if lane.landed_s(number) > now:  # others came that share the link with it
                    heappush(self._events, (lane.landed_s(number), kind, number))
                else:
                    lane.is_done[number] = True
            self._advance(now, goal)

    def _advance(self, now: float, goal: int) -> None:
        """Begins whatever may begin."""
        while self._may_write(self._out.num_issued):
            heappush(self._events, (self._out.issue(now), _WRITE, self._out.num_issued - 1))
        if len(self._ends_s) < len(self._computed_s) and self._may_leave(len(self._ends_s)):
            self._ends_s.append(now)
        step = len(self._starts_s)
        if step == len(self._ends_s) < goal and self._may_run(step):
            self._starts_s.append(now)
            heappush(self._events, (now + self._compute_s[step % len(self._compute_s)], _STEP, step))
        # What ends now too comes first: of what is asked for at one time, writes are.
        if self._offloads and self._events and self._events[0][0] <= now:
            return
        while self._may_copy(self._link.num_issued):
            heappush(self._events, (self._link.issue(now), _COPY, self._link.num_issued - 1))
        while self._may_read(self._disk.num_issued):
            heappush(self._events, (self._disk.issue(now), _READ, self._disk.num_issued - 1))

    def _may_write(self, number: int) -> bool:
        if number >= self._out.num_known:
            return False
        passes, within = divmod(number, len(self._offloads))
        return passes * len(self._compute_s) + self._offloads[within].after < len(self._computed_s)

    def _may_leave(self, step: int) -> bool:
        passes, within = divmod(step, len(self._compute_s))
        return all(self._out.is_done[passes * len(self._offloads) + number] for number in self._awaited[within])

    def _may_run(self, step: int) -> bool:
        passes, within = divmod(step, len(self._compute_s))
        return all(self._link.is_done[passes * len(self._copies) + number] for number in self._needed[within])

    def _may_copy(self, number: int) -> bool:
        if number >= self._link.num_known:
            return False
        passes, within = divmod(number, len(self._copies))
        if passes * len(self._compute_s) + self._copies[within].after >= len(self._ends_s):
            return False
        read = self._served_by[within]
        if read is None:
            return True
        read += passes * len(self._reads)
        return read < 0 or self._disk.is_done[read]

    def _may_read(self, number: int) -> bool:
        if number >= self._disk.num_known:
            return False
        passes, within = divmod(number, len(self._reads))
        copy = passes * len(self._copies) + self._reads[within].after
        return copy < 0 or self._link.is_done[copy]
