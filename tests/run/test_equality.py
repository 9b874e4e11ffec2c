"""Streamed equals unwrapped, bit for bit, for every kind of model, on a hostile device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mball
from tests.run.harness import assert_same, assert_streamed, make, run, weight_bytes, wrap_hostile
from tests.run.zoo import ZOO, generate, llama


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


def test_static_cache_with_grouped_heads(tmp_path: Path) -> None:
    """transformers itself takes another attention path while it is being compiled.

    So with graphs the result is that of the same model under torch.compile(backend="eager"), and only
    with operators alone it is that of the plain model.
    """
    call = generate("static")
    compiled = make(lambda: llama(layers=2))
    compiled.compile(backend="eager")
    expected = run(compiled, call)
    torch._dynamo.reset()
    model = make(lambda: llama(layers=2))
    wrap_hostile(model, int(weight_bytes(model) * 0.7), swap_dir=tmp_path)
    assert_same(run(model, call), expected)
    assert_streamed(model)
    watched = make(lambda: llama(layers=2))
    wrap_hostile(watched, int(weight_bytes(watched) * 0.7), swap_dir=tmp_path, capture="operators")
    assert_same(run(watched, call), run(make(lambda: llama(layers=2)), call))
    assert_streamed(watched)
