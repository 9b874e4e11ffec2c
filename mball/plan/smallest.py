"""The smallest budget that works, and what sets it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from mball.errors import ConfigError, SchemaError
from mball.plan.bundles import born_bundles, crossing, finest_bundles
from mball.plan.demand import Demand
from mball.schema import Lane, Machine, Tier, Trace, Treatment
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
        SchemaError: trace or machine contradict themselves or each other, or what steps do on the host lane, or write,
            cannot be planned.
    """
    trace.check()
    machine.check()
    _check_lanes(trace, machine)
    stay, stream = Treatment.STAY, Treatment.STREAM
    for tensor in trace.tensors:
        if stay not in tensor.may or (tensor.home is not None and stream not in tensor.may):
            wanted = {stay} if tensor.home is None else {stay, stream}
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


def _check_lanes(trace: Trace, machine: Machine) -> None:
    """Checks that what steps use on the host lane, and what they write, is in host memory when they need it."""
    for step in trace.steps:
        on_host = step.lane is Lane.HOST
        if machine.disk_link is not None and (on_host or step.writes):
            does = "runs on the host lane" if on_host else f"writes {len(step.writes)} tensors"
            raise SchemaError(
                f"step {step.name!r} of trace {trace.name!r} {does}, and machine {machine.name!r} has a disk_link; "
                "this mball plans host steps and writes over one link: take a machine whose link begins at the homes"
            )
        if on_host and machine.link.source is not Tier.HOST:
            raise SchemaError(
                f"step {step.name!r} of trace {trace.name!r} runs on the host lane and uses host memory; the "
                f"link of machine {machine.name!r} begins at {machine.link.source.value}: give it a link from host "
                "memory, and the tensors homes there"
            )
    for index in sorted(crossing(trace)):
        tensor = trace.tensors[index]
        if Treatment.OFFLOAD not in tensor.may:
            born, read = ("host", "compute") if trace.is_born_below(tensor) else ("compute", "host")
            raise SchemaError(
                f"tensor {tensor.name!r} is born on the {born} lane and read on the {read} lane, and may "
                f"{' and '.join(sorted(tensor.may))}; it has to go over the link: let it offload"
            )


def smallest_budget(trace: Trace, machine: Machine, *, fixed_bytes: int = 0) -> SmallestBudget:
    """Returns the smallest budget under which `trace` can be planned.

    There nothing is resident and each step waits for its own weights: the slots of the hungriest step, the
    largest activations of the pass and `fixed_bytes` must fit together. What is born in the pass and may leave is in
    slots, or with the other activations, whatever takes less.
    """
    born, must = born_bundles(trace, machine), born_bundles(trace, machine, must_leave=True)
    return min(
        (
            smallest_for(trace, Demand.of(trace, [*finest_bundles(trace, machine), *leaves]), fixed_bytes)
            for leaves in ([born, must] if born else [[]])
        ),
        key=lambda smallest: smallest.size_bytes,
    )


def smallest_for(trace: Trace, demand: Demand, fixed_bytes: int) -> SmallestBudget:
    """Returns the smallest budget for the finest partition of the weights, given as its demand."""
    apart = {index for bundle in demand.bundles for index in bundle.tensors}
    activation = max(trace.activation_bytes(apart), default=0)
    needs = [after - before for before, after in pairwise(demand.read_bytes_before)]
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
