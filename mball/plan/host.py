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
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf

from mball.errors import PlanError
from mball.plan.draft import Draft
from mball.plan.partition import Partition
from mball.plan.simulate import Writes, busy_times, gathered_bytes, run_passes
from mball.schema import HostTransfer, Link, Machine, Plan, Step, Tensor, Trace, Transfer


def host_partition(draft: Draft, machine: Machine) -> Partition:
    """Returns the pass of the copies of a draft, on the link from disk. Bundles have the numbers that they have there.

    Args:
        draft: of the device.
        machine: with both links.
    """
    assert machine.disk_link is not None, "asked only of machines with both links"
    trace, bundles, copies = draft.partition.trace, draft.partition.demand.bundles, draft.transfers
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
            )
            for number, (copy, time_s) in enumerate(zip(copies, times, strict=True))
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


def from_disk(transfers: Sequence[Transfer]) -> tuple[HostTransfer, ...]:
    """Returns the transfers from disk of a draft of the pass of copies, in which steps are copies."""
    return tuple(
        HostTransfer(
            bundle=each.bundle,
            offset_bytes=each.offset_bytes,
            after=each.after,
            needed_by=each.needed_by,
            last_use=each.last_use,
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


def check_order(plan: Plan) -> None:
    """Checks that nothing in the host part waits for itself.

    Raises:
        PlanError: something does.
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
