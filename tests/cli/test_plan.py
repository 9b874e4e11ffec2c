"""`mball plan`: for checkpoints and recorded traces, as text, JSON and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mball
from mball.api import trace_and_plan
from mball.cli import main
from mball.cli.checkpoint_trace import trace_of_checkpoint
from mball.errors import ConfigError, StorageError, WrapError
from mball.plan import validate
from mball.schema import Link, Plan, Trace, Treatment
from mball.units import KIB, MIB
from tests.calibrations import keep_calibration
from tests.plan.traces import make_gathering, make_training
from tests.run.harness import make, run
from tests.run.zoo import Net, noise


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Twelve layers of 256 KiB with a bias, an embedding and a norm, written in the order of the alphabet."""
    tensors = {f"model.layers.{n}.weight": torch.zeros(256, 256) for n in range(12)}
    tensors |= {f"model.layers.{n}.bias": torch.zeros(256) for n in range(12)}
    tensors |= {"model.embed.weight": torch.zeros(512, 256), "model.norm.weight": torch.zeros(256)}
    path = tmp_path / "model.safetensors"
    save_file(dict(sorted(tensors.items())), path)
    return path


def plan_of(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_checkpoint_is_read_module_by_module_with_numbers_as_numbers(checkpoint: Path) -> None:
    trace = trace_of_checkpoint(checkpoint)
    names = [step.name for step in trace.steps]
    assert names == ["model.embed", *(f"model.layers.{n}" for n in range(12)), "model.norm"]
    assert all(len(step.reads) == 2 for step in trace.steps[1:-1]), "a weight and its bias"
    trace.check()


def test_the_plan_of_a_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_of(str(checkpoint), "--budget", "2MiB", "--bandwidth", "1GB", "--curve", capsys=capsys)
    plan = Plan.from_json(json.dumps(found["plan"]))
    validate(trace_of_checkpoint(checkpoint), plan)
    assert found["link_bytes_per_s"] == 1e9
    assert plan.budget_bytes == 2 << 20
    assert plan.transfers
    times = [point["prediction"]["pass_s"] for point in found["curve"] if point["prediction"]]
    assert times == sorted(times, reverse=True)
    assert found["curve"][-1]["prediction"]["streamed_bytes"] == 0
    # Measured where the weights lie, unless it is given.
    assert plan_of(str(checkpoint), "--budget", "2MiB", capsys=capsys)["link_bytes_per_s"] not in (1e9, 2e9)


def test_a_calibration_of_the_disk_spares_measuring_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["plan", str(checkpoint), "--budget", "2MiB"]) == 0
    assert "(measured on model.safetensors)" in capsys.readouterr().out
    calibration = keep_calibration(tmp_path, Link(bandwidth_bytes_per_s=3.5e9, latency_s=2e-4), monkeypatch)
    monkeypatch.setattr("mball.cli.plan.measure_link", lambda *_: pytest.fail("the link is known"))
    assert main(["plan", str(checkpoint), "--budget", "2MiB"]) == 0
    assert f"3.50 GB/s (calibrated on {calibration.day})" in capsys.readouterr().out
    assert main(["plan", str(checkpoint), "--budget", "2MiB", "--bandwidth", "1GB"]) == 0
    assert "1.00 GB/s (as given)" in capsys.readouterr().out


def test_what_a_person_reads(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(checkpoint), "--budget", "2MiB", "--bandwidth", "50MB", "--curve"]) == 0
    output = capsys.readouterr().out
    for words in ("stays", "streams", "pass", "at best", "set by the link", "smallest", "where it waits", "more:"):
        assert words in output, output
    assert "model.layers." in output
    assert "budget  2.00 MiB" in output
    assert main(["plan", str(checkpoint), "--budget", "1GiB", "--bandwidth", "50MB"]) == 0
    output = capsys.readouterr().out
    assert "where it waits" not in output
    assert "0 B in 0 weights" in output
    assert "set by compute" in output


