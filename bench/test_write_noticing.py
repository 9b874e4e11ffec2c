"""What it costs to notice writes to weights: the scan alone, its share of a pass, and a pass after a write.

Homes are written by whoever likes, so each pass begins by asking the kernel which pages were (`Homes.collect_writes`).
The model is a Llama with random bfloat16 weights that begin in a checkpoint, under a budget of half of them.
All figures come from the same process; samples that are compared are interleaved.
"""

from __future__ import annotations

import copy
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from safetensors.torch import save_file
from torch import nn

import mball
from bench.findings import Findings, Heading
from bench.results import Device, Measurement, Topic
from mball.memory.mapping import scan_written
from mball.run.home_sources import map_homes
from mball.run.homes import Homes
from mball.storage import SwapFile
from mball.units import GIB, MIB, format_bytes
from tests.run.harness import assert_same, assert_streamed, engine_of, run, weight_bytes

HEADING = Heading(
    name="write-noticing", topic=Topic.WRITES, device=Device.CPU, headline="{share_of_pass} of a pass, nothing written"
)

PAGE_BYTES = 4096
NUM_WRITTEN_PAGES = 1000
SIZES = {"256_mib": GIB // 4, "1_gib": GIB}
STATES = ("untouched", "read", "written")

SCAN_ROUNDS = 30
COLLECT_ROUNDS = 7
# A slow or busy disk gets fewer samples rather than more time.
MIN_PASSES, MAX_PASSES = 7, 20
TIME_S = 6.0


# -- the scan alone ------------------------------------------------------------------------------------------------


class Field:
    """Homes over a sparse file in the page cache, and nothing else: no model, no engine."""

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self.path = directory / "homes"
        self.size_bytes = size_bytes
        with self.path.open("wb") as file:
            file.truncate(size_bytes)
        self.directory = directory
        self.homes: Homes | None = None

    def renew(self, state: str) -> Homes:
        """Returns new homes, 4 MiB each, of which nothing, everything (read) or scattered pages (written) is mapped."""
        if self.homes is not None:
            self.homes.close()
        swap = SwapFile.create(self.directory)
        like = torch.empty(4 * MIB // 2, dtype=torch.bfloat16, device="meta")
        placed = [(f"weight {offset}", offset, like) for offset in range(0, self.size_bytes, 4 * MIB)]
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            home_file, homes = map_homes("checkpoint", descriptor, swap, placed)
        finally:
            os.close(descriptor)
        self.homes = Homes(homes, [home_file], swap)
        pages = home_file.mapping.tensor(0, torch.uint8, (self.size_bytes,)).view(-1, PAGE_BYTES)
        if state == "read":
            pages[:, 0].sum()
        elif state == "written":
            pages[:: len(pages) // NUM_WRITTEN_PAGES, 0][:NUM_WRITTEN_PAGES] = 1
        return self.homes


@pytest.fixture(scope="module", params=list(SIZES))
def field(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Field]]:
    field = Field(tmp_path_factory.mktemp("field"), SIZES[request.param])
    field.renew("read")  # brings the file into the page cache
    yield request.param, field
    if field.homes is not None:
        field.homes.close()
    field.path.unlink()  # and its pages out of the cache


@pytest.mark.parametrize("state", STATES)
def test_scan(field: tuple[str, Field], state: str, benchmark: BenchmarkFixture, findings: Findings) -> None:
    """Which pages were written: the question alone, nothing saved."""
    size, homes = field[0], field[1].renew(state)
    mappings = [file.mapping for file in homes.files]
    expected = NUM_WRITTEN_PAGES if state == "written" else 0
    assert sum(end - first for first, end in scan_written(mappings)[0]) == expected * PAGE_BYTES

    samples: list[float] = []
    benchmark.pedantic(_timed(lambda: scan_written(mappings), samples), rounds=SCAN_ROUNDS, warmup_rounds=2)
    findings.add(
        Measurement.of(
            f"scan_{size}_{state}", samples[-SCAN_ROUNDS:], unit="s",
            description=f"scan_written over homes of {format_bytes(field[1].size_bytes)}, {_what(state)}",
        )
    )  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_collect(field: tuple[str, Field], state: str, benchmark: BenchmarkFixture, findings: Findings) -> None:
    """The whole of what a pass begins with: the scan, saving what was written, giving back what was read."""
    size, ground = field
    homes = ground.renew(state)
    assert len(homes.collect_writes()) == (len(homes) if state == "written" else 0)
    assert homes.collect_writes() == set()
    assert homes.touched_bytes() == 0

    samples: list[float] = []
    collect = _timed(lambda: _of(ground).collect_writes(), samples)
    # Collecting changes what is collected, so each round gets new homes.
    benchmark.pedantic(collect, setup=lambda: _nothing(ground.renew(state)), rounds=COLLECT_ROUNDS)
    findings.add(
        Measurement.of(
            f"collect_{size}_{state}", samples, unit="s",
            description=f"Homes.collect_writes over homes of {format_bytes(ground.size_bytes)}, {_what(state)}",
        )
    )  # fmt: skip


def _what(state: str) -> str:
    return {
        "untouched": "never touched",
        "read": "every page read",
        "written": f"{NUM_WRITTEN_PAGES} scattered pages written",
    }[state]


def _of(field: Field) -> Homes:
    assert field.homes is not None
    return field.homes


def _nothing(_: object) -> None:
    """pytest-benchmark takes what a setup returns for arguments."""


def _timed(function: Callable[[], Any], samples: list[float]) -> Callable[[], Any]:
    def timed() -> Any:
        began_s = time.perf_counter()
        result = function()
        samples.append(time.perf_counter() - began_s)
        return result

    return timed


# -- in a pass -----------------------------------------------------------------------------------------------------


def llama() -> nn.Module:
    """8 layers of 13.5 MiB and two embeddings of 6 MiB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=4096,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


TOKENS = torch.tensor([[17]])


def forward(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=TOKENS).logits
    return logits


def write_layer(model: Any) -> None:
    """Writes every weight of a layer, as an optimizer would."""
    with torch.no_grad():
        for parameter in model.model.layers[5].parameters():
            parameter.mul_(1.0078125)


class Bench:
    """The same model three times: unwrapped, wrapped and left alone, wrapped and written to."""

    def __init__(self, directory: Path) -> None:
        self.plain = llama()
        checkpoint = directory / "model.safetensors"
        save_file(self.plain.state_dict(), checkpoint)
        self.quiet, self.written = (self._wrap(checkpoint, directory) for _ in range(2))

    def _wrap(self, checkpoint: Path, directory: Path) -> nn.Module:
        model = copy.deepcopy(self.plain)
        mball.wrap(model, weight_bytes(model) // 2, weights=checkpoint, swap_dir=directory)
        return model

    def rounds(self, passes_a_round: int) -> int:
        """Returns how many rounds of that many passes fit into the time there is."""
        usual_s = statistics.median(self.pass_s(self.quiet) for _ in range(5))
        return min(max(int(TIME_S / (usual_s * passes_a_round)), MIN_PASSES), MAX_PASSES)

    def pass_s(self, model: nn.Module) -> float:
        """Runs one pass; returns its time."""
        began_s = time.perf_counter()
        run(model, forward)
        return time.perf_counter() - began_s


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    directory = tmp_path_factory.mktemp("llama")
    bench = Bench(directory)
    # The gate: nothing is timed before everything is right.
    expected = run(bench.plain, forward)
    for model in (bench.quiet, bench.written):
        for _ in range(3):
            assert_same(run(model, forward), expected)
            assert_streamed(model)
    yield bench
    for model in (bench.quiet, bench.written):
        mball.unwrap(model)
    (directory / "model.safetensors").unlink()


def test_share_of_a_pass(
    bench: Bench, benchmark: BenchmarkFixture, findings: Findings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written: what the question costs, and how much longer a pass is for asking it."""
    homes = engine_of(bench.quiet).homes
    collect = homes.collect_writes
    collect_s: list[float] = []
    with_s: list[float] = []
    without_s: list[float] = []

    # Which of a pair goes first alternates, so that neither gains by its place.
    order = itertools.cycle((True, False, False, True))

    def choose() -> tuple[tuple[bool], dict[str, Any]]:
        asks = next(order)
        monkeypatch.setattr(homes, "collect_writes", _timed(collect, collect_s) if asks else set)
        return (asks,), {}

    def one_pass(asks: bool) -> None:
        (with_s if asks else without_s).append(bench.pass_s(bench.quiet))

    rounds = bench.rounds(2)
    benchmark.pedantic(one_pass, setup=choose, rounds=2 * rounds)
    if not benchmark.enabled:
        one_pass(*choose()[0])  # then pytest-benchmark ran one round
        rounds = 1
    assert len(collect_s) == len(with_s) == len(without_s) == rounds
    assert_streamed(bench.quiet)
    findings.add(
        Measurement.of("pass_quiet", with_s, unit="s", description="a pass of the Llama, half of it streamed"),
        Measurement.of("collect_in_pass", collect_s, unit="s", description="Homes.collect_writes within that pass"),
        Measurement.of(
            "share_of_pass", [100 * part / whole for part, whole in zip(collect_s, with_s, strict=True)], unit="%",
            description="time of Homes.collect_writes", compared_with="the time of the same pass",
        ),
        Measurement.of(
            "pass_over_pass_without", [a / b for a, b in zip(with_s, without_s, strict=True)], unit="x",
            description="time of a pass", compared_with="a pass beside it, with Homes.collect_writes left out",
        ),
    )  # fmt: skip


def test_pass_after_a_written_layer(bench: Bench, benchmark: BenchmarkFixture, findings: Findings) -> None:
    """One whole layer is written: the pass that saves it, and the next, which finds it in the swap file."""
    quiet_s: list[float] = []
    saving_s: list[float] = []
    after_s: list[float] = []
    moved_bytes = sum(p.nbytes for p in bench.plain.model.layers[5].parameters())  # type: ignore[union-attr,index]
    for _ in range(2):
        write_layer(bench.plain)
        write_layer(bench.written)
        expected = run(bench.plain, forward)
        for _ in range(2):
            assert_same(run(bench.written, forward), expected)
            assert_streamed(bench.written)
    assert mball.report(bench.written).swap_bytes >= moved_bytes

    def quiet_then_write() -> None:
        quiet_s.append(bench.pass_s(bench.quiet))
        write_layer(bench.written)
        saving_s.append(bench.pass_s(bench.written))

    benchmark.pedantic(
        lambda: after_s.append(bench.pass_s(bench.written)), setup=quiet_then_write, rounds=bench.rounds(3)
    )
    findings.add(
        Measurement.of(
            "pass_saving_layer", saving_s, unit="s",
            description=f"a pass that first saves {format_bytes(moved_bytes)}, a layer just written, to the swap file",
        ),
        Measurement.of(
            "pass_after_write", after_s, unit="s", description="the pass after that, which reads the layer from there"
        ),
        Measurement.of(
            "saving_over_quiet", [a / b for a, b in zip(saving_s, quiet_s, strict=True)], unit="x",
            description="time of the pass that saves the layer",
            compared_with="the pass before it, of the same model with nothing written",
        ),
        Measurement.of(
            "after_over_quiet", [a / b for a, b in zip(after_s, quiet_s, strict=True)], unit="x",
            description="time of the pass after it",
            compared_with="the pass two before it, of the same model with nothing written",
        ),
    )  # fmt: skip
