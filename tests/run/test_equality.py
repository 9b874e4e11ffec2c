"""Streamed equals unwrapped, bit for bit, for every kind of model, on a hostile device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import mball
from tests.run.harness import assert_same, assert_streamed, make, run, weight_bytes, wrap_hostile
from tests.run.zoo import ZOO, BrokenLayers, generate, llama, noise


@pytest.mark.parametrize("name", ZOO)
def test_streamed_equals_unwrapped(name: str, tmp_path: Path) -> None:
    specimen = ZOO[name]
    plain = make(specimen.make)
    model = make(specimen.make)
    wrap_hostile(model, int(weight_bytes(model) * specimen.budget), swap_dir=tmp_path)
    for attempt in range(3):
        # Side by side, since a model may carry state from call to call (a static cache that has grown).
        for number, call in enumerate(specimen.runs):
            assert_same(run(model, call), run(plain, call), f"{name}, attempt {attempt}, call {number}")
        report = assert_streamed(model)
    assert (report.graphs > 0) == specimen.graphs
    assert report.weights_read == report.weights_managed or name == "experts"
    mball.unwrap(model)
    assert_same(run(model, specimen.runs[0]), run(plain, specimen.runs[0]), f"{name}, unwrapped")


@pytest.mark.parametrize("name", ["llama-fp32", "llama-tied-static-cache", "breaks", "t5", "transformer-encoder"])
def test_operators_alone(name: str, tmp_path: Path) -> None:
    """Without any captured graph the results are the same."""
    specimen = ZOO[name]
    plain = make(specimen.make)
    model = make(specimen.make)
    wrap_hostile(model, int(weight_bytes(model) * max(specimen.budget, 0.7)), swap_dir=tmp_path, capture="operators")
    for _ in range(2):
        for number, call in enumerate(specimen.runs):
            assert_same(run(model, call), run(plain, call), f"{name}, call {number}")
        assert assert_streamed(model).graphs == 0


@pytest.mark.parametrize("compiled", ["eager", "inductor"])
def test_a_graph_of_one_layer_serves_equal_ones(compiled: str, tmp_path: Path) -> None:
    """Dynamo calls the graph that it has for another layer, whose Parameters are other arguments."""
    calls: list[nn.Module] = []
    plain, model = (make(BrokenLayers) for _ in range(2))
    for each in (plain, model):
        for layer in each.layers:
            layer.register_forward_hook(lambda module, _, __: calls.append(module))
    wrap_hostile(model, int(weight_bytes(model) * 0.85), swap_dir=tmp_path, capture="graphs", compile=compiled)
    for _ in range(3):
        for call in (lambda m: m(noise(3, 64)), lambda m: m(noise(2, 3, 64))):
            calls.clear()
            expected, result = run(plain, call), run(model, call)
            if compiled == "eager":
                assert_same(result, expected)
            else:
                torch.testing.assert_close(result, expected)
            assert [each.first.weight.data_ptr() for each in calls[7:]] == [
                model.layers[number].first.weight.data_ptr() for number in (0, 1, 2, 1, 3, 4, 0)
            ]
    assert mball.report(model).graphs <= 4


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_static_cache_with_grouped_heads(capture: str, tmp_path: Path) -> None:
    """transformers chooses another attention while it is compiled, unless it is told that mball captures."""
    call = generate("static")
    model = make(lambda: llama(layers=2))
    wrap_hostile(model, int(weight_bytes(model) * 0.7), swap_dir=tmp_path, capture=capture)
    assert_same(run(model, call), run(make(lambda: llama(layers=2)), call))
    assert_streamed(model)


class LastToken(nn.Module):
    """Scores the last token only: a batch of rows that cannot be seen as one matrix without a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(576, 576, bias=False)
        self.scores = nn.Linear(576, 4096, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(self.inner(x)[:, -1:])


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_kernels_chosen_by_requires_grad(capture: str, tmp_path: Path) -> None:
    """ATen folds such a batch when the weight requires grad, even under no_grad, and the last bits tell."""
    x = noise(1, 32, 576).bfloat16()
    plain, model = (make(lambda: LastToken().bfloat16()) for _ in range(2))
    folded = run(plain, lambda m: m(x))
    wrap_hostile(model, int(weight_bytes(model) * 0.98), swap_dir=tmp_path, capture=capture)
    for flag in (True, False, True):
        plain.requires_grad_(flag)
        model.requires_grad_(flag)
        for _ in range(2):
            assert_same(run(model, lambda m: m(x)), run(plain, lambda m: m(x)), f"requires_grad={flag}")
    plain.requires_grad_(False)
    if torch.equal(run(plain, lambda m: m(x)), folded):
        pytest.skip("this CPU's kernels do not tell them apart")
