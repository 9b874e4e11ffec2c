"""torch.compile(model, backend="mball", options={"budget": ...}): the same numbers as backend="eager", streamed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mball
from mball.api import _state_of
from mball.backend_door import DoorRunner, find_door, mball_backend
from mball.errors import AutogradError, WrapError
from tests.run.door import Tied, X, backend, call, compiled, is_installed, options, three_layers
from tests.run.harness import assert_same, assert_streamed, make, run, weight_bytes
from tests.run.test_passes import Pieces
from tests.run.zoo import Run, generate, ids, llama, logits, noise


class Layer(nn.Module):
    """Its second part is a graph of its own: Dynamo captures it once for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Shares(nn.Module):
    """Two Parameters over the same memory: one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
        self.layers[3].weight.data = self.layers[0].weight.data

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Writes(nn.Module):
    """Writes to weights between graphs, and inside one."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside = inside
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(x)
        if self.inside:
            self.layers[1].weight.mul_(0.5)
        else:
            self.by_hand()
        return self.layers(x)

    @torch._dynamo.disable
    def by_hand(self) -> None:
        self.layers[1].weight.mul_(0.5)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Run, ...], float]] = {
    "llama": (three_layers, (logits(1, 9), logits(2, 5)), 0.6),
    "llama-generates": (three_layers, (generate("dynamic"),), 0.6),
    "llama-tied-static-cache": (lambda: llama(2, tied=True), (generate("static"),), 0.75),
    "tied": (Tied, (call,), 0.6),
    "tied-by-memory": (Shares, (call,), 0.6),
    "breaks": (Pieces, (call,), 0.6),
    "one-graph-for-all-layers": (Layers, (call,), 0.6),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_of_torch_compile(name: str, tmp_path: Path) -> None:
    factory, calls, budget = MODELS[name]
    plain, model = compiled(factory, budget, tmp_path)
    for attempt in range(3):
        for each in calls:
            assert_same(run(model, each), run(plain, each), f"attempt {attempt}")
    for each in calls:
        run(model, each)
        report = assert_streamed(model)
    assert report.weights_read == report.weights_managed
    assert report.unplanned_fetches == 0


def test_one_plan_for_a_pass_of_several_graphs(tmp_path: Path) -> None:
    _, model = compiled(Pieces, 0.6, tmp_path)
    for _ in range(4):  # captured, measured, timed, planned with that
        run(model, call)
    engine = _state_of(model).engine
    run(model, call)
    plan = engine.plan
    passes = mball.report(model).passes
    for number in range(1, 4):
        run(model, call)
        report = assert_streamed(model)
        assert report.passes == passes + number
        assert report.unplanned_fetches == 0
        assert engine.plan is plan
        read = {bundle for step in plan.steps for bundle in step.reads}
        assert {weight for bundle in read for weight in plan.bundles[bundle].tensors} == set(range(12))


def test_tokens_of_generate_are_passes_of_their_own(tmp_path: Path) -> None:
    _, model = compiled(three_layers, 0.6, tmp_path)
    for _ in range(3):
        run(model, generate("static"))
    before = mball.report(model).passes
    run(model, generate("static"))
    # Six tokens: the prompt shares a pass with the next ones, at most two.
    assert mball.report(model).passes - before in (4, 5, 6)


def test_names_are_those_of_the_model(tmp_path: Path) -> None:
    _, model = compiled(three_layers, 0.6, tmp_path)
    run(model, logits(1, 4))
    assert {weight.name for weight in _state_of(model).engine.weights} == {name for name, _ in model.named_parameters()}


def test_it_is_captured_once(tmp_path: Path) -> None:
    model = make(Tied)
    graphs = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        graphs.append(args[0])
        return backend()(*args, **kwargs)

    call_compiled = torch.compile(model, backend=counting, options=options(model, 0.6, tmp_path))
    for _ in range(3):
        run(call_compiled, call)
    assert len(graphs) == 1
    assert_streamed(call_compiled)


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "breaks", "one-graph-for-all-layers"])
def test_inductor_streamed_equals_resident(name: str, tmp_path: Path) -> None:
    factory, calls, budget = MODELS[name]
    size = weight_bytes(make(factory))
    settings = {"compile": "inductor", "step_bytes": int(size * budget / 3)}
    streamed, resident = make(factory), make(factory)
    streamed.compile(backend=backend(), options=options(streamed, budget, tmp_path, **settings))
    large = {"budget": size * 4 + (64 << 20), "swap_dir": str(tmp_path), **settings}
    resident.compile(backend="mball" if is_installed() else mball_backend, options=large)
    for _ in range(3):
        for each in calls:
            assert_same(run(streamed, each), run(resident, each))
    assert_streamed(streamed)
    runners = _state_of(streamed).backend.runners
    assert runners
    assert all(not program._counts_flops for runner in runners for program in runner._programs[:1]), "not compiled"


