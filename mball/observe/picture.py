"""Draws a timeline with matplotlib, which is loaded here only."""

from __future__ import annotations

import io

from mball.errors import MballError
from mball.observe.timeline import Lane, Timeline
from mball.units import format_bytes

WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 12.0, 3.4, 150

# Two shades a lane, in turn, so that spans that touch can be told apart.
_COLORS = {
    Lane.COMPUTE: ("#3b6ea5", "#6d9bcb"),
    Lane.STALLS: ("#c8373a", "#e2696b"),
    Lane.READS: ("#3f8f4f", "#7bbd87"),
}
_BAND = 0.8  # of each lane's height of 1
_MARGIN = 0.03  # of the pass, shown before and after it at least; up to thrice as much where reads run there


def draw(timeline: Timeline) -> bytes:
    """Returns the picture as a PNG of 1800 × 510 pixels.

    Raises:
        MballError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MballError(
            f"a picture of a timeline needs matplotlib ({error}): pip install 'mball[plot]', or write a .json file and "
            "open it in Perfetto"
        ) from error

    # A Figure of its own has no window, no global state and the Agg canvas; pyplot would bring all three.
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    pass_ms = timeline.pass_s * 1e3
    for place, lane in enumerate(Lane):
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
    axes.set_ylim(len(Lane) - 0.45, -0.55)
    for edge_ms, outside_ms in ((0.0, left), (pass_ms, right)):
        axes.axvspan(min(edge_ms, outside_ms), max(edge_ms, outside_ms), color="#ececec", linewidth=0, zorder=0)
        axes.axvline(edge_ms, color="#444444", linewidth=0.8)
    axes.set_yticks(range(len(Lane)), [_label(timeline, lane) for lane in Lane])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#d8d8d8", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("ms since the pass began (grey: before and after it)")
    share = timeline.stall_s / timeline.pass_s if timeline.pass_s > 0 else 0.0
    axes.set_title(
        f"pass {pass_ms:.1f} ms, stall {timeline.stall_s * 1e3:.1f} ms ({share:.0%}), "
        f"{format_bytes(timeline.bytes_read)} read",
        loc="left",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _label(timeline: Timeline, lane: Lane) -> str:
    spans = timeline.of(lane)
    if lane is Lane.READS:
        return f"{lane.value}\n{len(spans)} bundles, {format_bytes(sum(span.size_bytes or 0 for span in spans))}"
    noun = "steps" if lane is Lane.COMPUTE else "waits"
    return f"{lane.value}\n{len(spans)} {noun}, {sum(span.duration_s for span in spans) * 1e3:.1f} ms"
