"""`mball plan`: for checkpoints and recorded traces, as text, JSON and a picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mball
from mball.api import trace_and_plan
from mball.cli import main
from mball.cli.checkpoint_trace import trace_of_checkpoint
from mball.cli.plan_picture import picture_of
from mball.errors import ConfigError, StorageError, WrapError
from mball.observe.timeline import Lane
from mball.plan import explain, make_plan, validate
from mball.schema import Link, Plan, Trace, Treatment
from mball.units import KIB, MIB
from tests.calibrations import keep_calibration
from tests.plan.traces import make_gathering, make_host_machine, make_optimized, make_training
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


def test_embeddings_of_a_checkpoint_are_looked_up_where_the_head_is_another_matrix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = torch.zeros(512, 256)
    tensors = {f"model.layers.{n}.weight": torch.zeros(256, 256) for n in range(4)}
    tensors |= {"model.embed_tokens.weight": table, "model.embed_positions.weight": torch.zeros(300, 256)}
    tied, untied = tmp_path / "tied.safetensors", tmp_path / "untied.safetensors"
    save_file(tensors, tied)
    save_file(tensors | {"lm_head.weight": table.clone()}, untied)
    neox = tmp_path / "neox.safetensors"
    both = {"gpt_neox.embed_in.weight": table, "embed_out.weight": table.clone()}
    save_file(both | {"patch_embed.weight": torch.zeros(256, 256), "proj.weight": torch.zeros(256, 256)}, neox)

    def gathered(path: Path) -> list[str]:
        trace = trace_of_checkpoint(path)
        trace.check()
        return [trace.tensors[gather.tensor].name for step in trace.steps for gather in step.gathers]

    assert gathered(tied) == ["model.embed_positions.weight"], "the head may be the same table"
    assert gathered(untied) == ["model.embed_positions.weight", "model.embed_tokens.weight"]
    assert gathered(neox) == ["gpt_neox.embed_in.weight"], "the head and layers are no tables"
    assert main(["plan", str(untied), "--budget", "1MiB", "--bandwidth", "1GB"]) == 0
    assert "2 as looked up by rows guessed" in capsys.readouterr().out


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
    monkeypatch.setattr("mball.cli.plan.measure_link", lambda *_, **__: pytest.fail("the link is known"))
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


def test_what_is_offloaded_has_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "training.json"
    path.write_text(make_training(4, 0, MIB, may=(Treatment.STAY, Treatment.OFFLOAD)).to_json())
    arguments = [str(path), "--budget", "3MiB", "--bandwidth", "1GB"]
    assert main(["plan", *arguments, "--offload-budget", "1MiB"]) == 0
    assert "1.00 MiB at one time of 1.00 MiB that may be" in capsys.readouterr().out
    found = plan_of(*arguments, "--offload-budget", "1MiB", "--curve", capsys=capsys)
    assert found["plan"]["offload_budget_bytes"] == MIB
    assert found["curve"][0]["prediction"] is None, "less of the device needs more below"
    assert main(["plan", *arguments, "--offload-budget", "1KiB"]) == 2
    assert "on tier disk is too small" in capsys.readouterr().err
    # Through host memory, its budget is for both.
    through = ["--host-budget", "20MiB", "--link-bandwidth", "1GB"]
    assert main(["plan", *arguments, *through]) == 0
    assert "are for what is offloaded" in capsys.readouterr().out
    assert main(["plan", *arguments, *through, "--offload-budget", "3MiB"]) == 2
    assert "leave --offload-budget out" in capsys.readouterr().err


def test_a_trace_with_an_optimizer_shows_both_lanes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, pictures, said = tmp_path / "training.json", [], []
    for on_device in (False, True):
        path.write_text(make_optimized(6, MIB, host_s=2e-3, on_device=on_device).to_json())
        target = tmp_path / "plan.png"
        arguments = [str(path), "--budget", "9MiB", "--bandwidth", "2GB", "--picture", str(target)]
        assert main(["plan", *arguments]) == 0
        pictures.append(target.read_bytes())
        said.append(capsys.readouterr().out)
    beside, on_device_said = said
    assert "host lane  6 steps, 12.0 ms; 12.00 MiB in 6 weights are used there only (w6, w7, w8 + 3 more)" in beside
    assert "on the host lane" in beside, "what the first step waits for"
    assert "changes" not in beside
    assert "host lane" not in on_device_said
    assert "  changes  18.00 MiB in 12 weights" in on_device_said
    assert pictures[0] != pictures[1]
    trace = make_optimized(6, MIB, host_s=2e-3)
    machine = make_host_machine()
    plan = make_plan(trace, machine, 9 * MIB)
    picture = picture_of(trace, plan, explain(trace, plan, machine), ())
    assert [span.name for span in picture.timeline.of(Lane.HOST)] == [f"update{n}" for n in reversed(range(6))]
    assert list(picture.edges_s) == sorted(picture.edges_s)
    assert len(picture.edges_s) == len(plan.steps) + 1


def test_a_trace_is_planned_where_torch_is_not_installed(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(make_training(4, 0, MIB).to_json())
    call = f"main(['plan', {str(path)!r}, '--budget', '8MiB', '--bandwidth', '1GB'])"
    script = f"import sys; sys.modules['torch'] = None; from mball.cli import main; sys.exit({call})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "budget  8.00 MiB" in done.stdout


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
        (
            ["{checkpoint}", "--budget", "1MiB", "--host-budget", "1MiB", "--offload-budget", "1MiB"],
            "leave --offload-budget out",
        ),
        (["{beside}", "--budget", "9MiB", "--host-budget", "1GiB"], "say with --bandwidth"),
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
    (tmp_path / "beside.json").write_text(make_optimized(6, MIB).to_json())
    names = {"checkpoint": checkpoint, **{name: tmp_path / f"{name}.json" for name in ("future", "garbage", "beside")}}
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
