"""The smallest budget of host memory that works beside a budget of the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mball.errors import ConfigError
from mball.plan.bundles import lay_out_bundle
from mball.plan.demand import Demand
from mball.plan.offloading import fewest_offloaded, most_offloaded, narrowed, offloadable
from mball.plan.partition import Partition
from mball.plan.problem import Problem
from mball.schema import Bundle, Machine, Trace
from mball.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallestHostBudget:
    """The smallest feasible budget of host memory beside a budget of the device.

    Attributes:
        size_bytes: the slot of the largest bundle that has to come to the device in each pass, and what has to be
            offloaded; this budget works, one page less is refused. 0 if all stays on the device.
        limited_by: for people: what sets the number.
    """

    size_bytes: int
    limited_by: str


def smallest_host_budget(
    trace: Trace, machine: Machine, budget_bytes: int, *, fixed_bytes: int = 0
) -> SmallestHostBudget:
    """Returns the smallest host budget under which `trace` can be planned with `budget_bytes` on the device.

    There the largest weights stay on the device, as many as its budget holds, and the others come through one slot.

    Raises:
        BudgetError: the budget of the device is below the smallest that works, which the error names.
        ConfigError: the machine has no link from disk to host memory, or `fixed_bytes` is negative.
        SchemaError: trace or machine contradict themselves.
    """
    if machine.disk_link is None:
        raise ConfigError(
            f"machine {machine.name!r} has no disk_link: host memory needs no budget where bundles do not come through "
            "it; give the machine a disk_link"
        )
    problems = Problem.ways(trace, machine, budget_bytes, fixed_bytes=fixed_bytes, host_budget_bytes=0)
    return smallest_host_for(problems)[0]


def smallest_host_for(problems: Sequence[Problem]) -> tuple[SmallestHostBudget, Problem]:
    """Returns the same for a pass, given as the problems in which its tensors leave or stay, and the one it is of.

    Where tensors may leave, these are all of them, as few as can be offloaded, or none: the more leave the more is left
    of the device for what would come through a large slot.
    """
    best: tuple[SmallestHostBudget, Problem] | None = None
    for problem in problems:
        for narrower in _narrower(problem) if problem.born else (problem,):
            found = _smallest_slots(narrower)
            if offloaded := narrower.offload_budget_bytes:
                found = SmallestHostBudget(
                    size_bytes=offloaded + found.size_bytes,
                    limited_by=f"{format_bytes(offloaded)} of what is born in the pass are offloaded at one time, and "
                    f"{found.limited_by}",
                )
            if best is None or found.size_bytes < best[0].size_bytes:
                best = found, narrower
    assert best is not None, "there is a problem, and it is one that fits the device"
    return best


def _narrower(problem: Problem) -> Iterator[Problem]:
    """Yields the problem if none are offloaded, the fewest, or all that may be, with room for that."""
    every = frozenset(each.index for each in offloadable(problem))
    for allowed in dict.fromkeys((frozenset[int](), fewest_offloaded(problem), every)):
        found = narrowed(problem, allowed, most_offloaded(problem, allowed))
        if found is not None:
            yield found


def _smallest_slots(problem: Problem) -> SmallestHostBudget:
    """Returns what the weights need."""
    if confined(problem, 0) is not None:
        return SmallestHostBudget(size_bytes=0, limited_by="all that is read stays on the device")
    demand = problem.finest.demand
    read = _weights(demand)
    single = Demand.of(problem.trace, _split(problem, 0))
    sizes = sorted(
        {demand.bundles[bundle].size_bytes for bundle in read}
        | {single.bundles[bundle].size_bytes for bundle in _weights(single)}
    )
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        if confined(problem, sizes[middle]) is None:
            low = middle + 1
        else:
            high = middle
    size_bytes = sizes[low]
    return SmallestHostBudget(
        size_bytes=size_bytes,
        limited_by=(
            f"what does not stay on the device comes through one slot, and {format_bytes(problem.arena_bytes)} there "
            f"cannot hold all bundles of {format_bytes(size_bytes)} or more"
        ),
    )


def confined(problem: Problem, largest_bytes: int) -> Partition | None:
    """Returns a partition that fits the device where bundles with larger slots stay there, as its `pooled` ones.

    None if the two below do not fit: the finest bundles, and those with each weight by itself that shares a bundle
    larger than that. Where such a partition fits, it does with nothing else resident and no gap bridged but stretches.
    """
    for bundles in (problem.finest.demand.bundles, _split(problem, largest_bytes)):
        partition = Partition.of(problem.trace, problem.machine, bundles)
        demand = partition.demand
        large = {bundle for bundle in _weights(demand) if demand.bundles[bundle].size_bytes > largest_bytes}
        if large and not problem.trace.cyclic:
            continue
        uses = partition.uses
        if not large.isdisjoint(uses.bundle[~uses.may_stay].tolist()):
            continue
        kept_bytes = demand.slot_bytes(sorted(large))
        most_bytes = max(
            (demand.slot_bytes([bundle for bundle in reads if bundle not in large]) for reads in demand.reads),
            default=0,
        )
        if kept_bytes + most_bytes <= problem.arena_bytes:
            return Partition.of(problem.trace, problem.machine, bundles, frozenset(large))
    return None


def _weights(demand: Demand) -> list[int]:
    """Returns the bundles that are read and come from disk."""
    return [bundle for bundle in demand.read_bundles() if not demand.born[bundle]]


def _split(problem: Problem, largest_bytes: int) -> list[Bundle]:
    """Returns the finest bundles, those with larger slots by single weights."""
    trace, machine = problem.trace, problem.machine
    bundles: list[Bundle] = []
    for bundle in problem.finest.demand.bundles:
        if bundle.size_bytes > largest_bytes and len(bundle.tensors) > 1:
            bundles += [lay_out_bundle([index], trace, machine) for index in bundle.tensors]
        else:
            bundles.append(bundle)
    return bundles
