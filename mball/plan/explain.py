"""What a plan does, in terms that a person asks in: what stays, what comes and when, where it waits, and for what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mball.plan.chain import simulate
from mball.plan.demand import bundle_gathers
from mball.plan.lanes import Waits
from mball.plan.simulate import Simulation, slot_bytes, written_bytes
from mball.schema import HostPlan, Lane, Machine, Offload, Plan, Prediction, Trace, Transfer
from mball.units import format_names

_SAME_S = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """A step that waits.

    Attributes:
        step: its name.
        stall_s: how long.
        weights: what it waits for.
        size_bytes: what is read for it, or written.
        lead_s: how long before the step the slot of the last of it was free; of a write, how long it had. If the bytes
            take longer than that, only a smaller need or a faster link helps, or more room.
        is_write: whether the step waits, before it is left, for what is written below.
        host_step: the step on the host lane that what it waits for waits for, or that it waits for itself.
    """

    step: str
    stall_s: float
    weights: tuple[str, ...]
    size_bytes: int
    lead_s: float
    is_write: bool = False
    host_step: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes of the device while a plan step runs."""

    fixed_bytes: int
    resident_bytes: int
    slot_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.resident_bytes + self.slot_bytes + self.activation_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BelowDevice:
    """What comes to the device through host memory.

    Attributes:
        resident, read: weights that stay in host memory, and that are read from disk in each pass, by the order of
            first use.
        resident_bytes, read_bytes: of those.
        slots: reads from disk of a pass.
        offloaded_bytes: of host memory, set aside for what is offloaded.
    """

    resident: tuple[str, ...]
    read: tuple[str, ...]
    resident_bytes: int
    read_bytes: int
    slots: int
    offloaded_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A plan, explained.

    Attributes:
        resident, streamed, gathered: the weights, by the order of first use; of the last only rows are read, at home.
        resident_bytes, streamed_bytes, gathered_bytes: of those; of the last the rows of a pass.
        unread_bytes: weights that no step reads take no memory.
        in_place, in_place_bytes: weights that only steps on the host lane use, where they are.
        offloaded: tensors born in the pass that are written below, and brought back if the device reads them again.
        offloaded_peak_bytes: the most bytes of those that are below at one time.
        written_back: weights that steps change on the device.
        anew: those that are dropped and made anew.
        slots: transfers of a pass.
        stalls: the steps that wait, the longest first.
        memory: of each plan step.
        simulation: of a steady pass.
        gap: predicted time over the roofline.
        below: of the streamed weights, who stays in host memory, if they come through it.
    """

    resident: tuple[str, ...]
    streamed: tuple[str, ...]
    gathered: tuple[str, ...]
    resident_bytes: int
    streamed_bytes: int
    gathered_bytes: int
    unread_bytes: int
    in_place: tuple[str, ...]
    in_place_bytes: int
    offloaded: tuple[str, ...]
    offloaded_peak_bytes: int
    written_back: tuple[str, ...]
    anew: tuple[str, ...]
    slots: int
    stalls: tuple[Stall, ...]
    memory: tuple[MemoryUse, ...]
    simulation: Simulation
    gap: float
    below: BelowDevice | None = None

    @property
    def prediction(self) -> Prediction:
        """Of a steady pass."""
        return self.simulation.prediction


def explain(trace: Trace, plan: Plan, machine: Machine) -> Explanation:
    """Returns what `plan`, which is valid for `trace`, does on `machine`."""
    simulation = simulate(trace, plan, machine)
    kept = {weight for placement in plan.residents for weight in plan.bundles[placement.bundle].tensors}
    needs = trace.needs()
    read = {weight for weights in needs for weight in weights}
    rows = trace.gathered()
    first_used: dict[int, None] = {}
    for weights, gathers in zip(needs, rows, strict=True):
        first_used |= dict.fromkeys((*weights, *(gather.tensor for gather in gathers)))
    resident = [weight for weight in first_used if weight in kept]
    streamed = [weight for weight in first_used if weight not in kept and weight in read]
    gathered = [weight for weight in first_used if weight not in kept and weight not in read]
    at_home = set(gathered)
    on_host = [step for step in trace.steps if step.lane is Lane.HOST]
    used = {index for step in on_host for index in (*step.reads, *step.writes, *(each.tensor for each in step.gathers))}
    # A dict keeps their order.
    in_place = {index: None for index, _ in trace.homed() if index in used and index not in first_used}
    changed = {index for step in trace.steps if step.lane is Lane.COMPUTE for index in step.writes}
    born = [offload for offload in plan.offloads if not plan.bundles[offload.bundle].extents]
    roofline_s = simulation.prediction.roofline_s
    return Explanation(
        resident=tuple(trace.tensors[weight].name for weight in resident),
        streamed=tuple(trace.tensors[weight].name for weight in streamed),
        gathered=tuple(trace.tensors[weight].name for weight in gathered),
        resident_bytes=sum(trace.tensors[weight].size_bytes for weight in resident),
        streamed_bytes=sum(trace.tensors[weight].size_bytes for weight in streamed),
        gathered_bytes=sum(gather.size_bytes for gathers in rows for gather in gathers if gather.tensor in at_home),
        offloaded_peak_bytes=simulation.peak_offloaded_bytes,
        unread_bytes=sum(tensor.size_bytes for n, tensor in trace.homed() if n not in first_used and n not in in_place),
        in_place=tuple(trace.tensors[weight].name for weight in in_place),
        in_place_bytes=sum(trace.tensors[weight].size_bytes for weight in in_place),
        offloaded=tuple(_name(trace, plan, offload.bundle) for offload in born),
        written_back=tuple(trace.tensors[weight].name for weight in first_used if weight in changed),
        anew=tuple(dict.fromkeys(_name(trace, plan, made.bundle) for made in plan.made if made.is_anew)),
        slots=len(plan.transfers),
        stalls=tuple(_stalls(trace, plan, simulation)),
        memory=tuple(_memory(trace, plan)),
        simulation=simulation,
        gap=simulation.pass_s / roofline_s if roofline_s else 1.0,
        below=None if plan.host is None else _below(trace, plan, plan.host, streamed),
    )


def _below(trace: Trace, plan: Plan, host: HostPlan, streamed: Sequence[int]) -> BelowDevice:
    kept = {weight for placement in host.residents for weight in plan.bundles[placement.bundle].tensors}
    resident = [weight for weight in streamed if weight in kept]
    read = [weight for weight in streamed if weight not in kept]
    return BelowDevice(
        resident=tuple(trace.tensors[weight].name for weight in resident),
        read=tuple(trace.tensors[weight].name for weight in read),
        resident_bytes=sum(trace.tensors[weight].size_bytes for weight in resident),
        read_bytes=sum(trace.tensors[weight].size_bytes for weight in read),
        slots=len(host.transfers),
        offloaded_bytes=host.offloaded_bytes,
    )


def _name(trace: Trace, plan: Plan, bundle: int) -> str:
    """Returns the name of a tensor that has a bundle of its own."""
    return trace.tensors[plan.bundles[bundle].tensors[0]].name


def _stalls(trace: Trace, plan: Plan, simulation: Simulation) -> list[Stall]:
    found = []
    count = len(plan.steps)
    arrivals: list[list[tuple[Transfer, float]]] = [[] for _ in plan.steps]
    for transfer, served in zip(plan.transfers, simulation.transfers, strict=True):
        # Times count from the pass that asked: for what runs ahead that is the one before.
        landed_s = served.end_s - (simulation.pass_s if transfer.after < 0 else 0.0)
        arrivals[transfer.needed_by].append((transfer, landed_s))
    rows = _rows_waits(trace, plan)
    on_host = [trace.steps[step.first].lane is Lane.HOST for step in plan.steps]
    leaving: list[list[_Write]] = [[] for _ in plan.steps]
    changed = {index for step in trace.steps if step.lane is Lane.COMPUTE for index in step.writes}
    for offload, size_bytes in zip(plan.offloads, written_bytes(trace, plan.offloads, plan.bundles), strict=True):
        tensors = plan.bundles[offload.bundle].tensors
        if plan.bundles[offload.bundle].extents:
            tensors = tuple(index for index in tensors if index in changed)
        leaving[offload.until % count].append(_Write(offload, tensors, size_bytes))
    last_host = max((number for number in range(count) if on_host[number]), default=None)
    for number, (step, timing) in enumerate(zip(plan.steps, simulation.steps, strict=True)):
        if timing.write_s > 0:
            found.append(_write_stall(trace, plan, simulation, number, leaving[number], last_host))
        if timing.stall_s <= 0:
            continue
        ready_s = timing.start_s - timing.stall_s
        came = [transfer for transfer, landed_s in arrivals[number] if landed_s > ready_s - _SAME_S]
        weights = [weight for transfer in came for weight in plan.bundles[transfer.bundle].tensors]
        # `after` counts back into the pass before where it is negative.
        freed = max((transfer.after for transfer in came), default=number - 1)
        while on_host[freed % count] and freed > -count:  # left as soon as the step before it
            freed -= 1
        left = simulation.steps[freed % count]
        freed_s = left.end_s + left.write_s - (simulation.pass_s if freed < 0 else 0.0)
        hosts = [transfer.after_host for transfer in came if transfer.after_host is not None] or rows[number]
        ends = {host: simulation.steps[host % count].end_s + host // count * simulation.pass_s for host in hosts}
        late = max((host for host, end_s in ends.items() if end_s > freed_s + _SAME_S), default=None)
        found.append(
            Stall(
                step=format_names([each.name for each in trace.steps[step.first : step.end]]),
                stall_s=timing.stall_s,
                weights=tuple(trace.tensors[weight].name for weight in weights),
                size_bytes=sum(plan.bundles[transfer.bundle].moved_bytes for transfer in came),
                lead_s=ready_s - freed_s,
                host_step=None if late is None else trace.steps[plan.steps[late % count].first].name,
            )
        )
    return sorted(found, key=lambda stall: -stall.stall_s)


class _Write(NamedTuple):
    """An offload, the tensors of its bundle that are written, and their bytes."""

    offload: Offload
    tensors: tuple[int, ...]
    size_bytes: int


def _write_stall(
    trace: Trace, plan: Plan, simulation: Simulation, number: int, writes: Sequence[_Write], last_host: int | None
) -> Stall:
    """Returns why a step is left late.

    Args:
        number: of the plan step.
        writes: those that it waits for.
        last_host: the last plan step on the host lane, if there is one.
    """
    step, timing, count = plan.steps[number], simulation.steps[number], len(plan.steps)
    asked_s = [
        simulation.steps[offload.after].end_s - offload.until // count * simulation.pass_s for offload, _, _ in writes
    ]
    return Stall(
        step=format_names([each.name for each in trace.steps[step.first : step.end]]),
        stall_s=timing.write_s,
        weights=tuple(trace.tensors[index].name for write in writes for index in write.tensors),
        size_bytes=sum(write.size_bytes for write in writes),
        lead_s=timing.end_s - max(asked_s, default=timing.end_s),
        is_write=bool(writes),
        # The last step also waits for the host lane to end the pass before.
        host_step=trace.steps[plan.steps[last_host].first].name if last_host is not None and not writes else None,
    )


def _rows_waits(trace: Trace, plan: Plan) -> list[list[int]]:
    """Returns for each plan step the steps on the host lane that write what it reads rows of, counted from its pass."""
    kept = {placement.bundle for placement in plan.residents}
    gathers = bundle_gathers(trace, plan.bundles)
    rows = Waits.of(trace, plan, [[bundle for bundle, _ in each if bundle not in kept] for each in gathers]).rows
    return [[] if row is None else [row[0] - row[1] * len(plan.steps)] for row in rows]


def _memory(trace: Trace, plan: Plan) -> list[MemoryUse]:
    resident = sum(plan.bundles[placement.bundle].size_bytes for placement in plan.residents)
    activations = trace.activation_bytes({index for bundle in plan.bundles for index in bundle.tensors})
    found = []
    for step, slots in zip(plan.steps, slot_bytes(plan), strict=True):
        found.append(
            MemoryUse(
                fixed_bytes=plan.fixed_bytes,
                resident_bytes=resident,
                slot_bytes=slots,
                activation_bytes=max(activations[step.first : step.end], default=0),
            )
        )
    return found
