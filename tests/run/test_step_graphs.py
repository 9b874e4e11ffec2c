"""Steps that are recorded and replayed: the bits of steps that are not, whatever moves in between.

Steps are the graphs of basic operators that Inductor would be given, run as they are: it knows no foreign device. What
records them is `tests/foreign/graphs.py`.
"""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mball
from mball.config import Policy
from mball.errors import DeviceError
from mball.run import frame as frames
from mball.run import step_graphs
from mball.run.engine import Engine
from mball.run.frame import Frame
from mball.run.step_graphs import RecordingStage, StepGraphs
from mball.trace import inductor
from tests.foreign import device as foreign
from tests.foreign.graphs import ForeignGraph, ForeignGraphs
from tests.foreign.pieces import as_it_is
from tests.run.harness import assert_same, assert_streamed, engine_of, make, run, weight_bytes
from tests.run.test_elsewhere import wrap_there
from tests.run.there import PLACE, There
from tests.run.zoo import ids, llama, noise

WIDTH = 256
NUM_LAYERS = 4
SPARE_BYTES = 128 << 10
LAYER_BYTES = 4 * WIDTH * WIDTH


@pytest.fixture(autouse=True)
def pieces(foreign: Any, new_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "compile_piece", as_it_is)


class Row(nn.Module):
    """Equal layers, what the first made goes past them; one drops some of it, and one remembers what came last."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS))
        self.dropout = dropout
        self.register_buffer("memory", torch.zeros(4, WIDTH))

    def forward(self, x: torch.Tensor) -> Any:
        first = x = self.layers[0](x).sin()
        for number, layer in enumerate(self.layers[1:], start=1):
            x = x + layer(x).sin()
            if number == 1 and self.dropout:
                x = nn.functional.dropout(x, self.dropout, self.training)
        self.memory[:1].add_(x[:1])
        return x + first, self.memory.sum(), first


def one_layer() -> nn.Module:
    return llama(layers=1)


def generates(cache: str) -> Callable[[Any], Any]:
    def generate(model: Any) -> Any:
        prompt = ids(1, 5)
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
            output_scores=True, return_dict_in_generate=True, cache_implementation=cache, disable_compile=True,
        )[:2]  # fmt: skip

    return generate


class Caches(nn.Module):
    """Each layer writes to a cache of the caller's and reads all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS))

    def forward(self, x: torch.Tensor, cache: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).sin()
            cache.index_copy_(0, place, x)
            x = x + cache.mean(0, keepdim=True)
        return x


class Pair:
    """A model whose steps are recorded and streamed, and another one on the device with all weights there.

    `plain` is not wrapped unless `cut_alike`, for models that basic operators round otherwise.
    """

    def __init__(
        self,
        factory: Callable[[], nn.Module],
        budget_bytes: int,
        directory: Path,
        *,
        cut_alike: bool = False,
        **settings: Any,
    ) -> None:
        settings = {"compile": "inductor", "step_bytes": LAYER_BYTES, "swap_dir": directory, **settings}
        self.plain: Any = make(factory)
        if cut_alike:
            wrap_there(self.plain, 64 << 20, **settings)
        else:
            self.plain.to(PLACE)
        if "options" not in settings:
            settings["mode"] = "reduce-overhead"
        self.model: Any = wrap_there(make(factory), budget_bytes, **settings)
        self.engine = engine_of(self.model)
        self.shared: StepGraphs = self.engine.step_graphs

    @property
    def graphs(self) -> ForeignGraphs:
        recorder = self.shared._graphs
        assert isinstance(recorder, ForeignGraphs)
        return recorder

    def places(self) -> dict[int, list[int]]:
        """Returns where the weights were that each step read last."""
        (frame,) = self.shared._frames.values()
        return {number: [w.data_ptr() for w in step.weights] for number, step in enumerate(frame._steps)}

    def compare(self, call: Callable[[Any], Any], where: str = "") -> Any:
        torch.manual_seed(7)
        expected = run(There(self.plain), call)
        torch.manual_seed(7)
        found = run(There(self.model), call)
        assert_same(found, expected, where)
        return found


def budget_bytes(slots: float) -> int:
    """For so many layers, with room for the rest."""
    return int(slots * LAYER_BYTES) + SPARE_BYTES


def row(directory: Path, *, slots: float = 2.5, **settings: Any) -> Pair:
    return Pair(Row, budget_bytes(slots), directory, **settings)


def steps(seed: int, rows: int = 3) -> Callable[[Any], Any]:
    return lambda model: model(noise(rows, WIDTH, seed=seed))


# -- what is to be right; the mutants below spoil it -----------------------------------------------------------------