def test_weights_that_come_through_host_memory(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--budget", "1MiB", "--host-budget", "1MiB")
    speeds = ("--bandwidth", "50MB", "--link-bandwidth", "10GB")
    assert main(["plan", str(checkpoint), *sizes, *speeds]) == 0
    output = capsys.readouterr().out
    for words in ("0.05 GB/s (as given), 10.00 GB/s from host memory", "host  1.00 MiB:", "reads a pass", "the disk"):
        assert words in output, output
    found = plan_of(str(checkpoint), *sizes, *speeds, "--curve", capsys=capsys)
    plan = Plan.from_json(json.dumps(found["plan"]))
    validate(trace_of_checkpoint(checkpoint), plan)
    assert plan.host is not None
    assert plan.host.budget_bytes == 1 << 20
    assert plan.host.transfers
    assert (found["link_bytes_per_s"], found["disk_bytes_per_s"]) == (1e10, 5e7)
    assert found["curve"][-1]["prediction"]["streamed_bytes"] == 0


def test_a_recorded_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(Net)
    mball.wrap(model, 1 << 24, swap_dir=tmp_path, capture="graphs")
    with pytest.raises(WrapError, match="nothing ran yet"):
        mball.save_trace(model, tmp_path / "trace.json")
    for _ in range(3):
        run(model, lambda m: m(noise(2, 3, 32, 32)))
    path = mball.save_trace(model, tmp_path / "trace.json")
    trace = Trace.from_json(path.read_text())
    recorded = trace_and_plan(model)[0]
    assert trace.steps == recorded.steps
    assert any(step.time_s for step in trace.steps)
    buffers = [tensor for tensor in trace.tensors if tensor.name == "buffers"]
    assert sum(tensor.size_bytes for tensor in buffers) == mball.report(model).buffer_bytes
    found = plan_of(str(path), "--budget", "16MiB", "--bandwidth", "1GB", capsys=capsys)
    validate(trace, Plan.from_json(json.dumps(found["plan"])))
    with pytest.raises(ConfigError, match=r"\.json"):
        mball.save_trace(model, tmp_path / "trace.txt")
    with pytest.raises(StorageError, match="folder that"):
        mball.save_trace(model, tmp_path / "nowhere" / "trace.json")


def test_a_picture(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    sizes = []
    for extra in ([], ["--curve"]):
        target = tmp_path / "plan.png"
        arguments = [str(checkpoint), "--budget", "2MiB", "--bandwidth", "1GB", "--picture", str(target), *extra]
        assert main(["plan", *arguments]) == 0
        content = target.read_bytes()
        assert content.startswith(b"\x89PNG")
        sizes.append(int.from_bytes(content[20:24], "big"))
    assert sizes[1] > sizes[0], "the curve comes below"
    capsys.readouterr()


def test_what_is_born_in_a_pass_and_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    may = (Treatment.STAY, Treatment.OFFLOAD)
    path, pictures = tmp_path / "training.json", []
    path.write_text(make_training(12, MIB, 2 * MIB, may=may).to_json())
    for budget in ("64MiB", "12MiB"):
        target = tmp_path / "plan.png"
        arguments = [str(path), "--budget", budget, "--bandwidth", "4GB", "--picture", str(target)]
        assert main(["plan", *arguments]) == 0
        pictures.append(target.read_bytes())
    said = capsys.readouterr().out
    assert said.count("offloads") == 1, "only where memory is short"
    assert "tensors (a0, a1, a2 + " in said
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.safetensors", "--budget", "1GiB"], "nothing.safetensors"),
        (["nothing.json", "--budget", "1GiB"], "cannot be read"),
        (["{checkpoint}", "--budget", "much"], "budget 'much' cannot be read"),
        (["{checkpoint}", "--budget", "1KiB"], "the smallest that works is"),
        (["{checkpoint}", "--budget", "1GiB", "--bandwidth", "fast"], "bandwidth 'fast' cannot be read"),
        (["{checkpoint}", "--budget", "1GiB", "--picture", "plan.gif"], "its suffix must be .png"),
        (["{checkpoint}", "--budget", "1GiB", "--picture", "/no/such/folder/p.png"], "cannot be written"),
        (["{checkpoint}", "--budget", "1MiB", "--host-budget", "1KiB"], "of host memory"),
        (["{checkpoint}", "--budget", "1MiB", "--link-bandwidth", "1GB"], "say with --host-budget"),
        (["{future}", "--budget", "1GiB"], "has version 99"),
        (["{garbage}", "--budget", "1GiB"], "is no JSON"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "/no/such/folder/p.png" in arguments:
        pytest.importorskip("matplotlib")
    (tmp_path / "future.json").write_text('{"version": 99}')
    (tmp_path / "garbage.json").write_text("not at all")
    names = {"checkpoint": checkpoint, "future": tmp_path / "future.json", "garbage": tmp_path / "garbage.json"}
    assert main(["plan", *(argument.format(**names) for argument in arguments)]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1


def test_a_trace_that_gathers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json"
    path.write_text(make_gathering(8, MIB, 6 * MIB, 8 * KIB).to_json())
    assert main(["plan", str(path), "--budget", "4MiB", "--bandwidth", "1GB"]) == 0
    output = capsys.readouterr().out
    assert "gathers  8.00 KiB of rows a pass from 1 weights that stay home (w0)" in output
    assert main(["plan", str(path), "--budget", "20MiB", "--bandwidth", "1GB"]) == 0
    assert "gathers" not in capsys.readouterr().out
