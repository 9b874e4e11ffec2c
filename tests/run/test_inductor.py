"""Compiled steps: streamed equals resident under the same cuts, bit for bit, on a hostile device."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import mball
from mball.api import _states
from mball.errors import ConfigError
from mball.trace import inductor
from tests.run.harness import assert_same, assert_streamed, engine_of, make, run, weight_bytes, wrap_hostile
from tests.run.zoo import ZOO, Net, Specimen, generate, ids, llama, logits, noise


def wrap_both(make_model: Callable[[], nn.Module], budget: float, directory: Path, **settings: Any) -> tuple[Any, Any]:
    """Returns the model streamed by a hostile device, and resident; both are cut alike."""
    streamed, resident = make(make_model), make(make_model)
    size = weight_bytes(streamed)
    settings = {"compile": "inductor", "step_bytes": int(size * budget / 3), "swap_dir": directory} | settings
    wrap_hostile(streamed, int(size * budget), **settings)
    mball.wrap(resident, budget=size * 4 + (64 << 20), **settings)
    return streamed, resident


def steps_compiled(model: nn.Module) -> list[int]:
    """Returns the number of steps of each captured graph, all of them compiled."""
    runners = _states[model].backend.runners
    assert runners
    assert all(not runner._programs[0]._counts_flops for runner in runners), "steps run as they were captured"
    return [len(runner.graph.steps) for runner in runners]


SPECIMENS = {
    "llama": Specimen(make=llama, runs=(logits(1, 9),)),
    "llama-generates": Specimen(make=lambda: llama(dtype=torch.bfloat16), runs=(generate("dynamic"),)),
    "llama-static-cache": Specimen(make=lambda: llama(tied=True), runs=(generate("static"),)),
    "sequential": ZOO["sequential"],
    "breaks": ZOO["breaks"],
    "convolutions": Specimen(make=Net, runs=(lambda m: m(noise(2, 3, 16, 16)),), budget=1.95),
    "bert": ZOO["bert-bf16"],
}
# Dynamo captures the gate alone of a loop over experts: one step.
LONG = {name: ZOO[name] for name in ZOO if name not in SPECIMENS and ZOO[name].graphs and name != "experts"}
# Graphs of half a layer, whose two weights of 16 KiB fit at a time.
SMALL_GRAPHS = {"breaks-in-layers"}


def check(specimen: Specimen, directory: Path) -> list[int]:
    """Passes of both models agree. Returns the steps in which each graph of the streamed one was compiled."""
    streamed, resident = wrap_both(specimen.make, specimen.budget, directory)
    plain = make(specimen.make)
    for attempt in range(2):
        for number, call in enumerate(specimen.runs):
            got = run(streamed, call)
            assert_same(got, run(resident, call), f"attempt {attempt}, call {number}")
            assert_near(got, run(plain, call))
        assert_streamed(streamed)
        assert mball.report(resident).unplanned_fetches == 0
    assert steps_compiled(streamed) == steps_compiled(resident)
    return steps_compiled(streamed)


def assert_near(got: Any, expected: Any) -> None:
    """Compiled numbers differ in their last bits; whole tokens of `generate` are compared elsewhere."""
    if isinstance(got, torch.Tensor) and got.is_floating_point():
        torch.testing.assert_close(got, expected, rtol=2e-2 if got.dtype is torch.bfloat16 else 1e-4, atol=2e-2)


@pytest.mark.parametrize("name", SPECIMENS)
def test_streamed_equals_resident(name: str, tmp_path: Path) -> None:
    assert max(check(SPECIMENS[name], tmp_path)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_streamed_equals_resident_for_more_models(name: str, tmp_path: Path) -> None:
    steps = check(LONG[name], tmp_path)
    assert max(steps) > 1 or name in SMALL_GRAPHS


class Gathers(nn.Module):
    """What is gathered from an embedding is used long after: a fused kernel must not gather again then."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        gathered = self.table(tokens)
        scale = self.table.weight[3:4] * 2
        x = gathered
        for layer in self.layers:
            x = layer(x).sin() + gathered * scale
        return x


def test_no_weight_is_read_after_its_release(tmp_path: Path) -> None:
    streamed, resident = wrap_both(Gathers, 0.75, tmp_path)
    for seed in range(3):
        tokens = ids(2, 5, seed=seed)
        assert_same(run(streamed, lambda m, t=tokens: m(t)), run(resident, lambda m, t=tokens: m(t)))
        assert_streamed(streamed)
    assert steps_compiled(streamed) == [5]


