"""What Dynamo hands a backend, what a driver may put in its place, and which models never get there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func

GUARDED_BY_HOME = "TENSOR_MATCH"


class TwoLayers(nn.Module):
    """A module of our own: Dynamo looks into its forward, which it does not for torch's own modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


class CountingBackend:
    """Runs a graph as it is, and remembers what it was given."""

    def __init__(self) -> None:
        self.example_inputs: list[list[Any]] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.example_inputs.append(example_inputs)
        return graph.forward


class BindingBackend:
    """Runs each graph on `bound` tensors where Dynamo would pass the module's parameters.

    `names` maps the id of what Dynamo traces to the name in `bound`. Gradients are moved to `home_device`,
    since autograd wants them where the leaf is.
    """

    def __init__(self, names: dict[int, str], bound: dict[str, torch.Tensor], home_device: torch.device) -> None:
        self.names, self.bound, self.home_device = names, bound, home_device
        self.num_compiles = 0
        self.num_bindings = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.num_compiles += 1
        names = [self.names.get(id(value)) for value in example_inputs]

        def compile_forward(forward: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
            bindings: dict[int, torch.Tensor] = {}
            for position, node in enumerate(forward.graph.find_nodes(op="placeholder")):
                argument = getattr(node.meta.get("desc"), "idx", None)
                if argument is not None and names[argument] is not None:
                    bindings[position] = self.bound[names[argument]]

            def run(*args: Any) -> Any:
                self.num_bindings += len(bindings)
                return forward(*(bindings.get(position, value) for position, value in enumerate(args)))

            return make_boxed_func(run)

        def compile_backward(backward: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                gradients = backward(*args)
                return [g.to(self.home_device) if isinstance(g, torch.Tensor) else g for g in gradients]

            return make_boxed_func(run)

        return aot_module_simplified(graph, example_inputs, compile_forward, compile_backward)


def keep_other_guards(guards: list[Any]) -> list[bool]:
    """A guard filter that drops what compares a parameter with the one that was traced."""
    return [not (guard.guard_type == GUARDED_BY_HOME and "_parameters" in guard.name) for guard in guards]


def put(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Makes `parameters`, by their dotted names, the parameters of `model`."""
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)


def homes_of(model: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    """Returns leaves that a graph for `device` cannot read: on the CPU, or there of another dtype."""
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    return {name: nn.Parameter(value.detach().to("cpu", dtype)) for name, value in model.named_parameters()}


def test_example_inputs_are_the_parameters(device: torch.device) -> None:
    """A backend's example inputs hold the module's own Parameter objects, tied ones once, so ids name them."""
    model = TwoLayers().to(device)
    model.second.weight = nn.Parameter(model.first.weight.detach().t().contiguous())
    model.second.bias = model.first.bias = nn.Parameter(torch.zeros(1, device=device))
    backend = CountingBackend()
    model.compile(backend=backend, fullgraph=True)
    model(torch.randn(3, 8, device=device))
    (inputs,) = backend.example_inputs
    found = [value for value in inputs if isinstance(value, nn.Parameter)]
    assert sorted(map(id, found)) == sorted({id(parameter) for parameter in model.parameters()})
    assert {id(value) for value in found} == {id(p) for _, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("filtered", [True, False], ids=["filtered", "guarded"])
def test_the_driver_binds_other_tensors(device: torch.device, filtered: bool) -> None:
    """With its parameters' guards dropped, one graph traced over stand-ins of the compute device serves homes that
    it could not read: the driver passes bound tensors by index, outputs are bit-equal, and the gradients reach the
    homes. With the guards kept, Dynamo traces the homes as well."""
    model = TwoLayers().to(device)
    reference = copy.deepcopy(model)
    bound = {name: value.detach().clone() for name, value in model.named_parameters()}
    homes = homes_of(model, device)
    stand_ins = {name: nn.Parameter(torch.empty_like(value)) for name, value in bound.items()}
    put(model, stand_ins)
    backend = BindingBackend({id(value): name for name, value in stand_ins.items()}, bound, torch.device("cpu"))
    model.compile(backend=backend, options={"guard_filter_fn": keep_other_guards} if filtered else {})

    x = torch.randn(3, 8, device=device)
    model(x)
    assert backend.num_compiles == 1
    put(model, homes)
    if not filtered:
        # A home of another device or dtype cannot be traced beside the input: both are RuntimeErrors of Dynamo.
        with pytest.raises(RuntimeError):
            model(x)
        return
    output = model(x)
    output.sum().backward()
    expected = reference(x)
    expected.sum().backward()
    assert backend.num_compiles == 1
    assert backend.num_bindings == 2 * len(bound)
    assert torch.equal(output, expected)
    for name, parameter in reference.named_parameters():
        assert homes[name].grad is not None
        assert homes[name].grad.device.type == "cpu"
        assert torch.equal(homes[name].grad.float(), parameter.grad.cpu())
        assert stand_ins[name].grad is None


@pytest.mark.parametrize("compute", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_homes_elsewhere_need_stand_ins(compute: str) -> None:
    """A CPU home beside an input of the compute device fails while tracing, before any backend runs; stand-ins of
    that device can be traced. (`meta` plays the compute device where there is no other.)"""
    model, backend = TwoLayers(), CountingBackend()
    model.compile(backend=backend)
    x = torch.empty(3, 8, device=compute)
    with pytest.raises(RuntimeError, match=r"two (different )?devices"):
        model(x)
    assert backend.example_inputs == []

    torch._dynamo.reset()
    put(model, {name: nn.Parameter(torch.empty_like(p, device=compute)) for name, p in model.named_parameters()})
    assert model(x).device.type == compute
    assert len(backend.example_inputs) == 1


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(4, 4), (2, 4)),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (2, 4)),
        (nn.LSTM(4, 4), (3, 2, 4)),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1), (2, 3, 4)),
    ],
    ids=["Linear", "Sequential", "LSTM", "TransformerEncoder"],
)
def test_bare_modules_never_reach_the_backend(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> None:
    """`.compile()` of one of torch's own modules runs it and never calls the backend: Dynamo skips their frames."""
    model, backend = model.to(device), CountingBackend()
    model.compile(backend=backend)
    model(torch.randn(shape, device=device))
    assert backend.example_inputs == []


@pytest.mark.parametrize("door", ["forward", "submodule"])
def test_other_doors_never_reach_the_backend(door: str, device: torch.device) -> None:
    """A call of `forward` itself, or of a submodule, goes past an in-place compile; a call of the model does not."""
    model, backend = TwoLayers().to(device), CountingBackend()
    model.compile(backend=backend)
    x = torch.randn(3, 8, device=device)
    model.forward(x) if door == "forward" else model.first(x)
    assert backend.example_inputs == []
    model(x)
    assert len(backend.example_inputs) == 1
