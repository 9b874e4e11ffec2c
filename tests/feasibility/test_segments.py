"""Compiled graphs cut into segments at weight boundaries, run by a flat driver that binds each segment's weights."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._guards import TracingContext
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.fx.passes.split_module import split_module

ALIGNMENT_BYTES = 256
# One weight matrix of Network with its bias, and not two: every block is cut in the middle.
WEIGHT_LIMIT_BYTES = 20_000


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 48), nn.LayerNorm(48)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Resident:
    """Binds weights as they are."""

    def __init__(self) -> None:
        self.num_segments = 0
        self.streamed_bytes = 0

    def enter(self, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        self.num_segments += 1
        return weights

    def leave(self) -> None:
        pass


class Streamed(Resident):
    """Binds copies in one slot, which is NaN at all times but while a segment runs."""

    def __init__(self, device: torch.device, *, released_early: bool = False) -> None:
        super().__init__()
        self._slot = torch.full((WEIGHT_LIMIT_BYTES // 4 + 1024,), float("nan"), device=device)
        self._released_early = released_early

    def enter(self, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        self.num_segments += 1
        bound, begin = [], 0
        for weight in weights:
            view = self._slot[begin : begin + weight.numel()].view(weight.shape)
            bound.append(view.copy_(weight))
            self.streamed_bytes += weight.nbytes
            begin += math.ceil(weight.nbytes / ALIGNMENT_BYTES) * ALIGNMENT_BYTES // 4
        if self._released_early:
            self._slot.fill_(float("nan"))
        return bound

    def leave(self) -> None:
        self._slot.fill_(float("nan"))


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightView:
    """A value that is a view of a weight: it is taken from the weight wherever it is needed, and never kept."""

    weight: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def is_view(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and len(schema.returns) == 1 and schema.returns[0].alias_info is not None


class SegmentBackend:
    """A Dynamo backend: Inductor compiles each AOTAutograd graph in segments that read up to `limit_bytes` of weights.

    `self.binder` may be changed between runs.
    """

    def __init__(self, model: nn.Module, limit_bytes: float, binder: Resident) -> None:
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._weights = dict(model.named_parameters())
        self._limit_bytes = limit_bytes
        self._saved_views: dict[str, WeightView] = {}
        self.binder = binder
        self.num_segments: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        names = {i: self._names[id(value)] for i, value in enumerate(example_inputs) if id(value) in self._names}
        return compile_fx(graph, example_inputs, inner_compile=lambda g, _, **kw: self._compile(g, names, kw))

    def _compile(self, graph: torch.fx.GraphModule, names: dict[int, str], options: dict[str, Any]) -> Any:
        views: dict[torch.fx.Node, WeightView] = {}
        for node in graph.graph.nodes:
            name = None
            if node.op == "placeholder":
                name = names.get(getattr(node.meta.get("desc"), "idx", -1))
                if name is None and node.name in self._saved_views:
                    name = self._saved_views[node.name].weight
            elif node.op == "call_function" and is_view(node) and node.args[0] in views:
                name = views[node.args[0]].weight
            if name is not None:
                value = node.meta["val"]
                views[node] = WeightView(
                    weight=name, size=tuple(value.shape), stride=value.stride(), offset=value.storage_offset()
                )
        outputs = [views.get(value, value) for value in graph.graph.output_node().args[0]]
        if not options.get("is_backward"):
            self._saved_views |= {node.name: view for node, view in views.items() if node.op != "placeholder"}
        segment_of = self._cut(graph, views)
        split = split_module(graph, None, segment_of.__getitem__, keep_original_order=True)
        return self._drive(split, {node.name: view for node, view in views.items()}, outputs, options)

    def _cut(self, graph: torch.fx.GraphModule, views: dict[torch.fx.Node, WeightView]) -> dict[torch.fx.Node, int]:
        """Gives every node a segment. A view of a weight is made anew beside each of its readers."""
        for node in list(graph.graph.nodes):
            if node.op == "output":
                # What the driver returns itself must not be computed for it.
                node.args = (tuple(None if value in views else value for value in node.args[0]),)
            elif node.op == "call_function" and node not in views:
                for source in [source for source in node.all_input_nodes if source in views]:
                    chain = [source]
                    while chain[-1].op != "placeholder":
                        chain.append(chain[-1].args[0])
                    fresh = below = chain.pop()
                    with graph.graph.inserting_before(node):
                        for above in reversed(chain):
                            copied = graph.graph.node_copy(above, {below: fresh}.__getitem__)
                            views[copied] = views[above]
                            fresh, below = copied, above
                    node.replace_input_with(source, fresh)
        for node in reversed(list(graph.graph.nodes)):
            if node.op == "call_function" and node in views and not node.users:
                graph.graph.erase_node(node)

        segments: dict[torch.fx.Node, int] = {}
        current, held, waiting = 0, set(), []
        for node in graph.graph.nodes:
            if node.op != "call_function":
                continue
            waiting.append(node)
            if node in views:
                continue
            read = {views[source].weight for source in node.all_input_nodes if source in views}
            if held and sum(self._weights[name].nbytes for name in held | read) > self._limit_bytes and read - held:
                current, held = current + 1, set()
            held |= read
            segments |= dict.fromkeys(waiting, current)
            waiting.clear()
        graph.recompile()
        return segments

    def _drive(self, split: Any, views: dict[str, WeightView], outputs: list[Any], options: dict[str, Any]) -> Any:
        """Compiles the pieces and returns the function that runs them in order."""
        context = TracingContext.try_get()
        inputs = [node.name for node in split.graph.find_nodes(op="placeholder")]
        pieces: dict[str, Any] = {}
        for node in split.graph.find_nodes(op="call_module"):
            piece = getattr(split, node.target)
            result = piece.graph.output_node()
            pieces[node.name + ".single"] = not isinstance(result.args[0], tuple | list)
            values = result.args if pieces[node.name + ".single"] else result.args[0]
            result.args = (tuple(values),)
            # Inductor may lay a boundary tensor out as it likes unless the user sees it.
            result.meta["user_visible_output_idxs"] = list(range(len(values)))
            piece.recompile()
            if context is not None and context.output_strides is not None:
                context.output_strides.clear()
            pieces[node.name] = compile_fx_inner(
                piece,
                [placeholder.meta["val"] for placeholder in piece.graph.find_nodes(op="placeholder")],
                static_input_idxs=[i for i, source in enumerate(node.args) if source.name in views],
                **{key: options[key] for key in ("is_inference", "is_backward", "cudagraphs") if key in options},
            )
        if context is not None and context.output_strides is not None:
            # AOTAutograd reads one entry an output; None says that the strides are as traced.
            context.output_strides[:] = [None] * len(outputs)
        self.num_segments.append(len(pieces) // 2)
        results = split.graph.output_node().args[0]

        def run(*args: Any) -> tuple[Any, ...]:
            values = dict(zip(inputs, args, strict=True))
            for node in split.graph.nodes:
                if node.op == "call_module":
                    read = [source.name for source in node.args if source.name in views]
                    weights = list(dict.fromkeys(views[name].weight for name in read))
                    bound = self.binder.enter([self._weights[name].detach() for name in weights])
                    by_weight = dict(zip(weights, bound, strict=True))
                    arguments = [
                        view_in(by_weight[views[source.name].weight], views[source.name])
                        if source.name in views
                        else values[source.name]
                        for source in node.args
                    ]
                    answer = pieces[node.name](arguments)
                    self.binder.leave()
                    values[node.name] = answer[0] if pieces[node.name + ".single"] else answer
                elif node.target is operator.getitem:
                    values[node.name] = values[node.args[0].name][node.args[1]]
            return tuple(
                view_in(self._weights[output.weight].detach(), output)
                if isinstance(output, WeightView)
                else (values[result.name] if isinstance(result, torch.fx.Node) else result)
                for output, result in zip(outputs, results, strict=True)
            )

        return make_boxed_func(run)


def view_in(bound: torch.Tensor, view: WeightView) -> torch.Tensor:
    """Takes `view` of a bound weight, which may begin anywhere in its storage."""
    return bound.as_strided(view.size, view.stride, bound.storage_offset() + view.offset)


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The compute device. On the CPU Inductor needs a C++ compiler, and takes its time with it."""
    if request.param == "cuda":
        return torch.device("cuda", 0)
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("Inductor needs a C++ compiler on the CPU")
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def deterministic_kernels() -> Iterator[None]:
    """Inductor chooses kernels without timing them, which could give two equal graphs other sums on a GPU."""
    with torch._inductor.config.patch(deterministic=True):
        yield


