"""backend="mball": its settings, what it refuses, and how it gets on with the rest of mball."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mball
from mball import backend_door
from mball.api import _state_of
from mball.backend_door import _doors, mball_backend
from mball.errors import BudgetError, ConfigError, StorageError, WrapError
from mball.trace import inductor
from tests.run.door import Tied, X, backend, call, compiled, options, three_layers
from tests.run.harness import assert_same, assert_streamed, make, run, weight_bytes
from tests.run.zoo import logits, noise


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ({"options": {"epilogue-fusion": False}}, "epilogue_fusion", False),
        ({"mode": "max-autotune"}, "max_autotune", True),
    ],
)
def test_inductors_own_options_and_mode(
    settings: dict[str, Any], name: str, value: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config

    compile_piece, seen = inductor.compile_piece, []
    monkeypatch.setattr(
        inductor,
        "compile_piece",
        lambda *args: seen.append(getattr(torch._inductor.config, name)) or compile_piece(*args),
    )
    plain, model = compiled(Tied, 2.0, tmp_path, compile="inductor", **settings)
    torch.testing.assert_close(run(model, call), run(plain, call))
    assert seen
    assert set(seen) == {value}
    assert getattr(torch._inductor.config, name) is not value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "no such"}, "no such"),
        ({"options": {"no_such": 1}}, "Unexpected optimization option no_such; give"),
        ({"options": {"freezing": True}}, "options say freezing"),
        ({"options": {"max_fusion_size": "large"}}, "max_fusion_size, got str should be int"),
    ],
)
def test_inductor_settings_that_it_does_not_know(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = make(Tied)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(ConfigError, match=message):
        mball.wrap(model, budget="64MiB", swap_dir=tmp_path, compile="inductor", **settings)
    chosen = options(model, 2.0, tmp_path, compile="inductor", **settings)
    with pytest.raises(ConfigError, match=message):
        run(torch.compile(model, backend=mball_backend, options=chosen), call)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "needs a budget.*options="),
        ({"compile": "eager"}, "needs a budget"),
        ({"budget": "1GiB", "colour": "blue"}, "colour"),
        ({"budget": "1GiB", "capture": "operators"}, "capture"),
        ({"budget": "1GiB", "fullgraph": True}, r"torch\.compile's own"),
        ({"budget": "1GiB", "options": {"max_fusion_size": 1}}, "compile='inductor'"),
        ({"budget": "much"}, "much"),
        ({"budget": "1GiB", "io": "gds"}, "io='gds' is for files that go straight to a GPU"),
    ],
)
def test_settings_that_make_no_sense(settings: Any, message: str) -> None:
    model = make(Tied)
    with pytest.raises(ConfigError, match=message):
        run(torch.compile(model, backend=mball_backend, options=settings), call)
    with pytest.raises(WrapError, match="not wrapped"):
        mball.report(model)


def test_a_budget_that_is_too_small(tmp_path: Path) -> None:
    plain, model = make(three_layers), make(three_layers)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    threads = set(threading.enumerate())  # some of them may be ending
    with pytest.raises(BudgetError, match="smallest") as refused:
        run(
            torch.compile(model, backend=mball_backend, options={"budget": 4096, "swap_dir": str(tmp_path)}),
            logits(1, 4),
        )
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert_same(run(model, logits(1, 4)), run(plain, logits(1, 4)))
    gc.collect()
    assert set(threading.enumerate()) <= threads
    smallest = refused.value.smallest_bytes
    assert refused.value.budget_bytes == 4096
    assert 4096 < smallest < weight_bytes(model)
    exact = {"budget": smallest - 4096, "swap_dir": str(tmp_path)}
    with pytest.raises(BudgetError):
        run(torch.compile(model, backend=mball_backend, options=exact), logits(1, 4))


def test_a_swap_file_that_cannot_be_made(tmp_path: Path) -> None:
    model = make(Tied)
    chosen = {"budget": "1MiB", "swap_dir": str(tmp_path / "nowhere")}
    with pytest.raises(StorageError, match="nowhere"):
        run(torch.compile(model, backend=mball_backend, options=chosen), call)


def test_overlapping_weights_are_refused_and_left_alone(tmp_path: Path) -> None:
    model = make(Tied)
    memory = noise(64 * 65)
    model.body[0].weight = nn.Parameter(memory[: 64 * 64].view(64, 64))
    model.body[4].weight = nn.Parameter(memory[64:].view(64, 64))
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(WrapError, match="different views of the same memory"):
        run(torch.compile(model, backend=mball_backend, options=options(model, 0.6, tmp_path)), call)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_another_budget_for_the_same_weights_is_refused(tmp_path: Path) -> None:
    plain, model = compiled(Tied, 0.6, tmp_path)
    run(model, call)
    other = torch.compile(model.forward, backend=mball_backend, options=options(model, 0.7, tmp_path))
    with pytest.raises(WrapError, match="under another budget"):
        run(model, lambda _: other(X))
    assert_same(run(model, call), run(plain, call))


# -- with the rest of mball ----------------------------------------------------------------------------------------


def test_report_timeline_and_unwrap(tmp_path: Path) -> None:
    plain, model = make(Tied), make(Tied)
    call_compiled = torch.compile(model, backend=backend(), options=options(model, 0.6, tmp_path))
    with pytest.raises(WrapError, match="not wrapped"):
        mball.report(call_compiled)
    for _ in range(3):
        run(call_compiled, call)
    assert mball.report(call_compiled) == mball.report(model)
    assert mball.timeline(model, tmp_path / "trace.json").stat().st_size > 1000
    assert mball.unwrap(call_compiled) is call_compiled
    assert_same(run(model, call), run(plain, call))
    with pytest.raises(WrapError, match="unwrapped"):
        run(call_compiled, call)
    with pytest.raises(WrapError, match="not wrapped"):
        mball.report(model)
    torch._dynamo.reset()
    assert_same(run(call_compiled, call), run(plain, call))
    assert mball.report(model).weights_managed == mball.report(model).weights_owned


def test_what_dynamo_forgot_is_captured_again(tmp_path: Path) -> None:
    plain, model = compiled(Tied, 0.6, tmp_path)
    for _ in range(2):
        run(model, call)
        with torch.no_grad():
            model.body[0].weight.mul_(2)
            plain.body[0].weight.mul_(2)
        torch._dynamo.reset()
        gc.collect()
        with pytest.raises(WrapError, match="not wrapped"):
            mball.report(model)
        for _ in range(2):
            assert_same(run(model, call), run(plain, call))
        assert_streamed(model)


def test_unwrap_after_compiling_in_place(tmp_path: Path) -> None:
    plain, model = compiled(Tied, 0.6, tmp_path)
    run(model, call)
    mball.unwrap(model)
    assert_same(run(model, call), run(plain, call))
    torch._dynamo.reset()
    mball.wrap(model, budget=int(weight_bytes(model) * 0.6), swap_dir=tmp_path)
    for _ in range(2):
        assert_same(run(model, call), run(plain, call))
    assert_streamed(model)


def test_a_wrapped_model_keeps_its_own_engine(tmp_path: Path) -> None:
    plain, model = make(Tied), make(Tied)
    budget = int(weight_bytes(model) * 0.6)
    mball.wrap(model, budget=budget, swap_dir=tmp_path)
    whole = torch.compile(model, backend=mball_backend, options={"budget": budget})
    for _ in range(3):
        assert_same(run(whole, call), run(plain, call))
    assert mball.report(whole).passes == 3
    within = torch.compile(lambda x: model(x) + 1, backend=mball_backend)
    for _ in range(3):
        assert_same(run(model, lambda _: within(X)), run(plain, call) + 1)
    assert mball.report(model).passes == 6
    assert_streamed(model)
    other = torch.compile(lambda x: model(x) + 2, backend=mball_backend, options={"budget": budget + 4096})
    with pytest.raises(ConfigError, match="wrapped already"):
        run(model, lambda _: other(X))


def test_everything_is_given_back(tmp_path: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    gc.collect()
    threads, files = set(threading.enumerate()), open_files()
    model = make(Tied)
    model.compile(backend=mball_backend, options=options(model, 0.6, tmp_path))
    for _ in range(2):
        run(model, call)
    engine = weakref.ref(_state_of(model).engine.execution.arena)
    assert set(threading.enumerate()) - threads
    assert mapped()
    gone = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None
    assert engine() is None
    assert set(threading.enumerate()) <= threads
    assert open_files() <= files
    assert not mapped()


def test_weights_that_are_constants_of_graphs(tmp_path: Path) -> None:
    import torch._inductor.config

    plain, wrapped, model = (make(Tied) for _ in range(3))
    budget = int(weight_bytes(wrapped) * 0.6)
    mball.wrap(wrapped, budget=budget, swap_dir=tmp_path)
    with torch._inductor.config.patch(freezing=True):
        for _ in range(2):
            assert_same(run(wrapped, call), run(plain, call))
        assert_streamed(wrapped)
        for each in (wrapped, model):
            within = torch.compile(lambda x, each=each: each(x), backend=mball_backend, options={"budget": budget})
            with pytest.raises(ConfigError, match="9 weights as its constants"):
                run(each, lambda _, within=within: within(X))


# -- graphs without weights ----------------------------------------------------------------------------------------


class StartsWithoutWeights(nn.Module):
    """Its first graph and its last one have no Parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        for layer in self.layers:
            x = layer(x)
        torch._dynamo.graph_break()
        return x.relu()


