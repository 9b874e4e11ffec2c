"""Predicts what a plan does: a serial device beside a serial link each way, pass after pass until nothing changes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from mball.plan.demand import bundle_gathers
from mball.schema import Bundle, Link, Machine, Made, Offload, Placement, Plan, PlanStep, Prediction, Trace, Transfer

# What a step that was never measured is taken to cost: one read of its weights at this speed.
UNMEASURED_BYTES_PER_S = 20e9
MAX_SIMULATED_PASSES = 16
_SAME = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTiming:
    """When a plan step ran, in seconds from the start of its pass, and what it waited for.

    Attributes:
        stall_s: how long it had waited for bundles before it began.
        write_s: how long it waited for writes after it had ended.
    """

    start_s: float
    end_s: float
    stall_s: float
    write_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferTiming:
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
        pass_s: seconds from the end of one pass to the end of the next.
        peak_arena_bytes: the most bytes in slots at one time.
        prediction: the same in the plan's terms.
        link_s: for how long the link to the device moves bytes.
        host: of the level below, if the plan has one.
    """

    steps: tuple[StepTiming, ...]
    transfers: tuple[TransferTiming, ...]
    offloads: tuple[TransferTiming, ...]
    pass_s: float
    peak_arena_bytes: int
    prediction: Prediction
    link_s: float
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
    return [sum(link.latency_s + size / link.bandwidth_bytes_per_s for size in sizes) for sizes in gathered]


def trace_times(trace: Trace) -> list[float]:
    """Returns for each trace step its measured seconds, or an estimate from the bytes it reads."""
    return [
        (sum(trace.tensors[index].size_bytes for index in step.reads) + sum(each.size_bytes for each in step.gathers))
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
    rows_s = rows_times(gathered, machine)
    seconds = [
        time_s + sum(rows_s[step.first : step.end])
        for time_s, step in zip(step_times(trace, plan.steps), plan.steps, strict=True)
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
    written = [moved_bytes[offload.bundle] for offload in plan.offloads]
    writes = Writes(plan.offloads, written, machine.write_link)
    timings = run_passes(compute_s, plan.transfers, read, machine.link, served, cyclic=trace.cyclic, writes=writes)
    compute, stall = sum(compute_s), sum(timing.stall_s + timing.write_s for timing in timings)
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
        roofline_s=max(compute, link_s, write_s),
    )


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
    needed: list[list[int]] = [[] for _ in range(num_steps)]
    issued: list[list[int]] = [[] for _ in range(num_steps)]
    ahead: list[list[int]] = [[] for _ in range(num_steps)]
    early: list[int] = []
    for number, transfer in enumerate(transfers):
        needed[transfer.needed_by].append(number)
        if transfer.after >= 0:
            issued[transfer.after].append(number)
        else:
            ahead[transfer.after + num_steps].append(number)
            early.append(number)
    out = writes.link or link
    seconds += [size / out.bandwidth_bytes_per_s for size in writes.written_bytes]
    leaving: list[list[int]] = [[] for _ in range(num_steps)]
    awaited: list[list[int]] = [[] for _ in range(num_steps)]
    for number, offload in enumerate(writes.offloads, start=len(transfers)):
        leaving[offload.after].append(number)
        awaited[offload.until].append(number)
    landed = [0.0] * len(seconds)
    queue = LinkQueue(landed, seconds, link)
    write_queue = queue if writes.link is None else LinkQueue(landed, seconds, writes.link)
    now = 0.0
    for number in early:
        queue.add(number, now)
    state: list[float] = []
    pass_start = 0.0
    times: list[tuple[float, float, float, float]] = []
    for _ in range(MAX_SIMULATED_PASSES if cyclic else 1):
        pass_start = now
        times = []
        for step in range(num_steps):
            start = now
            for number in needed[step]:
                if landed[number] > start:
                    start = landed[number]
            end = start + compute_s[step]
            stall = start - now
            now = end
            for number in leaving[step]:
                write_queue.add(number, now)
            for number in awaited[step]:
                now = max(now, landed[number])
            times.append((start - pass_start, end - pass_start, stall, now - end))
            for number in issued[step]:
                queue.add(number, now)
            for number in ahead[step] if cyclic else ():
                queue.add(number, now)
        # A transfer ahead was used in this pass before its slot was free for the next.
        busy = max(queue.free_s - now, 0.0), max(write_queue.free_s - now, 0.0)
        before, state = state, [now - pass_start, *busy, *(landed[n] - now for n in early)]
        scale = max(now - pass_start, 1e-12) * _SAME
        if len(before) == len(state) and all(abs(a - b) <= scale for a, b in zip(before, state, strict=True)):
            break
    if served is not None:
        served += [(end - size - pass_start, end - pass_start) for end, size in zip(landed, seconds, strict=True)]
    return [StepTiming(start_s=start, end_s=end, stall_s=stall, write_s=write) for start, end, stall, write in times]


class LinkQueue:
    """The requests on one link.

    Bytes are served in the order of the requests, a window of them at one time: a request has landed when what is
    behind it within the window, if anything is there by then, is served too.
    """

    def __init__(self, landed_s: list[float], seconds: Sequence[float], link: Link) -> None:
        self.free_s = 0.0
        self._landed_s = landed_s
        self._seconds = seconds
        self._latency_s = link.latency_s
        self._window_s = link.window_bytes / link.bandwidth_bytes_per_s
        self._recent: list[tuple[int, float]] = []  # those that others may still join, with the latest they can land

    def add(self, number: int, now_s: float) -> None:
        """Serves request `number`, made now."""
        landed_s, seconds = self._landed_s, self._seconds[number]
        self._recent = [(other, latest_s) for other, latest_s in self._recent if now_s < landed_s[other] < latest_s]
        for other, latest_s in self._recent:
            landed_s[other] = min(landed_s[other] + seconds, latest_s)
        self.free_s = max(self.free_s, now_s + self._latency_s) + seconds
        landed_s[number] = self.free_s
        if self._window_s:
            self._recent.append((number, self.free_s + self._window_s))


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
    for transfer in plan.transfers:
        for first, end in occupied_steps(transfer, num_steps):
            yield transfer.bundle, transfer.offset_bytes, first, end
    leaves = {(offload.bundle, offload.after): offload.until for offload in plan.offloads}
    for made in plan.made:
        last = max(made.last_use, leaves.get((made.bundle, made.last_use), -1))
        yield made.bundle, made.offset_bytes, made.step, last + 1


def peak_bytes(plan: Plan) -> int:
    """Returns the most bytes of the arena that slots hold at one time."""
    kept = sum(plan.bundles[placement.bundle].size_bytes for placement in plan.residents)
    return kept + max(slot_bytes(plan), default=0)


def occupied_steps(transfer: Transfer, num_steps: int) -> list[tuple[int, int]]:
    """Returns the half-open ranges of steps, within one pass of the cycle, in which a transfer holds its slot."""
    first, end = transfer.after + 1, transfer.last_use + 1
    if first < 0:
        first, end = first + num_steps, end + num_steps
    return [(first, end)] if end <= num_steps else [(first, num_steps), (0, end - num_steps)]
