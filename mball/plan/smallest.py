"""The smallest budget that works, and what sets it."""

from __future__ import annotations

from dataclasses import dataclass

from mball.errors import ConfigError, SchemaError
from mball.plan.bundles import born_bundles, finest_bundles
from mball.plan.demand import Demand
from mball.schema import Lane, Machine, Trace, Treatment
from mball.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallestBudget:
    """The smallest feasible budget.

    Attributes:
        size_bytes: ``fixed + activation + slots``; this budget works, one page less does not.
        limited_by: for people: the step and the bytes that set the number.
        slots_bytes: slots of the step that needs most, in whole pages.
        activation_bytes: the largest need of any step for activations that have no slots.
        fixed_bytes: device memory that never moves.
    """

    size_bytes: int
    limited_by: str
    slots_bytes: int
    activation_bytes: int
    fixed_bytes: int


def check_problem(trace: Trace, machine: Machine, fixed_bytes: int) -> None:
    """Checks that this can be planned at all.

    Raises:
        ConfigError: `fixed_bytes` is negative.
        SchemaError: trace or machine contradict themselves or each other, or a step runs beside the device.
    """
    trace.check()
    machine.check()
    for step in trace.steps:
        if step.lane is not Lane.COMPUTE:
            raise SchemaError(
                f"step {step.name!r} of trace {trace.name!r} runs on the {step.lane.value} lane; this mball plans "
                f"{Lane.COMPUTE.value} steps only"
            )
    for tensor in trace.tensors:
        wanted = {Treatment.STAY} if tensor.home is None else {Treatment.STAY, Treatment.STREAM}
        if not wanted.issubset(tensor.may):
            raise SchemaError(
                f"tensor {tensor.name!r} may {' and '.join(sorted(tensor.may))}; this mball plans tensors that may "
                f"{' and '.join(sorted(wanted))}"
            )
    link = machine.link if machine.disk_link is None else machine.disk_link
    for _, tensor in trace.homed():
        if tensor.home is not None and tensor.home.tier is not link.source:
            raise SchemaError(
                f"tensor {tensor.name!r} has its home on tier {tensor.home.tier.value}; the link of machine "
                f"{machine.name!r} begins at {link.source.value}"
            )
    if fixed_bytes < 0:
        raise ConfigError(f"fixed_bytes is {fixed_bytes}; it must be zero or more")


def smallest_budget(trace: Trace, machine: Machine, *, fixed_bytes: int = 0) -> SmallestBudget:
    """Returns the smallest budget under which `trace` can be planned.

    There nothing is resident and each step waits for its own weights: the slots of the hungriest step, the
    largest activations of the pass and `fixed_bytes` must fit together. What is born in the pass and may leave is in
    slots, or with the other activations, whatever takes less; over two links it stays with them.
    """
    born = born_bundles(trace, machine)
    return min(
        (
            smallest_for(trace, Demand.of(trace, [*finest_bundles(trace, machine), *leaves]), fixed_bytes)
            for leaves in ([born, []] if born and machine.disk_link is None else [[]])
        ),
        key=lambda smallest: smallest.size_bytes,
    )


def smallest_for(trace: Trace, demand: Demand, fixed_bytes: int) -> SmallestBudget:
    """Returns the smallest budget for the finest partition of the weights, given as its demand."""
    apart = {index for bundle in demand.bundles for index in bundle.tensors}
    activation = max(trace.activation_bytes(apart), default=0)
    needs = [demand.slot_bytes(reads) for reads in demand.reads]
    slots = max(needs, default=0)
    limited_by = "no step reads a weight"
    if slots:
        hungriest = needs.index(slots)
        held = {index for bundle in demand.reads[hungriest] for index in demand.bundles[bundle].tensors}
        held_bytes = sum(trace.tensors[index].size_bytes for index in held)
        kind = "weights" if all(trace.tensors[index].home for index in held) else "weights and activations"
        limited_by = (
            f"step {trace.steps[hungriest].name!r} reads {format_bytes(held_bytes)} of {kind} at once, "
            f"{format_bytes(slots)} in whole pages"
        )
    limited_by += f"; activations take {format_bytes(activation)} and fixed memory {format_bytes(fixed_bytes)}"
    return SmallestBudget(
        size_bytes=fixed_bytes + activation + slots,
        limited_by=limited_by,
        slots_bytes=slots,
        activation_bytes=activation,
        fixed_bytes=fixed_bytes,
    )
