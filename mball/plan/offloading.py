"""Who is offloaded, where the tier below has room for some only.

[Note: fewer leave]
What is offloaded takes its bytes below until it is back. Where those would be too many at one time, the pass is
planned as if only some tensors could be offloaded: of the others those that can be are made anew, and the rest stays.
Any plan of such a pass needs at most what all that may be offloaded take if they leave at birth and come back for their
last use. So the sets of tensors are chosen by that, and the search does the rest.

What stays does so among the activations, which are set aside for the whole pass: it is known then what fits. Or in a
slot, which others have before and after: to the search it is then made anew at a price that nobody pays if there is
another way, and where it found none its draft is of no use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from mball.errors import BudgetError, ConfigError
from mball.plan.arrays import Ints, prefix_sums
from mball.plan.bundles import crossing
from mball.plan.draft import Draft
from mball.plan.problem import Problem
from mball.plan.simulate import Movement, offloaded_bytes, trace_times
from mball.plan.smallest import smallest_budget
from mball.schema import Lane, Machine, Trace, Treatment
from mball.units import format_bytes, round_up

# So often the tensors that make a plan need too much below are taken from it, and the pass is planned without.
ROUNDS = 3
# Seconds to make a tensor anew that cannot be: more than any pass takes.
NEVER_S = 1e4

Search = Callable[[Problem], Draft | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloadable:
    """A tensor that may be offloaded.

    Attributes:
        index: of the trace.
        size_bytes: what it takes below, in whole pages.
        first, end: the steps at whose begin it may be below: from the one after its birth to its last use.
        value_s: seconds that a byte of it below is worth in a pass: it is made anew else, or takes room from weights.
        is_anew: whether it may be made anew instead.
    """

    index: int
    size_bytes: int
    first: int
    end: int
    value_s: float
    is_anew: bool


def offloadable(problem: Problem) -> list[Offloadable]:
    """Returns the tensors with a place in the problem that may be offloaded and need not be, by index."""
    trace, machine = problem.trace, problem.machine
    before_s = prefix_sums(trace_times(trace))
    bandwidth = (machine.disk_link or machine.link).bandwidth_bytes_per_s
    placed = {bundle.tensors[0] for bundle in problem.born} - crossing(trace)
    found = []
    for index, tensor in trace.movable():
        if Treatment.OFFLOAD not in tensor.may or index not in placed or tensor.live is None:
            continue
        first, end = tensor.live.first, tensor.live.end
        # Staying takes its bytes from weights for a part of the pass: so much of them comes over the link instead.
        away_s = float(before_s[end - 1] - before_s[first + 1]) if end - 1 > first else 0.0
        value_s = away_s / max(float(before_s[-1]), 1e-12) / bandwidth
        if tensor.recompute_s is not None:
            value_s = min(value_s, tensor.recompute_s / max(tensor.size_bytes, 1))
        found.append(
            Offloadable(
                index=index,
                size_bytes=round_up(tensor.size_bytes, machine.page_bytes),
                first=first + 1,
                end=end,
                value_s=value_s,
                is_anew=tensor.recompute_s is not None,
            )
        )
    return found


def most_offloaded(problem: Problem, allowed: Collection[int]) -> int:
    """Returns the most bytes below at one time if only these tensors may be offloaded, whatever the plan is."""
    return _Room(problem, [each for each in offloadable(problem) if each.index in allowed]).peak_bytes


def narrowed(
    problem: Problem, allowed: Collection[int], offload_budget_bytes: int | None, *, in_slots: bool = False
) -> Problem | None:
    """Returns the problem if only these tensors may be offloaded; None if the device is too small then.

    With `in_slots` what stays does so in slots; then `is_sound` says which drafts are of use.
    """
    try:
        return Problem.of(
            _narrowed_trace(problem.trace, allowed, NEVER_S if in_slots else None),
            problem.machine,
            problem.budget_bytes,
            fixed_bytes=problem.fixed_bytes,
            previous=problem.previous,
            moves_born=True,
            host_budget_bytes=problem.host_budget_bytes,
            offload_budget_bytes=offload_budget_bytes,
        )
    except BudgetError:
        return None


def _narrowed_trace(trace: Trace, allowed: Collection[int], anew_s: float | None) -> Trace:
    """Returns the pass; what is not allowed to leave and cannot be made anew is taken to be in `anew_s`, if given."""
    tensors, stays = list(trace.tensors), {*allowed, *crossing(trace)}
    for index, tensor in enumerate(tensors):
        if Treatment.OFFLOAD not in tensor.may or index in stays:
            continue
        if tensor.recompute_s is None and anew_s is not None:
            tensors[index] = replace(tensor, may=(Treatment.STAY, Treatment.RECOMPUTE), recompute_s=anew_s)
        else:
            tensors[index] = replace(tensor, may=tuple(each for each in tensor.may if each is not Treatment.OFFLOAD))
    return replace(trace, tensors=tuple(tensors))


def is_sound(trace: Trace, plan: Movement) -> bool:
    """Returns whether all that is made anew, in a plan or draft of a narrower problem, can be."""
    anew = [plan.bundles[made.bundle].tensors[0] for made in plan.made if made.is_anew]
    return all(Treatment.RECOMPUTE in trace.tensors[index].may for index in anew)


def fewest_offloaded(problem: Problem) -> frozenset[int]:
    """Returns a set of tensors with which the device is large enough, and that needs little room below.

    None of them can be made anew. Where most is below at one time the largest stays instead, if the device can hold it
    beside all others that stay; this is repeated while there is one.
    """
    trace, finest = problem.trace, problem.finest
    slots = np.array([finest.demand.slot_bytes(reads) for reads in finest.demand.reads], dtype=np.int64)
    apart = {index for bundle in finest.demand.bundles for index in bundle.tensors}
    activations = np.array(trace.activation_bytes(apart), dtype=np.int64)
    uses = {bundle.tensors[0]: number for number, bundle in enumerate(finest.demand.bundles) if bundle.tensors}
    most_bytes = problem.budget_bytes - problem.fixed_bytes
    # The largest first, of those the ones that are worth least.
    tensors = [each for each in offloadable(problem) if not each.is_anew]
    tensors.sort(key=lambda each: (-each.size_bytes, each.value_s, each.index))
    firsts = np.array([each.first for each in tensors], dtype=np.int64)
    ends = np.array([each.end for each in tensors], dtype=np.int64)
    untried = np.ones(len(tensors), dtype=bool)
    stays: set[int] = set()
    room = _Room(problem, tensors)
    while room.peak_bytes:
        step = room.peak_step
        here = untried & (firsts <= step) & (step < ends)
        if not here.any():
            break
        number = int(here.argmax())
        untried[number] = False
        one = tensors[number]
        used = list(finest.demand.uses[uses[one.index]])
        slots[used] -= one.size_bytes
        activations[one.first - 1 : one.end] += trace.tensors[one.index].size_bytes
        if int(slots.max()) + int(activations.max()) <= most_bytes:
            stays.add(one.index)
            room.give(one)
        else:
            slots[used] += one.size_bytes
            activations[one.first - 1 : one.end] -= trace.tensors[one.index].size_bytes
    return frozenset(each.index for each in tensors if each.index not in stays)


def sets_within(problem: Problem, limit_bytes: int) -> Iterator[frozenset[int]]:
    """Yields sets of tensors that need at most so many bytes below at one time, whatever the plan is.

    First those that are worth most, then the same beside those that have to leave, these alone, and none.
    """
    found: list[frozenset[int]] = []
    fewest = fewest_offloaded(problem)
    for needed in (frozenset[int](), fewest):
        if most_offloaded(problem, needed) > limit_bytes:
            continue
        for chosen in (_worth_most(problem, needed, limit_bytes), needed):
            if chosen not in found:
                found.append(chosen)
    # None of them, the least that there is, comes last.
    yield from sorted(found, key=lambda chosen: not chosen)


def _worth_most(problem: Problem, needed: Collection[int], limit_bytes: int) -> frozenset[int]:
    """Returns these tensors and others that fit beside them, those first that are worth most."""
    tensors = offloadable(problem)
    room = _Room(problem, [each for each in tensors if each.index in needed])
    chosen = set(needed)
    for each in sorted(tensors, key=lambda each: (-each.value_s, each.index)):
        if each.index not in chosen and room.most_bytes(each) + each.size_bytes <= limit_bytes:
            room.take(each)
            chosen.add(each.index)
    return frozenset(chosen)


def drafts_within(problem: Problem, draft: Draft, limit_bytes: int, search: Search) -> Iterator[tuple[Problem, Draft]]:
    """Yields drafts that need at most so many bytes below, each with the narrower problem that it is of.

    Args:
        problem: the pass.
        draft: of it, which needs more.
        limit_bytes: below the device.
        search: returns the fastest draft of a problem, None where it finds none.
    """
    if host_lane_bytes(problem.trace, problem.machine) > limit_bytes:
        return  # no set of the others helps
    tried: set[tuple[frozenset[int], bool]] = set()

    def drafted(allowed: frozenset[int], *, in_slots: bool) -> tuple[Problem, Draft] | None:
        tried.add((allowed, in_slots))
        narrower = narrowed(problem, allowed, limit_bytes, in_slots=in_slots)
        found = None if narrower is None else search(narrower)
        if narrower is None or found is None or not is_sound(problem.trace, found):
            return None
        return narrower, found

    for in_slots in (True, False):
        allowed, too_much = frozenset(each.index for each in offloadable(problem)), draft
        for _ in range(ROUNDS):
            allowed -= _least_worth(problem, too_much, limit_bytes)
            found = drafted(allowed, in_slots=in_slots)
            if found is None:
                break
            too_much = found[1]
            if peak_offloaded(too_much) <= limit_bytes:
                yield found
                break
    for chosen in (*placed_before(problem), *sets_within(problem, limit_bytes)):
        for in_slots in (True, False):
            found = None if (chosen, in_slots) in tried else drafted(chosen, in_slots=in_slots)
            if found is not None and peak_offloaded(found[1]) <= limit_bytes:
                yield found


def peak_offloaded(draft: Draft) -> int:
    """Returns the most bytes of offloaded tensors below at one time."""
    return max(offloaded_bytes(draft), default=0)


def placed_before(problem: Problem) -> list[frozenset[int]]:
    """Returns, if there was a plan before, the tensors that may be offloaded and had a place in it."""
    if problem.previous is None:
        return []
    placed = {index for bundle in problem.previous.bundles for index in bundle.tensors}
    return [frozenset(each.index for each in offloadable(problem) if each.index in placed)]


def check_offload_budget(machine: Machine, offload_budget_bytes: int | None) -> None:
    """Raises ConfigError unless the budget, if there is one, caps what host memory's own budget does not."""
    if offload_budget_bytes is None:
        return
    if machine.disk_link is not None:
        raise ConfigError(
            f"offload_budget_bytes is {offload_budget_bytes} B, and machine {machine.name!r} has a disk_link: there "
            "offloaded tensors share host_budget_bytes with what comes from disk; leave offload_budget_bytes out"
        )
    if offload_budget_bytes < 0:
        raise ConfigError(f"offload_budget_bytes is {offload_budget_bytes}; it must be zero or more, or None")


