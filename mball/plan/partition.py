"""A trace under one partition of its weights into bundles: what every search and every policy starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mball.plan.bundles import TINY_WEIGHT_BYTES, even_bytes, lay_out_bundle
from mball.plan.demand import Demand
from mball.plan.flow import Flow
from mball.plan.simulate import trace_times
from mball.plan.uses import Uses
from mball.schema import Bundle, Machine, Trace


@dataclass(frozen=True)
class Partition:
    """A trace, a machine, and bundles.

    Attributes:
        trace: the pass.
        machine: runs it.
        demand: of the trace under the bundles.
    """

    trace: Trace
    machine: Machine
    demand: Demand

    @classmethod
    def of(
        cls, trace: Trace, machine: Machine, bundles: Sequence[Bundle], pooled: frozenset[int] = frozenset()
    ) -> Partition:
        """Returns the partition into these bundles, of which `pooled` must stay."""
        return cls(trace, machine, Demand.of(trace, bundles, pooled))

    @classmethod
    def like(cls, trace: Trace, machine: Machine, bundles: Sequence[Bundle]) -> Partition | None:
        """Returns the partition into bundles that were made for another plan, None if they are not of these weights."""
        if sorted(index for bundle in bundles for index in bundle.tensors) != [index for index, _ in trace.homed()]:
            return None
        for bundle in bundles:
            here = lay_out_bundle(bundle.tensors, trace, machine)
            if (bundle.tensors, bundle.offsets_bytes, bundle.extents) != (
                here.tensors,
                here.offsets_bytes,
                here.extents,
            ) or bundle.size_bytes not in (here.size_bytes, even_bytes(here, trace, machine)):
                return None
        tiny = {index for index, tensor in trace.homed() if tensor.size_bytes <= TINY_WEIGHT_BYTES}
        read = {index for needs in trace.needs() for index in needs}
        pooled = frozenset(
            number
            for number, bundle in enumerate(bundles)
            if len(bundle.tensors) > 1 and tiny.issuperset(bundle.tensors) and not read.isdisjoint(bundle.tensors)
        )
        return cls.of(trace, machine, bundles, pooled)

    @cached_property
    def uses(self) -> Uses:
        """When each bundle is used."""
        return Uses(self.trace, self.demand)

    @cached_property
    def flow(self) -> Flow:
        """Times passes."""
        times = trace_times(self.trace)
        return Flow(self.demand, times, self.machine.link, cyclic=self.trace.cyclic, floor=self.uses.floor)

    @property
    def read_bytes(self) -> int:
        """The slots of all bundles that are read."""
        return self.demand.slot_bytes(self.demand.read_bundles())
