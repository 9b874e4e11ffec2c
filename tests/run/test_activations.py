"""The activation bytes that a plan promises, against what a pass of captured graphs really holds.

Measured is the peak of all tensors that operators of the pass return: their storages, from birth to death. Not seen, as
the report says: workspace inside operators (a convolution's columns, what a GEMM packs, all of a fused encoder layer).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mball
from mball.api import _states, trace_and_plan
from tests.run.harness import assert_same, engine_of, make, run, weight_bytes
from tests.run.zoo import Net, bert, ids, llama, noise, tied_sequential


class Watch(TorchDispatchMode):
    """Adds up the storages that operators make, each until it dies, and the inputs, which live throughout."""

    def __init__(self, known: set[int], inputs: Any) -> None:
        super().__init__()
        self.known = set(known)
        self.current = self.peak = self.num_born = 0
        for leaf in tree_leaves(inputs):
            self._born(leaf)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._born(leaf)
        return result

    def _born(self, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        address, size_bytes = storage.data_ptr(), storage.nbytes()
        if not size_bytes or address in self.known:
            return

        def died() -> None:
            self.known.discard(address)
            self.current -= size_bytes

        weakref.finalize(storage, died)
        self.known.add(address)
        self.num_born += 1
        self.current += size_bytes
        self.peak = max(self.peak, self.current)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], float]] = {
    "llama-prefill": (llama, {"input_ids": ids(1, 64), "use_cache": False}, 4.0),
    "llama-prefill-bf16": (lambda: llama(dtype=torch.bfloat16), {"input_ids": ids(2, 64), "use_cache": False}, 4.0),
    "convolutions": (Net, {"x": noise(4, 3, 32, 32)}, 60.0),
    "bert": (bert, {"input_ids": ids(2, 64)}, 4.0),
    "sequential": (tied_sequential, {"input": noise(64, 64)}, 4.0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_planned_peak_is_the_real_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    factory, inputs, budget = CASES[name]
    plain, model = make(factory), make(factory)
    mball.wrap(model, budget=int(weight_bytes(model) * budget), swap_dir=tmp_path, capture="graphs")

    def call(each: Any) -> Any:
        return each(**inputs)

    expected = run(plain, call)
    for _ in range(3):  # the plan is made anew when steps have been timed
        run(model, call)
    _, plan = trace_and_plan(model)
    engine = engine_of(model)
    homes = {home.tensor.untyped_storage().data_ptr() for home in engine.homes.homes}
    buffers = {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    slots = {view.untyped_storage().data_ptr() for view in engine.execution._views.values()}
    watch = Watch(homes | buffers | slots, inputs)
    gate = _states[model].gate
    run_graph = gate.run_graph

    def watched(*args: Any, **kwargs: Any) -> Any:
        # Inside the captured graph, where every operator is seen as it runs; around it, Dynamo would step aside.
        with watch:
            return run_graph(*args, **kwargs)

    monkeypatch.setattr(gate, "run_graph", watched)
    assert_same(run(model, call), expected)
    assert mball.report(model).graphs > 0
    assert trace_and_plan(model)[1] is plan
    assert watch.num_born > 5
    ratio = plan.activation_bytes / watch.peak
    record_property("planned_over_real", ratio)
    assert watch.peak <= plan.activation_bytes, f"{watch.peak} B are live, {plan.activation_bytes} B were planned"
    assert plan.activation_bytes <= 2 * watch.peak, f"{plan.activation_bytes} B planned for {watch.peak} B"


def test_a_cache_that_outlives_the_pass_is_in_the_budget_without_graphs(tmp_path: Path) -> None:
    """Its tensors were born in no pass, or in an earlier one, and operators read them."""
    from transformers import StaticCache

    plain, model = (make(lambda: llama(layers=2)) for _ in range(2))
    mball.wrap(model, budget="8MiB", swap_dir=tmp_path, capture="operators")

    def cache() -> StaticCache:
        return StaticCache(config=model.config, max_cache_len=128)

    caches = cache(), cache()
    for tokens in (ids(1, 9), ids(1, 1), ids(1, 1)):
        results = [
            run(each, lambda m, c=held, t=tokens: m(t, past_key_values=c).logits)
            for each, held in zip((plain, model), caches, strict=True)
        ]
        assert_same(results[1], results[0])
    held_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[1].layers)
    assert held_bytes > 100_000
    assert mball.report(model).activation_bytes >= held_bytes