def test_graphs_without_weights_run_as_they_are(tmp_path: Path) -> None:
    plain, model = compiled(StartsWithoutWeights, 0.75, tmp_path)
    for attempt in range(4):
        assert_same(run(model, call), run(plain, call), f"attempt {attempt}")
    assert_streamed(model)


def test_graphs_without_weights_are_compiled_where_steps_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_graph, seen = backend_door.compile_graph, []
    monkeypatch.setattr(backend_door, "compile_graph", lambda *args: seen.append(args) or compile_graph(*args))
    plain, model = compiled(StartsWithoutWeights, 4, tmp_path, compile="inductor", options={"epilogue_fusion": False})
    for _ in range(2):
        torch.testing.assert_close(run(model, call), run(plain, call))
    assert [settings for _, _, settings in seen] == [{"epilogue_fusion": False}] * 2


def test_a_wrapped_model_with_graphs_without_weights(tmp_path: Path) -> None:
    plain, model = make(StartsWithoutWeights), make(StartsWithoutWeights)
    budget = int(weight_bytes(model) * 0.75)
    mball.wrap(model, budget=budget, swap_dir=tmp_path)
    doors = len(_doors)
    for chosen in (None, {"budget": budget}):
        torch._dynamo.reset()
        within = torch.compile(lambda x: model(x * 2 + 1), backend=mball_backend, options=chosen)
        for _ in range(3):
            assert_same(run(model, lambda _, within=within: within(X)), run(plain, lambda m: m(X * 2 + 1)))
        assert_streamed(model)
    assert len(_doors) == doors


