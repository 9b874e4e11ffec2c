"""`mball plan`: what a plan for a checkpoint or a trace would do, and what more memory would buy."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mball.cli.checkpoint_trace import trace_of_checkpoint
from mball.config import calibration_directory, own_cache
from mball.errors import CheckpointError, ConfigError, StorageError
from mball.plan import Explanation, UtilityPoint, explain, make_plan, smallest_budget, utility_curve
from mball.schema import Lane, Link, Machine, Plan, Prediction, Tier, Trace
from mball.storage import FileTable, calibrated_choice, choose_reader, find_calibrated_link, measure_link
from mball.units import GIB, PAGE_BYTES, format_bytes, format_names, parse_bytes

# Where nothing was measured: a fast SATA or a slow NVMe disk.
ASSUMED_BYTES_PER_S = 2e9
ASSUMED_LATENCY_S = 1e-4
# From pinned host memory to a GPU on PCIe 4.
ASSUMED_LINK_BYTES_PER_S = 20e9
ASSUMED_LINK_LATENCY_S = 1e-5
CURVE_POINTS = 12
SHOWN_STALLS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What `mball plan` was asked for.

    Attributes:
        source: a checkpoint, or a trace that `mball.save_trace` wrote.
        budget: as for `mball.wrap`.
        bandwidth: of the link in bytes a second, such as ``"2GB"``; None takes the calibration of
            the disk that the weights lie on, or measures it.
        host_budget: of host memory, if the weights are to come through it to a device of its own; or None.
        offload_budget: of what is offloaded to disk; None if that may be as much as it likes, or without meaning.
        link_bandwidth: of the link from host memory to that device in bytes a second; None takes that of PCIe 4.
        curve: whether to show what other budgets would give.
        picture: a PNG to draw, or None.
        as_json: whether to print JSON.
    """

    source: str
    budget: str
    bandwidth: str | None = None
    host_budget: str | None = None
    offload_budget: str | None = None
    link_bandwidth: str | None = None
    curve: bool = False
    picture: str | None = None
    as_json: bool = False


def run_plan(request: Request) -> int:
    """Prints the plan and returns 0.

    Raises:
        MballError: the source, the budget or the bandwidth cannot be read, or the budget is too small.
    """
    budget_bytes = parse_bytes(request.budget, what="budget")
    bandwidth = None if request.bandwidth is None else parse_bytes(request.bandwidth, what="bandwidth")
    if request.picture is not None and not request.picture.endswith(".png"):
        raise ConfigError(f"a plan cannot be drawn to {request.picture!r}: its suffix must be .png")
    trace, origin = _read(Path(request.source))
    machine, link_origin = _machine(trace, bandwidth)
    _check_tiers(request, machine)
    host_bytes = offload_bytes = None
    if request.host_budget is not None:
        host_bytes = parse_bytes(request.host_budget, what="host budget")
        machine = _through_host(machine, request.link_bandwidth)
    if request.offload_budget is not None:
        offload_bytes = parse_bytes(request.offload_budget, what="offload budget")
    plan = make_plan(trace, machine, budget_bytes, host_budget_bytes=host_bytes, offload_budget_bytes=offload_bytes)
    explanation = explain(trace, plan, machine)
    curve = _curve(trace, machine, budget_bytes, host_bytes, offload_bytes) if request.curve else ()
    # What leaves the device could stay as well.
    missing_bytes = explanation.streamed_bytes + sum(
        plan.bundles[made.bundle].size_bytes for made in plan.made if made.is_anew
    )
    missing_bytes += sum(
        plan.bundles[each.bundle].size_bytes for each in plan.offloads if not plan.bundles[each.bundle].extents
    )
    more_bytes = min(GIB, missing_bytes)
    if request.as_json:
        print(json.dumps(_document(trace, machine, plan, explanation, curve), indent=2))
    else:
        console = Console()
        for line in _lines(trace, machine, plan, explanation, origin, link_origin):
            console.print(line, highlight=False, soft_wrap=True)
        if explanation.stalls:
            console.print(_stalls(explanation))
        budgets = [budget_bytes, budget_bytes + more_bytes]
        more = utility_curve(trace, machine, budgets, host_budget_bytes=host_bytes, offload_budget_bytes=offload_bytes)[
            -1
        ].prediction
        if more is not None and more_bytes:
            console.print(f"     more  {format_bytes(more_bytes)} more: {_change(explanation.prediction, more)}")
        if curve:
            console.print(_table(curve, budget_bytes))
    if request.picture is not None:
        _draw(Path(request.picture), trace, plan, explanation, curve)
    return 0


