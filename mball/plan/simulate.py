"""Predicts what a plan does: one serial link beside one serial device, pass after pass until nothing changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from mball.schema import Link, Machine, Plan, PlanStep, Prediction, Trace, Transfer

# What a step that was never measured is taken to cost: one read of its weights at this speed.
UNMEASURED_BYTES_PER_S = 20e9
MAX_PASSES = 16
_SAME = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTiming:
    """When a plan step ran, in seconds from the start of its pass, and how long it had waited for bundles."""

    start_s: float
    end_s: float
    stall_s: float


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
        pass_s: seconds from the end of one pass to the end of the next.
        peak_arena_bytes: the most bytes in slots at one time.
        prediction: the same in the plan's terms.
        link_s: for how long the link to the device moves bytes.
        host: of the level below, if the plan has one.
    """

    steps: tuple[StepTiming, ...]
    transfers: tuple[TransferTiming, ...]
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
    compute = step_times(trace, plan.steps)
    moved = [sum(extent.size_bytes for extent in bundle.extents) for bundle in plan.bundles]
    sizes = [moved[transfer.bundle] for transfer in plan.transfers]
    served: list[tuple[float, float]] = []
    timings = run_passes(compute, plan.transfers, sizes, machine.link, served, cyclic=trace.cyclic)
    streamed = sum(moved[transfer.bundle] for transfer in plan.transfers)
    prediction = predict(compute, timings, streamed, machine.link)
    return Simulation(
        steps=tuple(timings),
        transfers=tuple(TransferTiming(start_s=start_s, end_s=end_s) for start_s, end_s in served),
        pass_s=prediction.pass_s,
        peak_arena_bytes=peak_bytes(plan),
        prediction=prediction,
        link_s=streamed / machine.link.bandwidth_bytes_per_s,
    )


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


def predict(compute_s: Sequence[float], timings: Sequence[StepTiming], streamed_bytes: int, link: Link) -> Prediction:
    """Returns the prediction for a steady pass with these timings."""
    total = sum(compute_s)
    stall = sum(timing.stall_s for timing in timings)
    return Prediction(
        pass_s=total + stall,
        compute_s=total,
        stall_s=stall,
        streamed_bytes=streamed_bytes,
        roofline_s=max(total, streamed_bytes / link.bandwidth_bytes_per_s),
    )


def run_passes(
    compute_s: Sequence[float],
    transfers: Sequence[Transfer],
    moved_bytes: Sequence[int],
    link: Link,
    served: list[tuple[float, float]] | None = None,
    *,
    cyclic: bool = True,
) -> list[StepTiming]:
    """Returns the timings of the steady pass.

    Args:
        compute_s: seconds of each plan step.
        transfers: in the order of the plan.
        moved_bytes: the bytes that each transfer reads.
        served: if given, start and end of each transfer are added, from the start of the pass that asked for it.
        cyclic: whether the pass repeats; the only pass has the first timing.
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
    landed = [0.0] * len(transfers)
    queue = LinkQueue(landed, seconds, link)
    now = 0.0
    for number in early:
        queue.add(number, now)
    state: list[float] = []
    pass_start = 0.0
    times: list[tuple[float, float, float]] = []
    for _ in range(MAX_PASSES if cyclic else 1):
        pass_start = now
        times = []
        for step in range(num_steps):
            start = now
            for number in needed[step]:
                if landed[number] > start:
                    start = landed[number]
            end = start + compute_s[step]
            times.append((start - pass_start, end - pass_start, start - now))
            now = end
            for number in issued[step]:
                queue.add(number, now)
            for number in ahead[step] if cyclic else ():
                queue.add(number, now)
        # A transfer ahead was used in this pass before its slot was free for the next.
        before, state = state, [now - pass_start, max(queue.free_s - now, 0.0), *(landed[n] - now for n in early)]
        scale = max(now - pass_start, 1e-12) * _SAME
        if len(before) == len(state) and all(abs(a - b) <= scale for a, b in zip(before, state, strict=True)):
            break
    if served is not None:
        served += [(end - size - pass_start, end - pass_start) for end, size in zip(landed, seconds, strict=True)]
    return [StepTiming(start_s=start, end_s=end, stall_s=stall) for start, end, stall in times]


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
    """Returns for each plan step the bytes of slots that transfers hold."""
    num_steps = len(plan.steps)
    deltas = [0] * (num_steps + 1)
    for transfer in plan.transfers:
        size = plan.bundles[transfer.bundle].size_bytes
        for first, end in occupied_steps(transfer, num_steps):
            deltas[first] += size
            deltas[end] -= size
    return list(accumulate(deltas[:num_steps]))


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