def test_mode_is_refused_for_a_wrapped_model(tmp_path: Path) -> None:
    model = make(Tied)
    mball.wrap(model, budget=int(weight_bytes(model) * 0.6), swap_dir=tmp_path)
    within = torch.compile(lambda x: model(x) + 1, backend=mball_backend, mode="reduce-overhead")
    with pytest.raises(ConfigError, match=r"wrapped already.*reduce-overhead"):
        run(model, lambda _: within(X))


def test_settings_are_read_with_the_first_graph() -> None:
    model = make(StartsWithoutWeights)
    with pytest.raises(ConfigError, match="colour"):
        run(torch.compile(model, backend=mball_backend, options={"budget": "1GiB", "colour": "blue"}), call)


# -- reports -------------------------------------------------------------------------------------------------------


class WithOthers(nn.Module):
    """Holds Parameters that cannot be streamed, and that no graph reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Tied()
        self.lazy = nn.LazyLinear(4)
        self.sparse = nn.Parameter(torch.eye(4).to_sparse())
        memory = noise(12)
        self.left, self.right = nn.Parameter(memory[:8]), nn.Parameter(memory[4:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_report_counts_weights_that_cannot_be_streamed(tmp_path: Path) -> None:
    model = make(WithOthers)
    chosen = {"budget": "64MiB", "swap_dir": str(tmp_path)}
    whole = torch.compile(model, backend=backend(), options=chosen)
    run(whole, call)
    report = mball.report(whole)
    assert report.weights_owned == report.weights_managed + 3


def test_report_counts_graphs_and_not_what_was_renumbered(tmp_path: Path) -> None:
    models = [make(Tied, seed) for seed in range(3)]
    for model in models:
        model.compile(backend=mball_backend, options=options(model, 0.6, tmp_path))
        run(model, call)
    assert mball.report(models[0]).graphs == 1


@torch.compiler.disable
def by_hand(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, layer.weight)


class EndsWithGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(64, 64) for _ in range(3))
        self.reads_by_hand = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        if self.reads_by_hand:
            x = by_hand(self.second, x)
        torch._dynamo.graph_break()
        return self.third(self.second(x))


@pytest.mark.parametrize("reads_by_hand", [False, True])
def test_what_is_read_after_a_pass_is_not_charged_to_it(reads_by_hand: bool, tmp_path: Path) -> None:
    _, model = compiled(EndsWithGraph, 0.8, tmp_path)
    model.reads_by_hand = reads_by_hand
    for _ in range(3):
        run(model, call)
    for parameter in model.parameters():
        parameter.sum()
    assert (mball.report(model).in_place_bytes > 0) == reads_by_hand
