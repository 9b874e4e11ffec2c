"""Result files: written whole, read strictly, and free of anything that names a machine."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.machine import machine_facts
from bench.results import Device, Measurement, Result, Topic, read_result, read_results, record, show, write_result
from mball.errors import SchemaError
from tests.bench.samples import result

Break = Callable[[dict[str, Any]], object]


def test_summary_of_samples() -> None:
    measurement = Measurement.of("t", [4.0, 1.0, 2.0, 3.0, 100.0], unit="s", description="time", compared_with="before")
    assert (measurement.median, measurement.minimum, measurement.maximum) == (3.0, 1.0, 100.0)
    assert measurement.iqr == 2.0
    assert measurement.num_samples == 5
    one = Measurement.of("t", [7], unit="s", description="time")
    assert (one.median, one.iqr) == (7.0, 0.0)
    one.check()
    with pytest.raises(SchemaError, match="no samples"):
        Measurement.of("t", [], unit="s", description="time")


def test_what_is_recorded_is_what_is_read(tmp_path: Path) -> None:
    peak = Measurement.of("peak", [3 << 20], unit="bytes", description="peak", compared_with="the limit")
    path = record(
        name="cgroup-small", topic=Topic.MEMORY_CAP, device=Device.CPU, headline="{peak} at most",
        measurements=[peak], note="shared", directory=tmp_path,
    )  # fmt: skip
    found = read_result(path)
    assert found.measurements == (peak,)
    assert found.summary() == "3.00 MiB at most"
    assert (found.topic, found.device, found.note) == ("memory-cap", "cpu", "shared")
    assert path.name == f"{found.day()}-{found.machine.cores}-core{'s'[: found.machine.cores > 1]}-cgroup-small.json"
    assert read_results(tmp_path) == [found]
    assert [other.name for other in tmp_path.iterdir()] == [path.name]


def test_a_refused_result_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="headline"):
        write_result(replace(result(), headline="fast"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_names_the_file() -> None:
    on_gpu = result(device="cuda", gpu="NVIDIA H200 (SXM)")
    on_gpu.check()
    assert on_gpu.file_name() == "2026-01-31-nvidia-h200-sxm-toy.json"
    with pytest.raises(SchemaError, match="needs a machine with a GPU"):
        result(device="cuda").check()


MALFORMED: dict[str, tuple[Break, str]] = {
    "version": (lambda data: data.update(version=2), "version 2"),
    "no version": (lambda data: data.pop("version"), "version None"),
    "lacks": (lambda data: data.pop("machine"), "lacks"),
    "unknown field": (lambda data: data.update(hostname="x"), "unknown fields"),
    "unknown fact": (lambda data: data["machine"].update(user="x"), "unknown fields"),
    "topic": (lambda data: data.update(topic="weather"), "topic 'weather'"),
    "device": (lambda data: data.update(device="tpu"), "device 'tpu'"),
    "name": (lambda data: data.update(name="A b"), "name 'A b'"),
    "no samples": (lambda data: data["measurements"][0].update(num_samples=0), "0 samples"),
    "type": (lambda data: data["measurements"][0].update(median="3"), "must be float"),
    "not finite": (lambda data: data["measurements"][0].update(maximum=float("nan")), "not finite"),
    "median": (lambda data: data["measurements"][0].update(median=9.0), "outside"),
    "iqr": (lambda data: data["measurements"][0].update(iqr=-1.0), "IQR"),
    "measurement name": (lambda data: data["measurements"][0].update(name="a b"), "'a b'"),
    "twice": (lambda data: data["measurements"].append(data["measurements"][0]), "one name"),
    "headline": (lambda data: data.update(headline="{speed}"), "speed"),
    "headline brace": (lambda data: data.update(headline="{share"), "cannot be read"),
    "headline format": (lambda data: data.update(headline="{share:d}"), "formats"),
    "headline typed in": (lambda data: data.update(headline="0.3 %"), "shows no measurement"),
    "date": (lambda data: data["machine"].update(date="yesterday"), "yesterday"),
    "local date": (lambda data: data["machine"].update(date="2026-01-31T09:30:00+01:00"), "UTC"),
    "other file's date": (lambda data: data["machine"].update(date="2026-02-01T09:30:00+00:00"), "2026-02-01-8-cores"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_with_its_path(case: str, tmp_path: Path) -> None:
    damage, message = MALFORMED[case]
    path = write_result(result(), tmp_path)
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(SchemaError) as caught:
        read_results(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe"])
def test_what_is_no_result_at_all_is_refused_with_its_path(content: bytes, tmp_path: Path) -> None:
    path = write_result(result(), tmp_path)
    path.write_bytes(content)
    with pytest.raises(SchemaError) as caught:
        read_results(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_good_file_passes_the_same_way(tmp_path: Path) -> None:
    # So that the refusals above are about the damage.
    path = write_result(result(), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert read_results(tmp_path) == [result()]


def test_facts_name_neither_machine_nor_user() -> None:
    facts = Result(
        name="toy", topic="speed", device="cpu", headline="{share}", note="", machine=machine_facts(),
        measurements=result().measurements,
    )  # fmt: skip
    facts.check()
    data = json.loads(facts.to_json())["machine"]
    assert set(data) == {
        "date", "cpu", "cores", "memory_bytes", "kernel", "python", "torch", "transformers", "gpu", "gpu_driver",
        "commit",
    }  # fmt: skip
    text = json.dumps(data)
    assert str(Path.home()) not in text or len(str(Path.home())) < 3
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text
    assert data["cores"] >= 1
    assert data["memory_bytes"] > 1 << 28


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.2834, "%", "0.283 %"), (42.0, "cases", "42 cases"), (1234.5, "tokens/s", "1234 tokens/s"),
        (1.018, "x", "1.02×"), (0.0213, "s", "21.3 ms"), (2.4e-5, "s", "24 µs"), (3.1e-8, "s", "31 ns"),
        (0.0, "s", "0 ns"), (80 << 20, "bytes", "80.00 MiB"),
    ],
)  # fmt: skip
def test_figures(value: float, unit: str, text: str) -> None:
    assert show(value, unit) == text
