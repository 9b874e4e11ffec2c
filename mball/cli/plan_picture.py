"""What a plan looks like, as data for `mball.observe.picture`."""

from __future__ import annotations

from collections.abc import Sequence

from mball.observe.picture import PlanPicture
from mball.observe.timeline import Lane, Span, Timeline
from mball.plan import Explanation, UtilityPoint, written_bytes
from mball.schema import Lane as StepLane
from mball.schema import Plan, Trace
from mball.units import format_names


def picture_of(trace: Trace, plan: Plan, explanation: Explanation, curve: Sequence[UtilityPoint]) -> PlanPicture:
    """Returns memory over time by kind, the lanes of a predicted pass, and the utility curve."""
    simulation = explanation.simulation
    spans, edges, left_s = list[Span](), list[float](), 0.0
    for number, (step, timing) in enumerate(zip(plan.steps, simulation.steps, strict=True)):
        name = trace.steps[step.first].name
        if trace.steps[step.first].lane is StepLane.HOST:
            # On the device it begins when the step before is left, and takes no time.
            edges.append(left_s)
            spans.append(Span(lane=Lane.HOST, name=name, start_s=timing.start_s, end_s=timing.end_s, step=number))
            continue
        edges.append(timing.start_s - timing.stall_s)
        left_s = timing.end_s + timing.write_s
        spans.append(Span(lane=Lane.COMPUTE, name=name, start_s=timing.start_s, end_s=timing.end_s, step=number))
        if timing.stall_s > 0:
            began_s = timing.start_s - timing.stall_s
            spans.append(Span(lane=Lane.STALLS, name=name, start_s=began_s, end_s=timing.start_s, step=number))
        if timing.write_s > 0:
            spans.append(Span(lane=Lane.STALLS, name=name, start_s=timing.end_s, end_s=left_s, step=number))
    for transfer, served in zip(plan.transfers, simulation.transfers, strict=True):
        bundle = plan.bundles[transfer.bundle]
        spans.append(
            Span(
                lane=Lane.READS,
                name=format_names([trace.tensors[weight].name for weight in bundle.tensors]),
                start_s=served.start_s,
                end_s=served.end_s,
                size_bytes=bundle.moved_bytes,
                asked_s=0.0,
            )
        )
    sizes = written_bytes(trace, plan.offloads, plan.bundles)
    for offload, served, size_bytes in zip(plan.offloads, simulation.offloads, sizes, strict=True):
        bundle = plan.bundles[offload.bundle]
        spans.append(
            Span(
                lane=Lane.WRITES,
                name=format_names([trace.tensors[index].name for index in bundle.tensors]),
                start_s=served.start_s,
                end_s=served.end_s,
                size_bytes=size_bytes,
            )
        )
    return PlanPicture(
        timeline=Timeline(spans=tuple(spans), pass_s=simulation.pass_s),
        edges_s=(*edges, simulation.pass_s),
        memory={
            "fixed": tuple(use.fixed_bytes for use in explanation.memory),
            "residents": tuple(use.resident_bytes for use in explanation.memory),
            "slots": tuple(use.slot_bytes for use in explanation.memory),
            "activations": tuple(use.activation_bytes for use in explanation.memory),
        },
        budget_bytes=plan.budget_bytes,
        curve=tuple((point.budget_bytes, point.prediction.pass_s) for point in curve if point.prediction is not None),
    )