def _check_tiers(request: Request, machine: Machine) -> None:
    """Raises ConfigError when options do not go with each other, or with where the weights are."""
    if machine.link.source is Tier.HOST and (request.host_budget or request.link_bandwidth) is not None:
        raise ConfigError(
            "--host-budget and --link-bandwidth are for weights that come from disk; those of this trace are in host "
            "memory: leave them out, and say with --bandwidth how fast the link from there is"
        )
    if request.host_budget is None and request.link_bandwidth is not None:
        raise ConfigError(
            f"link bandwidth {request.link_bandwidth!r} is of the link from host memory: say with --host-budget how "
            "much of that there is, or leave --link-bandwidth out"
        )
    if request.host_budget is not None and request.offload_budget is not None:
        raise ConfigError(
            f"offload budget {request.offload_budget!r}: with --host-budget what is offloaded shares host memory with "
            "what comes from disk; leave --offload-budget out"
        )


def _read(source: Path) -> tuple[Trace, str]:
    if source.suffix == ".json" and not source.name.endswith(".safetensors.index.json"):
        try:
            text = source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"the trace {str(source)!r} cannot be read: {error}") from error
        trace = Trace.from_json(text)
        return trace, "as saved"
    trace = trace_of_checkpoint(source)
    tables = sum(bool(step.gathers) for step in trace.steps)
    guessed = "times guessed" if not tables else f"times and {tables} as looked up by rows guessed"
    return trace, f"by their names, {guessed}; activations and buffers come on top"


def _machine(trace: Trace, bandwidth: int | None) -> tuple[Machine, str]:
    """Returns the machine, and how its link is known."""
    link, origin = (
        Link(bandwidth_bytes_per_s=ASSUMED_BYTES_PER_S, latency_s=ASSUMED_LATENCY_S),
        "assumed; measure yours and give --bandwidth",
    )
    homed = [tensor for _, tensor in trace.homed()]
    write_link = None
    is_home = any(tensor.home is not None and tensor.home.tier is Tier.HOST for tensor in homed)
    if is_home or any(step.lane is Lane.HOST for step in trace.steps):
        link = Link(bandwidth_bytes_per_s=ASSUMED_LINK_BYTES_PER_S, latency_s=ASSUMED_LINK_LATENCY_S, source=Tier.HOST)
        write_link = Link(
            bandwidth_bytes_per_s=bandwidth or link.bandwidth_bytes_per_s,
            latency_s=link.latency_s,
            source=Tier.DEVICE,
            target=Tier.HOST,
        )
    largest = max(homed, key=lambda tensor: tensor.size_bytes, default=None)
    file = largest.home.file if largest is not None and largest.home is not None else ""
    if bandwidth is not None:
        link, origin = dataclasses.replace(link, bandwidth_bytes_per_s=float(bandwidth)), "as given"
    elif write_link is None and os.path.isfile(file):
        files = FileTable()
        try:
            link, origin = _link_of(files, files.add_path(file))
        except StorageError:
            origin = "assumed: the file of the weights cannot be read"
        finally:
            files.close()
    machine = Machine(
        name="this machine", page_bytes=PAGE_BYTES, alignment_bytes=PAGE_BYTES, link=link, write_link=write_link
    )
    return machine, origin


def _through_host(machine: Machine, link_bandwidth: str | None) -> Machine:
    """Returns the machine whose weights come from disk through host memory to a device of its own."""
    bandwidth = ASSUMED_LINK_BYTES_PER_S
    if link_bandwidth is not None:
        bandwidth = float(parse_bytes(link_bandwidth, what="link bandwidth"))
    link = Link(bandwidth_bytes_per_s=bandwidth, latency_s=ASSUMED_LINK_LATENCY_S, source=Tier.HOST)
    return dataclasses.replace(machine, link=link, disk_link=dataclasses.replace(machine.link, target=Tier.HOST))


def _link_of(files: FileTable, name: str) -> tuple[Link, str]:
    choice = calibrated_choice(calibration_directory(), files, choose_reader(cache=own_cache()))
    known = find_calibrated_link(calibration_directory(), files, name, choice)
    if known is not None:
        return known[0], f"calibrated on {known[1]}"
    return measure_link(files, name, choice=choice), f"measured on {os.path.basename(name)}"


