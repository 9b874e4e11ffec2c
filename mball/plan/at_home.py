"""What happens to the bytes below the device besides being brought: steps use them there, and the device writes back.

[Note: what waits for what]
A bundle has one place below the device, in its home or where it was offloaded to. Steps on the host lane use it in
place; what steps on the device have changed is written back to it. So a step on the host lane waits for the last write
before it, a write waits for the last such step before it, and a transfer for the last that wrote.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from mball.schema import Bundle, Lane, Machine, PlanStep, Trace

# What a step that was never measured is taken to cost: one read of its weights at this speed.
UNMEASURED_BYTES_PER_S = 20e9

Steps = dict[int, list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AtHome:
    """Steps by bundle, ascending; bundles without any are left out.

    Attributes:
        host_uses: steps on the host lane that read, write or bear it.
        host_reads: of those the ones that read it.
        host_writes: of those the ones that write or bear it.
        device_writes: steps on the device that change it.
        changed_bytes: of each bundle that steps on the device change, the bytes of the tensors that they change.
    """

    host_uses: Steps = field(default_factory=dict)
    host_reads: Steps = field(default_factory=dict)
    host_writes: Steps = field(default_factory=dict)
    device_writes: Steps = field(default_factory=dict)
    changed_bytes: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, trace: Trace, bundles: Sequence[Bundle], steps: Sequence[PlanStep] | None = None) -> Self:
        """Returns what the steps of a trace do, or the steps of a plan that run them."""
        found = cls()
        if not any(step.writes or step.lane is Lane.HOST for step in trace.steps):
            return found
        step_of: Sequence[int] = range(len(trace.steps))
        if steps is not None:
            step_of = [number for number, step in enumerate(steps) for _ in range(step.first, step.end)]
        bundle_of = {index: number for number, bundle in enumerate(bundles) for index in bundle.tensors}
        changed: dict[int, set[int]] = {}

        def add(where: Steps, index: int, number: int) -> None:
            known = where.setdefault(bundle_of[index], [])
            if step_of[number] not in known[-1:]:
                known.append(step_of[number])

        born: list[list[int]] = [[] for _ in trace.steps]
        for index, tensor in trace.movable():
            if index in bundle_of and trace.is_born_below(tensor):
                assert tensor.live is not None
                born[tensor.live.first].append(index)
        for number, step in enumerate(trace.steps):
            if step.lane is Lane.COMPUTE:
                for index in step.writes:
                    if trace.tensors[index].size_bytes:
                        add(found.device_writes, index, number)
                        changed.setdefault(bundle_of[index], set()).add(index)
                continue
            for index in (*step.reads, *(gather.tensor for gather in step.gathers)):
                if index in bundle_of and index not in born[number]:
                    add(found.host_reads, index, number)
                    add(found.host_uses, index, number)
            for index in (*step.writes, *born[number]):
                add(found.host_writes, index, number)
                add(found.host_uses, index, number)
        for bundle, indices in changed.items():
            found.changed_bytes[bundle] = sum(trace.tensors[index].size_bytes for index in indices)
        return found

    def host_write(self, bundle: int, after: int, num_steps: int, *, cyclic: bool) -> int | None:
        """Returns the last step on the host lane that writes or bears a bundle and is not after step `after`.

        Steps count from the pass of `after`, and where the pass repeats it may be of an earlier one. None: none does.
        """
        return last_of(self.host_writes.get(bundle, ()), after, num_steps, cyclic=cyclic)


def last_of(steps: Sequence[int], after: int, num_steps: int, *, cyclic: bool) -> int | None:
    """Returns the last of these steps of a pass, ascending, that is not after step `after`; maybe of a pass before.

    Args:
        steps: within the pass.
        after: may lie in another pass.
        num_steps: of a pass.
        cyclic: whether there are passes before.
    """
    if not steps:
        return None
    passes, within = divmod(after, num_steps)
    at = bisect_right(steps, within) - 1
    if at < 0 and cyclic:
        passes, at = passes - 1, len(steps) - 1
    if at < 0 or (passes < 0 and not cyclic):
        return None
    return steps[at] + passes * num_steps


def first_of(steps: Sequence[int], start: int, num_steps: int) -> int:
    """Returns the first of these steps of a pass that repeats, ascending, at step `start` or after it."""
    passes, within = divmod(start, num_steps)
    at = bisect_left(steps, within)
    return steps[at] + passes * num_steps if at < len(steps) else steps[0] + (passes + 1) * num_steps


def host_times(trace: Trace, machine: Machine) -> list[float]:
    """Returns for each trace step its seconds on the host lane; 0 for those on the device.

    Measured, or estimated from the bytes that it reads and writes, and no less than these take in host memory.
    """
    born = [0] * len(trace.steps)
    for tensor in trace.tensors:
        if tensor.live is not None:
            born[tensor.live.first] += tensor.size_bytes
    speed = machine.host_bandwidth_bytes_per_s
    found = []
    for number, step in enumerate(trace.steps):
        if step.lane is Lane.COMPUTE:
            found.append(0.0)
            continue
        used = sum(trace.tensors[index].size_bytes for index in (*step.reads, *step.writes))
        used += sum(gather.size_bytes for gather in step.gathers) + born[number]
        seconds = used / UNMEASURED_BYTES_PER_S if step.time_s is None else step.time_s
        found.append(seconds if speed is None else max(seconds, used / speed))
    return found


def changed_alike(trace: Trace) -> list[tuple[tuple[int, bool], ...]]:
    """Returns for each tensor the steps that change it, and whether on the host lane: what is alike may move together.

    Of one that steps on the device change also those on the host lane that read it.
    """
    found: list[list[tuple[int, bool]]] = [[] for _ in trace.tensors]
    on_device = {index for step in trace.steps if step.lane is Lane.COMPUTE for index in step.writes}
    for number, step in enumerate(trace.steps):
        on_host = step.lane is Lane.HOST
        reads = on_device.intersection(step.reads) if on_host else ()
        for index in {*step.writes, *reads}:
            found[index].append((number, on_host))
    return [tuple(each) for each in found]
