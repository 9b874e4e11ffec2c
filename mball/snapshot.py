"""Takes the report and the timeline of a wrapped model from what its engine knows, and what its process holds."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence

import torch

from mball.memory.gauge import HostGauge
from mball.memory.ledger import Kind, Ledger
from mball.observe.reconcile import CudaFacts, Reconciliation, reconcile_gpu, reconcile_host
from mball.observe.report import HostMemory, Report
from mball.observe.timeline import Lane, Span, Timeline
from mball.observe.told import NotTold, Told
from mball.run.engine import Engine
from mball.run.recorder import PassRecord
from mball.schema import Machine, Plan
from mball.units import format_names

# On a GPU these are memory that PyTorch's allocator gives; the rest of a ledger mball takes from the driver itself.
_IN_ALLOCATOR = frozenset(
    kind.value for kind in (Kind.BUFFERS, Kind.ACTIVATIONS, Kind.CAPTURE, Kind.GRAPHS, Kind.SCRATCH)
)
NOT_COUNTED = ("Python and torch themselves", "tensors the user keeps")
NOT_COUNTED_ON_GPU = (
    "the CUDA context",
    "workspaces of CUDA's libraries",
    "tensors the user keeps",
)
KEPT_BLOCKS = "blocks that PyTorch's allocator keeps"  # until it is capped


def take_report(
    engine: Engine, *, policy: str, machine: Machine, io_path: str, weights_owned: int, graphs: int
) -> Report:
    """Returns what `engine` holds, moves and takes now.

    Args:
        engine: runs the model.
        policy: who plans.
        machine: with its links, as measured.
        io_path: how the reader reads, in words.
        weights_owned: the weights that the modules hold now.
        graphs: the graphs that were captured.
    """
    plan, last, place, swap = engine.plan, engine.meter.last, engine.place, engine.homes.swap.statistics
    on_gpu = place.type == "cuda"
    resident = streamed = arena = activations = slots = workspace = 0
    if plan is not None:
        resident = _weight_bytes(plan, [placement.bundle for placement in plan.residents], engine)
        streamed = plan.prediction.streamed_bytes
        slots = plan.arena_bytes - sum(plan.bundles[placement.bundle].size_bytes for placement in plan.residents)
        arena, activations = engine.execution.arena.bytes_of(plan.arena_bytes), plan.activation_bytes
    if engine.trace is not None:
        workspace = max(step.scratch_bytes for step in engine.trace.steps)
    pinned = engine.execution.device.pinned()
    compute_s = max(last.wall_s - last.stall_s, 0.0)
    link_bytes_per_s = machine.link.bandwidth_bytes_per_s
    roofline_s = max(compute_s, last.bytes_read / link_bytes_per_s)
    host = _host_memory(engine, machine)
    if host is not None:
        roofline_s = max(roofline_s, host.disk_bytes_per_pass / host.disk_bytes_per_s)
    return Report(
        policy=policy,
        budget_bytes=engine.budget_bytes,
        peak_bytes=engine.ledger.peak_bytes,
        buffer_bytes=engine.ledger.account(Kind.BUFFERS).current_bytes,
        staging_bytes=engine.ledger.account(Kind.STAGING).current_bytes,
        activation_bytes=activations,
        arena_bytes=arena,
        slot_bytes=slots,
        workspace_bytes=workspace,
        scratch_bytes=engine.ledger.account(Kind.SCRATCH).current_bytes,
        taken_bytes=engine.execution.idle.taken_bytes,
        pinned_bytes=pinned.size_bytes,
        pinning_s=pinned.time_s,
        capture_bytes=engine.capture.held_bytes,
        capture_is_counted=engine.ledger.account(Kind.CAPTURE).current_bytes > 0,
        step_graph_bytes=engine.ledger.account(Kind.GRAPHS).current_bytes,
        step_graphs=0 if engine.step_graphs is None else engine.step_graphs.num_recorded,
        workspace_is_counted=engine.workspace_fits,
        weight_bytes=sum(weight.size_bytes for weight in engine.weights),
        resident_bytes=resident,
        streamed_bytes_per_pass=streamed,
        bytes_read=engine.execution.counters.bytes_read,
        bytes_read_last_pass=last.bytes_read,
        passes=engine.meter.passes,
        pass_s=last.wall_s,
        compute_s=compute_s,
        stall_s=last.stall_s,
        roofline_s=roofline_s,
        predicted_s=last.predicted_s,
        measured_over_roofline=last.wall_s / roofline_s if roofline_s else None,
        link_bytes_per_s=link_bytes_per_s,
        io_path=io_path,
        weights_managed=len(engine.homes),
        weights_owned=weights_owned,
        weights_read=len(engine.weights_read),
        graphs=graphs,
        steps=engine.num_steps,
        unplanned_fetches=last.unplanned_fetches,
        in_place_bytes=last.in_place_bytes,
        host=host,
        swap_bytes=swap.size_bytes,
        swap_limit_bytes=engine.homes.swap.limit_bytes,
        swap_written_bytes=swap.written_bytes,
        swap_writes=swap.num_writes,
        swap_queue_s=swap.queue_s,
        swap_read_bytes=swap.read_bytes,
        swap_hit_bytes=swap.hit_bytes,
        swap_checked_bytes=swap.checked_bytes,
        held=take_gpu_memory(engine.ledger, ordinal=place.index or 0) if on_gpu else take_host_memory(engine.ledger),
        not_counted=not_counted(engine) if on_gpu else NOT_COUNTED,
    )


def _host_memory(engine: Engine, machine: Machine) -> HostMemory | None:
    plan, below = engine.plan, engine.execution.below
    if plan is None or plan.host is None or below is None or machine.disk_link is None:
        return None
    return HostMemory(
        budget_bytes=plan.host.budget_bytes,
        arena_bytes=plan.host.arena_bytes,
        resident_bytes=_weight_bytes(plan, [placement.bundle for placement in plan.host.residents], engine),
        disk_bytes_per_pass=sum(plan.bundles[transfer.bundle].moved_bytes for transfer in plan.host.transfers),
        disk_bytes_per_s=machine.disk_link.bandwidth_bytes_per_s,
        bytes_read=below.counters.bytes_read,
    )


def not_counted(engine: Engine) -> tuple[str, ...]:
    """Returns what the budget does not cover on a GPU now."""
    return NOT_COUNTED_ON_GPU if engine.allocator.is_capped else (*NOT_COUNTED_ON_GPU, KEPT_BLOCKS)


def take_host_memory(ledger: Ledger) -> Reconciliation:
    """Returns what this process holds of the host's memory, and what of it is in `ledger`."""
    anonymous_bytes = HostGauge().used_bytes()
    held = anonymous_bytes or NotTold(why="the kernel does not tell what is anonymous")
    return reconcile_host(anonymous_bytes=held, ledger=_kinds(ledger))