def test_both_programs_of_a_graph_keep_their_own_names_for_other_weights(tmp_path: Path) -> None:
    """A graph in one piece has another program for when it does not fit; a plan is found by the program's name."""
    options = {"budget": "64MiB", "swap_dir": str(tmp_path), "compile": "inductor"}
    models = [nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval() for _ in range(2)]
    for model in models:
        with torch.no_grad():
            torch.compile(model, backend=mball_backend, options=options)(noise(2, 64))
    door = find_door(models[1])
    assert door is not None
    runners = door.backend.runners
    renumbered = runners[0].renumbered(
        "@9", {weight: weight for weight in range(4)}, runners[0]._programs[0]._weight_bytes
    )
    for runner in (*runners, renumbered):
        names = [program.graph.name for program in runner._programs]
        assert len(set(names)) == len(names) == 2


# -- weights that others have written, exchanged, shared -----------------------------------------------------------


@pytest.mark.parametrize("budget", [0.6, 2.0])
def test_writes_between_calls_are_noticed(budget: float, tmp_path: Path) -> None:
    plain, model = compiled(Pieces, budget, tmp_path)
    for number in range(4):
        assert_same(run(model, call), run(plain, call), f"call {number}")
        for each in (model, plain):
            with torch.no_grad():
                each.first[1].weight.mul_(0.5)
                each.third[0].bias.data += 1
    assert mball.report(model).bytes_read_last_pass > 0


@pytest.mark.parametrize("inside", [False, True])
def test_writes_within_a_call_are_noticed(inside: bool, tmp_path: Path) -> None:
    plain, model = compiled(lambda: Writes(inside), 0.75, tmp_path)
    for number in range(4):
        assert_same(run(model, call), run(plain, call), f"call {number}")
    assert mball.report(model).bytes_read_last_pass > 0
    assert bool(_state_of(model).backend.unsupported) == inside


