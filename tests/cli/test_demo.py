"""The demo on a tiny model; with the real one it is slow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from mball.cli import demo, smollm2  # noqa: E402

WORDS = ["<pad>", "<end>", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama with random weights and a tokenizer of letters, where the demo looks for its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(WORDS), tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    directory = tmp_path / "cache" / "mball" / smollm2.NAME
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    fast.save_pretrained(directory)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return directory


def test_same_answer_and_both_measured(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run_demo(budget="400KiB", prompt="why", max_new_tokens=8) == 0
    output = capsys.readouterr().out
    assert "identical: both answered with the same" in output
    for shown in ("dequantised Q4_1", "tokens/s", "growth of the process", "budget"):
        assert shown in output
    assert "Report(" not in output, "a report for people"


def test_another_answer_fails(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = demo.ask_unwrapped

    def lie(*arguments: Any) -> dict[str, Any]:
        result = honest(*arguments)
        result["token_ids"][-1] += 1
        return result

    monkeypatch.setattr(demo, "ask_unwrapped", lie)
    assert demo.run_demo(budget="400KiB", prompt="why", max_new_tokens=4) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_the_yardstick_does_not_import_mball(checkpoint: Path) -> None:
    program = Path(demo.__file__).with_name("plain_answer.py")
    finished = subprocess.run(
        [sys.executable, "-P", str(program), str(checkpoint), "why", "4"], capture_output=True, text=True, check=True
    )
    result = json.loads(finished.stdout)
    assert result["mball_imported"] is False
    assert 1 <= len(result["token_ids"]) <= 4
    assert result["peak_bytes"] > 0


@pytest.mark.slow
def test_the_real_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        smollm2.find_gguf()
    except smollm2.CheckpointError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.run_demo(budget="80MiB", prompt="Why is the sky blue?", max_new_tokens=16) == 0
    assert "sky" in capsys.readouterr().out