class Remembers(nn.Module):
    """Writes to buffers: AOTAutograd does that at the end of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.register_buffer("memory", torch.zeros(4, 8, 64))

    def forward(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x)
            self.memory[number].index_copy_(0, place, x)
            x = x + self.memory[number].mean(0, keepdim=True)
        return x


def test_written_buffers(tmp_path: Path) -> None:
    streamed, resident = wrap_both(Remembers, 0.9, tmp_path)
    plain = make(Remembers)
    for number in range(5):
        x, place = noise(1, 64, seed=number), torch.tensor([number])
        got = run(streamed, lambda m, x=x, place=place: m(x, place))
        assert_same(got, run(resident, lambda m, x=x, place=place: m(x, place)))
        torch.testing.assert_close(got, run(plain, lambda m, x=x, place=place: m(x, place)))
        assert_same(streamed.memory, resident.memory)
    assert_streamed(streamed)
    assert steps_compiled(streamed) == [4]


class Shifts(nn.Module):
    """A written buffer is what the next one written becomes: neither may be written before all have read it."""

    def __init__(self, keeps_result: bool) -> None:
        super().__init__()
        self.keeps_result = keeps_result
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("previous", torch.zeros(4, 64))
        self.register_buffer("current", torch.ones(4, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x * 2
        result = self.second(self.first(scaled - self.previous)) + self.current
        self.previous.copy_(self.current)
        self.current.copy_(result if self.keeps_result else scaled)
        return result


@pytest.mark.parametrize("keeps_result", [True, False])
@pytest.mark.parametrize("in_one_piece", [True, False])
def test_a_buffer_that_another_one_becomes(in_one_piece: bool, keeps_result: bool, tmp_path: Path) -> None:
    plain, model = (make(lambda: Shifts(keeps_result)) for _ in range(2))
    if in_one_piece:
        mball.wrap(model, budget="64MiB", swap_dir=tmp_path, compile="inductor")
    else:
        wrap_hostile(model, weight_bytes(model), swap_dir=tmp_path, compile="inductor", step_bytes=64 * 65 * 4)
    for seed in range(3):
        x = noise(4, 64, seed=seed)
        torch.testing.assert_close(run(model, lambda m, x=x: m(x)), run(plain, lambda m, x=x: m(x)))
        torch.testing.assert_close(model.previous, plain.previous)
        torch.testing.assert_close(model.current, plain.current)
    assert steps_compiled(model) == [1 if in_one_piece else 2]


class Layers(nn.Module):
    def __init__(self, count: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_equal_layers_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    compile_piece = inductor.compile_piece
    monkeypatch.setattr(inductor, "compile_piece", lambda *args: compiled.append(args) or compile_piece(*args))
    model = make(lambda: Layers(8))
    wrap_hostile(model, weight_bytes(model) // 2, swap_dir=tmp_path, compile="inductor")
    run(model, lambda m: m(noise(4, 64)))
    run(model, lambda m: m(noise(4, 64)))
    assert steps_compiled(model)[0] >= 8
    assert len(compiled) <= 3
    assert_streamed(model)


def test_a_model_that_fits_is_one_graph_and_computes_what_torch_compile_does(tmp_path: Path) -> None:
    plain, model = make(lambda: Layers(3)), make(lambda: Layers(3))
    compiled = torch.compile(plain)
    mball.wrap(model, budget="64MiB", swap_dir=tmp_path, compile="inductor")
    x = noise(4, 64)
    for _ in range(3):
        assert_same(run(model, lambda m: m(x)), run(compiled, lambda m: m(x)))
    assert steps_compiled(model) == [1]
    assert mball.report(model).bytes_read_last_pass == 0


def test_one_graph_that_does_not_fit_at_some_sizes_runs_in_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, model = (make(lambda: Layers(8, width=256)) for _ in range(2))
    budget = weight_bytes(model) + (1 << 20)
    mball.wrap(model, budget=budget, swap_dir=tmp_path, compile="inductor")
    small = {rows: run(model, lambda m, rows=rows: m(noise(rows, 256))) for rows in (4, 8, 12)}
    assert steps_compiled(model)[0] == 1
    x = noise(1000, 256)  # 3 MB of activations at least, beside 8 MB of weights
    with caplog.at_level(logging.WARNING):
        for rows in (4, 8, 12):
            assert_same(run(model, lambda m, rows=rows: m(noise(rows, 256))), small[rows])
            torch.testing.assert_close(run(model, lambda m: m(x)), run(plain, lambda m: m(x)), rtol=1e-4, atol=1e-4)
    assert sum("in one piece" in message for message in caplog.messages) == 1
    assert mball.report(model).peak_bytes <= budget


def test_one_piece_must_have_room_for_workspace(tmp_path: Path) -> None:
    def convolutions() -> nn.Module:
        return nn.Sequential(nn.Conv2d(256, 256, 3), nn.Conv2d(256, 256, 3))

    plain, model = make(convolutions), make(convolutions)
    budget = weight_bytes(model) + (1 << 20)  # each convolution reorders its weight of 2.4 MB
    mball.wrap(model, budget=budget, swap_dir=tmp_path, compile="inductor")
    x = noise(1, 256, 6, 6)
    for _ in range(2):
        torch.testing.assert_close(run(model, lambda m: m(x)), run(plain, lambda m: m(x)))
    assert steps_compiled(model) == [2]
    assert engine_of(model).workspace_fits


def test_operations_of_compiled_steps_are_known(tmp_path: Path) -> None:
    model = make(lambda: Layers(3))
    wrap_hostile(model, int(weight_bytes(model) * 0.7), swap_dir=tmp_path, compile="inductor")
    for _ in range(3):
        run(model, lambda m: m(noise(4, 64)))
        assert sum(step.flops for step in engine_of(model)._active.tape.trace.steps) == 2 * 4 * 3 * 2 * 64 * 128


class Counts(nn.Module):
    """Sizes that depend on data, one of them used in another step than where it is known."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor, count: torch.Tensor) -> Any:
        number = count.item()
        torch._check(number >= 0)
        torch._check(number < 7)
        more = number + 1
        x = self.first(x)
        x = self.second(x) * more
        rows = x.new_ones(more, 64)
        return self.third(rows) + x.sum(), more


