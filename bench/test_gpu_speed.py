"""Streaming a Llama of 8 B parameters to a GPU: against the copies alone, and against itself where it fits.

What is compared is in `bench/gpu/streaming.py`. A target that is missed does not fail the bench. Parts are in the order
in which they should not be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.gpu import streaming
from bench.gpu.keep import PEERS, SPEED, Book
from bench.gpu.limit import Limit
from bench.gpu.streaming import Scale
from bench.gpu.ways import Way
from bench.results import Measurement
from bench.speed.model import LLAMA_8B, make_checkpoint
from bench.speed.rounds import Say
from bench.speed.workload import Kind

# Beyond the limit of the rounds: loading, and what is under way when the limit comes.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(150)]

Keep = Callable[[Book, Sequence[Measurement]], None]
Allot = Callable[[float], Limit]


@pytest.fixture(scope="module")
def scale(request: pytest.FixtureRequest, say: Say) -> Scale:
    folder = request.config.getoption("--model-dir")
    say("the model of 16 GB is written unless it is there")
    return Scale(checkpoint=make_checkpoint(LLAMA_8B, Path(folder) if folder else None, quick=True))


def _decode(percent: int, scale: Scale, say: Say, gpu_time: Allot, benchmark: BenchmarkFixture, kept: Keep) -> None:
    limit = gpu_time(70)
    kept(SPEED, benchmark.pedantic(streaming.decode, args=(scale, percent, limit, say), rounds=1))


def test_decode_50(scale: Scale, say: Say, gpu_time: Allot, benchmark: BenchmarkFixture, kept: Keep) -> None:
    _decode(50, scale, say, gpu_time, benchmark, kept)


def test_peers(scale: Scale, say: Say, gpu_time: Allot, benchmark: BenchmarkFixture, kept: Keep) -> None:
    limit = gpu_time(70)
    kept(PEERS, benchmark.pedantic(streaming.peers, args=(scale, 50, limit, say), rounds=1))


@pytest.mark.parametrize("kind", [Kind.DECODE, Kind.PREFILL], ids=lambda kind: kind.value)
def test_group_offload(
    kind: Kind, scale: Scale, say: Say, gpu_time: Allot, benchmark: BenchmarkFixture, kept: Keep
) -> None:
    limit = gpu_time(60)
    kept(PEERS, benchmark.pedantic(streaming.group_offload, args=(scale, kind, limit, say), rounds=1))


def test_fits(scale: Scale, say: Say, gpu_time: Allot, benchmark: BenchmarkFixture, kept: Keep) -> None:
    limit = gpu_time(60)
    kept(SPEED, benchmark.pedantic(streaming.fits, args=(scale, Way.PLAIN, limit, say), rounds=1))


def test_decode_with_graphs(scale: Scale, say: Say, gpu_time: Allot, benchmark: BenchmarkFixture, kept: Keep) -> None:
    limit, steps = gpu_time(100), {"steps": Way.GRAPHS}
    kept(SPEED, benchmark.pedantic(streaming.decode, args=(scale, 50, limit, say), kwargs=steps, rounds=1))


def test_prefill(scale: Scale, say: Say, gpu_time: Allot, benchmark: BenchmarkFixture, kept: Keep) -> None:
    limit = gpu_time(70)
    kept(SPEED, benchmark.pedantic(streaming.prefill, args=(scale, 50, limit, say), rounds=1))


@pytest.mark.parametrize("percent", [25, 75])
def test_decode(percent: int, scale: Scale, say: Say, gpu_time: Allot, benchmark: BenchmarkFixture, kept: Keep) -> None:
    _decode(percent, scale, say, gpu_time, benchmark, kept)


@pytest.mark.parametrize("other", [Way.GRAPHS, Way.COMPILED], ids=lambda way: way.value)
def test_fits_compiled(
    other: Way, scale: Scale, say: Say, gpu_time: Allot, benchmark: BenchmarkFixture, kept: Keep
) -> None:
    """Last: compiling takes a minute by itself."""
    limit = gpu_time(110)
    kept(SPEED, benchmark.pedantic(streaming.fits, args=(scale, other, limit, say), rounds=1))
