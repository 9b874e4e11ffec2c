"""Host memory, seen as the device is: a pass whose steps are the copies to the device.

[Note: the level below]
A copy needs its bundle in host memory as a step needs its weights on the device. So what stays in host memory, what
comes from disk in each pass and where it lies there is the planner's problem once more: the steps are the plan's
transfers to the device in their order, each reading one bundle, and the link is that from disk. A slot in host memory
is free as soon as the copy out of it has ended, however early that is: what the device holds ahead of its steps is lead
for the disk as well.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf

from mball.errors import PlanError
from mball.plan.draft import Draft
from mball.plan.partition import Partition
from mball.plan.simulate import Writes, busy_times, gathered_bytes, run_passes
from mball.schema import Bundle, HostTransfer, Link, Machine, Plan, PlanStep, Step, Tensor, Trace, Transfer


def as_plan(plan: Plan) -> Plan:
    """Returns the host part of a plan that has one as a plan of its own, with a step for each copy."""
    host = plan.host
    assert host is not None, "asked only of plans with a host part"
    return replace(
        plan,
        budget_bytes=host.budget_bytes,
        fixed_bytes=0,
        activation_bytes=0,
        arena_bytes=host.arena_bytes,
        steps=tuple(
            PlanStep(first=number, end=number + 1, reads=(copy.bundle,) if plan.bundles[copy.bundle].extents else ())
            for number, copy in enumerate(plan.transfers)
        ),
        residents=host.residents,
        transfers=tuple(
            Transfer(
                bundle=each.bundle,
                offset_bytes=each.offset_bytes,
                after=each.after,
                needed_by=each.needed_by,
                last_use=each.last_use,
            )
            for each in host.transfers
        ),
        made=(),
        offloads=(),
        host=None,
    )


def host_partition(draft: Draft, machine: Machine) -> Partition:
    """Returns the pass of the copies of a draft, on the link from disk. Bundles have the numbers that they have there.

    Args:
        draft: of the device.
        machine: with both links.
    """
    assert machine.disk_link is not None, "asked only of machines with both links"
    trace, bundles, copies = draft.partition.trace, draft.partition.demand.bundles, draft.transfers
    writes: list[list[int]] = [[] for _ in copies]
    afters = [copy.after for copy in copies]
    for bundle, steps in written_steps(trace, draft.steps, bundles).items():
        for step in steps:
            # Copies that begin once this step has been left bring what it wrote. The one before them is the last that
            # does not: in the pass of copies it is the one that writes.
            before = bisect_left(afters, step) + (bisect_left(afters, step - len(draft.steps)) if trace.cyclic else 0)
            if copies and (before or trace.cyclic):
                writes[(before - 1) % len(copies)].append(bundle)
    moved = [bundles[copy.bundle].moved_bytes for copy in copies]
    left = [bundles[offload.bundle].moved_bytes for offload in draft.offloads]
    gathered = gathered_bytes(trace, bundles, {placement.bundle for placement in draft.residents})
    times = _copy_times(
        busy_times(trace, machine, draft, gathered),
        copies,
        moved,
        machine.link,
        Writes(draft.offloads, left, machine.write_link),
        cyclic=trace.cyclic,
    )
    below = Trace(
        name=trace.name,
        # A tensor for each bundle: what is in it is of no matter here.
        tensors=tuple(
            Tensor.weight(
                f"bundle {number}",
                dtype="uint8",
                shape=(bundle.size_bytes,),
                size_bytes=bundle.size_bytes,
                file="",
                offset_bytes=0,
            )
            for number, bundle in enumerate(bundles)
        ),
        steps=tuple(
            Step(
                name=f"copy {number}",
                graph=None,
                reads=(copy.bundle,) if bundles[copy.bundle].extents else (),
                scratch_bytes=0,
                flops=0,
                time_s=time_s,
                writes=tuple(dict.fromkeys(written)),
            )
            for number, (copy, time_s, written) in enumerate(zip(copies, times, writes, strict=True))
        ),
        cyclic=trace.cyclic,
    )
    whole = [replace(bundle, tensors=(number,), offsets_bytes=(0,)) for number, bundle in enumerate(bundles)]
    return Partition.of(below, replace(machine, link=machine.disk_link, disk_link=None), whole)


def _copy_times(
    compute_s: Sequence[float],
    copies: Sequence[Transfer],
    moved_bytes: Sequence[int],
    link: Link,
    writes: Writes,
    *,
    cyclic: bool,
) -> list[float]:
    """Returns the seconds from the latest begin of each copy that delays nothing to that of the next one."""
    if not copies:
        return []
    timings = run_passes(compute_s, copies, moved_bytes, link, cyclic=cyclic, writes=writes)
    pass_s = timings[-1].end_s + timings[-1].write_s
    begins = [0.0] * len(copies)
    following = inf
    # Twice, for what the first copies of the next pass ask of the last ones.
    for _ in range(2 if cyclic else 1):
        for number in reversed(range(len(copies))):
            needed_s = timings[copies[number].needed_by].start_s
            following = min(needed_s, following) - moved_bytes[number] / link.bandwidth_bytes_per_s
            begins[number] = following
        following += pass_s
    ends = [*begins[1:], begins[0] + pass_s]
    return [max(end - begin, 0.0) for begin, end in zip(begins, ends, strict=True)]


def written_steps(trace: Trace, steps: Sequence[PlanStep], bundles: Sequence[Bundle]) -> dict[int, list[int]]:
    """Returns the plan steps that write each bundle, ascending, for those that any step writes."""
    home = {index: number for number, bundle in enumerate(bundles) for index in bundle.tensors}
    found: dict[int, list[int]] = {}
    for number, step in enumerate(steps):
        for bundle in {home[index] for each in trace.steps[step.first : step.end] for index in each.writes}:
            found.setdefault(bundle, []).append(number)
    return found


def last_write(written: Sequence[int], after: int, num_steps: int, *, cyclic: bool) -> int | None:
    """Returns the last of these steps, or of those in passes before, that is not after step `after`; None if none is.

    Args:
        written: steps of the pass, ascending.
        after: counts from the pass too, and may lie in the one before.
        num_steps: of a pass.
        cyclic: whether there are passes before.
    """
    passes = (0, -num_steps, -2 * num_steps) if cyclic else (0,)
    return max((step + shift for step in written for shift in passes if step + shift <= after), default=None)


def from_disk(
    transfers: Sequence[Transfer],
    copies: Sequence[Transfer],
    written: Mapping[int, Sequence[int]],
    num_steps: int,
    *,
    cyclic: bool,
) -> tuple[HostTransfer, ...]:
    """Returns the transfers from disk of a draft of the pass of copies.

    Args:
        transfers: of that draft, in which steps are copies.
        copies: to the device.
        written: see `written_steps`.
        num_steps: of the device's pass.
        cyclic: whether it repeats.
    """
    return tuple(
        HostTransfer(
            bundle=each.bundle,
            offset_bytes=each.offset_bytes,
            after=each.after,
            needed_by=each.needed_by,
            last_use=each.last_use,
            after_step=last_write(written.get(each.bundle, ()), copies[each.needed_by].after, num_steps, cyclic=cyclic),
        )
        for each in transfers
    )


def copies_by_bundle(copies: Sequence[Transfer]) -> dict[int, list[int]]:
    """Returns the numbers of the copies of each bundle, ascending."""
    found: dict[int, list[int]] = {}
    for number, copy in enumerate(copies):
        found.setdefault(copy.bundle, []).append(number)
    return found


def copies_between(copies: Sequence[int], first: int, last: int, count: int) -> Iterator[tuple[int, int]]:
    """Yields pass and number of these copies (ascending, of a pass of `count`) from copy `first` to `last`, inclusive.

    Both are counted on from the pass of `first`, so the pass is 0 or 1.
    """
    for passes in range(first // count, last // count + 1):
        begin = bisect_left(copies, first - passes * count)
        end = bisect_right(copies, last - passes * count)
        for copy in copies[begin:end]:
            yield passes, copy


def check_order(trace: Trace, plan: Plan) -> None:
    """Checks that nothing in the host part waits for itself, and that it brings no bytes from before a write.

    Raises:
        PlanError: it does.
    """
    host = plan.host
    assert host is not None, "asked only of plans with a host part"
    # Then what a read waits for, those before it included, is asked for before the first copy of what it brings.
    needed = [each.needed_by for each in host.transfers]
    if needed != sorted(needed):
        raise PlanError(
            f"transfers from disk are first needed by copies {needed}, so they overtake each other: the plan is wrong, "
            "make it again"
        )
    written = written_steps(trace, plan.steps, plan.bundles)
    num_steps, count = len(plan.steps), len(plan.transfers)
    copies_of = copies_by_bundle(plan.transfers)
    for placement in host.residents:
        if placement.bundle in written:
            raise PlanError(
                f"bundle {placement.bundle} stays in host memory, and step {written[placement.bundle][0]} writes it: "
                "the plan is wrong, make it again"
            )
    for each in host.transfers:
        steps = written.get(each.bundle, ())
        first = plan.transfers[each.needed_by].after
        floor = each.after_step
        if floor is not None and floor > first:
            raise PlanError(
                f"the transfer of bundle {each.bundle} from disk waits for step {floor}, and its first copy only for "
                f"step {first}: the plan is wrong, make it again"
            )
        for passes, copy in copies_between(copies_of[each.bundle], each.needed_by, each.last_use, count):
            last = last_write(steps, plan.transfers[copy].after + passes * num_steps, num_steps, cyclic=trace.cyclic)
            if last is not None and (floor is None or last > floor):
                raise PlanError(
                    f"the transfer of bundle {each.bundle} from disk may begin before step {last} writes it, and copy "
                    f"{copy} takes it after that: the plan is wrong, make it again"
                )
