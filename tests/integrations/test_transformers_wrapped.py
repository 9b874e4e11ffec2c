"""`from_pretrained` with the real engine: logits to the bit, from the checkpoint in place and from swap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import mball  # noqa: E402
from mball.integrations.transformers import from_pretrained  # noqa: E402

SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": True,
}  # fmt: skip
MODELS = {
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)), False),
    "mixtral": (
        lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHAPE, num_local_experts=3)), True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_plain_model(name: str, tmp_path: Path) -> None:
    make, uses_swap = MODELS[name]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path, max_shard_size="500KB")
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    size_bytes = sum(parameter.nbytes for parameter in plain.parameters())
    model = from_pretrained(tmp_path, budget=int(size_bytes * 0.75))
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, 7))
    with torch.no_grad():
        expected = plain(tokens).logits
        for _ in range(3):
            assert torch.equal(model(tokens).logits, expected)
    facts = mball.report(model).as_dict()
    assert facts["weights_managed"] == facts["weights_owned"] == len(list(plain.parameters()))
    assert facts["steps"] > 1
    assert facts["bytes_read_last_pass"] > 0
    assert (facts["swap_bytes"] > 0) is uses_swap
    mball.unwrap(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