class WritesInParts(nn.Module):
    """Graphs that cannot be streamed in steps, each with weights that were not seen before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        self.layers[1].weight.mul_(0.5)
        x = self.layers[1](x)
        torch._dynamo.graph_break()
        self.layers[2].weight.mul_(0.5)
        return self.layers[2](x)


def test_weights_that_come_with_graphs_that_run_operator_by_operator(tmp_path: Path) -> None:
    plain, model = compiled(WritesInParts, 0.75, tmp_path)
    for number in range(3):
        assert_same(run(model, call), run(plain, call), f"call {number}")
    assert len(_state_of(model).backend.unsupported) == 2
    assert mball.report(model).weights_managed == 6


def test_other_memory_is_refused(tmp_path: Path) -> None:
    plain, model = compiled(Pieces, 0.6, tmp_path)
    run(model, call)
    before = model.first[0].weight.data
    model.first[0].weight.data = before.clone()
    with pytest.raises(WrapError, match=r"first\.0\.weight.*other memory"):
        run(model, call)
    model.first[0].weight.data = before
    for _ in range(2):
        assert_same(run(model, call), run(plain, call))
    assert_streamed(model)


def test_a_new_parameter_is_managed_too(tmp_path: Path) -> None:
    plain, model = compiled(Pieces, 0.6, tmp_path)
    run(model, call)
    for each in (model, plain):
        each.second[0].weight = nn.Parameter(noise(64, 64, seed=3))
    for _ in range(3):
        assert_same(run(model, call), run(plain, call))
    assert mball.report(model).weights_managed == 13


def test_models_with_equal_options_share_a_budget(tmp_path: Path) -> None:
    """Dynamo calls the graph of the first for the second: it must not compute with the first one's weights."""
    plain = [make(Tied, seed) for seed in (0, 1)]
    models = [make(Tied, seed) for seed in (0, 1)]
    for model in models:
        model.compile(backend=mball_backend, options=options(model, 0.6, tmp_path))
    for _ in range(3):
        for model, reference in zip(models, plain, strict=True):
            assert_same(run(model, call), run(reference, call))
    assert _state_of(models[0]) is _state_of(models[1])
    assert mball.report(models[1]).peak_bytes <= int(weight_bytes(models[0]) * 0.6)


def test_threads_take_turns(tmp_path: Path) -> None:
    plain, model = compiled(Pieces, 0.6, tmp_path)
    expected = run(plain, call)
    run(model, call)
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.extend(run(model, call) for _ in range(4))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    for result in results:
        assert_same(result, expected)


def test_autograd_is_refused(tmp_path: Path) -> None:
    plain, model = compiled(Tied, 0.6, tmp_path)
    run(model, call)
    assert all(_state_of(model).engine.homes.requires_grad)
    with pytest.raises(AutogradError, match=r"torch\.no_grad"):
        model(X)
    for each in (model, plain):
        each.requires_grad_(False)
    with pytest.raises(AutogradError, match="requires grad"):
        model(X.clone().requires_grad_())
    for _ in range(2):
        assert_same(model(X), plain(X))
    assert_streamed(model)
    assert not any(_state_of(model).engine.homes.requires_grad)


def test_inference_mode(tmp_path: Path) -> None:
    plain, model = compiled(Tied, 0.6, tmp_path)
    with torch.inference_mode():
        for _ in range(3):
            assert_same(model(X), plain(X))
    assert_streamed(model)
    assert_same(run(model, call), run(plain, call))


# -- the name ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not is_installed(), reason="needs mball installed: pip install -e .")
def test_torch_knows_the_name(tmp_path: Path) -> None:
    assert "mball" in torch._dynamo.list_backends()
    plain, model = make(three_layers), make(three_layers)
    plain.compile(backend="eager")
    model.compile(backend="mball", options=options(model, 0.6, tmp_path))
    for _ in range(2):
        assert_same(run(model, lambda m: m(ids(1, 4)).logits), run(plain, lambda m: m(ids(1, 4)).logits))
    assert_streamed(model)


# -- models that go ------------------------------------------------------------------------------------------------