def host_lane_bytes(trace: Trace, machine: Machine) -> int:
    """Returns the bytes below that what goes to the host lane takes at one time at least, under any plan.

    What no step on the device reads after its birth has its bytes there throughout; of the others each has for a time.
    """
    throughout, for_a_time = 0, 0
    for index in crossing(trace):
        tensor = trace.tensors[index]
        if trace.is_born_below(tensor) or tensor.live is None:
            continue
        size_bytes = round_up(tensor.size_bytes, machine.page_bytes)
        later = trace.steps[tensor.live.first + 1 : tensor.live.end]
        if any(step.lane is Lane.COMPUTE and index in step.reads for step in later):
            for_a_time = max(for_a_time, size_bytes)
        else:
            throughout += size_bytes
    return throughout + for_a_time


def offload_error(problem: Problem, known_bytes: int) -> BudgetError:
    """Returns what is wrong with the offload budget of a problem for which no plan was found, and what works.

    Args:
        problem: the pass.
        known_bytes: what a plan needs that would have been taken.
    """
    limit_bytes = problem.offload_budget_bytes
    assert limit_bytes is not None, "asked only where there is one"
    trace, device = problem.trace, format_bytes(problem.budget_bytes)
    smallest, alone = known_bytes, _smallest_alone(problem)
    way_out = "raise the offload budget to that"
    if not crossing(trace):  # those of the host lane are below in any plan
        smallest = min(most_offloaded(problem, fewest_offloaded(problem)), smallest)
        limited_by = f"the device, with {device}, cannot hold more of the tensors that cannot be made anew"
        way_out += f", or raise the budget of the device (with {alone} B nothing has to be offloaded)"
    elif (to_host := host_lane_bytes(trace, problem.machine)) > limit_bytes:
        limited_by = (
            f"what goes to the host lane takes {format_bytes(to_host)} ({to_host} B) there by itself, whatever the "
            "budget of the device is"
        )
    elif alone > problem.budget_bytes:
        limited_by = f"the device, with {device}, cannot hold more of the tensors that need not go to the host lane"
        way_out += (
            f", or raise the budget of the device (with {alone} B nothing has to be offloaded that does not go to the "
            "host lane)"
        )
    else:
        limited_by = "no plan was found in which what goes to the host lane takes less there"
    below = problem.machine.link.source.value
    return BudgetError(
        f"offload budget {format_bytes(limit_bytes)} ({limit_bytes} B) on tier {below} is too small for "
        f"{trace.name!r} with {device} on the device: {format_bytes(smallest)} ({smallest} B) are known to work, and "
        f"{limited_by}; {way_out}",
        budget_bytes=limit_bytes,
        smallest_bytes=smallest,
        limited_by=limited_by,
    )


