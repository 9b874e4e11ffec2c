"""Proves that a plan keeps the bytes below the device right: what steps change there, and what comes from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from mball.errors import PlanError
from mball.plan.at_home import AtHome, first_of, last_of
from mball.plan.bundles import crossing
from mball.plan.demand import bundle_reads
from mball.plan.simulate import held_until
from mball.schema import Offload, Placement, Plan, Trace, Transfer

_Part = TypeVar("_Part", Placement, Transfer, Offload)


def check_home(trace: Trace, plan: Plan) -> None:
    """Returns when all that uses the bytes of a bundle below the device finds the right ones.

    Raises:
        PlanError: something does not; the message says what, and where.
    """
    at_home = AtHome.of(trace, plan.bundles, plan.steps)
    residents, transfers, offloads = _by_bundle(plan.residents), _by_bundle(plan.transfers), _by_bundle(plan.offloads)
    _check_untils(trace, plan, offloads)
    _check_crossing(trace, plan, at_home, offloads)
    _check_host_writes(trace, plan, at_home)
    for bundle, steps in at_home.device_writes.items():
        stays = residents.get(bundle, []), transfers.get(bundle, [])
        _check_changed(trace, plan, bundle, steps, *stays, offloads.get(bundle, []))
        _check_host_uses(trace, plan, bundle, steps, offloads.get(bundle, []), at_home.host_uses.get(bundle, ()))
    for bundle in offloads:
        has_home = all(trace.tensors[index].home is not None for index in plan.bundles[bundle].tensors)
        if has_home and bundle not in at_home.device_writes:
            _fail(f"bundle {bundle} is written back, and no step on the device changes it")


def _by_bundle(parts: Sequence[_Part]) -> dict[int, list[_Part]]:
    found: dict[int, list[_Part]] = {}
    for part in parts:
        found.setdefault(part.bundle, []).append(part)
    return found


def _fail(message: str) -> NoReturn:
    raise PlanError(f"{message}: the plan is wrong, make it again")


def _check_untils(trace: Trace, plan: Plan, offloads: dict[int, list[Offload]]) -> None:
    """Checks that writes are in order, and that no slot is held for more than a pass."""
    num_steps = len(plan.steps)
    latest = num_steps if trace.cyclic else 0
    for offload in plan.offloads:
        after, until = offload.after, offload.until
        if not (0 <= after < num_steps and after <= until < max(after + latest, num_steps)):
            _fail(
                f"the write of bundle {offload.bundle} after step {after} is waited for in step {until}, in a pass of "
                f"{num_steps} steps"
            )
    for transfer in plan.transfers:
        if transfer.bundle in offloads:
            last = held_until(offloads[transfer.bundle], transfer.needed_by, transfer.last_use, num_steps)
            if last - transfer.after > num_steps:
                _fail(
                    f"transfer of bundle {transfer.bundle} holds its slot for {last - transfer.after} steps, to the "
                    f"end of its write; the pass has {num_steps}, so it would overwrite itself"
                )
    for made in plan.made:
        last = held_until(offloads.get(made.bundle, ()), made.step, made.last_use, num_steps)
        if last - made.step >= num_steps:
            _fail(
                f"bundle {made.bundle} holds the slot it is made in for {last - made.step + 1} steps, to the end of "
                f"its write; the pass has {num_steps}"
            )


def _check_crossing(trace: Trace, plan: Plan, at_home: AtHome, offloads: dict[int, list[Offload]]) -> None:
    """Checks that what one lane bears and the other one reads goes over the link in time."""
    bundle_of = {index: number for number, bundle in enumerate(plan.bundles) for index in bundle.tensors}
    for index in sorted(crossing(trace)):
        tensor = trace.tensors[index]
        if index not in bundle_of:
            _fail(f"tensor {tensor.name!r} is born on one lane and read on the other, and has no bundle")
        if trace.is_born_below(tensor):
            continue
        bundle = bundle_of[index]
        first = at_home.host_reads[bundle][0]
        if not any(offload.after < first for offload in offloads.get(bundle, ())):
            _fail(f"step {first} reads tensor {tensor.name!r} in host memory, and nothing writes it there before")


def _check_host_writes(trace: Trace, plan: Plan, at_home: AtHome) -> None:
    """Checks that no step on the device reads bytes that were brought before the host lane wrote them anew."""
    written = AtHome.of(trace, plan.bundles).host_writes
    num_steps, count = len(plan.steps), len(trace.steps)
    for placement in plan.residents:
        if placement.bundle in written:
            _fail(
                f"bundle {placement.bundle} is resident, and step {written[placement.bundle][0]} of the trace writes "
                "it on the host lane"
            )
    reads = bundle_reads(trace, plan.bundles) if written else []

    def begin(step: int) -> int:
        """Returns the trace step with which a plan step of this pass, or one beside it, begins."""
        return plan.steps[step % num_steps].first + step // num_steps * count

    for transfer in plan.transfers:
        changes = written.get(transfer.bundle, ())
        window = range(begin(transfer.needed_by), begin(transfer.last_use + 1)) if changes else ()
        last = max((number for number in window if transfer.bundle in reads[number % count]), default=-count)
        for number in changes:
            if any(begin(transfer.after + 1) <= number + shift < last for shift in (-count, 0, count)):
                _fail(
                    f"the transfer of bundle {transfer.bundle} may begin before step {number} of the trace writes it, "
                    f"and step {last % count} reads it after that"
                )
        waits = at_home.host_write(transfer.bundle, transfer.after, num_steps, cyclic=trace.cyclic)
        if transfer.after_host != waits:
            _fail(
                f"the transfer of bundle {transfer.bundle} after step {transfer.after} waits for step "
                f"{transfer.after_host} of the host lane; the last there to write it before is {waits}"
            )


@dataclass(frozen=True, slots=True)
class _Stay:
    """A bundle with a home in its slot: from its first use there to its last; of a resident one pass."""

    first: int
    last: int
    offset_bytes: int
    is_resident: bool


def _check_changed(
    trace: Trace,
    plan: Plan,
    bundle: int,
    steps: Sequence[int],
    residents: Sequence[Placement],
    transfers: Sequence[Transfer],
    offloads: Sequence[Offload],
) -> None:
    """Checks that what steps on the device change of a bundle is written back from each stay that they change.

    Args:
        steps: that change it.
        residents, transfers, offloads: of the plan those of this bundle.
    """
    num_steps = len(plan.steps)
    stays = [_Stay(steps[0], steps[0] + num_steps - 1, each.offset_bytes, is_resident=True) for each in residents]
    stays += [_Stay(each.needed_by, each.last_use, each.offset_bytes, is_resident=False) for each in transfers]
    num_written = 0
    for stay in stays:
        changes = [step + over for over in (0, num_steps) for step in steps if stay.first <= step + over <= stay.last]
        writes = [
            (each, over) for each in offloads for over in (0, num_steps) if stay.first <= each.after + over <= stay.last
        ]
        num_written += len(writes)
        if len(writes) != bool(changes):
            _fail(
                f"bundle {bundle} is in its slot in steps [{stay.first}, {stay.last}], where {len(changes)} steps "
                f"change it, and is written back {len(writes)} times"
            )
        for write, over in writes:
            if write.after + over < changes[-1]:
                _fail(f"bundle {bundle} is written back after step {write.after}, and step {changes[-1]} changes it")
            if write.offset_bytes != stay.offset_bytes:
                _fail(f"bundle {bundle} is written back from {write.offset_bytes} B; it is at {stay.offset_bytes} B")
            again = first_of(steps, write.after + 1, num_steps)
            if stay.is_resident and write.until >= again:
                _fail(
                    f"the write of bundle {bundle} is waited for in step {write.until}, and step {again} changes it "
                    "before that"
                )
    if num_written != len(offloads):
        _fail(f"bundle {bundle} is written back {len(offloads)} times, {num_written} of them from where it is")
    lengths = {each.after: each.until - each.after for each in offloads}
    afters = sorted(lengths)
    for transfer in transfers:
        changed = last_of(steps, transfer.needed_by - 1, num_steps, cyclic=trace.cyclic)
        if changed is None:
            continue
        written = last_of(afters, transfer.after, num_steps, cyclic=trace.cyclic)
        if written is None or written < changed or written + lengths[written % num_steps] > transfer.after:
            _fail(
                f"the transfer of bundle {bundle} may begin after step {transfer.after}; what step {changed} changes "
                "is not written back by then"
            )


def _check_host_uses(
    trace: Trace, plan: Plan, bundle: int, steps: Sequence[int], offloads: Sequence[Offload], host_uses: Sequence[int]
) -> None:
    """Checks that what the host lane uses has been written back since it was changed."""
    num_steps = len(plan.steps)
    afters = sorted(each.after for each in offloads)
    for step in host_uses:
        changed = last_of(steps, step - 1, num_steps, cyclic=trace.cyclic)
        if changed is None:
            continue
        written = last_of(afters, step - 1, num_steps, cyclic=trace.cyclic)
        if written is None or written < changed:
            _fail(
                f"step {step} uses bundle {bundle} on the host lane, and what step {changed} changes on the device is "
                "not written back before"
            )
