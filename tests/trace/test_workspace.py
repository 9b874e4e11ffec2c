"""What is assumed of an operator's workspace is what the kernels are seen to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from mball.memory.gauge import HostGauge
from mball.torch_private.inductor import compile_through_inductor
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


def compiled_sizes(model: Callable[..., Any], *inputs: torch.Tensor) -> dict[str, int]:
    """Returns what is assumed of each operator after AOTAutograd, where it is anything."""
    found: dict[str, int] = {}

    def compile_graph(module: torch.fx.GraphModule, _: Any) -> Any:
        assumed = {str(node.target): assumed_workspace_bytes(node) for node in module.graph.nodes}
        found.update({target: size_bytes for target, size_bytes in assumed.items() if size_bytes})
        return lambda values: torch.fx.Interpreter(module).boxed_run(values)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(
            model,
            backend=lambda graph, values: compile_through_inductor(graph, values, compile_graph, {}),
        )(*inputs)
    return found


def test_compiled_steps_take_workspace_too() -> None:
    convolution = nn.Conv2d(3, 8, 3)
    assert compiled_sizes(convolution.forward, torch.randn(1, 3, 8, 8)) == {
        "aten.convolution.default": 3 * 8 * 3 * 3 * 4
    }
    linear = nn.Linear(64, 128, bias=False).bfloat16().requires_grad_(False)
    half = torch.randn(2, 32, 64).bfloat16()
    # The weight is expanded to a batch, and copied whole.
    assert compiled_sizes(lambda x: linear(x[:, :16]), half) == {"aten.bmm.default": 2 * 64 * 128 * 2}
    assert compiled_sizes(lambda x: linear(x[:, -1:]), half) == {}, "Inductor makes a loop of it"
    assert compiled_sizes(linear.forward, half) == {}, "one product of two matrices"
    assert compiled_sizes(lambda x: x @ x.mT, half) == {}, "a batch of matrices of its own"


def test_a_batched_product_copies_the_weight_that_it_repeats() -> None:
    weight = torch.randn(64, 8192).bfloat16().expand(16, -1, -1)
    left = torch.randn(16, 2, 64).bfloat16()
    (assumed,) = compiled_sizes(torch.bmm, left, weight).values()
    assert assumed == 16 * MIB
    gauge = HostGauge()
    torch.bmm(left, weight)
    gauge.reset()
    torch.bmm(left, weight)
    assert gauge.rise_bytes() < assumed + 8 * MIB


def captured(model: Callable[..., Any], *inputs: torch.Tensor) -> CapturedGraph:
    """Returns the facts of a graph whose matrices are its weights."""
    graphs: list[CapturedGraph] = []

    def backend(module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        weights = [isinstance(value, nn.Parameter) and value.dim() == 2 for value in example_inputs]
        weight_of = [sum(weights[:number]) if is_weight else None for number, is_weight in enumerate(weights)]
        graphs.append(CapturedGraph(Cut("graph", module, weight_of, EveryWeight()), [False] * len(weight_of)))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*inputs)
    (graph,) = graphs
    return graph


def test_inputs_do_not_hide_what_the_first_step_takes() -> None:
    linear = nn.Linear(64, 64)
    graph = captured(lambda x, cache: linear(x) + cache[:4, :64], torch.randn(4, 64), torch.randn(1024, 4096))
    graph.steps[0].rise_bytes = 10 * MIB
    assert graph.learn_workspace({}), "the cache of 16 MiB was there before"
    assert 9 * MIB < graph.steps[0].workspace_bytes <= 10 * MIB


def test_what_was_measured_counts_where_it_is_more() -> None:
    graph = captured(nn.Linear(64, 64).forward, torch.randn(4, 64))
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