def _curve(
    trace: Trace, machine: Machine, budget_bytes: int, host_bytes: int | None, offload_bytes: int | None
) -> tuple[UtilityPoint, ...]:
    smallest = smallest_budget(trace, machine).size_bytes
    activations = max(trace.activation_bytes(), default=0)
    homed = [tensor.size_bytes for _, tensor in trace.homed()]
    largest = sum(homed) + activations + len(homed) * 2 * PAGE_BYTES
    step = max((largest - smallest) // (CURVE_POINTS - 1), 1)
    budgets = {budget_bytes, largest, *range(smallest, largest, step)}
    return utility_curve(trace, machine, budgets, host_budget_bytes=host_bytes, offload_budget_bytes=offload_bytes)


def _lines(
    trace: Trace, machine: Machine, plan: Plan, explanation: Explanation, origin: str, link_origin: str
) -> list[str]:
    weights = [tensor.size_bytes for _, tensor in trace.homed()]
    prediction = explanation.prediction
    smallest = smallest_budget(trace, machine)
    bound = "the link" if prediction.roofline_s > prediction.compute_s else "compute"
    if bound == "the link" and prediction.host_s >= prediction.roofline_s:
        bound = "the host lane"
    host = explanation.simulation.host
    if bound == "the link" and host is not None and host.disk_s >= prediction.roofline_s:
        bound = "the disk"
    disk = machine.link if machine.disk_link is None else machine.disk_link
    unread = f"; {format_bytes(explanation.unread_bytes)} are never read" if explanation.unread_bytes else ""
    return [
        f"    trace  {escape(trace.name)}: {len(trace.steps)} steps ({origin}), {len(weights)} weights, "
        f"{format_bytes(sum(weights))}{unread}",
        f"     link  {disk.bandwidth_bytes_per_s / 1e9:.2f} GB/s ({escape(link_origin)})"
        + ("" if disk is machine.link else f", {machine.link.bandwidth_bytes_per_s / 1e9:.2f} GB/s from host memory"),
        f"   budget  {format_bytes(plan.budget_bytes)}: activations {format_bytes(plan.activation_bytes)}, arena "
        f"{format_bytes(plan.arena_bytes)}",
        f" smallest  {format_bytes(smallest.size_bytes)}, set by {escape(smallest.limited_by)}",
        f"    stays  {format_bytes(explanation.resident_bytes)} in {len(explanation.resident)} weights"
        f"{_named(explanation.resident)}",
        f"  streams  {format_bytes(explanation.streamed_bytes)} in {len(explanation.streamed)} weights"
        f"{_named(explanation.streamed)}, by {explanation.slots} transfers a pass",
        *_gathers(explanation),
        *_leaving(trace, plan, explanation),
        *_host_lane(trace, explanation),
        *_below(plan, explanation),
        f"     pass  {_ms(prediction.pass_s)} predicted: compute {_ms(prediction.compute_s)}, stall "
        f"{_ms(prediction.stall_s)}; at best {_ms(prediction.roofline_s)}, set by {bound} "
        f"({explanation.gap:.2f} times that)",
    ]


def _gathers(explanation: Explanation) -> list[str]:
    if not explanation.gathered:
        return []
    rows = f"{format_bytes(explanation.gathered_bytes)} of rows a pass"
    return [f"  gathers  {rows} from {len(explanation.gathered)} weights that stay home{_named(explanation.gathered)}"]


def _leaving(trace: Trace, plan: Plan, explanation: Explanation) -> list[str]:
    """Says what is born in the pass and leaves the device before it is read."""
    lines = []
    if explanation.offloaded:
        born = [plan.bundles[offload.bundle] for offload in plan.offloads]
        size_bytes = sum(bundle.moved_bytes for bundle in born if not bundle.extents)
        lines.append(
            f" offloads  {format_bytes(size_bytes)} in {len(explanation.offloaded)} tensors"
            f"{_named(explanation.offloaded)}, {format_bytes(explanation.offloaded_peak_bytes)} at one time"
            f"{_most(plan)}"
        )
    if explanation.written_back:
        names = set(explanation.written_back)
        size_bytes = sum(tensor.size_bytes for tensor in trace.tensors if tensor.name in names)
        lines.append(
            f"  changes  {format_bytes(size_bytes)} in {len(names)} weights{_named(explanation.written_back)}, written "
            "back in each pass"
        )
    if explanation.anew:
        seconds = sum(
            trace.tensors[plan.bundles[made.bundle].tensors[0]].recompute_s or 0.0 for made in plan.made if made.is_anew
        )
        lines.append(
            f"     anew  {len(explanation.anew)} tensors{_named(explanation.anew)}, in {_ms(seconds)} of compute"
        )
    return lines


def _most(plan: Plan) -> str:
    budget_bytes = plan.offload_budget_bytes
    return "" if budget_bytes is None else f" of {format_bytes(budget_bytes)} that may be"


def _host_lane(trace: Trace, explanation: Explanation) -> list[str]:
    """Says what runs beside the device."""
    steps = sum(step.lane is Lane.HOST for step in trace.steps)
    if not steps:
        return []
    place = f"; {format_bytes(explanation.in_place_bytes)} in {len(explanation.in_place)} weights are used there only"
    return [
        f"host lane  {steps} steps, {_ms(explanation.prediction.host_s)}"
        f"{place + _named(explanation.in_place) if explanation.in_place else ''}"
    ]


def _below(plan: Plan, explanation: Explanation) -> list[str]:
    """Returns what is said of host memory, if the weights come through it."""
    below = explanation.below
    if below is None or plan.host is None:
        return []
    return [
        f"     host  {format_bytes(plan.host.budget_bytes)}: {format_bytes(below.resident_bytes)} stay there in "
        f"{len(below.resident)} weights{_named(below.resident)}"
        + (f", {format_bytes(below.offloaded_bytes)} are for what is offloaded" if below.offloaded_bytes else ""),
        f"     disk  {format_bytes(below.read_bytes)} in {len(below.read)} weights{_named(below.read)}, by "
        f"{below.slots} reads a pass",
    ]


def _named(names: Sequence[str]) -> str:
    return f" ({escape(format_names(names, 3))})" if names else ""


def _stalls(explanation: Explanation) -> Table:
    stalls = explanation.stalls
    title = f"where it waits: {len(stalls)} times in {len(explanation.simulation.steps)} steps"
    table = Table(title=title + (f", the longest {SHOWN_STALLS}" if len(stalls) > SHOWN_STALLS else ""))
    table.title_justify = "left"
    table.add_column("step", ratio=3, overflow="fold")
    table.add_column("waits", justify="right")
    table.add_column("for", ratio=3, overflow="fold")
    table.add_column("its slot was free before", justify="right")
    for stall in stalls[:SHOWN_STALLS]:
        what = "the write of " if stall.is_write else ""
        waited_for = f"{what}{format_bytes(stall.size_bytes)}: {escape(format_names(stall.weights, 2))}"
        if stall.host_step is not None:
            waited_for = f"{waited_for}, after " if stall.weights else ""
            waited_for += f"{escape(stall.host_step)} on the host lane"
        table.add_row(escape(stall.step), _ms(stall.stall_s), waited_for, _ms(stall.lead_s))
    return table


def _table(curve: Sequence[UtilityPoint], budget_bytes: int) -> Table:
    table = Table(title="what other budgets give", title_justify="left")
    for column in ("budget", "a pass", "streamed"):
        table.add_column(column, justify="right")
    table.add_column("")
    slowest = max((point.prediction.pass_s for point in curve if point.prediction), default=0.0)
    for point in curve:
        here = "[bold]" if point.budget_bytes == budget_bytes else ""
        found = point.prediction
        if found is None:
            table.add_row(here + format_bytes(point.budget_bytes), "does not fit", "", "")
            continue
        bar = "█" * max(round(30 * found.pass_s / slowest), 1) if slowest else ""
        table.add_row(
            here + format_bytes(point.budget_bytes), here + _ms(found.pass_s), format_bytes(found.streamed_bytes), bar
        )
    return table


def _change(now: Prediction, then: Prediction) -> str:
    if not now.pass_s:
        return "nothing changes"
    change = then.pass_s / now.pass_s - 1
    return f"{_ms(then.pass_s)} a pass ({change:+.0%}), {format_bytes(then.streamed_bytes)} streamed"


def _ms(time_s: float) -> str:
    return f"{time_s * 1e3:.1f} ms"


def _document(
    trace: Trace, machine: Machine, plan: Plan, explanation: Explanation, curve: Sequence[UtilityPoint]
) -> dict[str, Any]:
    return {
        "trace": trace.name,
        "link_bytes_per_s": machine.link.bandwidth_bytes_per_s,
        "plan": json.loads(plan.to_json()),
        "disk_bytes_per_s": machine.disk_link and machine.disk_link.bandwidth_bytes_per_s,
        "stalls": [dataclasses.asdict(stall) for stall in explanation.stalls],
        "memory": [dataclasses.asdict(use) for use in explanation.memory],
        "curve": [dataclasses.asdict(point) for point in curve],
    }


def _draw(target: Path, trace: Trace, plan: Plan, explanation: Explanation, curve: Sequence[UtilityPoint]) -> None:
    from mball.cli.plan_picture import picture_of
    from mball.observe.picture import draw_plan
    from mball.whole_files import replace_file

    replace_file(target, draw_plan(picture_of(trace, plan, explanation, curve)), "picture")