def test_sizes_that_depend_on_data(tmp_path: Path) -> None:
    plain = make(Counts)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        streamed, resident = wrap_both(Counts, 0.9, tmp_path, fullgraph=True)
        for number in (2, 5, 0):
            x, count = noise(8, 64, seed=number), torch.tensor(number)
            got = run(streamed, lambda m, x=x, count=count: m(x, count))
            assert_same(got, run(resident, lambda m, x=x, count=count: m(x, count)))
            expected, more = run(plain, lambda m, x=x, count=count: m(x, count))
            assert got[1] == more
            torch.testing.assert_close(got[0], expected)
    assert_streamed(streamed)
    assert set(steps_compiled(streamed)) == {3}


class Positions(nn.Module):
    """Returns a view of a weight, of a size that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.table = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.shape[1] + 1
        for layer in self.layers:
            x = layer(x)
        return x, self.table[:rows]


def test_a_view_of_a_weight_of_a_computed_size_is_returned(tmp_path: Path) -> None:
    streamed, resident = wrap_both(Positions, 0.9, tmp_path, dynamic=True)
    for rows in (5, 9):
        x = noise(2, rows, 64)
        got = run(streamed, lambda m, x=x: m(x))
        assert_same(got, run(resident, lambda m, x=x: m(x)))
        assert_same(got[1], make(Positions).table[: rows + 1].detach())
    assert_streamed(streamed)
    assert max(steps_compiled(streamed)) > 1


class Halves(nn.Module):
    """Equal layers; the sizes of the second one are known to be even."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, even: torch.Tensor, other: torch.Tensor) -> list[torch.Tensor]:
        torch._check(even.shape[0] % 2 == 0)
        fixed = torch.ones(3, 64)
        return [layer(x) for layer, x in zip(self.layers, (fixed, even, other), strict=True)]


def test_layers_of_which_other_things_are_known_are_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    compile_piece = inductor.compile_piece
    monkeypatch.setattr(inductor, "compile_piece", lambda *args: compiled.append(args) or compile_piece(*args))
    model, plain = make(Halves), make(Halves)
    wrap_hostile(
        model, weight_bytes(model), swap_dir=tmp_path, compile="inductor", step_bytes=64 * 65 * 4, dynamic=True
    )
    for even, other in ((4, 7), (6, 9)):
        inputs = noise(even, 64), noise(other, 64)
        torch.testing.assert_close(run(model, lambda m, xs=inputs: m(*xs)), run(plain, lambda m, xs=inputs: m(*xs)))
    assert steps_compiled(model) == [3]
    assert len(compiled) == 3


