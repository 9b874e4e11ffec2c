"""Proves that a plan keeps its promises; the oracle of the planner's tests."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import replace
from itertools import pairwise
from typing import NoReturn

from mball.errors import PlanError
from mball.plan.bundles import home_of
from mball.plan.demand import bundle_reads
from mball.plan.host import as_plan, check_order
from mball.plan.simulate import occupied_steps
from mball.schema import Bundle, Machine, Plan, Trace, Transfer
from mball.units import format_bytes


def validate(trace: Trace, plan: Plan, machine: Machine | None = None) -> None:
    """Returns when every read of `plan` finds its bytes and nothing exceeds the budget.

    Checked: bundles partition the weights and their layout is right; steps cover the trace in order; every
    read is resident or covered by a transfer; no slot is overwritten while in use, also across the end of the
    pass; where there is only one pass, nothing comes from another; all bytes are within the arena and the budget. The
    same of the host part, if there is one: every transfer to the device finds its bundle in host memory, and nothing
    waits for itself. With `machine`, pages and alignment too, and that there is a host part where it is needed.

    Raises:
        PlanError: an invariant is broken; the message says which, where, and by how much.
    """
    plan.check()
    _check_partition(trace, plan)
    for number, bundle in enumerate(plan.bundles):
        _check_layout(trace, number, bundle, machine)
    _check_steps(trace, plan)
    _check_transfers(plan)
    if not trace.cyclic:
        _check_only_pass(plan)
    _check_reads(plan)
    _check_writes(trace, plan)
    _check_bounds(trace, plan, machine)
    _check_overlap(plan)
    _check_host(trace, plan, machine)


def _fail(message: str) -> NoReturn:
    raise PlanError(f"{message}: the plan is wrong, make it again")


def _check_partition(trace: Trace, plan: Plan) -> None:
    seen = [0] * len(trace.tensors)
    for number, bundle in enumerate(plan.bundles):
        for index in bundle.tensors:
            if not 0 <= index < len(seen) or trace.tensors[index].home is None:
                _fail(
                    f"bundle {number} holds tensor {index}; the trace has {len(seen)} tensors, and bundles hold homes"
                )
            seen[index] += 1
    for index, _ in trace.homed():
        if (count := seen[index]) != 1:
            _fail(f"weight {trace.tensors[index].name!r} is in {count} bundles instead of one")


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
        weight, home = trace.tensors[index], home_of(trace.tensors[index])
        if weight.size_bytes == 0 and offset == 0:
            continue
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
        graphs = {(trace.steps[index].graph, trace.steps[index].lane) for index in range(step.first, step.end)}
        if len(graphs) > 1 or (None in dict(graphs) and step.end - step.first > 1):
            _fail(f"step {number} merges trace steps [{step.first}, {step.end}) that are not of one graph")
        wanted = {bundle for index in range(step.first, step.end) for bundle in reads[index]}
        if len(set(step.reads)) != len(step.reads) or set(step.reads) != wanted:
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
    windows: dict[int, list[Transfer]] = {}
    for transfer in plan.transfers:
        if transfer.bundle in resident:
            _fail(f"bundle {transfer.bundle} is resident and transferred")
        windows.setdefault(transfer.bundle, []).append(transfer)
    for bundle, transfers in windows.items():
        transfers.sort(key=lambda transfer: transfer.needed_by)
        again = replace(transfers[0], needed_by=transfers[0].needed_by + len(plan.steps))
        for one, other in pairwise((*transfers, again)):
            if other.needed_by <= one.last_use:
                _fail(f"step {other.needed_by % len(plan.steps)} finds bundle {bundle} in two slots")
    for number, step in enumerate(plan.steps):
        for bundle in step.reads:
            if bundle in resident:
                continue
            transfers = windows.get(bundle, [])
            at = bisect_left(transfers, number + 1, key=lambda transfer: transfer.needed_by) - 1
            # Before the first of this pass there is the last one of the pass before.
            at_step = number if at >= 0 else number + len(plan.steps)
            if not transfers or transfers[at].last_use < at_step:
                _fail(f"step {number} reads bundle {bundle}, which is neither resident nor transferred for it")


def _check_writes(trace: Trace, plan: Plan) -> None:
    """Checks that no step reads bytes that were brought before another step wrote them anew."""
    written: dict[int, list[int]] = {}
    home = {index: number for number, bundle in enumerate(plan.bundles) for index in bundle.tensors}
    for number, step in enumerate(trace.steps):
        for bundle in {home[index] for index in step.writes}:
            written.setdefault(bundle, []).append(number)
    if not written:
        return
    for placement in plan.residents:
        if placement.bundle in written:
            _fail(
                f"bundle {placement.bundle} is resident, and step {written[placement.bundle][0]} of the trace writes it"
            )
    count, num_steps = len(trace.steps), len(plan.steps)
    reads = bundle_reads(trace, plan.bundles)

    def begin(step: int) -> int:
        """Returns the trace step with which a plan step of this pass, or one beside it, begins."""
        return plan.steps[step % num_steps].first + step // num_steps * count

    for transfer in plan.transfers:
        if transfer.bundle not in written:
            continue
        window = range(begin(transfer.needed_by), begin(transfer.last_use + 1))
        last = max((number for number in window if transfer.bundle in reads[number % count]), default=-count)
        for number in written[transfer.bundle]:
            if any(begin(transfer.after + 1) <= number + shift < last for shift in (-count, 0, count)):
                _fail(
                    f"the transfer of bundle {transfer.bundle} may begin before step {number} of the trace writes it, "
                    f"and step {last % count} reads it after that"
                )


def _check_bounds(trace: Trace, plan: Plan, machine: Machine | None) -> None:
    activation = max(trace.activation_bytes(), default=0)
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
    for bundle, offset in [(p.bundle, p.offset_bytes) for p in plan.residents] + [
        (t.bundle, t.offset_bytes) for t in plan.transfers
    ]:
        if offset < 0 or offset + plan.bundles[bundle].size_bytes > plan.arena_bytes:
            _fail(f"bundle {bundle} at {offset} B ends outside the arena of {plan.arena_bytes} B")
        if machine is not None and offset % machine.page_bytes:
            _fail(f"bundle {bundle} at {offset} B is not on a page of {machine.page_bytes} B")


def _check_overlap(plan: Plan) -> None:
    num_steps = len(plan.steps)
    # What takes a slot at each step, and what gives it back before that step.
    taken: list[list[tuple[int, int, int]]] = [[] for _ in range(num_steps)]
    given: list[list[tuple[int, int, int]]] = [[] for _ in range(num_steps + 1)]
    ranges = [(p.bundle, p.offset_bytes, 0, num_steps) for p in plan.residents]
    for transfer in plan.transfers:
        ranges += [
            (transfer.bundle, transfer.offset_bytes, first, end) for first, end in occupied_steps(transfer, num_steps)
        ]
    for bundle, offset, first, end in ranges:
        size = plan.bundles[bundle].size_bytes
        if size and first < end:
            taken[first].append((offset, offset + size, bundle))
            given[end].append((offset, offset + size, bundle))
    held: list[tuple[int, int, int]] = []
    for step in range(num_steps):
        for slot in given[step]:
            held.pop(bisect_left(held, slot))
        for slot in taken[step]:
            insort(held, slot)
            at = bisect_left(held, slot)
            for other in held[max(at - 1, 0) : at] + held[at + 1 : at + 2]:
                if other[0] < slot[1] and slot[0] < other[1]:
                    _fail(
                        f"in step {step} bundles {other[2]} at [{other[0]}, {other[1]}) B and {slot[2]} at "
                        f"[{slot[0]}, {slot[1]}) B of the arena overlap"
                    )


def _check_host(trace: Trace, plan: Plan, machine: Machine | None) -> None:
    """Checks the host part as the plan that it is: one whose steps are the transfers to the device."""
    if machine is not None and (plan.host is None) != (machine.disk_link is None):
        has, link = ("no host part", "a") if plan.host is None else ("a host part", "no")
        _fail(f"it has {has}, and machine {machine.name!r} {link} link from disk to host memory")
    if plan.host is None:
        return
    below = as_plan(plan)
    try:
        _check_transfers(below)
        if not trace.cyclic:
            _check_only_pass(below)
        _check_reads(below)
        _check_bounds(replace(trace, tensors=(), steps=()), below, machine)
        _check_overlap(below)
    except PlanError as error:
        raise PlanError(f"in host memory, where steps are transfers to the device: {error}") from error
    check_order(trace, plan)
