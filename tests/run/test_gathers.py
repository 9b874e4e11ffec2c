"""A table of which rows are looked up is read where it lies, unless it is in the arena; the numbers are the same."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mball
from mball.api import trace_and_plan
from mball.errors import BudgetError, StorageError
from mball.units import MIB
from tests.run.harness import assert_same, assert_streamed, engine_of, make, run, weight_bytes, wrap_hostile
from tests.run.zoo import ids, llama, logits
from tests.storage.swaps import flip

VOCABULARY = 8192
ROW_BYTES = 128 * 4
TABLE_BYTES = VOCABULARY * ROW_BYTES


class Reader(nn.Module):
    """An embedding, and layers that are smaller than it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 128)
        self.layers = nn.ModuleList(nn.Linear(128, 512) for _ in range(6))
        self.back = nn.ModuleList(nn.Linear(512, 128) for _ in range(6))

    def look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.look_up(tokens)
        for layer, back in zip(self.layers, self.back, strict=True):
            x = x + back(layer(x).relu())
        return x


class ByIndex(Reader):
    def look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table.weight[tokens - 5] + self.table.weight.index_select(0, tokens[0])


class ByBag(Reader):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCABULARY, 128, mode="sum")

    def look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens) + self.bag(tokens)[:, None]


class ByMaximum(Reader):
    """Rows are looked up, and the table is read as a whole in the same step."""

    def look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens) + self.table.weight.amax(0)


def tokens(*shape: int, seed: int = 7) -> torch.Tensor:
    return ids(*shape, vocabulary=VOCABULARY, seed=seed)


def is_at_home(model: nn.Module, name: str = "table.weight") -> bool:
    """Whether the plan has no place for the table, and the last pass brought none of it to the arena."""
    trace, plan = trace_and_plan(model)
    (weight,) = (number for number, tensor in enumerate(trace.tensors) if tensor.name == name)
    (bundle,) = (number for number, bundle in enumerate(plan.bundles) if weight in bundle.tensors)
    moved = {placement.bundle for placement in plan.residents} | {transfer.bundle for transfer in plan.transfers}
    occupants = engine_of(model).execution._occupants
    assert (bundle in moved) == (bundle in occupants)
    return bundle not in moved


