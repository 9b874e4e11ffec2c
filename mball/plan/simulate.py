"""Predicts what a plan does: a serial device beside a serial link each way, pass after pass until nothing changes.

Steps on the host lane are followed by `lanes.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

from mball.plan.at_home import UNMEASURED_BYTES_PER_S, AtHome, host_times
from mball.plan.demand import bundle_gathers
from mball.plan.lanes import LanePass, Waits, run_lanes
from mball.plan.link_queue import LinkQueue
from mball.schema import (
    Bundle,
    Lane,
    Link,
    Machine,
    Made,
    Offload,
    Placement,
    Plan,
    PlanStep,
    Prediction,
    Trace,
    Transfer,
)

MAX_SIMULATED_PASSES = 16
_SAME = 1e-9


# Tuples: a long pass has very many, and a frozen dataclass takes four times as long to make.
class StepTiming(NamedTuple):
    """When a plan step ran, in seconds from the start of its pass, and what it waited for.

    On the host lane nothing waits for it but what needs it: there both waits are zero, and it may end after the pass.

    Attributes:
        stall_s: how long it had waited for bundles, or for the host lane, before it began.
        write_s: how long it waited for writes after it had ended, and in the last step for the host lane to end the
            pass before.
    """

    start_s: float
    end_s: float
    stall_s: float
    write_s: float = 0.0


class TransferTiming(NamedTuple):
    """When the bytes of a transfer were on the link, in seconds from the start of the pass that asked for it.

    The pass that reads them is the next one where the transfer runs ahead; it may end after the pass that asked.
    """

    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSimulation:
    """What host memory and the link to it from disk do in a steady pass.

    Attributes:
        transfers: when the bytes of each transfer from disk were on that link, counted as those of its first copy are;
            what is read ahead begins before zero.
        disk_s: for how long that link moves bytes.
        streamed_bytes: what comes from disk.
        peak_arena_bytes: the most bytes in slots of host memory at one time.
    """

    transfers: tuple[TransferTiming, ...]
    disk_s: float
    streamed_bytes: int
    peak_arena_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """One steady pass.

    Attributes:
        steps: the timing of each plan step.
        transfers: the timing of each transfer, in the order of the plan.
        offloads: the timing of each offload, likewise.
        pass_s: seconds from the end of one pass to the end of the next; of the only one until both lanes have ended.
            The steps need not add up to it where some run on the host lane: if that lane is the busier one it says how
            long a pass takes, and the simulation may end before the device is held up by it.
        peak_arena_bytes: the most bytes in slots at one time.
        prediction: the same in the plan's terms.
        link_s: for how long the link to the device moves bytes.
        peak_offloaded_bytes: the most bytes of offloaded tensors that are below at one time, on their way included.
        host: of the level below, if the plan has one.
    """

    steps: tuple[StepTiming, ...]
    transfers: tuple[TransferTiming, ...]
    offloads: tuple[TransferTiming, ...]
    pass_s: float
    peak_arena_bytes: int
    prediction: Prediction
    link_s: float
    peak_offloaded_bytes: int
    host: HostSimulation | None = None


def simulate(trace: Trace, plan: Plan, machine: Machine) -> Simulation:
    """Returns how `plan` runs in the steady state on `machine`.

    Transfers are served in the order in which they are issued, each for ``bytes / bandwidth``, and none sooner than
    ``latency`` after it was issued; those within the link's window share it. The first pass starts cold; passes
    repeat until two are alike.
    """
    moved = [bundle.moved_bytes for bundle in plan.bundles]
    served: list[tuple[float, float]] = []
    timings, prediction = run_plan(trace, machine, plan, moved, served)
    transfers = tuple(TransferTiming(start_s=start_s, end_s=end_s) for start_s, end_s in served)
    return Simulation(
        steps=tuple(timings),
        transfers=transfers[: len(plan.transfers)],
        offloads=transfers[len(plan.transfers) :],
        pass_s=prediction.pass_s,
        peak_arena_bytes=peak_bytes(plan),
        prediction=prediction,
        link_s=sum(moved[transfer.bundle] for transfer in plan.transfers) / machine.link.bandwidth_bytes_per_s,
        peak_offloaded_bytes=max(offloaded_bytes(plan), default=0),
    )


def gathered_bytes(trace: Trace, bundles: Sequence[Bundle], residents: Collection[int]) -> list[list[int]]:
    """Returns for each trace step the sizes of what it reads at home: rows of what is not resident.

    A bundle may also be in a slot when rows of it are read, because of another step. That is not counted on: the rows
    of an embedding are few.
    """
    return [[size for bundle, size in gathers if bundle not in residents] for gathers in bundle_gathers(trace, bundles)]


def rows_times(gathered: Sequence[Sequence[int]], machine: Machine) -> list[float]:
    """Returns for each trace step the seconds that it waits for rows; see `gathered_bytes`.

    They come from their homes, over the link too. (A step that was timed while it read them there has waited for them
    in that time as well.) They are few against what is streamed, so they are taken to delay nothing else.
    """
    link = machine.disk_link or machine.link
    return [
        sum(link.latency_s + size / link.bandwidth_bytes_per_s for size in sizes) if sizes else 0.0
        for sizes in gathered
    ]


def trace_times(trace: Trace) -> list[float]:
    """Returns for each trace step its seconds on the device, measured or estimated from the bytes it reads.

    It takes none for a step on the host lane (see `host_times`).
    """
    return [
        0.0
        if step.lane is Lane.HOST
        else (
            sum(trace.tensors[index].size_bytes for index in step.reads) + sum(each.size_bytes for each in step.gathers)
        )
        / UNMEASURED_BYTES_PER_S
        if step.time_s is None
        else step.time_s
        for step in trace.steps
    ]


def step_times(trace: Trace, steps: Sequence[PlanStep]) -> list[float]:
    """Returns the seconds of compute of each plan step."""
    costs = trace_times(trace)
    return [sum(costs[step.first : step.end]) for step in steps]


def busy_times(trace: Trace, machine: Machine, plan: Movement, gathered: Sequence[Sequence[int]]) -> list[float]:
    """Returns the seconds that each plan step takes once its bundles are there: compute, rows, and what is made anew.

    Args:
        gathered: of each trace step, see `gathered_bytes`.
    """
    seconds = step_times(trace, plan.steps)
    if any(gathered):
        rows_s = rows_times(gathered, machine)
        seconds = [
            time_s + sum(rows_s[step.first : step.end]) for time_s, step in zip(seconds, plan.steps, strict=True)
        ]
    for made in plan.made:
        if made.is_anew:
            seconds[made.step] += trace.tensors[plan.bundles[made.bundle].tensors[0]].recompute_s or 0.0
    return seconds


class Movement(Protocol):
    """What happens in a pass, of a plan or of a draft of one."""

    @property
    def bundles(self) -> tuple[Bundle, ...]: ...
    @property
    def steps(self) -> tuple[PlanStep, ...]: ...
    @property
    def residents(self) -> tuple[Placement, ...]: ...
    @property
    def transfers(self) -> tuple[Transfer, ...]: ...
    @property
    def made(self) -> tuple[Made, ...]: ...
    @property
    def offloads(self) -> tuple[Offload, ...]: ...


def run_plan(
    trace: Trace,
    machine: Machine,
    plan: Movement,
    moved_bytes: Sequence[int],
    served: list[tuple[float, float]] | None = None,
) -> tuple[list[StepTiming], Prediction]:
    """Returns the timings of the steady pass and the prediction for it.

    Args:
        moved_bytes: of each bundle, what one transfer moves.
        served: see `run_passes`.
    """
    gathered = gathered_bytes(trace, plan.bundles, {placement.bundle for placement in plan.residents})
    compute_s = busy_times(trace, machine, plan, gathered)
    read = [moved_bytes[transfer.bundle] for transfer in plan.transfers]
    written = written_bytes(trace, plan.offloads, plan.bundles)
    compute, host = sum(compute_s), 0.0
    if any(step.lane is Lane.HOST for step in trace.steps):
        host = sum(host_times(trace, machine))
        lanes = run_beside(trace, machine, plan, compute_s)
        timings = _lane_timings(lanes, trace, plan.steps)
        if served is not None:
            served += [*lanes.reads, *lanes.writes]
        # Where the host lane is a little slower than the rest, it takes many passes to hold them up.
        stall = max(lanes.pass_s, host) - compute
    else:
        writes = Writes(plan.offloads, written, machine.write_link)
        timings = run_passes(compute_s, plan.transfers, read, machine.link, served, cyclic=trace.cyclic, writes=writes)
        stall = sum(timing.stall_s + timing.write_s for timing in timings)
    link_s, write_s = sum(read) / machine.link.bandwidth_bytes_per_s, 0.0
    if machine.write_link is None:
        link_s += sum(written) / machine.link.bandwidth_bytes_per_s
    else:
        write_s = sum(written) / machine.write_link.bandwidth_bytes_per_s
    return timings, Prediction(
        pass_s=compute + stall,
        compute_s=compute,
        stall_s=stall,
        streamed_bytes=sum(read) + sum(map(sum, gathered)),
        roofline_s=max(compute, link_s, write_s, host),
        host_s=host,
        written_bytes=sum(written),
    )


def written_bytes(trace: Trace, offloads: Sequence[Offload], bundles: Sequence[Bundle]) -> list[int]:
    """Returns the bytes of each write: a tensor that is born in the pass, or those that steps change of a bundle."""
    changed = AtHome.of(trace, bundles).changed_bytes
    return [changed.get(offload.bundle, bundles[offload.bundle].moved_bytes) for offload in offloads]


def run_beside(trace: Trace, machine: Machine, plan: Movement, compute_s: Sequence[float]) -> LanePass:
    """Returns the steady pass of a plan with steps on the host lane.

    Args:
        compute_s: of each plan step, see `busy_times`.
    """
    kept = {placement.bundle for placement in plan.residents}
    rows = [[bundle for bundle, _ in gathers if bundle not in kept] for gathers in bundle_gathers(trace, plan.bundles)]
    waits = Waits.of(trace, plan, rows)
    host_s = host_times(trace, machine)
    seconds = [
        sum(host_s[step.first : step.end]) if on_host else time_s
        for step, on_host, time_s in zip(plan.steps, waits.on_host, compute_s, strict=True)
    ]
    read = [plan.bundles[transfer.bundle].moved_bytes for transfer in plan.transfers]
    written = written_bytes(trace, plan.offloads, plan.bundles)
    return run_lanes(plan, waits, seconds, read, written, machine.link, machine.write_link, cyclic=trace.cyclic)


def _lane_timings(found: LanePass, trace: Trace, steps: Sequence[PlanStep]) -> list[StepTiming]:
    timings = []
    for number, step in enumerate(steps):
        begin_s, end_s = found.begins_s[number], found.ends_s[number]
        stall_s, write_s = begin_s - found.reached_s[number], found.left_s[number] - end_s
        if trace.steps[step.first].lane is Lane.HOST:
            stall_s = write_s = 0.0
        timings.append(StepTiming(start_s=begin_s, end_s=end_s, stall_s=stall_s, write_s=write_s))
    return timings


@dataclass(frozen=True, slots=True)
class Writes:
    """What leaves the device in a pass.

    Attributes:
        offloads: in the order of the plan.
        written_bytes: of each.
        link: where they go; None if they take turns with transfers.
    """

    offloads: Sequence[Offload] = ()
    written_bytes: Sequence[int] = ()
    link: Link | None = None


_NOTHING = Writes()


def run_passes(
    compute_s: Sequence[float],
    transfers: Sequence[Transfer],
    moved_bytes: Sequence[int],
    link: Link,
    served: list[tuple[float, float]] | None = None,
    *,
    cyclic: bool = True,
    writes: Writes = _NOTHING,
) -> list[StepTiming]:
    """Returns the timings of the steady pass.

    Args:
        compute_s: seconds of each plan step.
        transfers: in the order of the plan.
        moved_bytes: the bytes that each transfer reads.
        served: if given, start and end of each transfer, then of each write, are added, from the start of the pass that
            asked for it.
        cyclic: whether the pass repeats; the only pass has the first timing.
        writes: what leaves the device.
    """
    num_steps = len(compute_s)
    seconds = [size / link.bandwidth_bytes_per_s for size in moved_bytes]
    early = [number for number, transfer in enumerate(transfers) if transfer.after < 0]
    later = [number for number, transfer in enumerate(transfers) if transfer.after >= 0]
    needed = _by_step(((transfer.needed_by, number) for number, transfer in enumerate(transfers)), num_steps)
    # What is asked for in this pass comes before what is asked for the next one.
    asks = (*later, *early) if cyclic else later
    issued = _by_step(((transfers[number].after % num_steps, number) for number in asks), num_steps)
    out = writes.link or link
    seconds += [size / out.bandwidth_bytes_per_s for size in writes.written_bytes]
    offloads = list(enumerate(writes.offloads, start=len(transfers)))
    leaving = _by_step(((offload.after, number) for number, offload in offloads), num_steps)
    # One that is waited for in the pass after is the last that was issued then.
    awaited = _by_step(((offload.until % num_steps, number) for number, offload in offloads), num_steps)
    over = [number for number, offload in offloads if offload.until >= num_steps]
    landed = [0.0] * len(seconds)
    queue = LinkQueue(landed, seconds, link)
    write_queue = queue if writes.link is None else LinkQueue(landed, seconds, writes.link)
    now = 0.0
    for number in early:
        queue.add(number, now)
    state: list[float] = []
    pass_start = 0.0
    starts: list[float] = []
    ends: list[float] = []
    leaves: list[float] = []
    for _ in range(MAX_SIMULATED_PASSES if cyclic else 1):
        pass_start = now
        starts, ends, leaves = [], [], []
        for needs, busy_s, written, waits, requests in zip(needed, compute_s, leaving, awaited, issued, strict=True):
            start = now
            for number in needs:
                if landed[number] > start:
                    start = landed[number]
            now = start + busy_s
            starts.append(start)
            ends.append(now)
            for number in written:
                write_queue.add(number, now)
            for number in waits:
                now = max(now, landed[number])
            leaves.append(now)
            for number in requests:
                queue.add(number, now)
        # A transfer ahead was used in this pass before its slot was free for the next.
        busy = max(queue.free_s - now, 0.0), max(write_queue.free_s - now, 0.0)
        before, state = state, [now - pass_start, *busy, *(landed[n] - now for n in (*early, *over))]
        scale = max(now - pass_start, 1e-12) * _SAME
        if len(before) == len(state) and all(abs(a - b) <= scale for a, b in zip(before, state, strict=True)):
            break
    if served is not None:
        served += [(end - size - pass_start, end - pass_start) for end, size in zip(landed, seconds, strict=True)]
    return [
        StepTiming(start_s=start - pass_start, end_s=end - pass_start, stall_s=start - reached, write_s=left - end)
        for reached, start, end, left in zip((pass_start, *leaves), starts, ends, leaves, strict=False)
    ]


def _by_step(numbers: Iterable[tuple[int, int]], num_steps: int) -> list[Sequence[int]]:
    """Returns for each step the numbers that are given with it, in their order."""
    found: list[Sequence[int]] = [()] * num_steps
    at: dict[int, list[int]] = {}
    for step, number in numbers:
        at.setdefault(step, []).append(number)
    for step, of_step in at.items():
        found[step] = of_step
    return found


def slot_bytes(plan: Plan) -> list[int]:
    """Returns for each plan step the bytes of slots that are held by what does not stay."""
    num_steps = len(plan.steps)
    deltas = [0] * (num_steps + 1)
    for bundle, _, first, end in slots_held(plan):
        deltas[first] += plan.bundles[bundle].size_bytes
        deltas[end] -= plan.bundles[bundle].size_bytes
    return list(accumulate(deltas[:num_steps]))


def slots_held(plan: Plan) -> Iterator[tuple[int, int, int, int]]:
    """Yields bundle, offset and the half-open range of steps of each slot that is held by what does not stay."""
    num_steps = len(plan.steps)
    leaving: dict[int, list[Offload]] = {}
    for offload in plan.offloads:
        leaving.setdefault(offload.bundle, []).append(offload)
    for transfer in plan.transfers:
        last = held_until(leaving.get(transfer.bundle, ()), transfer.needed_by, transfer.last_use, num_steps)
        for first, end in _within_pass(transfer.after + 1, last + 1, num_steps):
            yield transfer.bundle, transfer.offset_bytes, first, end
    for made in plan.made:
        last = held_until(leaving.get(made.bundle, ()), made.step, made.last_use, num_steps)
        for first, end in _within_pass(made.step, last + 1, num_steps):
            yield made.bundle, made.offset_bytes, first, end


def offloaded_bytes(plan: Movement) -> list[int]:
    """Returns for each plan step the most bytes of offloaded tensors below from the end of the one before to its own.

    A tensor takes its bytes there from the begin of its write, at the end of a step, to the end of the last copy that
    brings it back, for which a step waits before it begins. Both are of one pass. One that no copy brings back is for
    the host lane, which may be a pass behind: it has its bytes throughout. What is written back to its home takes
    nothing more there.
    """
    num_steps = len(plan.steps)
    if not plan.offloads:
        return [0] * num_steps
    needed: dict[int, int] = {}
    for transfer in plan.transfers:
        needed[transfer.bundle] = max(needed.get(transfer.bundle, 0), transfer.needed_by)
    deltas = [0] * (num_steps + 2)
    for offload in plan.offloads:
        bundle = plan.bundles[offload.bundle]
        if bundle.extents:
            continue
        if offload.bundle in needed:
            deltas[offload.after + 1] += bundle.size_bytes
            deltas[needed[offload.bundle] + 1] -= bundle.size_bytes
        else:
            deltas[0] += bundle.size_bytes
    return list(accumulate(deltas[:num_steps]))


def peak_bytes(plan: Plan) -> int:
    """Returns the most bytes of the arena that slots hold at one time."""
    kept = sum(plan.bundles[placement.bundle].size_bytes for placement in plan.residents)
    return kept + max(slot_bytes(plan), default=0)


def held_until(offloads: Sequence[Offload], first: int, last_use: int, num_steps: int) -> int:
    """Returns the last step that a bundle has its slot, where it is used from step `first` to `last_use`.

    That is the last use, or the step that waits for what is written from there.

    Args:
        offloads: all writes of the bundle.
        first, last_use: a stay, which may reach into the pass after.
        num_steps: of a pass.
    """
    last = last_use
    for offload in offloads:
        over = 0 if offload.after >= first else num_steps
        if first <= offload.after + over <= last_use:
            last = max(last, offload.until + over)
    return last


def _within_pass(first: int, end: int, num_steps: int) -> list[tuple[int, int]]:
    """Returns half-open ranges of steps within one pass of the cycle, for one that begins in this pass or before it."""
    if first < 0:
        first, end = first + num_steps, end + num_steps
    return [(first, end)] if end <= num_steps else [(first, num_steps), (0, end - num_steps)]