def test_recompiles_only_where_torch_compile_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (4, 4, 5, 6, 9, 1, 4, 33)
    counter = CompileCounter()
    compiled = torch.compile(make(lambda: Layers(3)), backend=counter)
    for rows in sizes:
        run(compiled, lambda m, rows=rows: m(noise(rows, 64)))
    torch._dynamo.reset()
    model = make(lambda: Layers(3))
    wrap_hostile(model, int(weight_bytes(model) * 0.7), swap_dir=tmp_path, compile="inductor")
    for rows in sizes:
        run(model, lambda m, rows=rows: m(noise(rows, 64)))
    assert mball.report(model).graphs == counter.frame_count
    engine = engine_of(model)
    before, compiled_now = engine.plan, []
    monkeypatch.setattr(inductor, "compile_piece", lambda *args: compiled_now.append(args))
    engine.forget_plans(engine._active.tape.keys)
    run(model, lambda m: m(noise(33, 64)))
    assert engine.plan is not before
    assert not compiled_now, "a change of plans alone compiles nothing"
    assert mball.report(model).graphs == counter.frame_count
    assert_streamed(model)


def test_dynamic_fullgraph_and_options_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config

    seen = []
    compile_piece = inductor.compile_piece
    monkeypatch.setattr(
        inductor,
        "compile_piece",
        lambda *args: seen.append(torch._inductor.config.epilogue_fusion) or compile_piece(*args),
    )
    model = make(lambda: Layers(3))
    wrap_hostile(
        model, int(weight_bytes(model) * 0.7), swap_dir=tmp_path, compile="inductor", dynamic=True,
        options={"epilogue_fusion": False},
    )  # fmt: skip
    for rows in (4, 7, 9):
        run(model, lambda m, rows=rows: m(noise(rows, 64)))
    assert mball.report(model).graphs == 1
    assert seen
    assert not any(seen)
    assert torch._inductor.config.epilogue_fusion
    breaking = make(ZOO["breaks"].make)
    wrap_hostile(breaking, int(weight_bytes(breaking) * 0.9), swap_dir=tmp_path, compile="inductor", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run(breaking, lambda m: m(noise(2, 3, 64)))


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    model = make(lambda: Layers(2))
    for settings, message in (
        ({"mode": "max-autotune"}, "compile='inductor'"),
        ({"step_bytes": "1MiB"}, "compile='inductor'"),
        ({"compile": "inductor", "capture": "operators"}, "needs graphs"),
        ({"compile": "inductor", "mode": "default", "options": {"a": 1}}, "exclude each other"),
        ({"compile": "inductor", "mode": "fastest"}, "fastest"),
        ({"compile": "cudagraphs"}, "'eager', 'inductor'"),
        ({"compile": "inductor", "step_bytes": 0}, "more than zero"),
    ):
        with pytest.raises(ConfigError, match=message):
            mball.wrap(model, budget="1MiB", swap_dir=tmp_path, **settings)
    assert type(model) is Layers


def test_without_a_compiler_steps_run_as_captured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import torch._inductor.config

    broken = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
    plain, model = make(lambda: Layers(3)), make(lambda: Layers(3))
    wrap_hostile(model, int(weight_bytes(model) * 0.7), swap_dir=tmp_path, compile="inductor")
    x = noise(4, 64)
    with broken, caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same(run(model, lambda m: m(x)), run(plain, lambda m: m(x)))
    assert sum("cannot be compiled" in message for message in caplog.messages) == 1
    assert_streamed(model)


PROCESS = """
import sys, torch, mball
from torch._dynamo.utils import counters
from tests.run.harness import make, run, weight_bytes
from tests.run.test_inductor import Layers
from tests.run.zoo import noise
torch.set_num_threads(1)
model = make(lambda: Layers(4))
mball.wrap(model, budget=int(weight_bytes(model) * 0.7), swap_dir=sys.argv[1], compile="inductor")
result = run(model, lambda m: m(noise(4, 64)))
assert mball.report(model).bytes_read_last_pass > 0
torch.save(result, sys.argv[2])
print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


def test_caches_on_disk_serve_other_processes(tmp_path: Path) -> None:
    environment = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    lines = []
    for number in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, str(tmp_path), str(tmp_path / f"{number}.pt")],
            env=environment, capture_output=True, text=True, timeout=300, check=False, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines.append(tuple(map(int, done.stdout.split())))
    (cold_misses, _), (warm_misses, warm_hits) = lines
    assert cold_misses > 0
    assert (warm_misses, warm_hits) == (0, cold_misses)
    assert_same(torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt"))
