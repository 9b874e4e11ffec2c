"""Activations saved for backward leave memory between the passes: the driver swaps them, no graph knows of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._guards import TracingContext

MIN_SPILLED_BYTES = 16 * 1024


class Network(nn.Module):
    """Residual blocks with norms, so that views, reductions and non-contiguous tensors are among what is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x.transpose(1, 2)).square().mean()


class SpillFile:
    """Bytes of tensors in a file. A handle, a CPU tensor of one int, stands for a spilled tensor."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self._end_bytes = 0
        self._entries: dict[int, tuple[int, torch.Size, tuple[int, ...], torch.dtype, torch.device]] = {}
        self.events: list[str] = []

    def spill(self, tensor: torch.Tensor) -> torch.Tensor:
        data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        assert os.pwrite(self._file, data, self._end_bytes) == data.nbytes
        entry = (self._end_bytes, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        self._entries[len(self._entries)] = entry
        self._end_bytes += data.nbytes
        self.events.append("spill")
        return torch.tensor([len(self._entries) - 1])

    def load(self, handle: torch.Tensor) -> torch.Tensor:
        offset_bytes, shape, stride, dtype, device = self._entries.pop(int(handle))
        data = torch.empty(shape, dtype=dtype)
        assert os.preadv(self._file, [data.view(-1).view(torch.uint8).numpy()], offset_bytes) == data.nbytes
        self.events.append("load")
        # The very strides, so that kernels sum in the order that they would have summed in.
        return torch.empty_strided(shape, stride, dtype=dtype, device=device).copy_(data)

    @property
    def num_spilled(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        os.close(self._file)


class Reloading(torch.fx.Interpreter):
    """Runs a backward graph; a handle is read back when the first node that needs it comes up."""

    def __init__(self, graph: torch.fx.GraphModule, handles: frozenset[str], file: SpillFile) -> None:
        super().__init__(graph)
        self._handles, self._file = handles, file
        self._loaded: set[str] = set()

    def run_node(self, n: torch.fx.Node) -> Any:
        for source in n.all_input_nodes:
            if source.op == "placeholder" and source.name in self._handles and source.name not in self._loaded:
                self.env[source] = self._file.load(self.env[source])
                self._loaded.add(source.name)
        if n.op == "call_function":
            self._file.events.append("compute")
        return super().run_node(n)


class SpillingBackend:
    """Runs AOTAutograd's graphs as they are; the forward returns handles for the large tensors that it saves."""

    def __init__(self, file: SpillFile | None) -> None:
        self._file = file
        self.spilled: frozenset[str] = frozenset()

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        if self._file is None:
            return aot_module_simplified(graph, example_inputs, lambda g, _: make_boxed_func(g.forward))
        return aot_module_simplified(graph, example_inputs, self._compile_forward, self._compile_backward)

    def _compile_forward(self, graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        context, file = TracingContext.try_get(), self._file
        assert context is not None
        assert context.fw_metadata is not None
        outputs = graph.graph.output_node().args[0]
        saved = range(*context.fw_metadata.tensors_saved_for_backwards_slice.indices(len(outputs)))
        returned = {outputs[position] for position in range(len(outputs)) if position not in saved}
        positions = {
            position: outputs[position].name
            for position in saved
            # A saved weight or input belongs to the caller, and a saved output stays in memory anyway.
            if outputs[position].op != "placeholder"
            and outputs[position] not in returned
            and outputs[position].meta["val"].nbytes >= MIN_SPILLED_BYTES
        }
        self.spilled = frozenset(positions.values())

        def run(*args: Any) -> tuple[Any, ...]:
            values = graph(*args)
            return tuple(file.spill(value) if at in positions else value for at, value in enumerate(values))

        return make_boxed_func(run)

    def _compile_backward(self, graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        assert self.spilled <= {node.name for node in graph.graph.find_nodes(op="placeholder")}
        return make_boxed_func(lambda *args: Reloading(graph, self.spilled, self._file).run(*args))


@pytest.fixture
def spill_file(tmp_path: Path) -> Iterator[SpillFile]:
    file = SpillFile(tmp_path / "activations")
    yield file
    file.close()


def two_steps(device: torch.device, file: SpillFile | None) -> tuple[list[torch.Tensor], SpillingBackend]:
    """Returns losses, gradients and weights of two training steps, and the backend that ran them."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Network(), torch.randn(4, 32, 64)
    model, x = model.to(device), x.to(device)
    backend = SpillingBackend(file)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(2):
        optimizer.zero_grad()
        loss = compiled(x)
        if file is not None:
            assert file.num_spilled == len(backend.spilled)
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
    return [*seen, *(p.detach() for p in model.parameters())], backend


def test_handles_in_place_of_saved_tensors(device: torch.device, spill_file: SpillFile) -> None:
    """The forward driver may return small handles for the outputs that fw_metadata says are saved for backward, and
    the backward driver reads each back at its first reader: losses and gradients stay bit-equal, in a second step
    too."""
    expected, _ = two_steps(device, None)
    got, backend = two_steps(device, spill_file)
    assert len(backend.spilled) >= 6
    assert len(expected) == len(got)
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))
    assert spill_file.num_spilled == 0
    assert spill_file.events.count("load") == spill_file.events.count("spill") == 2 * len(backend.spilled)
    # Loads are spread over the backward, not all made before it.
    backward = spill_file.events[spill_file.events.index("load") :]
    assert "compute" in backward[: len(backward) // 2]
    assert "load" in backward[backward.index("compute") :]
