"""Draws timelines and plans with matplotlib, which is loaded here only."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mball.errors import MballError
from mball.observe.timeline import Lane, Timeline
from mball.units import MIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 12.0, 3.4, 150
_MEMORY_HEIGHT_INCHES, _CURVE_HEIGHT_INCHES = 2.8, 2.8

# Two shades a lane, in turn, so that spans that touch can be told apart.
_COLORS = {
    Lane.COMPUTE: ("#3b6ea5", "#6d9bcb"),
    Lane.STALLS: ("#c8373a", "#e2696b"),
    Lane.HOST: ("#a8782f", "#d9a441"),
    Lane.READS: ("#3f8f4f", "#7bbd87"),
    Lane.WRITES: ("#8a5fa8", "#b795cc"),
}
_MEMORY_COLORS = ("#8a8a8a", "#3b6ea5", "#7bbd87", "#d9a441")
_BAND = 0.8  # of each lane's height of 1
_MARGIN = 0.03  # of the pass, shown before and after it at least; up to thrice as much where reads run there


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPicture:
    """A plan to be drawn.

    Attributes:
        timeline: of a pass, as predicted.
        edges_s: where steps begin (with their waits), and the end of the pass: one more than there are steps.
        memory: by what it is for, the bytes in each step.
        budget_bytes: the budget.
        curve: points of the utility curve (budget in bytes, seconds of a pass); may be empty.
    """

    timeline: Timeline
    edges_s: tuple[float, ...]
    memory: dict[str, tuple[int, ...]]
    budget_bytes: int
    curve: tuple[tuple[int, float], ...] = ()


def draw(timeline: Timeline) -> bytes:
    """Returns the picture as a PNG of 1800 × 510 pixels.

    Raises:
        MballError: matplotlib is not installed.
    """
    figure = _figure(HEIGHT_INCHES, "write a .json file and open it in Perfetto")
    _draw_lanes(figure.add_subplot(), timeline)
    return _png(figure)


def draw_plan(picture: PlanPicture) -> bytes:
    """Returns memory over time, the lanes below it, and the utility curve if there is one, as a PNG.

    Raises:
        MballError: matplotlib is not installed.
    """
    heights = [_MEMORY_HEIGHT_INCHES, HEIGHT_INCHES] + [_CURVE_HEIGHT_INCHES] * bool(picture.curve)
    figure = _figure(sum(heights), "leave the picture out")
    rows = figure.subplots(len(heights), 1, height_ratios=heights)
    _draw_lanes(rows[1], picture.timeline)
    _draw_memory(rows[0], picture)
    rows[0].set_xlim(rows[1].get_xlim())
    if picture.curve:
        _draw_curve(rows[2], picture)
    return _png(figure)


def _figure(height_inches: float, instead: str) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MballError(f"a picture needs matplotlib ({error}): pip install 'mball[plot]', or {instead}") from error
    # A Figure of its own has no window, no global state and the Agg canvas; pyplot would bring all three.
    return Figure(figsize=(WIDTH_INCHES, height_inches), dpi=DOTS_PER_INCH, layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_memory(axes: Axes, picture: PlanPicture) -> None:
    edges_ms = [edge_s * 1e3 for edge_s in picture.edges_s]
    below = [0.0] * len(edges_ms)
    for (name, sizes), color in zip(picture.memory.items(), _MEMORY_COLORS, strict=True):
        if not any(sizes):
            continue
        # The last value once more: the last step lasts until the last edge.
        top = [under + size / MIB for under, size in zip(below, (*sizes, sizes[-1]), strict=True)]
        label = f"{name}, up to {format_bytes(max(sizes))}"
        axes.fill_between(edges_ms, below, top, step="post", color=color, linewidth=0, label=label)
        below = top
    axes.axhline(picture.budget_bytes / MIB, color="#c8373a", linewidth=1.0, label="budget")
    axes.set_ylim(0, picture.budget_bytes / MIB * 1.08)
    axes.set_ylabel("MiB")
    axes.set_title(f"memory under a budget of {format_bytes(picture.budget_bytes)}", loc="left")
    _tidy(axes)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _draw_curve(axes: Axes, picture: PlanPicture) -> None:
    axes.plot([b / MIB for b, _ in picture.curve], [s * 1e3 for _, s in picture.curve], marker="o", color="#3b6ea5")
    axes.axvline(picture.budget_bytes / MIB, color="#c8373a", linewidth=1.0, label="this budget")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("budget in MiB")
    axes.set_ylabel("ms a pass")
    axes.set_title("what more memory buys", loc="left")
    _tidy(axes)
    axes.grid(axis="y", color="#d8d8d8", linewidth=0.6)
    axes.legend(frameon=False)


def _tidy(axes: Axes) -> None:
    axes.grid(axis="x", color="#d8d8d8", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_lanes(axes: Axes, timeline: Timeline) -> None:
    pass_ms = timeline.pass_s * 1e3
    lanes = timeline.lanes
    for place, lane in enumerate(lanes):
        rows = timeline.rows(lane)
        height = _BAND / len(rows)
        for number, row in enumerate(rows):
            bars = [(span.start_s * 1e3, span.duration_s * 1e3) for span in row]
            below = place - _BAND / 2 + number * height
            for shade, color in enumerate(_COLORS[lane]):
                # Without edges: a bar that is thinner than a pixel must not look like one.
                axes.broken_barh(bars[shade::2], (below, height * 0.94), facecolors=color, linewidth=0)
    first_ms = min((span.start_s * 1e3 for span in timeline.spans), default=0.0)
    last_ms = max((span.end_s * 1e3 for span in timeline.spans), default=0.0)
    left = max(min(first_ms, -_MARGIN * pass_ms), -3 * _MARGIN * pass_ms)
    right = min(max(last_ms, (1 + _MARGIN) * pass_ms), (1 + 3 * _MARGIN) * pass_ms)
    axes.set_xlim(left, max(right, left + 1e-6))
    axes.set_ylim(len(lanes) - 0.45, -0.55)
    for edge_ms, outside_ms in ((0.0, left), (pass_ms, right)):
        axes.axvspan(min(edge_ms, outside_ms), max(edge_ms, outside_ms), color="#ececec", linewidth=0, zorder=0)
        axes.axvline(edge_ms, color="#444444", linewidth=0.8)
    axes.set_yticks(range(len(lanes)), [_label(timeline, lane) for lane in lanes])
    axes.tick_params(axis="y", length=0)
    _tidy(axes)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("ms since the pass began (grey: before and after it)")
    share = timeline.stall_s / timeline.pass_s if timeline.pass_s > 0 else 0.0
    axes.set_title(
        f"pass {pass_ms:.1f} ms, stall {timeline.stall_s * 1e3:.1f} ms ({share:.0%}), "
        f"{format_bytes(timeline.bytes_read)} read",
        loc="left",
    )


def _label(timeline: Timeline, lane: Lane) -> str:
    spans = timeline.of(lane)
    if lane in (Lane.READS, Lane.WRITES):
        return f"{lane.value}\n{len(spans)} bundles, {format_bytes(sum(span.size_bytes or 0 for span in spans))}"
    noun = "waits" if lane is Lane.STALLS else "steps"
    return f"{lane.value}\n{len(spans)} {noun}, {sum(span.duration_s for span in spans) * 1e3:.1f} ms"
