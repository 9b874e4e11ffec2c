"""SmolLM2-135M-Instruct under 130 MiB: its logits are those of the unwrapped model, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import mball
from bench.findings import Findings, Heading
from bench.results import Device, Measurement, Topic
from mball.cli import smollm2
from mball.config import cache_directory
from mball.units import MIB

HEADING = Heading(
    name="real-model",
    topic=Topic.EQUALITY,
    device=Device.CPU,
    headline="{dynamic} of SmolLM2 have the same bits with a dynamic cache, {static} with a static one",
)

BUDGET_BYTES = 130 * MIB
NUM_NEW_TOKENS = 12


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return smollm2.converted_checkpoint(cache_directory()) or smollm2.convert(cache_directory())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_logits(cache: str, checkpoint: Path, benchmark: BenchmarkFixture, findings: Findings) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mball.integrations.transformers import from_pretrained

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    prompt = tokenizer("The three primary colours are", return_tensors="pt")
    settings = {"cache_implementation": "static"} if cache == "static" else {}

    def generate(model: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            result = model.generate(
                **prompt,
                **settings,
                max_new_tokens=NUM_NEW_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                disable_compile=True,
                pad_token_id=tokenizer.pad_token_id,
            )
        logits: list[torch.Tensor] = list(result.logits)
        return logits

    plain = AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True).eval()
    expected = generate(plain)
    model = from_pretrained(checkpoint, budget=BUDGET_BYTES)
    got = benchmark.pedantic(generate, args=(model,), rounds=1)
    report = mball.report(model)
    assert report.weights_managed == report.weights_owned
    assert report.bytes_read_last_pass > 0
    assert len(got) == len(expected) == NUM_NEW_TOKENS
    same = sum(a.numel() for a, b in zip(got, expected, strict=True) if torch.equal(a, b))
    assert same == sum(logits.numel() for logits in expected)
    findings.add(
        Measurement.of(
            cache, [same], unit="logits", compared_with="the unwrapped model in eager mode",
            description=f"logits of {NUM_NEW_TOKENS} tokens that have the same bits, budget 130 MiB of 257 MiB",
        )
    )  # fmt: skip
