"""Takes the report of a wrapped model from what its engine knows."""

from __future__ import annotations

from collections.abc import Sequence

from mball.observe.report import Report
from mball.run.engine import Engine
from mball.schema import Plan

NOT_COUNTED = ("Python and torch themselves", "tensors the user keeps")


def take_report(engine: Engine, *, link_bytes_per_s: float, io_path: str, weights_owned: int, graphs: int) -> Report:
    """Returns what `engine` holds, moves and takes now.

    Args:
        engine: runs the model.
        link_bytes_per_s: speed of the link, as measured.
        io_path: how the reader reads, in words.
        weights_owned: the weights that the modules hold now.
        graphs: the graphs that were captured.
    """
    plan, last = engine.plan, engine.last
    resident = streamed = arena = activations = 0
    if plan is not None:
        resident = _weight_bytes(plan, [placement.bundle for placement in plan.residents], engine)
        streamed = plan.prediction.streamed_bytes
        arena, activations = plan.arena_bytes, plan.activation_bytes
    compute_s = max(last.wall_s - last.stall_s, 0.0)
    roofline_s = max(compute_s, last.bytes_read / link_bytes_per_s)
    return Report(
        budget_bytes=engine.ledger.budget_bytes,
        peak_bytes=engine.ledger.peak_bytes,
        buffer_bytes=engine.fixed_bytes,
        activation_bytes=activations,
        arena_bytes=arena,
        capture_bytes=engine.capture.held_bytes,
        capture_is_counted=plan is not None and plan.budget_bytes < engine.ledger.budget_bytes,
        workspace_is_counted=engine.workspace_fits,
        weight_bytes=sum(weight.size_bytes for weight in engine.weights),
        resident_bytes=resident,
        streamed_bytes_per_pass=streamed,
        bytes_read=engine.execution.counters.bytes_read,
        bytes_read_last_pass=last.bytes_read,
        passes=engine.passes,
        pass_s=last.wall_s,
        compute_s=compute_s,
        stall_s=last.stall_s,
        roofline_s=roofline_s,
        measured_over_roofline=last.wall_s / roofline_s if roofline_s else None,
        link_bytes_per_s=link_bytes_per_s,
        io_path=io_path,
        weights_managed=len(engine.homes),
        weights_owned=weights_owned,
        weights_read=len(engine.weights_read),
        graphs=graphs,
        steps=last.steps,
        unplanned_fetches=last.unplanned_fetches,
        in_place_bytes=last.in_place_bytes,
        swap_bytes=engine.homes.swap.size_bytes,
        not_counted=NOT_COUNTED,
    )


def _weight_bytes(plan: Plan, bundles: Sequence[int], engine: Engine) -> int:
    return sum(engine.weights[weight].size_bytes for bundle in bundles for weight in plan.bundles[bundle].weights)
