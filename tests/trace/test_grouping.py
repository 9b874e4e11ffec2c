"""Which weights one step reads."""

from __future__ import annotations

from typing import Any

import torch

from mball.trace.cut import Cut
from mball.trace.grouping import Blocks, EveryWeight, Whole


def cut(grouping: Any, num_weights: int) -> list[list[int]]:
    """Returns the reads of the steps of a graph that reads one weight, and then all others in one operator."""
    graph = torch.fx.Graph()
    weights = [graph.placeholder(f"weight{number}") for number in range(num_weights)]
    first = graph.call_function(torch.neg, (weights[0],))
    rest = graph.call_function(torch.cat, (tuple(weights[1:]),))
    graph.output((first, rest))
    for node in (*weights, first, rest):
        node.meta["val"] = torch.empty(4)
    found = Cut("graph", torch.fx.GraphModule({}, graph), range(num_weights), grouping)
    return [step.reads for step in found.steps]


def test_weights_that_an_operator_reads_together_count_together() -> None:
    names = [f"layers.0.weight{number}" for number in range(3)]
    for step_bytes, expected in ((48, [[0, 1, 2]]), (47, [[0], [1, 2]])):
        blocks = Blocks(names=names, sizes_bytes=[16] * 3, step_bytes=step_bytes)
        assert cut(blocks, 3) == expected


def test_blocks_are_kept_apart() -> None:
    names = ["layers.0.weight", "layers.1.weight", "layers.1.bias"]
    assert cut(Blocks(names=names, sizes_bytes=[16] * 3, step_bytes=1000), 3) == [[0], [1, 2]]


def test_the_finest_and_the_coarsest_cut() -> None:
    assert cut(EveryWeight(), 2) == [[0], [1]]
    assert cut(Whole(), 3) == [[0, 1, 2]]
