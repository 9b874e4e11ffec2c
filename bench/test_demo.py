"""What `make demo` shows, as a result: SmolLM2 under 80 MiB beside the same model unwrapped, one run of each."""

from __future__ import annotations

import io

from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from bench.findings import Findings, Heading
from bench.results import Device, Measurement, Topic
from mball.cli import smollm2
from mball.cli.demo import ask_unwrapped, ask_wrapped
from mball.config import cache_directory
from mball.units import MIB

HEADING = Heading(
    name="demo",
    topic=Topic.DEMO,
    device=Device.CPU,
    headline="the same {tokens} in {budget} of 257 MiB; {rate}, unwrapped {plain_rate}",
)

BUDGET_BYTES = 80 * MIB
PROMPT = "Why is the sky blue?"
NUM_NEW_TOKENS = 64


def test_answers(benchmark: BenchmarkFixture, findings: Findings) -> None:
    checkpoint = smollm2.converted_checkpoint(cache_directory()) or smollm2.convert(cache_directory())
    console = Console(file=io.StringIO())
    arguments = (console, checkpoint, BUDGET_BYTES, PROMPT, NUM_NEW_TOKENS)
    wrapped, report = benchmark.pedantic(ask_wrapped, args=arguments, rounds=1)
    plain = ask_unwrapped(checkpoint, PROMPT, NUM_NEW_TOKENS)
    assert wrapped["token_ids"] == plain["token_ids"]
    assert report.bytes_read_last_pass > 0
    tokens = len(wrapped["token_ids"])
    for name, value, unit, description in (
        ("tokens", tokens, "tokens", "the same with and without mball"),
        ("budget", BUDGET_BYTES, "bytes", "weights, KV cache and activations"),
        ("peak", wrapped["peak_bytes"], "bytes", "growth of the process (PSS), capture included"),
        ("plain_peak", plain["peak_bytes"], "bytes", "the same unwrapped"),
        ("capture", report.capture_bytes, "bytes", "held by captured graphs, on top of this budget"),
        ("first", wrapped["first_token_s"], "s", "until the first token, capture included"),
        ("plain_first", plain["first_token_s"], "s", "the same unwrapped"),
        ("rate", wrapped["tokens_per_s"], "tokens/s", "of the median token"),
        ("plain_rate", plain["tokens_per_s"], "tokens/s", "the same unwrapped"),
        ("whole", wrapped["total_s"], "s", "the whole answer"),
        ("plain_whole", plain["total_s"], "s", "the same unwrapped"),
    ):
        findings.add(Measurement.of(name, [value], unit=unit, description=description))