def compiled_model(seed: int, directory: Path, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Returns a model as it is, and the same one compiled; all of them with equal options, so with one budget."""
    plain, model = make(Tied, seed), make(Tied, seed)
    model.compile(backend=mball_backend, options=options(model, 0.6, directory, **settings))
    return plain, model


@pytest.mark.parametrize("how", ["eager", "inductor"])
def test_a_model_that_is_dropped_is_freed(how: str, tmp_path: Path) -> None:
    """Its Parameters' ids may be those of the next model's: graphs must not take those for its weights."""
    kept_plain, kept = compiled_model(0, tmp_path, compile=how)
    expected = run(kept, call)
    runner = next(iter(_state_of(kept).backend.runners))
    for seed in range(1, 5):
        plain, model = compiled_model(seed, tmp_path, compile=how)
        for _ in range(2):
            torch.testing.assert_close(run(model, call), run(plain, call))
        gone = [weakref.ref(parameter) for parameter in model.parameters()]
        del model
        gc.collect()
        assert [ref() for ref in gone] == [None] * len(gone)
        assert _state_of(kept).backend.runners == [runner]
        assert len(_state_of(kept).gate.living_weights()) == len(list(kept.parameters()))
    assert_same(run(kept, call), expected)
    torch.testing.assert_close(expected, run(kept_plain, call))


def test_what_is_known_of_models_that_went_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make_runner = DoorRunner.__init__
    monkeypatch.setattr(DoorRunner, "__init__", lambda self, *args: made.append(self) or make_runner(self, *args))
    _, kept = compiled_model(0, tmp_path)
    run(kept, call)
    for seed in range(1, 5):
        _, model = compiled_model(seed, tmp_path)
        run(model, call)
        assert len(made) == 1
        assert len(made[0]._known) == 2  # of the first model, and of this one
        del model
        gc.collect()


def test_unwrap_leaves_models_that_share_the_budget_alone(tmp_path: Path) -> None:
    models = [compiled_model(seed, tmp_path) for seed in range(3)]
    for plain, model in models:
        assert_same(run(model, call), run(plain, call))
    (first_plain, first), (second_plain, second) = models[:2]
    mball.unwrap(first)
    del models[2], plain, model
    gc.collect()
    assert_same(run(first, call), run(first_plain, call))
    for _ in range(2):
        assert_same(run(second, call), run(second_plain, call))
    report = assert_streamed_among_others(second)
    assert report.weights_owned == len(list(second.parameters()))
    with pytest.raises(WrapError, match="not wrapped"):
        mball.report(first)
    first.compile(backend=mball_backend, options=options(first, 0.6, tmp_path))
    with pytest.raises(WrapError, match="was unwrapped"):
        run(first, call)  # the graph is the second one's too
    state = _state_of(second)
    mball.unwrap(second)
    assert state.engine.closed
    assert_same(run(second, call), run(second_plain, call))


def assert_streamed_among_others(model: nn.Module) -> Any:
    report = mball.report(model)
    assert report.bytes_read_last_pass > 0
    assert report.in_place_bytes == 0
    return report


def test_a_graph_that_cannot_be_captured_leaves_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no room for the graph")

    plain, model = compiled(Tied, 0.6, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("mball.backend.Backend.capture", fails)
        with pytest.raises(Exception, match="no room"):
            run(model, call)
        with pytest.raises(WrapError, match="not wrapped"):
            mball.report(model)
    torch._dynamo.reset()
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    for _ in range(2):
        assert_same(run(model, call), run(plain, call))
    assert_streamed(model)


def test_weights_that_a_capture_gave_back_may_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no room for the graph")

    _, first = compiled_model(0, tmp_path)
    plain, second = compiled_model(1, tmp_path)
    run(first, call)
    with monkeypatch.context() as patched:
        patched.setattr("mball.backend.Backend.capture", fails)
        with pytest.raises(Exception, match="no room"):
            run(second, lambda model: model(X[:2]))
    for _ in range(2):
        assert_same(run(second, call), run(plain, call))  # by the first one's graph


def test_weights_that_are_tied_otherwise_are_refused_and_left_alone(tmp_path: Path) -> None:
    """Dynamo calls the first one's graph for the second, in which two Parameters share their memory."""
    first, second = make(Shares), make(Shares)
    with torch.no_grad():
        first.layers[3].weight.data = first.layers[3].weight.clone()
    expected = run(second, call)
    addresses = [parameter.data_ptr() for parameter in second.parameters()]
    for model in (first, second):
        model.compile(backend=mball_backend, options=options(first, 0.75, tmp_path))
    run(first, call)
    with pytest.raises(WrapError, match="other weights were tied"):
        run(second, call)
    assert [parameter.data_ptr() for parameter in second.parameters()] == addresses
    assert_same(run(second, lambda model: model.forward(X)), expected)
