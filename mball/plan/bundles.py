"""Which weights move together, and where their bytes lie in a slot and on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

from mball.plan.at_home import changed_alike
from mball.schema import Bundle, Extent, Home, Machine, Tensor, Trace
from mball.units import KIB, round_down, round_up

# Reading a gap this small costs less than a request of its own.
MERGED_GAP_BYTES = 64 * KIB
# Norms and biases: a request for one costs latency, not bandwidth, so they are pooled and kept.
TINY_WEIGHT_BYTES = 64 * KIB
# Operators outside any graph share a bundle only when at most this many steps lie between them.
EAGER_REACH_STEPS = 8


def home_of(tensor: Tensor) -> Home:
    """Returns the home of a tensor that has one."""
    assert tensor.home is not None
    return tensor.home


def lay_out_bundle(weights: Sequence[int], trace: Trace, machine: Machine) -> Bundle:
    """Returns the bundle of these weights (indices into `trace.tensors`), in the order of their files.

    Bytes go from disk to the slot as they lie: an extent over-reads outward to the alignment, and a weight
    begins at ``extent.slot_offset_bytes + (weight.offset_bytes - extent.offset_bytes)``. Neighbours share an
    extent when the gap between them is at most 64 KiB. Every extent begins on a page of the slot. A weight
    without bytes needs no extent and has offset 0.
    """

    if len(weights) == 1:
        return _lay_out_one(weights[0], trace.tensors[weights[0]], machine, even=False)

    def home(index: int) -> tuple[str, int, int]:
        home = home_of(trace.tensors[index])
        return home.file, home.offset_bytes, index

    ordered = sorted(weights, key=home)
    extents: list[Extent] = []
    for file, start, end in _aligned_reads((trace.tensors[index] for index in ordered), machine.alignment_bytes):
        slot_offset = 0
        if extents:
            slot_offset = round_up(extents[-1].slot_offset_bytes + extents[-1].size_bytes, machine.page_bytes)
        extents.append(Extent(file=file, offset_bytes=start, size_bytes=end - start, slot_offset_bytes=slot_offset))
    offsets, current = [], 0
    for index in ordered:
        weight = trace.tensors[index]
        if weight.size_bytes == 0:
            offsets.append(0)
            continue
        # Both lists are in the order of the files, so the extent is this one or a later one.
        while not _holds(extents[current], weight):
            current += 1
        extent = extents[current]
        offsets.append(extent.slot_offset_bytes + home_of(weight).offset_bytes - extent.offset_bytes)
    used = extents[-1].slot_offset_bytes + extents[-1].size_bytes if extents else 0
    return Bundle(
        tensors=tuple(ordered),
        offsets_bytes=tuple(offsets),
        extents=tuple(extents),
        size_bytes=round_up(used, machine.page_bytes),
    )


def _lay_out_one(index: int, weight: Tensor, machine: Machine, *, even: bool) -> Bundle:
    """Does what `lay_out_bundle` or `even_bundle` does for one weight: most bundles of a large model are one."""
    if not weight.size_bytes:
        return Bundle(tensors=(index,), offsets_bytes=(0,), extents=(), size_bytes=0)
    home, alignment = home_of(weight), machine.alignment_bytes
    start = home.offset_bytes - home.offset_bytes % alignment
    size = round_up(home.offset_bytes + weight.size_bytes - start, alignment)
    extent = Extent(file=home.file, offset_bytes=start, size_bytes=size, slot_offset_bytes=0)
    size_bytes = round_up(size, machine.page_bytes)
    return Bundle(
        tensors=(index,),
        offsets_bytes=(home.offset_bytes - start,),
        extents=(extent,),
        size_bytes=max(size_bytes, _even_part(weight.size_bytes, machine)) if even else size_bytes,
    )


def weight_uses(trace: Trace) -> list[list[int]]:
    """Returns for each weight the trace steps that must find it on the device, ascending."""
    return _uses_of(trace, trace.needs())


def _uses_of(trace: Trace, needs: Sequence[Sequence[int]]) -> list[list[int]]:
    uses: list[list[int]] = [[] for _ in trace.tensors]
    for number, step_needs in enumerate(needs):
        for index in step_needs:
            uses[index].append(number)
    return uses


def group_weights(trace: Trace, machine: Machine, target_bytes: int) -> tuple[list[Bundle], frozenset[int]]:
    """Returns a partition of the weights into bundles of about `target_bytes`, and which of them pool tiny weights.

    Weights share a bundle when they are used equally often, each time near each other: in one graph, or by
    operators a few steps apart. Bundles of read weights come first, in the order of first use. What is only gathered
    from has a bundle of its own: it may stay home.
    """
    needs = trace.needs()
    uses, changed = _uses_of(trace, needs), changed_alike(trace)
    tiny, large = list[int](), list[int]()
    for index in dict.fromkeys(chain.from_iterable(needs)):
        # What the host lane changes comes anew after that: a pool of it would come as often as there are such steps.
        comes_anew = any(on_host for _, on_host in changed[index])
        is_tiny = trace.tensors[index].size_bytes <= TINY_WEIGHT_BYTES and not comes_anew
        (tiny if is_tiny else large).append(index)
    tables = {gather.tensor for gathers in trace.gathered() for gather in gathers if not uses[gather.tensor]}
    unread = [index for index, _ in trace.homed() if not uses[index] and index not in tables]

    groups: list[list[int]] = []
    filled_bytes = 0
    for index in large:
        size = trace.tensors[index].size_bytes
        if (
            groups
            and filled_bytes + size <= target_bytes
            and changed[groups[-1][-1]] == changed[index]
            and _used_alike(trace, uses[groups[-1][-1]], uses[index])
        ):
            groups[-1].append(index)
            filled_bytes += size
        else:
            groups.append([index])
            filled_bytes = size
    pools = _chunk(trace, [index for index in tiny if not changed[index]], target_bytes)
    pools += _chunk(trace, [index for index in tiny if changed[index]], target_bytes)
    pooled = frozenset(range(len(groups), len(groups) + len(pools)))
    groups += pools + [[index] for index in sorted(tables)] + _chunk(trace, unread, target_bytes)
    return [even_bundle(group, trace, machine) for group in groups], pooled


def even_bundle(weights: Sequence[int], trace: Trace, machine: Machine) -> Bundle:
    """Returns the bundle of these weights with the same slot size for the same sizes of weights.

    Weights that begin in the middle of a page may touch one page more than others. A slot with room for it can take the
    place of any other of its kind.
    """
    if len(weights) == 1:
        return _lay_out_one(weights[0], trace.tensors[weights[0]], machine, even=True)
    bundle = lay_out_bundle(weights, trace, machine)
    size_bytes = even_bytes(bundle, trace, machine)
    return bundle if size_bytes == bundle.size_bytes else replace(bundle, size_bytes=size_bytes)


def even_bytes(bundle: Bundle, trace: Trace, machine: Machine) -> int:
    """Returns the size that `even_bundle` gives the slot of this bundle."""
    if len(bundle.extents) == 1:
        parts = [sum([trace.tensors[index].size_bytes for index in bundle.tensors])]
    else:
        parts = [0] * len(bundle.extents)
        for index in bundle.tensors:
            weight = trace.tensors[index]
            if weight.size_bytes:
                parts[next(n for n, extent in enumerate(bundle.extents) if _holds(extent, weight))] += weight.size_bytes
    return max(bundle.size_bytes, sum(_even_part(size, machine) for size in parts))


def _even_part(weights_bytes: int, machine: Machine) -> int:
    """Returns the room that an extent with so many bytes of weights takes, wherever in a page it begins."""
    return round_up(weights_bytes, machine.page_bytes) + machine.page_bytes


def finest_bundles(trace: Trace, machine: Machine) -> list[Bundle]:
    """Returns the partition that needs the least space in every step: it defines the smallest budget.

    A weight a bundle, except that weights read by exactly the same steps share one where that is no larger
    (a norm's weight and bias on one page).
    """
    needs = trace.needs()
    uses, changed = _uses_of(trace, needs), changed_alike(trace)
    alike: dict[tuple[object, ...], list[int]] = {}
    for index in dict.fromkeys(chain.from_iterable(needs)):
        alike.setdefault((changed[index], *uses[index]), []).append(index)
    bundles: list[Bundle] = []
    for group in alike.values():
        if len(group) == 1:
            bundles.append(lay_out_bundle(group, trace, machine))
            continue
        singles = [lay_out_bundle([index], trace, machine) for index in group]
        together = lay_out_bundle(group, trace, machine)
        for extent in together.extents:
            parts = [one for one in singles if any(_holds(extent, trace.tensors[index]) for index in one.tensors)]
            parts = [one for one in parts if one.size_bytes]
            joined = lay_out_bundle([index for one in parts for index in one.tensors], trace, machine)
            bundles += [joined] if joined.size_bytes <= sum(one.size_bytes for one in parts) else parts
        bundles += [one for one in singles if not one.size_bytes]
    bundles += [lay_out_bundle([index], trace, machine) for index, _ in trace.homed() if not uses[index]]
    return bundles


def born_bundles(trace: Trace, machine: Machine, *, must_leave: bool = False) -> list[Bundle]:
    """Returns a bundle for each tensor that is born in the pass and may leave the device before it dies.

    With `must_leave` only of those that cannot stay there: one lane bears them and the other one reads them. What the
    host lane has for itself takes no room on the device.
    """
    must = crossing(trace)
    return [
        Bundle(
            tensors=(index,),
            offsets_bytes=(0,),
            extents=(),
            size_bytes=round_up(tensor.size_bytes, machine.page_bytes),
        )
        for index, tensor in trace.movable()
        if index in must or not (must_leave or trace.is_born_below(tensor))
    ]


def crossing(trace: Trace) -> set[int]:
    """Returns the tensors born in the pass that one lane bears and the other one reads."""
    return {
        index
        for step in trace.steps
        for index in step.reads
        if (live := trace.tensors[index].live) is not None and trace.steps[live.first].lane is not step.lane
    }


def _aligned_reads(weights: Iterable[Tensor], alignment_bytes: int) -> list[tuple[str, int, int]]:
    reads: list[tuple[str, int, int]] = []
    for weight in weights:
        if weight.size_bytes == 0:
            continue
        home = home_of(weight)
        start = round_down(home.offset_bytes, alignment_bytes)
        end = round_up(home.offset_bytes + weight.size_bytes, alignment_bytes)
        if reads and reads[-1][0] == home.file and start <= reads[-1][2] + MERGED_GAP_BYTES:
            reads[-1] = (home.file, reads[-1][1], max(reads[-1][2], end))
        else:
            reads.append((home.file, start, end))
    return reads


def _holds(extent: Extent, weight: Tensor) -> bool:
    home = home_of(weight)
    return (
        extent.file == home.file
        and extent.offset_bytes <= home.offset_bytes
        and home.offset_bytes + weight.size_bytes <= extent.offset_bytes + extent.size_bytes
    )


def _used_alike(trace: Trace, one: Sequence[int], other: Sequence[int]) -> bool:
    if len(one) != len(other):
        return False
    for first, second in zip(one, other, strict=True):
        graph = trace.steps[first].graph
        if graph != trace.steps[second].graph:
            return False
        if graph is None and abs(first - second) > EAGER_REACH_STEPS:
            return False
    return True


def _chunk(trace: Trace, weights: Iterable[int], target_bytes: int) -> list[list[int]]:
    chunks: list[list[int]] = []
    filled_bytes = 0
    for index in weights:
        size = trace.tensors[index].size_bytes
        if chunks and filled_bytes + size <= target_bytes:
            chunks[-1].append(index)
            filled_bytes += size
        else:
            chunks.append([index])
            filled_bytes = size
    return chunks