def inputs_change(directory: Path) -> None:
    """And what came of earlier calls stays what it was."""
    pair = row(directory)
    kept = []
    for seed in range(9):
        x = noise(3, WIDTH, seed=seed).to(PLACE)
        with torch.no_grad():
            kept.append((pair.model(x), [each.clone() for each in pair.plain(x)]))
    for seed, (found, expected) in enumerate(kept):
        assert_same([each.cpu() for each in found], [each.cpu() for each in expected], f"call {seed}")
    assert_streamed(pair.model)
    assert pair.shared.num_recorded == NUM_LAYERS
    assert pair.graphs.num_replayed > 2 * NUM_LAYERS


def plans_change(directory: Path) -> None:
    """Slots move under the graphs that were recorded."""
    pair = row(directory)
    plan = pair.engine.plans._plan
    found = []
    for policy in (Policy.MBALL, Policy.PREFIX, Policy.LRU, Policy.MBALL):
        pair.engine.plans._plan = partial(plan.func, **{**plan.keywords, "policy": policy})
        pair.engine._plan_anew()
        for seed in range(6):
            pair.compare(steps(seed), f"{policy.value}, call {seed}")
        assert pair.shared.num_recorded == NUM_LAYERS, policy
        assert_streamed(pair.model)
        found.append(pair.places())
    assert any(one != other for one, other in itertools.pairwise(found)), "no weight moved"


def budgets_change(directory: Path) -> None:
    """What is recorded takes part in the budget, and is gone where it has no room."""
    gc.collect()
    pair = row(directory)
    for slots in (2.5, 9, 2):
        mball.set_budget(pair.model, budget_bytes(slots))
        assert pair.shared.num_recorded == 0
        gc.collect()
        held_bytes = foreign.memory_allocated()
        for seed in range(8):  # the last ones with what recording really took
            pair.compare(steps(seed), f"{slots} slots, call {seed}")
        assert pair.shared.num_recorded == NUM_LAYERS
        report = mball.report(pair.model)
        assert report.step_graph_bytes > 0
        assert report.peak_bytes <= report.budget_bytes
        gc.collect()
        taken_bytes = foreign.memory_allocated() - held_bytes - pair.graphs.unshared_bytes
        assert 0 < taken_bytes <= report.step_graph_bytes
    taken_bytes = foreign.memory_allocated()
    pair.shared.grant(0)
    gc.collect()
    assert foreign.memory_allocated() < taken_bytes
    for seed in range(2):
        pair.compare(steps(seed), "without room")
    assert pair.shared.num_recorded == 0


def sizes_change(directory: Path) -> None:
    pair = row(directory, dynamic=True)
    for attempt in range(7):
        for rows in (2, 3):
            pair.compare(steps(attempt, rows), f"{rows} rows, call {attempt}")
    assert pair.shared.num_recorded == 2 * NUM_LAYERS
    for rows in range(4, 8):  # each comes once
        pair.compare(steps(rows, rows), f"{rows} rows")
    assert pair.shared.num_recorded == 2 * NUM_LAYERS


def callers_write_and_move(directory: Path) -> None:
    """What a step writes is the caller's: a cache that it gets, wherever that is."""
    pair = Pair(Caches, budget_bytes(2.5), directory)
    for attempt in range(2):
        caches = [torch.zeros(8, WIDTH, device=PLACE) for _ in range(2)]
        for place in range(8):
            x = noise(1, WIDTH, seed=place).to(PLACE)
            with torch.no_grad():
                found, expected = (
                    model(x, cache, torch.tensor([place], device=PLACE))
                    for model, cache in zip((pair.model, pair.plain), caches, strict=True)
                )
            assert_same(found.cpu(), expected.cpu(), f"cache {attempt}, place {place}")
            assert_same(caches[0].cpu(), caches[1].cpu(), f"what was written, cache {attempt}, place {place}")
    assert pair.shared.num_recorded >= NUM_LAYERS


def some_is_dropped(directory: Path) -> None:
    """Steps that draw random numbers draw them anew; the others are recorded."""
    options = {"triton.cudagraphs": True, "fallback_random": True}
    pair = Pair(lambda: Row(dropout=0.5), budget_bytes(2.5), directory, options=options)
    pair.model.train()
    pair.plain.train()
    found = [pair.compare(steps(0), f"call {number}")[0] for number in range(4)]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found += [run(There(pair.model), steps(0))[0] for _ in range(4)]
    assert 0 < pair.shared.num_recorded < NUM_LAYERS
    assert len({tuple(each.flatten().tolist()) for each in found}) == 5, "the same was dropped again"