def take_gpu_memory(ledger: Ledger, *, ordinal: int = 0, spare_bytes: int = 0) -> Reconciliation:
    """Returns what this process holds of a GPU, as NVML, CUDA, PyTorch and `ledger` say. Takes about 0.1 s.

    `ordinal` is as CUDA_VISIBLE_DEVICES counts; `spare_bytes` are pages that mball's pool keeps. Starts CUDA.
    """
    return explain_gpu_memory(ledger, _cuda_facts(ordinal), spare_bytes=spare_bytes)


def explain_gpu_memory(ledger: Ledger, facts: CudaFacts, *, spare_bytes: int) -> Reconciliation:
    """Asks NVML about the GPU of `facts`, and holds its numbers against the others."""
    from mball.observe.nvml import NoGpuError, open_nvml  # models are wrapped where there is no pynvml that works, too

    held: Told[int]
    free: Told[int]
    try:
        with open_nvml() as nvml:
            gpu = nvml.snapshot().find(facts.uuid)
    except NoGpuError as error:
        held = free = NotTold(why=error.reason)
    else:
        if gpu is None:
            held = free = NotTold(why=f"no GPU that the driver tells of is {facts.uuid}")
        else:
            held, free = gpu.held_by(os.getpid()), gpu.free_bytes
    return reconcile_gpu(
        facts=facts,
        driver_free_bytes=free,
        held_bytes=held,
        ledger=_kinds(ledger),
        in_allocator=_IN_ALLOCATOR,
        spare_bytes=spare_bytes,
    )


def _cuda_facts(ordinal: int) -> CudaFacts:
    free_bytes, _ = torch.cuda.mem_get_info(ordinal)
    return CudaFacts(
        ordinal=ordinal,
        uuid=str(torch.cuda.get_device_properties(ordinal).uuid),
        reserved_bytes=torch.cuda.memory_reserved(ordinal),
        free_bytes=free_bytes,
    )


def _kinds(ledger: Ledger) -> dict[str, int]:
    accounts = ledger.snapshot()
    return {kind.value: accounts[kind.value].current_bytes for kind in Kind}


def take_timeline(engine: Engine) -> Timeline | None:
    """Returns the timeline of the last pass that ended well; None before the first.

    A read that nobody knows the end of is drawn until the end of the pass. May be called in any thread.
    """
    record = engine.execution.recorder.last
    if record is None:
        return None
    weights = [weight.name for weight in engine.weights]
    spans = []
    steps = [_step(record, number, weights) for number in range(len(record.computes))]
    for (name, step), (_, began_s, ended_s) in zip(steps, record.computes, strict=True):
        spans.append(Span(lane=Lane.COMPUTE, name=name, start_s=began_s, end_s=ended_s, step=step))
    for number, bundle, began_s, ended_s in record.stalls:
        name = f"wait for {format_names([weights[weight] for weight in bundle.tensors])}"
        step = steps[number][1] if number < len(steps) else None
        spans.append(Span(lane=Lane.STALLS, name=name, start_s=began_s, end_s=ended_s, step=step))
    for read in record.reads:
        began_s, ended_s = read.times(record.ended_s)
        if max(read.asked_s, ended_s) <= record.began_s:
            continue  # the pass before has it
        spans.append(
            Span(
                lane=Lane.READS,
                name=format_names([weights[weight] for weight in read.bundle.tensors]),
                start_s=began_s,
                end_s=ended_s,
                size_bytes=read.size_bytes,
                asked_s=read.asked_s,
            )
        )
    return Timeline(spans=tuple(span.since(record.began_s) for span in spans), pass_s=record.ended_s - record.began_s)


def _step(record: PassRecord, number: int, weights: Sequence[str]) -> tuple[str, int | None]:
    """Returns the name of the pass's compute `number`, and its plan step if it was planned."""
    step = record.computes[number][0]
    if isinstance(step, tuple):
        return f"{format_names([weights[weight] for weight in step])}, not planned", None
    _, trace, plan = record.plans[bisect_right(record.plans, number, key=lambda adopted: adopted[0]) - 1]
    planned = plan.steps[step]
    return format_names([each.name for each in trace.steps[planned.first : planned.end]]), step


def _weight_bytes(plan: Plan, bundles: Sequence[int], engine: Engine) -> int:
    return sum(engine.weights[weight].size_bytes for bundle in bundles for weight in plan.bundles[bundle].tensors)
