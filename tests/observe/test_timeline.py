"""A timeline as files: what is in them, and that nothing else is left behind."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mball.errors import ConfigError, MballError, StorageError
from mball.observe.timeline import Lane, Span, Timeline


def read(start_s: float, end_s: float, asked_s: float) -> Span:
    return Span(lane=Lane.READS, name="w", start_s=start_s, end_s=end_s, size_bytes=2_000_000, asked_s=asked_s)


# One read began before the pass, two overlap, one runs on after it.
TIMELINE = Timeline(
    spans=(
        Span(lane=Lane.COMPUTE, name="first + 2 more", start_s=0.010, end_s=0.030, step=0),
        Span(lane=Lane.STALLS, name="wait for w", start_s=0.030, end_s=0.036, step=1),
        Span(lane=Lane.COMPUTE, name="second", start_s=0.036, end_s=0.050, step=1),
        read(-0.004, 0.006, -0.005),
        read(0.012, 0.032, 0.011),
        read(0.022, 0.036, 0.012),
        read(0.045, 0.060, 0.044),
    ),
    pass_s=0.052,
)


def events(trace: dict[str, Any], phase: str) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == phase]


def threads(trace: dict[str, Any]) -> dict[int, str]:
    return {event["tid"]: event["args"]["name"] for event in events(trace, "M") if event["name"] == "thread_name"}


def test_a_trace_has_three_lanes_with_everything_in_them(tmp_path: Path) -> None:
    trace = json.loads(TIMELINE.save(tmp_path / "t.json").read_text())
    names = threads(trace)
    assert list(names.values()) == ["compute", "stalls", "reads", "reads (2)"]
    spans = events(trace, "X")
    assert [e["name"] for e in spans if names[e["tid"]] == "compute"] == ["first + 2 more", "second"]
    assert [e["args"] for e in spans if names[e["tid"]] == "stalls"] == [{"step": 1}]
    reads = [e for e in spans if names[e["tid"]].startswith("reads")]
    assert sorted(e["args"]["GB/s"] for e in reads) == pytest.approx([0.1, 2 / 15, 1 / 7, 0.2], abs=1e-3)
    assert all(e["args"]["bytes"] == 2_000_000 for e in reads)
    assert sorted(e["args"]["waited for its turn, ms"] for e in reads) == [1, 1, 1, 10]
    assert {e["cat"] for e in spans} == {"compute", "stalls", "reads"}
    assert trace["otherData"] == {"pass_s": 0.052, "stall_s": pytest.approx(0.006), "bytes_read": 6_000_000}


def test_a_trace_begins_at_zero_and_marks_the_pass() -> None:
    trace = TIMELINE.as_chrome_trace()
    assert min(e["ts"] for e in events(trace, "X")) == 0, "Perfetto drops what is before zero"
    begins, ends = (e["ts"] for e in events(trace, "i"))
    assert (begins, ends) == (4000, 56000)
    first = next(e for e in events(trace, "X") if e["cat"] == "compute")
    assert (first["ts"], first["dur"]) == (14000, 20000)


def test_events_of_one_thread_never_cross() -> None:
    trace = TIMELINE.as_chrome_trace()
    for thread in threads(trace):
        own = [e for e in events(trace, "X") if e["tid"] == thread]
        for before, after in itertools.pairwise(own):
            assert before["ts"] + before["dur"] <= after["ts"], threads(trace)[thread]


def test_a_packed_trace_is_the_same_trace(tmp_path: Path) -> None:
    packed = gzip.decompress(TIMELINE.save(tmp_path / "t.json.gz").read_bytes())
    assert packed == TIMELINE.save(str(tmp_path / "t.json")).read_bytes()


def colors(path: Path) -> set[tuple[int, ...]]:
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(path.read_bytes())).convert("RGB")
    return {color for _, color in image.getcolors(maxcolors=1 << 24)}


RED, GREEN, BLUE = (0xC8, 0x37, 0x3A), (0x3F, 0x8F, 0x4F), (0x3B, 0x6E, 0xA5)


def test_a_picture_shows_each_lane_in_its_color(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = TIMELINE.save(tmp_path / "t.png")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (1800, 510)
    assert {RED, GREEN, BLUE} <= colors(path)
    calm = replace(TIMELINE, spans=tuple(span for span in TIMELINE.spans if span.lane is not Lane.STALLS))
    assert RED not in colors(calm.save(tmp_path / "calm.png"))


def test_a_pass_without_anything_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for pass_s in (0.0, 1e-6, 1.0):
        assert not {RED, GREEN, BLUE} & colors(Timeline(spans=(), pass_s=pass_s).save(tmp_path / "t.png"))


def test_matplotlib_is_loaded_for_pictures_only_and_without_pyplot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code = (
        "import sys; from mball.observe.timeline import Timeline; empty = Timeline(spans=(), pass_s=1.0)\n"
        "empty.save('t.json'); assert 'matplotlib' not in sys.modules\n"
        "empty.save('t.png'); assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    root = str(Path(__file__).parents[2])
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": root, "HOME": str(tmp_path)}, check=False,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr


def test_a_picture_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MballError, match=r"pip install 'mball\[plot\]'"):
        TIMELINE.save(tmp_path / "t.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["t.pdf", "t", "t.gz", "json", "t.JSONL"])
def test_another_suffix_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.json.*\.png"):
        TIMELINE.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"missing/t\.json.*No such file or directory.*folder that exists"):
        TIMELINE.save(tmp_path / "missing" / "t.json")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.json"
    path.write_text("old")
    write = os.write

    def fail_half_way(descriptor: int, content: memoryview) -> int:
        write(descriptor, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", fail_half_way)
    with pytest.raises(StorageError, match="No space left on device"):
        TIMELINE.save(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    assert json.loads(TIMELINE.save(path).read_text())["traceEvents"]
    assert list(tmp_path.iterdir()) == [path]
