"""How tensors born in a pass leave the device between two uses: written below and brought back, or made anew.

A write holds the slot until it is done. A plan says how long that may take: until the steps beside it have taken as
long as the write on an idle link. Whoever leaves that step waits for the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mball.plan.arrays import Bools, Floats, Ints, prefix_sums
from mball.plan.demand import Demand
from mball.plan.simulate import trace_times
from mball.schema import Link, Machine, Trace, Treatment


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """What a partition does with tensors that are born in the pass.

    Attributes:
        anew_within: one that may be both is made anew where that takes at most so many times as long as writing it and
            bringing it back, and offloaded otherwise.
        waits: whether the step that uses a tensor last waits for its write. No slot is held longer then.
    """

    anew_within: float = 1.0
    waits: bool = False


# With the least memory: nothing is held while it is written.
AT_ONCE = Leaving(waits=True)
# Links are what is waited for, or compute is, or both about as much.
WAYS = (Leaving(), Leaving(anew_within=0.0), Leaving(anew_within=math.inf), AT_ONCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """Arrays by bundle.

    Attributes:
        is_born: whether it is of a tensor that is born in the pass.
        is_anew: of those, whether it is made anew where it is not there.
        write_s: seconds on the link below where it is offloaded.
        anew_s: seconds of compute where it is made anew.
        before_s: seconds of compute before each step of the trace.
        waits: see `Leaving`.
    """

    is_born: Bools
    is_anew: Bools
    write_s: Floats
    anew_s: Floats
    before_s: Floats
    waits: bool

    def until(self, bundles: Ints, steps: Ints, reaches: Ints) -> Ints:
        """Returns the step that is left only when a write after `steps` is done, before the tensor is used again."""
        if self.waits:
            return steps.copy()
        done = np.searchsorted(self.before_s, self.before_s[steps + 1] + self.write_s[bundles])
        return np.clip(done - 1, steps, np.maximum(reaches - 1, steps))


def write_link(machine: Machine) -> Link:
    """Returns the link that tensors leave the device by."""
    return machine.link if machine.write_link is None else machine.write_link


def ways_out(trace: Trace, machine: Machine, demand: Demand, leaving: Leaving) -> Ways:
    """Returns how each bundle of `demand` leaves."""
    out = write_link(machine)
    is_anew = np.zeros(len(demand.bundles), dtype=bool)
    write_s, anew_s = np.zeros(len(demand.bundles)), np.zeros(len(demand.bundles))
    for bundle in np.flatnonzero(demand.born).tolist():
        tensor = trace.tensors[demand.bundles[bundle].tensors[0]]
        down_s = out.transfer_s(demand.moved_bytes[bundle])
        both_s = down_s + machine.link.transfer_s(demand.moved_bytes[bundle])
        may_offload, again_s = Treatment.OFFLOAD in tensor.may, tensor.recompute_s
        if again_s is None or (may_offload and again_s > leaving.anew_within * both_s):
            write_s[bundle] = down_s
        else:
            is_anew[bundle], anew_s[bundle] = True, again_s
    return Ways(
        is_born=np.array(demand.born, dtype=bool),
        is_anew=is_anew,
        write_s=write_s,
        anew_s=anew_s,
        before_s=prefix_sums(trace_times(trace)),
        waits=leaving.waits,
    )
