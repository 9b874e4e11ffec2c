"""What happens beside the visits of a pass, for its estimate: the host lane, and writes of what stays.

The host lane is taken to follow a pass that waits for nothing. Where steps wait, what it writes is there a little
sooner than is said here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mball.plan.arrays import Floats, Ints
from mball.plan.at_home import host_times
from mball.plan.demand import Demand
from mball.plan.leaving import write_link
from mball.plan.simulate import trace_times
from mball.plan.uses import NEVER, Uses
from mball.schema import Lane, Machine, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What a pass does beside its visits.

    Attributes:
        host_s: how long the host lane works in a pass.
        ready_s: of each gap when the host lane has written the bundle for the visit after it, from the begin of the
            pass of that visit if no step waits; -inf where it does not. None if it writes nothing.
        written_back: see `Uses.written_back`.
    """

    host_s: float
    ready_s: Floats | None
    written_back: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, trace: Trace, machine: Machine, demand: Demand, uses: Uses) -> Beside | None:
        """Returns what there is, None for a pass on the device alone that writes nothing back."""
        written_back = tuple(uses.written_back())
        if not written_back and all(step.lane is Lane.COMPUTE for step in trace.steps):
            return None
        host_s = host_times(trace, machine)
        ready_s = None
        if uses.host_floor is not None:
            ready_s = _ready_times(trace, machine, demand, host_s, uses.host_floor)
        return cls(host_s=sum(host_s), ready_s=ready_s, written_back=written_back)

    def delay_s(self, gaps: Ints, free_s: Floats) -> Floats:
        """Returns how much later than `free_s`, from the begin of their passes, visits after these gaps may begin."""
        assert self.ready_s is not None, "asked only where the host lane writes something"
        return np.maximum(self.ready_s[gaps] - free_s, 0.0)


def _ready_times(trace: Trace, machine: Machine, demand: Demand, host_s: list[float], floor: Ints) -> Floats:
    compute_s = trace_times(trace)
    pass_s = max(sum(compute_s), sum(host_s))
    out, at_home = write_link(machine), demand.at_home
    offloaded_s = [0.0] * len(trace.steps)
    for bundle, steps in at_home.host_reads.items():
        if demand.born[bundle] or bundle in at_home.changed_bytes:
            size_bytes = at_home.changed_bytes.get(bundle, demand.moved_bytes[bundle])
            for step in steps:
                offloaded_s[step] = max(offloaded_s[step], out.transfer_s(size_bytes))
    ends_s = np.zeros(len(trace.steps))
    free_s = 0.0
    for number in range(2 if trace.cyclic else 1):  # the second time the lane may still be busy with the pass before
        now_s = number * pass_s
        for step, seconds in enumerate(host_s):
            now_s += compute_s[step]
            if trace.steps[step].lane is Lane.HOST:
                free_s = max(free_s, now_s + offloaded_s[step]) + seconds
            ends_s[step] = free_s - number * pass_s
    passes, within = np.divmod(np.maximum(floor, -len(trace.steps)), max(len(trace.steps), 1))
    found = ends_s[within] + passes * pass_s
    return np.where(floor > NEVER, found, -np.inf)
