"""The bench of first tokens: what it makes shards of, and a session of a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mball
from bench.speed.child import Child
from bench.speed.contender import ContenderError
from bench.speed.first_token import first_token
from bench.speed.model import SMALL, make_checkpoint, make_shards, weight_bytes
from tests.bench.here import Here


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(SMALL, tmp_path_factory.mktemp("first-token"), quick=True)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.speed.first_token.Contender", Here)


def quiet(text: str) -> None:
    """Shows nothing."""


def test_shards_are_the_same_tensors_in_the_same_order(whole: Path) -> None:
    shards = make_shards(whole, 3)
    assert make_shards(whole, 3) == shards
    sizes = [path.stat().st_size for path in sorted(shards.glob("*.safetensors"))]
    assert len(sizes) == 3
    assert sum(sizes) == pytest.approx(weight_bytes(whole), rel=0.01)
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == weight_bytes(whole)
    one, several = mball.load_file(whole), mball.load_file(shards)
    assert list(one) == list(several)
    for name, tensor in one.items():
        assert torch.equal(several[name].view(torch.uint8), tensor.view(torch.uint8))
    assert [path.name for path in whole.parent.iterdir() if "part" in path.name] == []


def test_a_session(whole: Path) -> None:
    found = first_token(make_shards(whole, 2), weight_bytes(whole) // 2, 4, "prompt_4_50", 2, quiet)
    by_name = {measurement.name: measurement for measurement in found}
    assert {"prompt_4_50", "prompt_4_50_mball_s", "prompt_4_50_transformers_load_s", "prompt_4_50_read_s"} <= set(
        by_name
    )
    assert all(measurement.num_samples in (1, 2) and measurement.median > 0 for measurement in found)
    assert by_name["prompt_4_50_mball_load_s"].median < by_name["prompt_4_50_mball_s"].median


def test_other_tokens_are_noticed(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Child.first_tokens

    def first_tokens(self: Child, prompt_tokens: int, num_tokens: int, **loading: Any) -> dict[str, Any]:
        reply = real(self, prompt_tokens, num_tokens, **loading)
        reply["token_ids"][0] += loading["way"] == "mball"
        return reply

    monkeypatch.setattr(Child, "first_tokens", first_tokens)
    with pytest.raises(ContenderError, match="generates other tokens"):
        first_token(make_shards(whole, 2), weight_bytes(whole) // 2, 4, "prompt_4_50", 1, quiet)
