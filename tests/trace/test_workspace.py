"""What is assumed of an operator's workspace is what the kernels are seen to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from mball.memory.gauge import HostGauge
from mball.trace.cut import Cut
from mball.trace.graph import CapturedGraph
from mball.trace.grouping import EveryWeight
from mball.trace.workspace import assumed_workspace_bytes
from mball.units import MIB


def graph_of(model: Callable[..., Any], *inputs: torch.Tensor) -> torch.fx.Graph:
    found: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        found.append(module)
        # Once compiled, Dynamo forgets what the nodes' values were.
        sizes.extend(assumed_workspace_bytes(node) for node in module.graph.nodes)
        return module.forward

    sizes.clear()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*inputs)
    (module,) = found
    return module.graph


sizes: list[int] = []


def wide(frozen: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    weight = nn.Parameter(torch.randn(16384, 2048).bfloat16(), requires_grad=not frozen)

    def scores(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x[:, -1:], weight)

    return scores


@pytest.mark.parametrize("frozen", [True, False])
def test_a_product_that_does_not_fold_copies_its_weight(frozen: bool) -> None:
    scores, x = wide(frozen), torch.randn(1, 32, 2048).bfloat16()
    graph_of(scores, x)
    assert max(sizes) == (64 * MIB if frozen else 0)
    gauge = HostGauge()
    with torch.no_grad():
        scores(x)
        gauge.reset()
        scores(x)
        rise = gauge.rise_bytes()
    # A kernel of another CPU may need no copy; none may need one that is not assumed.
    assert rise < max(sizes) + 8 * MIB


@pytest.mark.parametrize(
    ("x", "bias", "copies"),
    [
        (torch.randn(2, 32, 64), False, False),
        (torch.randn(2, 32, 64)[:, ::2], False, False),
        (torch.randn(2, 32, 64)[:, :16], False, True),
        (torch.randn(2, 32, 64)[:, -1:], False, True),
        (torch.randn(2, 32, 64)[:, -1:], True, False),
        (torch.randn(32, 64)[::2], False, False),
    ],
)
def test_which_products_fold(x: torch.Tensor, bias: bool, copies: bool) -> None:
    linear = nn.Linear(64, 128, bias=bias).bfloat16().requires_grad_(False)
    half = torch.empty_strided(x.shape, x.stride(), dtype=torch.bfloat16).copy_(x)
    graph_of(linear.forward, half)
    assert max(sizes) == (64 * 128 * 2 if copies else 0)


def test_a_convolution_reorders_its_weight() -> None:
    convolution = nn.Conv2d(3, 8, 3)
    graph_of(convolution.forward, torch.randn(1, 3, 8, 8))
    assert max(sizes) == 3 * 8 * 3 * 3 * 4


def test_what_was_measured_counts_where_it_is_more() -> None:
    linear = nn.Linear(64, 64)
    graphs: list[CapturedGraph] = []

    def backend(module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        weight_of = [0 if isinstance(value, nn.Parameter) and value.dim() == 2 else None for value in example_inputs]
        graphs.append(CapturedGraph(Cut("graph", module, weight_of, EveryWeight()), [False] * len(weight_of)))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(linear.forward, backend=backend)(torch.randn(4, 64))
    (graph,) = graphs
    before = graph.schema_steps([64 * 64 * 4])[0][-1].scratch_bytes
    assert not graph.learn_workspace({}), "nothing was measured"
    graph.steps[-1].rise_bytes = 3 * MIB
    assert not graph.learn_workspace({}), "this little is noise"
    graph.steps[-1].rise_bytes = 20 * MIB
    assert graph.learn_workspace({})
    after = graph.schema_steps([64 * 64 * 4])[0][-1].scratch_bytes
    assert 19 * MIB < after - before <= 20 * MIB
    assert graph.schema_steps([64 * 64 * 4], workspace=False)[0][-1].scratch_bytes == before
    assert not graph.learn_workspace({}), "it is known by now"
