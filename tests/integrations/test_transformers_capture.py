"""A model of transformers is captured whole, and decides by the values of its masks as if it were not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

pytest.importorskip("transformers")

import mball
from tests.run.harness import assert_same, assert_streamed, make, run, weight_bytes, wrap_hostile
from tests.run.zoo import ZOO, bert, generate, ids, llama, t5

pytestmark = pytest.mark.usefixtures("new_dynamo")


def gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        max_position_embeddings=128,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0,
        eos_token_id=None,
    )
    return Gemma3ForCausalLM(config)


def masked(*padding: int) -> Callable[[Any], Any]:
    """Returns a call with this many places of padding on the left of each row of 7."""
    mask = torch.ones(len(padding), 7, dtype=torch.long)
    for row, count in zip(mask, padding, strict=True):
        row[:count] = 0
    return lambda model: model(ids(len(padding), 7), attention_mask=mask)[0]


def encoded(*padding: int) -> Callable[[Any], Any]:
    """Returns a call of an encoder and a decoder with this many places of padding on the right of each row of 7."""
    mask = torch.ones(len(padding), 7, dtype=torch.long)
    for row, count in zip(mask, padding, strict=True):
        row[7 - count :] = 0
    return lambda model: model(input_ids=ids(2, 7), attention_mask=mask, decoder_input_ids=ids(2, 4), use_cache=False)[
        0
    ]


def at(*positions: int) -> Callable[[Any], Any]:
    """Returns a call without a cache and without a mask, with tokens at these positions."""
    where = torch.tensor([positions])
    return lambda model: model(ids(1, len(positions)), position_ids=where, use_cache=False)[0]


# A model, calls of it, and how many answers there are among them.
CASES = {
    "llama": (llama, [masked(0, 0), masked(0, 3), masked(2, 1)], 2),
    "llama-packed": (llama, [at(0, 1, 2, 3, 4, 5), at(0, 1, 2, 0, 1, 2), at(0, 1, 0, 1, 2, 3)], 2),
    "gemma3": (gemma3, [masked(0, 0), masked(0, 3), masked(2, 1)], 2),
    "bert": (bert, [masked(0, 0), masked(0, 3), masked(2, 1)], 2),
    "t5": (t5, [encoded(0, 0), encoded(0, 3), encoded(2, 1)], 2),
}


@pytest.mark.parametrize("name", CASES)
def test_each_answer_of_a_mask_is_one_graph(name: str, tmp_path: Path) -> None:
    factory, calls, num_answers = CASES[name]
    plain, model = make(factory), make(factory)
    wrap_hostile(model, int(weight_bytes(model) * 0.7), swap_dir=tmp_path)
    for attempt in range(3):
        for number, call in enumerate(calls):
            assert_same(run(model, call), run(plain, call), f"attempt {attempt}, call {number}")
            assert_streamed(model)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == num_answers
    # Where a cache is returned, code that Dynamo wrote may read the configuration: up to two frames without a graph.
    assert counters["frames"]["total"] <= num_answers + 2
    assert mball.report(model).graphs == num_answers
    mball.unwrap(model)


@pytest.mark.parametrize("name", ["llama-bf16-dynamic-cache", "llama-tied-static-cache", "t5", "whisper"])
def test_no_graph_of_a_loop_of_tokens_breaks(name: str, tmp_path: Path) -> None:
    model = make(ZOO[name].make)
    wrap_hostile(model, int(weight_bytes(model) * ZOO[name].budget), swap_dir=tmp_path)
    for _ in range(2):
        run(model, ZOO[name].runs[0])
    assert not counters["graph_break"]
    # The prompt (of an encoder: what it makes), a token, and a token with any number before it.
    assert counters["frames"]["total"] <= 3
    mball.unwrap(model)


def test_fullgraph_holds(tmp_path: Path) -> None:
    plain, model = make(llama), make(llama)
    wrap_hostile(model, int(weight_bytes(model) * 0.7), swap_dir=tmp_path, fullgraph=True)
    for call in (masked(0, 0), masked(0, 3), masked(0, 0), generate("dynamic")):
        assert_same(run(model, call), run(plain, call))
    mball.unwrap(model)