def tokens_are_generated(directory: Path) -> None:
    """With a static cache most of it is replayed, and with a growing one nothing."""
    size = weight_bytes(make(one_layer))
    pair = Pair(one_layer, int(size * 0.85) + SPARE_BYTES, directory, step_bytes=size // 4, cut_alike=True)
    with torch._dynamo.config.patch(recompile_limit=64):
        pair.compare(generates("static"), "static cache")
        replayed = pair.graphs.num_replayed
        assert replayed > 2 * pair.shared.num_recorded > 0
        for number in range(2):
            pair.compare(generates("dynamic"), f"growing cache, call {number}")
    assert pair.graphs.num_replayed == replayed


SCENES = [
    inputs_change, plans_change, budgets_change, sizes_change, callers_write_and_move, some_is_dropped,
]  # fmt: skip


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_the_same_bits(scene: Callable[[Path], None], tmp_path: Path) -> None:
    scene(tmp_path)


@pytest.mark.slow
def test_tokens_are_generated(tmp_path: Path) -> None:
    tokens_are_generated(tmp_path)


def test_a_step_that_cannot_be_recorded_runs_plainly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair = row(tmp_path)
    pair.graphs.refused = (2, 3)
    with caplog.at_level(logging.WARNING, "mball"):
        for seed in range(9):
            pair.compare(steps(seed), f"call {seed}")
    assert pair.shared.num_recorded == NUM_LAYERS - 2
    assert pair.graphs.num_recorded == NUM_LAYERS, "what failed is not tried again"
    assert sum("cannot be recorded as a graph (operation failed" in text for text in caplog.messages) == 1


@pytest.mark.parametrize("spoiled", [1, 3])
def test_an_interrupt_while_a_step_is_recorded(spoiled: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = row(tmp_path)
    record = pair.graphs.record
    recordings = itertools.count(1)

    def interrupted(work: Callable[[], None]) -> ForeignGraph:
        graph = record(work)
        if next(recordings) == spoiled:
            raise KeyboardInterrupt
        return graph

    monkeypatch.setattr(pair.graphs, "record", interrupted)
    num_interrupts = 0
    for seed in range(8):
        try:
            pair.compare(steps(seed), f"call {seed}")
        except KeyboardInterrupt:
            num_interrupts += 1
            pair.plain.memory.copy_(pair.model.memory)  # how far the pass came is nobody's promise
    assert num_interrupts == 1
    assert pair.shared.num_recorded == NUM_LAYERS


@pytest.mark.parametrize("spoiled", [2, 3])
def test_an_interrupt_while_memory_is_given_back(spoiled: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph outlives a buffer that it reads or writes."""
    pair = row(tmp_path)
    for seed in range(7):
        pair.compare(steps(seed), f"call {seed}")
    assert pair.shared.num_recorded == NUM_LAYERS
    closes = itertools.count(1)
    close = ForeignGraph.close

    def interrupted(graph: ForeignGraph) -> None:
        close(graph)
        if next(closes) == spoiled:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ForeignGraph, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pair.shared.grant(0)
    pair.shared.grant(pair.shared.wanted_bytes)
    gc.collect()
    others = [torch.full((3, WIDTH), torch.nan, device=PLACE) for _ in range(64)]  # who has the memory now
    for seed in range(3):
        pair.compare(steps(seed), f"after an interrupt, call {seed}")
    assert all(bool(each.isnan().all()) for each in others)


def test_graphs_that_take_too_much_are_not_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair = row(tmp_path)
    with caplog.at_level(logging.WARNING, "mball"):
        for seed in range(5):
            pair.compare(steps(seed, rows=40), f"call {seed}")
    assert pair.shared.num_recorded == 0
    assert mball.report(pair.model).step_graph_bytes == 0
    assert sum("some calls are launched kernel by kernel" in text for text in caplog.messages) == 1
    for seed in range(7):
        pair.compare(steps(seed), f"a call that takes less, {seed}")
    assert pair.shared.num_recorded == NUM_LAYERS


def test_a_model_that_fits_is_one_graph(tmp_path: Path) -> None:
    pair = row(tmp_path, slots=40, step_bytes=None)
    for seed in range(8):
        pair.compare(steps(seed), f"call {seed}")
    report = mball.report(pair.model)
    assert (report.steps, report.step_graphs, report.bytes_read_last_pass) == (1, 1, 0)
    assert "graphs of 1 steps" in str(report)
    mball.unwrap(pair.model)
    gc.collect()
    assert pair.graphs.pool_bytes == 0, "memory is still taken"


class Words(nn.Module):
    """A table that rows are looked up of, and what is made of them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8192, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            x = x + layer(x).sin()
        return x


def test_rows_that_are_read_at_home_are_not_recorded(tmp_path: Path) -> None:
    pair = Pair(Words, budget_bytes(2.5), tmp_path)
    for seed in range(9):
        if seed == 7:
            for model in (pair.model, pair.plain):
                model.table.weight.data.mul_(2)
        pair.compare(lambda model, seed=seed: model(ids(1, 3, seed=seed)), f"call {seed}")
    assert 0 < pair.shared.num_recorded <= 2


def test_a_mode_of_the_users_sees_every_operator(tmp_path: Path) -> None:
    pair = row(tmp_path)
    for seed in range(8):
        pair.compare(steps(seed))
    with FlopCounterMode(display=False) as counter:
        pair.compare(steps(1))
    assert counter.get_total_flops() == 2 * 2 * 3 * NUM_LAYERS * WIDTH**2, "of both models"


def test_inference_mode_and_none_take_turns(tmp_path: Path) -> None:
    pair = row(tmp_path)
    for seed in range(12):
        with torch.inference_mode(seed % 4 < 2):
            pair.compare(steps(seed), f"call {seed}")
    assert pair.graphs.num_replayed > NUM_LAYERS


# -- mutants ---------------------------------------------------------------------------------------------------------

Patch = Callable[[pytest.MonkeyPatch], None]


def stale_weights(patch: pytest.MonkeyPatch) -> None:
    """A step is replayed though its weights are elsewhere."""
    patch.setattr(frames, "_are_there", lambda weights, before: len(before) == len(weights))


def stale_arguments(patch: pytest.MonkeyPatch) -> None:
    """Arguments are copied once."""
    begin = Frame.begin

    def once(self: Frame, values: Sequence[Any], copied: Sequence[int]) -> list[Any]:
        if self.num_recorded < NUM_LAYERS - 1:
            return begin(self, values, copied)
        return [*values]

    patch.setattr(Frame, "begin", once)


def results_of_the_next(patch: pytest.MonkeyPatch) -> None:
    """Callers are handed the frame's memory."""
    patch.setattr(frames, "_outside", lambda value, own: value)


def results_in_the_pool(patch: pytest.MonkeyPatch) -> None:
    """What a step makes stays where its graph made it."""
    compute = Frame.compute

    def left_there(self: Frame, number: int, piece: Any, weights: Any, inputs: Any) -> Any:
        def keeping(values: list[Any]) -> Any:
            self._steps[number].results[:] = results = list(piece(values))
            return results

        return compute(self, number, keeping, weights, inputs)

    patch.setattr(Frame, "compute", left_there)


def copied_in_vain(patch: pytest.MonkeyPatch) -> None:
    """What is written is a copy."""
    init = RecordingStage.__init__

    def all_copied(self: RecordingStage, *args: Any, copied: Any, in_place: Any, **settings: Any) -> None:
        init(self, *args, copied=sorted((*copied, *in_place)), in_place=(), **settings)

    patch.setattr(RecordingStage, "__init__", all_copied)


def wherever_it_is(patch: pytest.MonkeyPatch) -> None:
    """What is written may be elsewhere in the next call."""
    patch.setattr(step_graphs, "_place", lambda value: None)


def the_same_dice(patch: pytest.MonkeyPatch) -> None:
    """Steps that draw random numbers are recorded."""
    patch.setattr(inductor, "can_be_recorded", lambda module: True)


def never_given_back(patch: pytest.MonkeyPatch) -> None:
    """What has no room stays."""
    patch.setattr(Frame, "release", lambda self: None)


def not_counted(patch: pytest.MonkeyPatch) -> None:
    """Plans leave no room, and it is taken all the same."""
    patch.setattr(StepGraphs, "has_room", lambda self: True)
    patch.setattr(Engine, "step_graph_bytes", 0)


def forgotten_by_no_budget(patch: pytest.MonkeyPatch) -> None:
    """Another budget leaves what was recorded."""
    patch.setattr(StepGraphs, "forget", lambda self: None)


MUTANTS = [
    (stale_weights, plans_change), (stale_arguments, inputs_change), (results_of_the_next, inputs_change),
    (results_in_the_pool, inputs_change),
    (copied_in_vain, callers_write_and_move), (wherever_it_is, callers_write_and_move),
    (the_same_dice, some_is_dropped), (never_given_back, budgets_change), (not_counted, budgets_change),
    (forgotten_by_no_budget, budgets_change),
]  # fmt: skip


@pytest.mark.parametrize(("mutant", "scene"), MUTANTS, ids=lambda each: each.__name__)
def test_each_mistake_is_missed(
    mutant: Patch, scene: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, DeviceError)):
        scene(tmp_path)