CAPTURES: dict[str, dict[str, Any]] = {
    "graphs": {"capture": "graphs"},
    "operators": {"capture": "operators"},
}


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("make_model", [Reader, ByIndex, ByBag])
def test_a_table_is_not_read_whole(make_model: Callable[[], nn.Module], capture: str, tmp_path: Path) -> None:
    plain, model = make(make_model), make(make_model)
    wrap_hostile(model, 2 * MIB, swap_dir=tmp_path, **CAPTURES[capture])
    tables = [module for module in plain.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    layers_bytes = weight_bytes(model) - TABLE_BYTES * len(tables)
    for seed in range(5):
        asked = tokens(2, 9, seed=seed)
        assert_same(run(model, lambda m, a=asked: m(a)), run(plain, lambda m, a=asked: m(a)))
        report = assert_streamed(model)
        assert is_at_home(model)
    assert report.weights_read == report.weights_managed
    # Layers come once at most, in whole pages, and each row that is looked up touches a page or two.
    assert report.bytes_read_last_pass < layers_bytes + 24 * 2 * 4096 + 2 * 18 * 2 * 4096
    assert (report.graphs > 0) == (capture == "graphs")
    assert report.unplanned_fetches == 0


@pytest.mark.parametrize("capture", CAPTURES)
def test_all_that_is_read_at_home_is_counted_and_given_back(capture: str, tmp_path: Path) -> None:
    model = make(Reader)
    wrap_hostile(model, weight_bytes(model) - MIB, swap_dir=tmp_path, **CAPTURES[capture])
    for _ in range(4):
        run(model, lambda m: m(tokens(1, 3)))
    homes = engine_of(model).homes
    before = mball.report(model).bytes_read
    # Rows 0 to 7 are one page: the home begins on one. Row 16 is on the third.
    run(model, lambda m: m(torch.tensor([[0, 7, 7], [3, 0, 16]])))
    assert mball.report(model).bytes_read - before == 2 * 4096
    assert homes.touched_bytes() == 0, "pages of the home stay in memory"


def test_a_long_prompt_reads_the_table_whole(tmp_path: Path) -> None:
    plain, model = make(Reader), make(Reader)
    wrap_hostile(model, TABLE_BYTES + 3 * MIB, swap_dir=tmp_path)
    few, many = tokens(1, 9), tokens(1, 300)
    for asked, at_home in ((few, True), (many, False), (few, True), (many, False)):
        for _ in range(2):
            assert_same(run(model, lambda m, a=asked: m(a)), run(plain, lambda m, a=asked: m(a)))
            assert mball.report(model).in_place_bytes == 0
        assert is_at_home(model) == at_home


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_table_that_is_read_otherwise_too_comes_whole(capture: str, tmp_path: Path) -> None:
    plain, model = make(ByMaximum), make(ByMaximum)
    wrap_hostile(model, TABLE_BYTES + 2 * MIB, swap_dir=tmp_path, **CAPTURES[capture])
    for seed in range(3):
        asked = tokens(2, 5, seed=seed)
        assert_same(run(model, lambda m, a=asked: m(a)), run(plain, lambda m, a=asked: m(a)))
        assert_streamed(model)
    assert not is_at_home(model)


def test_a_table_that_a_lookup_writes_comes_whole(tmp_path: Path) -> None:
    """With `max_norm` rows are made shorter where they lie."""

    def renormed() -> nn.Module:
        model = Reader()
        model.table = nn.Embedding(VOCABULARY, 128, max_norm=1.0)
        return model

    plain, model = make(renormed), make(renormed)
    with pytest.raises(BudgetError):
        wrap_hostile(model, 2 * MIB, swap_dir=tmp_path, capture="operators")
    wrap_hostile(model, TABLE_BYTES + 2 * MIB, swap_dir=tmp_path, capture="operators")
    for seed in range(3):
        asked = tokens(2, 5, seed=seed)
        assert_same(run(model, lambda m, a=asked: m(a)), run(plain, lambda m, a=asked: m(a)))
    assert_same(model.table.weight.detach(), plain.table.weight.detach())


@pytest.mark.parametrize("capture", CAPTURES)
def test_the_smallest_budget_has_no_room_for_the_table(capture: str, tmp_path: Path) -> None:
    plain, model = make(Reader), make(Reader)
    with pytest.raises(BudgetError) as refused:
        mball.wrap(model, 4096, swap_dir=tmp_path, **CAPTURES[capture])
    assert refused.value.smallest_bytes < MIB
    wrap_hostile(model, MIB, swap_dir=tmp_path, **CAPTURES[capture])
    assert_same(run(model, lambda m: m(tokens(1, 4))), run(plain, lambda m: m(tokens(1, 4))))


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model(tied: bool, capture: str, tmp_path: Path) -> None:
    def make_model() -> nn.Module:
        return llama(layers=3, tied=tied, vocabulary=4096, dtype=torch.bfloat16)

    plain, model = make(make_model), make(make_model)
    # Less than all but the table takes: the rest is streamed.
    budget = int(weight_bytes(model) * (0.7 if tied else 0.5))
    wrap_hostile(model, budget, swap_dir=tmp_path, **CAPTURES[capture])
    for _ in range(3):
        for shape in ((1, 9), (2, 3), (1, 1)):
            assert_same(run(model, logits(*shape)), run(plain, logits(*shape)))
            report = assert_streamed(model)
    trace, _ = trace_and_plan(model)
    gathered = {gather.tensor for step in trace.steps for gather in step.gathers}
    assert [trace.tensors[weight].name for weight in gathered] == ["model.embed_tokens.weight"]
    if not tied:
        assert is_at_home(model, "model.embed_tokens.weight")
    assert report.weights_read == report.weights_managed


@pytest.mark.parametrize("make_model", [Reader, ByIndex, ByBag])
def test_compiled_steps_look_up_rows_at_home(make_model: Callable[[], nn.Module], tmp_path: Path) -> None:
    streamed, resident = make(make_model), make(make_model)
    settings: dict[str, Any] = {"compile": "inductor", "step_bytes": MIB // 2, "swap_dir": tmp_path}
    wrap_hostile(streamed, 2 * MIB, **settings)
    mball.wrap(resident, budget="1GiB", **settings)
    for seed in range(4):
        asked = tokens(2, 9, seed=seed)
        assert_same(run(streamed, lambda m, a=asked: m(a)), run(resident, lambda m, a=asked: m(a)))
        report = assert_streamed(streamed)
        assert is_at_home(streamed)
    assert report.bytes_read_last_pass < weight_bytes(streamed) - TABLE_BYTES + MIB
    assert report.unplanned_fetches == 0
    assert not is_at_home(resident)


def test_a_compiled_language_model(tmp_path: Path) -> None:
    def make_model() -> nn.Module:
        return llama(layers=3, tied=True, vocabulary=4096)

    streamed, resident = make(make_model), make(make_model)
    size = weight_bytes(streamed)
    settings: dict[str, Any] = {"compile": "inductor", "step_bytes": size // 4, "swap_dir": tmp_path}
    wrap_hostile(streamed, int(size * 0.8), **settings)
    mball.wrap(resident, budget="1GiB", **settings)
    for _ in range(3):
        for shape in ((1, 9), (1, 1)):
            assert_same(run(streamed, logits(*shape)), run(resident, logits(*shape)))
            assert_streamed(streamed)
    trace, _ = trace_and_plan(streamed)
    gathered = {gather.tensor for step in trace.steps for gather in step.gathers}
    assert [trace.tensors[weight].name for weight in gathered] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_table_in_a_checkpoint(capture: str, tmp_path: Path) -> None:
    plain, model = make(Reader), make(Reader)
    path = tmp_path / "model.safetensors"
    save_file(plain.state_dict(), path)
    wrap_hostile(model, 2 * MIB, path, swap_dir=tmp_path, **CAPTURES[capture])
    for seed in range(4):
        with path.open("rb") as file:  # cold
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        asked = tokens(2, 40, seed=seed)
        assert_same(run(model, lambda m, a=asked: m(a)), run(plain, lambda m, a=asked: m(a)))
        assert_streamed(model)
        assert is_at_home(model)


def write_row(model: nn.Module) -> None:
    model.table.weight.data[11] = 2.5


def write_numpy(model: nn.Module) -> None:
    model.table.weight.detach().numpy()[7:12] *= 3


def step_adam(model: nn.Module) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.5 + number)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


def step_sparse(model: nn.Module) -> None:
    rows = torch.tensor([[3, 11, 700]])
    model.table.weight.grad = torch.sparse_coo_tensor(rows, torch.ones(3, 128), (VOCABULARY, 128))
    torch.optim.SparseAdam([model.table.weight], lr=0.1).step()


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("from_checkpoint", [False, True])
@pytest.mark.parametrize("write", [write_row, write_numpy, step_adam, step_sparse])
def test_rows_that_were_written_are_read(
    write: Callable[[nn.Module], None], from_checkpoint: bool, capture: str, tmp_path: Path
) -> None:
    plain, model = make(Reader), make(Reader)
    path = tmp_path / "model.safetensors"
    save_file(plain.state_dict(), path)
    wrap_hostile(model, 2 * MIB, path if from_checkpoint else None, swap_dir=tmp_path, **CAPTURES[capture])
    asked = torch.tensor([[3, 7, 8, 11, 12, 700]])
    for attempt in range(4):
        assert_same(run(model, lambda m: m(asked)), run(plain, lambda m: m(asked)), f"attempt {attempt}")
        assert_streamed(model)
        for each in (model, plain):
            write(each)
    assert_same(model.table.weight.detach(), plain.table.weight.detach())


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_row_that_is_written_in_the_middle_of_a_pass_is_read_there(capture: str, tmp_path: Path) -> None:
    class Writes(Reader):
        @torch._dynamo.disable
        def change(self) -> None:
            self.table.weight.data[11] += 1

        def look_up(self, tokens: torch.Tensor) -> torch.Tensor:
            before = self.table(tokens)
            self.change()
            return before + self.table(tokens)

    plain, model = make(Writes), make(Writes)
    wrap_hostile(model, 2 * MIB, swap_dir=tmp_path, **CAPTURES[capture])
    asked = torch.tensor([[3, 10, 11, 12]])
    for attempt in range(4):
        assert_same(run(model, lambda m: m(asked)), run(plain, lambda m: m(asked)), f"attempt {attempt}")
    assert_same(model.table.weight.detach(), plain.table.weight.detach())


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("is_hostile", [False, True])
def test_a_table_is_read_in_the_arena_where_all_fits(
    is_hostile: bool, capture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, model = make(Reader), make(Reader)
    wrap = wrap_hostile if is_hostile else mball.wrap
    wrap(model, 2 * MIB, swap_dir=tmp_path, **CAPTURES[capture])

    def check(seed: int = 0) -> mball.Report:
        asked = tokens(2, 5, seed=seed)
        assert_same(run(model, lambda m: m(asked)), run(plain, lambda m: m(asked)))
        return mball.report(model)

    for _ in range(3):
        check()
    assert is_at_home(model)
    for seed in range(3):
        mball.set_budget(model, 64 * MIB)
        report = check(seed)
        assert not is_at_home(model)
        # Rows are read at home until the table has come; on the hostile device it may never come, as nobody waits.
        until_s = time.monotonic() + 30
        while not is_hostile and report.bytes_read_last_pass and time.monotonic() < until_s:
            report = check(seed)
        assert is_hostile or report.bytes_read_last_pass == 0
        assert report.resident_bytes == report.weight_bytes
        mball.set_budget(model, 2 * MIB)
        with caplog.at_level(logging.WARNING, logger="mball"):
            assert check(seed).in_place_bytes == 0
        assert is_at_home(model)
    assert not [record for record in caplog.records if record.name.startswith("mball")]


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_row_that_does_not_exist_is_refused_as_by_the_model_itself(capture: str, tmp_path: Path) -> None:
    model = make(Reader)
    wrap_hostile(model, 2 * MIB, swap_dir=tmp_path, **CAPTURES[capture])
    for wrong in (VOCABULARY, -1):
        for _ in range(2):
            with pytest.raises((IndexError, RuntimeError), match="index out of range"):
                run(model, lambda m, w=wrong: m(torch.tensor([[1, w]])))
    assert_same(run(model, lambda m: m(tokens(1, 4))), run(make(Reader), lambda m: m(tokens(1, 4))))


def test_rows_are_brought_by_the_pages_that_hold_them(tmp_path: Path) -> None:
    model = make(Reader)
    wrap_hostile(model, 2 * MIB, swap_dir=tmp_path)
    homes = engine_of(model).homes
    (weight,) = (number for number, home in enumerate(homes.homes) if home.name == "table.weight")
    assert homes.homes[weight].offset_bytes % 4096 == 0
    rows_a_page = 4096 // ROW_BYTES
    for rows, pages in (
        ([], 0),
        ([0, 1, rows_a_page - 1], 1),
        ([rows_a_page, 0], 2),
        ([-1, VOCABULARY - 2, 3], 2),
        ([VOCABULARY, -VOCABULARY - 1, 5], 1),
        (range(VOCABULARY), VOCABULARY // rows_a_page),
    ):
        indices = torch.tensor(list(rows), dtype=torch.int32).reshape(-1, 1)
        assert homes.prefetch_rows(weight, indices) == pages * 4096, rows


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize(("check", "is_written"), [("first", False), ("first", True), ("off", False)])
def test_rows_of_damaged_swap_are_not_computed_with(check: str, is_written: bool, capture: str, tmp_path: Path) -> None:
    """Also of a table that was mapped from a checkpoint and written to since; other rows are looked up as before."""
    plain, model = make(Reader), make(Reader)
    path = tmp_path / "model.safetensors"
    save_file(plain.state_dict(), path)
    weights = path if is_written else None
    wrap_hostile(model, 2 * MIB, weights, swap_dir=tmp_path, swap_check=check, **CAPTURES[capture])
    right, damaged = torch.tensor([[3, 5]]), torch.tensor([[3, 4000]])
    for _ in range(2):
        if is_written:
            for each in (model, plain):
                each.table.weight.data[3990:4010] += 1
        assert_same(run(model, lambda m: m(right)), run(plain, lambda m: m(right)))
        assert is_at_home(model)
    homes = engine_of(model).homes
    (weight,) = (number for number, home in enumerate(homes.homes) if home.name == "table.weight")
    (place,) = (
        piece.offset_bytes + at - piece.shift_bytes
        for piece in homes.pieces(weight)
        if piece.shift_bytes <= (at := 4000 * ROW_BYTES) < piece.shift_bytes + piece.size_bytes
    )
    flip(homes.swap, place)
    if check == "off":
        run(model, lambda m: m(damaged))
        return
    for _ in range(2):
        with pytest.raises(StorageError, match=rf"of {homes.swap.name} in .* are not what was written there"):
            run(model, lambda m: m(damaged))
        assert homes.touched_bytes() == 0
        assert_same(run(model, lambda m: m(right)), run(plain, lambda m: m(right)))
    flip(homes.swap, place)
    assert_same(run(model, lambda m: m(damaged)), run(plain, lambda m: m(damaged)))


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_lookup_that_fails_leaves_nothing_at_home(capture: str, tmp_path: Path) -> None:
    plain, model = make(Reader), make(Reader)
    wrap_hostile(model, 2 * MIB, swap_dir=tmp_path, **CAPTURES[capture])
    asked = tokens(2, 9)
    for _ in range(2):
        run(model, lambda m: m(asked))
    wrong = asked.clone()
    wrong[-1, -1] = VOCABULARY
    with pytest.raises(IndexError):
        run(model, lambda m: m(wrong))
    assert engine_of(model).homes.touched_bytes() == 0
    assert_same(run(model, lambda m: m(asked)), run(plain, lambda m: m(asked)))
