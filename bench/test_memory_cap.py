"""A model of 1.56 GiB under a budget, in a process that the kernel caps: see tests/run/memory_proof.py.

The cap is base + budget + 5 %. The base is the process's anonymous memory after a two-layer model of the same
kind was run and dropped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.findings import Findings, Heading
from bench.results import Device, Measurement, Topic
from mball.units import MIB
from tests.run import memory_proof as proof
from tests.run.cgroup import MemoryGroup, NoCgroupError
from tests.run.memory_proof import Outcome
from tests.run.test_memory_proof import assert_proves

HEADING = Heading(
    name="memory-cap",
    topic=Topic.MEMORY_CAP,
    device=Device.CPU,
    headline="{weights} of weights ran in {budget}; anonymous memory grew by {peak_growth}, cap {allowed}",
)

BUDGET_BYTES = 640 * MIB


@pytest.mark.timeout(1200)
def test_capped(tmp_path: Path, benchmark: BenchmarkFixture, findings: Findings) -> None:
    """One run is the proof; its control, the same model without mball, must be killed at the same limit."""
    try:
        MemoryGroup.create(f"mball-bench-{os.getpid()}").remove()
    except NoCgroupError as error:
        pytest.skip(str(error))
    checkpoints = proof.write_checkpoints(tmp_path, proof.LARGE)
    try:
        reference = proof.unwrapped(checkpoints)
        outcome: Outcome = benchmark.pedantic(proof.capped, args=(checkpoints, BUDGET_BYTES), rounds=1)
        assert_proves(outcome, reference, BUDGET_BYTES)
        limited, done = outcome.events["limited"], outcome.events["done"]
        assert proof.unwrapped_capped(checkpoints, limited["limit_bytes"]).killed_at_limit
    finally:
        for path in tmp_path.glob("*/*"):
            path.unlink()
    for name, value, description, compared_with in (
        ("weights", done["report"]["weight_bytes"], "all weights of the model, bfloat16", None),
        ("budget", BUDGET_BYTES, "the budget", None),
        ("base", limited["base_bytes"], "anonymous memory when the limit was set", None),
        ("allowed", limited["limit_bytes"] - limited["base_bytes"], "the kernel's limit beyond the base", "budget"),
        ("peak_growth", done["peak_growth_bytes"], "anonymous memory beyond the base, sampled every 10 ms", "allowed"),
        ("peak_pss", done["peak_pss_bytes"], "largest PSS of the process, mapped files included", None),
        ("capture", done["capture_bytes"], "anonymous memory beside arena and buffers after the run", None),
        ("read", done["report"]["bytes_read"], "bytes read from the checkpoint", None),
    ):
        findings.add(Measurement.of(name, [value], unit="bytes", description=description, compared_with=compared_with))
    findings.add(
        Measurement.of(
            "generate", [done["generate_s"]], unit="s",
            description="32 prompt tokens, 12 new ones, graphs captured", compared_with="plain_generate",
        ),
        Measurement.of(
            "plain_generate", [reference.events["done"]["generate_s"]], unit="s",
            description="the same by transformers alone, without a limit",
        ),
    )  # fmt: skip