def step(compiled: Callable[..., Any], model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Returns the output of one training step and the gradients of all weights."""
    model.zero_grad()
    output = compiled(x)
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def all_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_segments_after_aot(device: torch.device) -> None:
    """AOTAutograd's graphs can be cut at weight boundaries and the pieces compiled one by one. Streamed through one
    slot that is poisoned whenever it is released, forward and backward equal the same cuts with resident weights bit
    for bit; they equal one graph within the rounding that other fusion brings, and one segment equals it exactly."""
    torch.manual_seed(0)
    model, x = Network().to(device), torch.randn(12, 48, device=device)
    whole = step(torch.compile(model, fullgraph=True), model, x)

    torch._dynamo.reset()
    uncut = SegmentBackend(model, math.inf, Resident())
    single = step(torch.compile(model, backend=uncut, fullgraph=True), model, x)
    assert uncut.num_segments == [1, 1]
    assert all_equal(single, whole)

    torch._dynamo.reset()
    backend = SegmentBackend(model, WEIGHT_LIMIT_BYTES, Resident())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    resident = step(compiled, model, x)
    assert min(backend.num_segments) >= 3
    for one, other in zip(resident, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    backend.binder = streamed = Streamed(device)
    for _ in range(2):
        assert all_equal(step(compiled, model, x), resident)
    assert streamed.num_segments == 2 * sum(backend.num_segments)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert streamed.streamed_bytes > 2 * weight_bytes

    # The poison works: a segment that runs after its slot was released shows it.
    backend.binder = Streamed(device, released_early=True)
    assert step(compiled, model, x)[0].isnan().all()
