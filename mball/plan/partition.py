"""A trace under one partition of its weights into bundles: what every search and every policy starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from mball.plan.beside import Beside
from mball.plan.bundles import TINY_WEIGHT_BYTES, even_bytes, lay_out_bundle
from mball.plan.demand import Demand
from mball.plan.flow import Flow
from mball.plan.leaving import AT_ONCE, Leaving, Ways, ways_out
from mball.plan.simulate import gathered_bytes, rows_times, trace_times
from mball.plan.uses import Uses
from mball.schema import Bundle, Machine, Trace


@dataclass(frozen=True)
class Partition:
    """A trace, a machine, and bundles.

    Attributes:
        trace: the pass.
        machine: runs it.
        demand: of the trace under the bundles.
        leaving: what becomes of tensors that are born in the pass, and how much time they have for it.
    """

    trace: Trace
    machine: Machine
    demand: Demand
    leaving: Leaving

    @classmethod
    def of(
        cls,
        trace: Trace,
        machine: Machine,
        bundles: Sequence[Bundle],
        pooled: frozenset[int] = frozenset(),
        leaving: Leaving = AT_ONCE,
    ) -> Partition:
        """Returns the partition into these bundles, of which `pooled` must stay."""
        return cls(trace, machine, Demand.of(trace, bundles, pooled), leaving)

    @classmethod
    def like(cls, finest: Partition, bundles: Sequence[Bundle]) -> Partition | None:
        """Returns the partition into bundles that were made for another plan, None if they are not of these tensors.

        The bundles are those of `group_weights`, which puts tiny weights into pools and nowhere else, or the finest
        ones, of which none is a pool. Those of tensors born in the pass come last.

        Args:
            finest: the pass under its finest bundles.
            bundles: of the other plan.
        """
        trace, machine = finest.trace, finest.machine
        born = tuple(
            bundle for bundle, is_born in zip(finest.demand.bundles, finest.demand.born, strict=True) if is_born
        )
        weights = tuple(bundles[: len(bundles) - len(born)])
        if tuple(bundles[len(weights) :]) != born:
            return None
        if sorted(index for bundle in weights for index in bundle.tensors) != [index for index, _ in trace.homed()]:
            return None
        known = {bundle.tensors: bundle for bundle in finest.demand.bundles}
        is_finest = len(bundles) == len(finest.demand.bundles)
        for bundle in weights:
            here = known.get(bundle.tensors)
            if here is None:
                here, is_finest = lay_out_bundle(bundle.tensors, trace, machine), False
            if bundle == here:
                continue
            is_finest = False
            if (bundle.tensors, bundle.offsets_bytes, bundle.extents) != (
                here.tensors,
                here.offsets_bytes,
                here.extents,
            ) or bundle.size_bytes not in (here.size_bytes, even_bytes(here, trace, machine)):
                return None
        if is_finest and bundles == finest.demand.bundles:
            return cls(trace, machine, finest.demand, Leaving())
        if is_finest:
            return cls.of(trace, machine, bundles, leaving=Leaving())
        tiny = {index for index, tensor in trace.homed() if tensor.size_bytes <= TINY_WEIGHT_BYTES}
        read = set(chain.from_iterable(trace.needs()))
        pooled = frozenset(
            number
            for number, bundle in enumerate(weights)
            if tiny.issuperset(bundle.tensors) and not read.isdisjoint(bundle.tensors)
        )
        return cls.of(trace, machine, bundles, pooled, Leaving())

    @cached_property
    def uses(self) -> Uses:
        """When each bundle is used."""
        return Uses(self.trace, self.demand, self.ways)

    @cached_property
    def ways(self) -> Ways | None:
        """How tensors that are born in the pass leave and come again, and what changes; None if nothing does."""
        at_home = self.demand.at_home
        if not any(self.demand.born) and not at_home.device_writes and not at_home.host_writes:
            return None
        return ways_out(self.trace, self.machine, self.demand, self.leaving)

    @cached_property
    def flow(self) -> Flow:
        """Times passes."""
        # Where anything is streamed no table is resident: rows of tables are then read at home.
        gathered = gathered_bytes(self.trace, self.demand.bundles, set(self.demand.read_bundles()))
        rows_s = rows_times(gathered, self.machine)
        return Flow(
            self.demand,
            [compute_s + wait_s for compute_s, wait_s in zip(trace_times(self.trace), rows_s, strict=True)],
            self.machine,
            cyclic=self.trace.cyclic,
            floor=self.uses.floor,
            ways=self.ways,
            beside=Beside.of(self.trace, self.machine, self.demand, self.uses),
        )

    @property
    def read_slot_bytes(self) -> int:
        """The slots of all bundles that are read."""
        return self.demand.slot_bytes(self.demand.read_bundles())
