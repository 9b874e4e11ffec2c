"""One pass as spans of time, and as files: a Chrome trace, which Perfetto opens, and a picture.

[Note: what Perfetto needs] A thread's events must nest, so reads that overlap go to several threads, its *rows*. Events
before time zero are dropped, so a trace begins with its earliest span, and marks say where the pass begins and ends.
"""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from mball.errors import ConfigError
from mball.whole_files import replace_file

_PROCESS = 1


class Lane(Enum):
    """What ran."""

    COMPUTE = "compute"
    STALLS = "stalls"
    HOST = "host lane"
    READS = "reads"
    WRITES = "writes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that ran from `start_s` to `end_s`, in seconds since the pass began.

    Attributes:
        name: the step, or the weights that were read or waited for.
        size_bytes: of a read or a write.
        step: the plan step that computed or waited.
        asked_s: when a read was asked for; it may have waited for its turn until `start_s`.
    """

    lane: Lane
    name: str
    start_s: float
    end_s: float
    size_bytes: int | None = None
    step: int | None = None
    asked_s: float | None = None

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    def since(self, origin_s: float) -> Span:
        """Returns the span as seen by a clock that shows zero when this one shows `origin_s`."""
        asked_s = None if self.asked_s is None else self.asked_s - origin_s
        return replace(self, start_s=self.start_s - origin_s, end_s=self.end_s - origin_s, asked_s=asked_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A pass that took `pass_s` seconds.

    Its reads are those that were asked for during the pass, and those that were still under way when it began. So a
    read may begin before time zero, one may end after `pass_s`, and one that runs across the end of a pass is in the
    timelines of both passes. Steps and stalls lie within `[0, pass_s]`; what runs on the host lane may end after.
    """

    spans: tuple[Span, ...]
    pass_s: float

    def of(self, lane: Lane) -> tuple[Span, ...]:
        """Returns the spans of `lane`, by their beginning."""
        return tuple(sorted((s for s in self.spans if s.lane is lane), key=lambda span: (span.start_s, span.end_s)))

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """All lanes, but that of writes, and that of steps on the host, only where something is in them."""
        return tuple(lane for lane in Lane if lane not in (Lane.WRITES, Lane.HOST) or self.of(lane))

    @property
    def stall_s(self) -> float:
        """Seconds that steps waited for reads, and for writes."""
        return sum(span.duration_s for span in self.spans if span.lane is Lane.STALLS)

    @property
    def bytes_read(self) -> int:
        """Bytes that were asked for during the pass."""
        asked = (span for span in self.of(Lane.READS) if span.asked_s is not None and span.asked_s >= 0)
        return sum(span.size_bytes or 0 for span in asked)

    def rows(self, lane: Lane) -> list[list[Span]]:
        """Returns the spans of `lane` in as few rows as hold them side by side; one row, maybe empty, at least."""
        rows: list[list[Span]] = [[]]
        for span in self.of(lane):
            row = next((row for row in rows if not row or row[-1].end_s <= span.start_s), None)
            if row is None:
                rows.append(row := [])
            row.append(span)
        return rows

    def as_chrome_trace(self) -> dict[str, Any]:
        """Returns the pass in the trace event format, times in microseconds since the earliest span began."""
        origin_s = min([0.0, *(span.start_s for span in self.spans)])
        events = [_metadata("process_name", {"name": "mball"})]
        marks = {"pass begins": 0.0, "pass ends": self.pass_s}
        for name, time_s in marks.items():
            ts = _microseconds(time_s - origin_s)
            events.append({"ph": "i", "s": "p", "name": name, "ts": ts, "pid": _PROCESS, "tid": 1})
        thread = 0
        for lane in self.lanes:
            for number, row in enumerate(self.rows(lane), start=1):
                thread += 1
                name = lane.value if number == 1 else f"{lane.value} ({number})"
                events.append(_metadata("thread_name", {"name": name}, thread))
                events.append(_metadata("thread_sort_index", {"sort_index": thread}, thread))
                events += [_event(span, origin_s, thread) for span in row]
        return {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": {"pass_s": self.pass_s, "stall_s": self.stall_s, "bytes_read": self.bytes_read},
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the pass to `path`, whose suffix says how, and returns it.

        ``.json`` and ``.json.gz`` are Chrome traces, to be opened at ui.perfetto.dev or chrome://tracing; ``.png`` is
        a picture. A file that is there already is replaced once the new one is whole.

        Raises:
            ConfigError: another suffix.
            MballError: a picture without matplotlib.
            StorageError: the file cannot be written; nothing is left behind.
        """
        target = Path(path)
        if target.name.endswith((".json", ".json.gz")):
            content = json.dumps(self.as_chrome_trace()).encode()
            if target.suffix == ".gz":
                content = gzip.compress(content)
        elif target.suffix == ".png":
            # Here, since matplotlib takes a second to load and need not be installed.
            from mball.observe.picture import draw

            content = draw(self)
        else:
            raise ConfigError(
                f"a timeline cannot be written to {str(target)!r}: its suffix must be .json or .json.gz (for Perfetto) "
                "or .png (a picture)"
            )
        replace_file(target, content, "timeline")
        return target


def _metadata(name: str, args: dict[str, Any], thread: int = 0) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": _PROCESS, "tid": thread, "args": args}


def _event(span: Span, origin_s: float, thread: int) -> dict[str, Any]:
    args: dict[str, Any] = {}
    if span.step is not None:
        args["step"] = span.step
    if span.size_bytes is not None:
        args["bytes"] = span.size_bytes
        if span.duration_s > 0:
            args["GB/s"] = round(span.size_bytes / span.duration_s / 1e9, 3)
    if span.asked_s is not None:
        args["waited for its turn, ms"] = round((span.start_s - span.asked_s) * 1e3, 6)
    start, end = _microseconds(span.start_s - origin_s), _microseconds(span.end_s - origin_s)
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.lane.value,
        "ts": start,
        "dur": round(end - start, 3),
        "pid": _PROCESS,
        "tid": thread,
        "args": args,
    }


def _microseconds(time_s: float) -> float:
    return round(time_s * 1e6, 3)
