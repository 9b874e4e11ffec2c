"""From loaded imports to the first token of a 2.2 GB Llama in five shards, none of which is in the page cache."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.findings import Findings, Heading
from bench.results import Device, Topic
from bench.speed.first_token import first_token
from bench.speed.model import LARGE, make_checkpoint, make_shards, weight_bytes
from bench.speed.rounds import Say

HEADING = Heading(
    name="first-token",
    topic=Topic.FIRST_TOKEN,
    device=Device.CPU,
    headline="from five shards to the first token of a prompt of 8 in {prompt_8_50_mball_s} with half the weights' "
    "bytes, {prompt_8_50} of transformers' time; of a prompt of 32 {prompt_32_50}; where all fits {prompt_8_110}",
)
NUM_SHARDS = 5
NUM_ROUNDS = 5


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("percent", [50, 110])
@pytest.mark.parametrize("prompt_tokens", [8, 32])
def test_first_token(
    prompt_tokens: int, percent: int, say: Say, benchmark: BenchmarkFixture, findings: Findings
) -> None:
    whole = make_checkpoint(LARGE)
    budget_bytes = weight_bytes(whole) * percent // 100
    prefix = f"prompt_{prompt_tokens}_{percent}"
    arguments = (make_shards(whole, NUM_SHARDS), budget_bytes, prompt_tokens, prefix, NUM_ROUNDS, say)
    findings.add(*benchmark.pedantic(first_token, args=arguments, rounds=1))
