"""Proves that a plan keeps its promises; the oracle of the planner's tests."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import replace
from itertools import chain, pairwise
from typing import NoReturn

from mball.errors import PlanError
from mball.plan.bundles import crossing
from mball.plan.check_home import check_home
from mball.plan.demand import bundle_reads
from mball.plan.host import check_order
from mball.plan.simulate import offloaded_bytes, slots_held
from mball.schema import Bundle, Lane, Machine, Made, Offload, Plan, Tensor, Trace, Treatment
from mball.units import format_bytes


def validate(trace: Trace, plan: Plan, machine: Machine | None = None) -> None:
    """Returns when every read of `plan` finds its bytes and nothing exceeds the budget.

    Checked: bundles partition the weights and their layout is right; steps cover the trace in order; every read is
    resident or covered by a transfer, or by the step that makes it; what is born in the pass comes from where it was
    written; what steps change is written back, and what the host lane uses or writes is there in time; no slot is
    overwritten while in use, also across the end of the pass; where there is only one pass, nothing comes from another;
    all bytes are within the arena and the budget, and what is offloaded within its own. The same of the host part, if
    there is one: every transfer to the device finds its bundle in host memory, and nothing waits for itself. With
    `machine`, pages and alignment too, and that there is a host part where it is needed.

    Raises:
        PlanError: an invariant is broken; the message says which, where, and by how much.
    """
    plan.check()
    if plan.host is not None:
        _check_one_link(trace)
    _check_partition(trace, plan)
    for number, bundle in enumerate(plan.bundles):
        _check_layout(trace, number, bundle, machine)
    _check_steps(trace, plan)
    _check_transfers(plan)
    if not trace.cyclic:
        _check_only_pass(plan)
    _check_reads(plan)
    _check_born(trace, plan)
    check_home(trace, plan)
    _check_bounds(trace, plan, machine)
    _check_overlap(plan)
    _check_offloaded(plan)
    _check_host(trace, plan, machine)


def _fail(message: str) -> NoReturn:
    raise PlanError(f"{message}: the plan is wrong, make it again")


def _check_one_link(trace: Trace) -> None:
    """Checks that a pass of a plan with a host part does nothing that is planned over one link only."""
    for step in trace.steps:
        if step.writes or step.lane is Lane.HOST:
            does = "runs on the host lane" if step.lane is Lane.HOST else f"writes {len(step.writes)} tensors"
            _fail(f"it has a host part, and step {step.name!r} {does}, which is planned over one link")


def _check_partition(trace: Trace, plan: Plan) -> None:
    seen = [0] * len(trace.tensors)
    movable = {index for index, _ in trace.movable()}
    for number, bundle in enumerate(plan.bundles):
        for index in bundle.tensors:
            if not 0 <= index < len(seen) or (trace.tensors[index].home is None and index not in movable):
                _fail(
                    f"bundle {number} holds tensor {index}; the trace has {len(seen)} tensors, and bundles hold those "
                    "that have a home or may leave"
                )
            seen[index] += 1
        if not movable.isdisjoint(bundle.tensors) and (len(bundle.tensors) > 1 or bundle.extents):
            _fail(
                f"bundle {number} holds {len(bundle.tensors)} tensors and reads {len(bundle.extents)} extents; one "
                "that is born in the pass is alone and read from nowhere"
            )
    for index, _ in trace.homed():
        if (count := seen[index]) != 1:
            _fail(f"weight {trace.tensors[index].name!r} is in {count} bundles instead of one")
    for index in movable:
        if seen[index] > 1:
            _fail(f"tensor {trace.tensors[index].name!r} is in {seen[index]} bundles instead of one")


def _check_layout(trace: Trace, number: int, bundle: Bundle, machine: Machine | None) -> None:
    if len(bundle.tensors) != len(bundle.offsets_bytes):
        _fail(f"bundle {number} has {len(bundle.tensors)} weights and {len(bundle.offsets_bytes)} offsets")
    filled = 0
    for extent in sorted(bundle.extents, key=lambda extent: extent.slot_offset_bytes):
        if extent.size_bytes <= 0 or extent.offset_bytes < 0:
            _fail(f"bundle {number} reads {extent.size_bytes} B at {extent.offset_bytes} B of {extent.file!r}")
        if extent.slot_offset_bytes < filled:
            _fail(f"bundle {number}: the extent at {extent.slot_offset_bytes} B begins before {filled} B is free")
        filled = extent.slot_offset_bytes + extent.size_bytes
    if filled > bundle.size_bytes or bundle.size_bytes < 0:
        _fail(f"bundle {number} fills {filled} B of a slot of {bundle.size_bytes} B")
    for index, offset in zip(bundle.tensors, bundle.offsets_bytes, strict=True):
        weight = trace.tensors[index]
        if weight.size_bytes == 0 and offset == 0:
            continue
        if weight.home is None:
            if offset < 0 or offset + weight.size_bytes > bundle.size_bytes:
                _fail(
                    f"bundle {number} has {bundle.size_bytes} B for tensor {weight.name!r}, of {weight.size_bytes} B "
                    f"at {offset} B"
                )
            continue
        home = weight.home
        for extent in bundle.extents:
            within = home.offset_bytes - extent.offset_bytes
            if (
                extent.file == home.file
                and within >= 0
                and within + weight.size_bytes <= extent.size_bytes
                and offset == extent.slot_offset_bytes + within
            ):
                break
        else:
            _fail(f"bundle {number}: no extent brings weight {weight.name!r} to {offset} B of the slot")
    if machine is not None:
        _check_alignment(number, bundle, machine)


def _check_alignment(number: int, bundle: Bundle, machine: Machine) -> None:
    if bundle.size_bytes % machine.page_bytes:
        _fail(f"bundle {number}: slot of {bundle.size_bytes} B is no multiple of the page, {machine.page_bytes} B")
    for extent in bundle.extents:
        if extent.offset_bytes % machine.alignment_bytes or extent.size_bytes % machine.alignment_bytes:
            _fail(
                f"bundle {number}: read of {extent.size_bytes} B at {extent.offset_bytes} B is not aligned to "
                f"{machine.alignment_bytes} B"
            )
        if extent.slot_offset_bytes % machine.page_bytes:
            _fail(
                f"bundle {number}: extent at {extent.slot_offset_bytes} B of the slot is not on a page of "
                f"{machine.page_bytes} B"
            )


def _check_steps(trace: Trace, plan: Plan) -> None:
    reads = bundle_reads(trace, plan.bundles)
    expected = 0
    for number, step in enumerate(plan.steps):
        if step.first != expected or not step.first < step.end <= len(trace.steps):
            _fail(f"step {number} runs trace steps [{step.first}, {step.end}) instead of beginning at {expected}")
        expected = step.end
        if step.end - step.first > 1:
            if len({trace.steps[index].lane for index in range(step.first, step.end)}) > 1:
                _fail(f"step {number} merges trace steps [{step.first}, {step.end}) that are not on one lane")
            graphs = {trace.steps[index].graph for index in range(step.first, step.end)}
            if len(graphs) > 1 or None in graphs:
                _fail(f"step {number} merges trace steps [{step.first}, {step.end}) that are not of one graph")
        read, wanted = set(step.reads), set(chain.from_iterable(reads[step.first : step.end]))
        if len(read) != len(step.reads) or read != wanted:
            _fail(f"step {number} reads bundles {sorted(step.reads)}; its trace steps read {sorted(wanted)}")
    if expected != len(trace.steps):
        _fail(f"the steps end at trace step {expected} of {len(trace.steps)}")


def _check_transfers(plan: Plan) -> None:
    num_steps = len(plan.steps)
    for transfer in plan.transfers:
        after, needed_by, last_use = transfer.after, transfer.needed_by, transfer.last_use
        if not (-num_steps <= after < needed_by <= last_use and 0 <= needed_by < num_steps):
            _fail(
                f"transfer of bundle {transfer.bundle}: after {after}, needed by {needed_by}, last use {last_use} are "
                f"not in order within a pass of {num_steps} steps"
            )
        if last_use - after > num_steps:
            _fail(
                f"transfer of bundle {transfer.bundle} holds its slot for {last_use - after} steps; "
                f"the pass has {num_steps}, so it would overwrite itself"
            )
    order = [(transfer.after, transfer.needed_by) for transfer in plan.transfers]
    if order != sorted(order):
        _fail("transfers are not sorted by (after, needed_by)")


def _check_only_pass(plan: Plan) -> None:
    """Checks that nothing comes from a pass before, nor stays for one after: there is none."""
    for placement in plan.residents:
        _fail(f"bundle {placement.bundle} is resident, and nothing brings it before the only pass")
    for transfer in plan.transfers:
        if transfer.after < -1 or transfer.last_use >= len(plan.steps):
            _fail(
                f"transfer of bundle {transfer.bundle}: after {transfer.after} and last use {transfer.last_use} are "
                f"not within the only pass, of {len(plan.steps)} steps"
            )


def _check_reads(plan: Plan) -> None:
    kept = [placement.bundle for placement in plan.residents]
    if len(set(kept)) != len(kept):
        _fail("a bundle is resident twice")
    resident = set(kept)
    windows: dict[int, list[tuple[int, int]]] = {}
    for transfer in plan.transfers:
        if transfer.bundle in resident:
            _fail(f"bundle {transfer.bundle} is resident and transferred")
        windows.setdefault(transfer.bundle, []).append((transfer.needed_by, transfer.last_use))
    for made in plan.made:
        if not 0 <= made.step <= made.last_use < len(plan.steps):
            _fail(
                f"bundle {made.bundle} is made in step {made.step} and last used in {made.last_use}, in a pass of "
                f"{len(plan.steps)} steps"
            )
        windows.setdefault(made.bundle, []).append((made.step, made.last_use))
    for bundle, stays in windows.items():
        stays.sort()
        for (_, last_use), (needed_by, _) in pairwise((*stays, (stays[0][0] + len(plan.steps), 0))):
            if needed_by <= last_use:
                _fail(f"step {needed_by % len(plan.steps)} finds bundle {bundle} in two slots")
    for transfer in plan.transfers:
        stays = windows[transfer.bundle]
        # The stay before it, in this pass or at the end of the one before.
        at = bisect_left(stays, (transfer.needed_by,)) - 1
        last_use = stays[at][1] - (0 if at >= 0 else len(plan.steps))
        if transfer.after < last_use:
            _fail(
                f"the transfer of bundle {transfer.bundle} for step {transfer.needed_by} may begin after step "
                f"{transfer.after}, while its copy in another slot is used up to step {last_use}"
            )
    for number, step in enumerate(plan.steps):
        for bundle in step.reads:
            if bundle in resident:
                continue
            stays = windows.get(bundle, [])
            at = bisect_left(stays, (number + 1,)) - 1
            # Before the first of this pass there is the last one of the pass before.
            at_step = number if at >= 0 else number + len(plan.steps)
            if not stays or stays[at][1] < at_step:
                _fail(f"step {number} reads bundle {bundle}, which is neither resident nor transferred nor made for it")


def _check_born(trace: Trace, plan: Plan) -> None:
    """Checks that what is born in the pass is there after its birth only, and comes only from where it was written."""
    if not plan.made and not plan.offloads and not any(trace.movable()):
        return
    for placement in plan.residents:
        if any(trace.tensors[index].home is None for index in plan.bundles[placement.bundle].tensors):
            _fail(f"bundle {placement.bundle} is resident, and its tensor dies in the pass")
    step_of = [number for number, step in enumerate(plan.steps) for _ in range(step.first, step.end)]
    births: dict[int, Made] = {}
    for made in plan.made:
        tensor = _born(trace, plan, made.bundle)
        birth = step_of[tensor.live.first] if tensor.live is not None else -1
        if trace.is_born_below(tensor):
            _fail(f"step {made.step} makes tensor {tensor.name!r}, which the host lane bears in host memory")
        if made.is_anew:
            if Treatment.RECOMPUTE not in tensor.may or made.step <= birth:
                _fail(f"step {made.step} makes tensor {tensor.name!r} anew, which is born in step {birth}")
            if made.bundle not in plan.steps[made.step].reads:
                _fail(f"step {made.step} makes tensor {tensor.name!r} anew and does not read it")
        elif made.step != birth or made.bundle in births:
            _fail(f"step {made.step} bears tensor {tensor.name!r}, which is born once, in step {birth}")
        else:
            births[made.bundle] = made
    written: dict[int, Offload] = {}
    for offload in plan.offloads:
        if all(trace.tensors[index].home is not None for index in plan.bundles[offload.bundle].tensors):
            continue
        tensor = _born(trace, plan, offload.bundle)
        born = births.get(offload.bundle)
        if Treatment.OFFLOAD not in tensor.may or offload.bundle in written or born is None:
            _fail(f"tensor {tensor.name!r} is written below more often than it may be, or before it is born")
        if not born.step <= offload.after <= born.last_use or offload.offset_bytes != born.offset_bytes:
            _fail(
                f"tensor {tensor.name!r} is written after step {offload.after} from {offload.offset_bytes} B; it is at "
                f"{born.offset_bytes} B from step {born.step} to step {born.last_use}"
            )
        written[offload.bundle] = offload
    for transfer in plan.transfers:
        if any(trace.tensors[index].home is None for index in plan.bundles[transfer.bundle].tensors):
            tensor, there = _born(trace, plan, transfer.bundle), written.get(transfer.bundle)
            is_there = there is not None and there.until <= transfer.after
            if tensor.live is not None and trace.is_born_below(tensor):
                is_there = step_of[tensor.live.first] <= transfer.after
            if not is_there or transfer.last_use >= len(plan.steps):
                _fail(
                    f"the transfer of bundle {transfer.bundle} may begin after step {transfer.after}; nothing is "
                    "written below for it by then"
                )
    brought, crosses = {transfer.bundle for transfer in plan.transfers}, crossing(trace)
    for bundle in written:
        if bundle not in brought and crosses.isdisjoint(plan.bundles[bundle].tensors):
            _fail(f"bundle {bundle} is written below, and nothing brings it back")
    order = [(offload.after, offload.until) for offload in plan.offloads]
    if order != sorted(order):
        _fail("offloads are not sorted by (after, until)")


def _born(trace: Trace, plan: Plan, bundle: int) -> Tensor:
    """Returns the tensor of a bundle that is born in the pass."""
    tensors = [trace.tensors[index] for index in plan.bundles[bundle].tensors]
    if len(tensors) != 1 or tensors[0].home is not None:
        _fail(f"bundle {bundle} has a home, and steps do not make it")
    return tensors[0]


def _check_bounds(trace: Trace, plan: Plan, machine: Machine | None) -> None:
    activation = max(trace.activation_bytes({index for bundle in plan.bundles for index in bundle.tensors}), default=0)
    if plan.activation_bytes < activation:
        _fail(f"activations need {activation} B; the plan leaves {plan.activation_bytes} B")
    if min(plan.fixed_bytes, plan.arena_bytes) < 0:
        _fail(f"fixed memory has {plan.fixed_bytes} B and the arena {plan.arena_bytes} B; neither can be negative")
    used = plan.fixed_bytes + plan.activation_bytes + plan.arena_bytes
    if used > plan.budget_bytes:
        _fail(
            f"fixed {format_bytes(plan.fixed_bytes)}, activations {format_bytes(plan.activation_bytes)} and arena "
            f"{format_bytes(plan.arena_bytes)} exceed the budget by {used - plan.budget_bytes} B"
        )
    places = [(placement.bundle, placement.offset_bytes) for placement in plan.residents]
    places += [(transfer.bundle, transfer.offset_bytes) for transfer in plan.transfers]
    places += [(made.bundle, made.offset_bytes) for made in plan.made]
    for bundle, offset in places:
        if offset < 0 or offset + plan.bundles[bundle].size_bytes > plan.arena_bytes:
            _fail(f"bundle {bundle} at {offset} B ends outside the arena of {plan.arena_bytes} B")
        if machine is not None and offset % machine.page_bytes:
            _fail(f"bundle {bundle} at {offset} B is not on a page of {machine.page_bytes} B")


def _check_overlap(plan: Plan) -> None:
    num_steps = len(plan.steps)
    # Residents are many and never move: whoever comes and goes is held against them, and against the others like it.
    residents = sorted(
        _slot(plan, each.bundle, each.offset_bytes) for each in plan.residents if plan.bundles[each.bundle].size_bytes
    )
    for one, other in pairwise(residents if num_steps else ()):
        _check_apart(0, other, one)
    # What takes a slot at each step, and what gives it back before that step.
    taken: list[list[tuple[int, int, int]]] = [[] for _ in range(num_steps)]
    given: list[list[tuple[int, int, int]]] = [[] for _ in range(num_steps + 1)]
    for bundle, offset, first, end in slots_held(plan):
        if plan.bundles[bundle].size_bytes and first < end:
            slot = _slot(plan, bundle, offset)
            taken[first].append(slot)
            given[end].append(slot)
    held: list[tuple[int, int, int]] = []
    for step in range(num_steps):
        for slot in given[step]:
            held.pop(bisect_left(held, slot))
        for slot in taken[step]:
            for others in (residents, held):
                at = bisect_left(others, slot)
                for other in others[max(at - 1, 0) : at + 1]:
                    _check_apart(step, slot, other)
            insort(held, slot)


def _slot(plan: Plan, bundle: int, offset: int) -> tuple[int, int, int]:
    return offset, offset + plan.bundles[bundle].size_bytes, bundle


def _check_apart(step: int, slot: tuple[int, int, int], other: tuple[int, int, int]) -> None:
    if other[0] < slot[1] and slot[0] < other[1]:
        _fail(
            f"in step {step} bundles {other[2]} at [{other[0]}, {other[1]}) B and {slot[2]} at "
            f"[{slot[0]}, {slot[1]}) B of the arena overlap"
        )


def _check_offloaded(plan: Plan) -> None:
    """Checks that what is offloaded has room below."""
    peak = max(offloaded_bytes(plan), default=0)
    if plan.offload_budget_bytes is not None and peak > plan.offload_budget_bytes:
        _fail(f"offloaded tensors take {peak} B below at one time; their budget is {plan.offload_budget_bytes} B")
    if plan.host is None:
        return
    if peak > plan.host.offloaded_bytes:
        _fail(f"offloaded tensors take {peak} B of host memory; {plan.host.offloaded_bytes} B are set aside")
    used = plan.host.arena_bytes + plan.host.offloaded_bytes
    if used > plan.host.budget_bytes:
        _fail(
            f"slots, {format_bytes(plan.host.arena_bytes)}, and offloaded tensors, "
            f"{format_bytes(plan.host.offloaded_bytes)}, exceed the budget of host memory by "
            f"{used - plan.host.budget_bytes} B"
        )


def _check_host(trace: Trace, plan: Plan, machine: Machine | None) -> None:
    """Checks the host part as the plan that it is: one whose steps are the transfers to the device."""
    if machine is not None and (plan.host is None) != (machine.disk_link is None):
        has, link = ("no host part", "a") if plan.host is None else ("a host part", "no")
        _fail(f"it has {has}, and machine {machine.name!r} {link} link from disk to host memory")
    if plan.host is None:
        return
    placed = [each.bundle for each in plan.host.residents] + [each.bundle for each in plan.host.transfers]
    for bundle in placed:
        if not plan.bundles[bundle].extents:
            _fail(f"bundle {bundle} has a slot in host memory, and nothing on disk that could fill it")
    below = plan.below()
    try:
        _check_transfers(below)
        if not trace.cyclic:
            _check_only_pass(below)
        _check_reads(below)
        _check_bounds(replace(trace, tensors=(), steps=()), below, machine)
        _check_overlap(below)
    except PlanError as error:
        raise PlanError(f"in host memory, where steps are transfers to the device: {error}") from error
    check_order(plan)
