"""How bytes leave the device: what is born in a pass is written below or made anew, what steps change is written back.

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
        is_below: of those, whether a step on the host lane bears it: it is never written, only brought.
        is_anew: of those, whether it is made anew where it is not there.
        is_changed: whether it has a home and steps on the device change it.
        first_read: the first step on the host lane that reads it, if it is born on the device: it is written before
            that. -1 for others.
        write_s: seconds on the link below where it is offloaded.
        anew_s: seconds of compute where it is made anew.
        before_s: seconds of compute before each step of the trace.
        waits: see `Leaving`.
    """

    is_born: Bools
    is_below: Bools
    is_anew: Bools
    is_changed: Bools
    first_read: Ints
    write_s: Floats
    anew_s: Floats
    before_s: Floats
    waits: bool

    @property
    def always_written(self) -> Bools:
        """Whether a bundle is written in each pass, wherever it stays."""
        return self.is_changed | (self.first_read >= 0)

    def until(self, bundles: Ints, steps: Ints, reaches: Ints) -> Ints:
        """Returns the step that is left only when a write after `steps` is done, before the tensor is used again.

        Steps may lie in the pass before or after, counted on.
        """
        if self.waits:
            return steps.copy()
        count, pass_s = len(self.before_s) - 1, self.before_s[-1]
        passes, within = np.divmod(steps, count)
        ends_s = self.before_s[within + 1] + self.write_s[bundles]
        over = np.floor_divide(ends_s, pass_s) if pass_s else np.zeros(len(steps))
        over = np.where(ends_s == pass_s, 0, np.minimum(over, 2)).astype(np.int64)
        done = np.searchsorted(self.before_s, ends_s - over * pass_s) + (passes + over) * count
        return np.clip(done - 1, steps, np.maximum(reaches - 1, steps))


def write_link(machine: Machine) -> Link:
    """Returns the link that tensors leave the device by."""
    return machine.link if machine.write_link is None else machine.write_link


def ways_out(trace: Trace, machine: Machine, demand: Demand, leaving: Leaving) -> Ways:
    """Returns how each bundle of `demand` leaves."""
    out, at_home = write_link(machine), demand.at_home
    is_below, is_changed = np.zeros(len(demand.bundles), dtype=bool), np.zeros(len(demand.bundles), dtype=bool)
    first_read = np.full(len(demand.bundles), -1, dtype=np.int64)
    is_anew = np.zeros(len(demand.bundles), dtype=bool)
    write_s, anew_s = np.zeros(len(demand.bundles)), np.zeros(len(demand.bundles))
    for bundle in np.flatnonzero(demand.born).tolist():
        tensor = trace.tensors[demand.bundles[bundle].tensors[0]]
        if trace.is_born_below(tensor):
            is_below[bundle] = True
            continue
        first_read[bundle] = at_home.host_reads.get(bundle, (-1,))[0]
        down_s = out.transfer_s(demand.moved_bytes[bundle])
        both_s = down_s + machine.link.transfer_s(demand.moved_bytes[bundle])
        may_offload, again_s = Treatment.OFFLOAD in tensor.may, tensor.recompute_s
        is_cheap = again_s is not None and again_s <= leaving.anew_within * both_s
        if again_s is None or first_read[bundle] >= 0 or (may_offload and not is_cheap):
            write_s[bundle] = down_s
        else:
            is_anew[bundle], anew_s[bundle] = True, again_s
    for bundle, size_bytes in at_home.changed_bytes.items():
        is_changed[bundle], write_s[bundle] = True, out.transfer_s(size_bytes)
    return Ways(
        is_born=np.array(demand.born, dtype=bool),
        is_below=is_below,
        is_anew=is_anew,
        is_changed=is_changed,
        first_read=first_read,
        write_s=write_s,
        anew_s=anew_s,
        before_s=prefix_sums(trace_times(trace)),
        waits=leaving.waits,
    )