def _smallest_alone(problem: Problem) -> int:
    """Returns the smallest budget of the device under which nothing but what goes to the host lane is offloaded."""
    trace = _narrowed_trace(problem.trace, (), None)
    return smallest_budget(trace, problem.machine, fixed_bytes=problem.fixed_bytes).size_bytes


def _least_worth(problem: Problem, draft: Draft, limit_bytes: int) -> set[int]:
    """Returns of the tensors that a draft offloads those that are worth least, so that the others need no more."""
    room = np.array(offloaded_bytes(draft), dtype=np.int64)
    back = {transfer.bundle: transfer.needed_by for transfer in draft.transfers}
    tensors = {each.index: each for each in offloadable(problem)}
    left = {draft.bundles[offload.bundle].tensors[0]: offload for offload in draft.offloads}
    left = {index: offload for index, offload in left.items() if index in tensors}
    gone: set[int] = set()
    while int(room.max()) > limit_bytes:
        step = int(room.argmax())
        here = [index for index, each in left.items() if each.after < step <= back[each.bundle]]
        if not here:  # what is left is for the host lane
            break
        index = min(here, key=lambda index: (tensors[index].value_s, -tensors[index].size_bytes, index))
        offload = left.pop(index)
        room[offload.after + 1 : back[offload.bundle] + 1] -= tensors[index].size_bytes
        gone.add(index)
    return gone


class _Room:
    """What tensors take below, at the begin of each step, if all of them leave at birth until their last use."""

    def __init__(self, problem: Problem, tensors: Iterable[Offloadable]) -> None:
        self._bytes: Ints = np.zeros(len(problem.trace.steps) + 1, dtype=np.int64)
        for each in tensors:
            self.take(each)

    @property
    def peak_bytes(self) -> int:
        """The most at one time."""
        return int(self._bytes.max())

    @property
    def peak_step(self) -> int:
        """When that is first."""
        return int(self._bytes.argmax())

    def most_bytes(self, tensor: Offloadable) -> int:
        """Returns the most while this tensor may be below."""
        return int(self._bytes[tensor.first : tensor.end].max(initial=0))

    def take(self, tensor: Offloadable) -> None:
        """Adds a tensor."""
        self._bytes[tensor.first : tensor.end] += tensor.size_bytes

    def give(self, tensor: Offloadable) -> None:
        """Takes one away again."""
        self._bytes[tensor.first : tensor.end] -= tensor.size_bytes
