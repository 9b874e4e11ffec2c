"""The foreign device promises what CUDA does with devices, and the CPU's bits."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import subprocess
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from torch import nn
from torch._dynamo.device_interface import get_interface_for_device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from tests.foreign.device import foreign_tensor

pytestmark = pytest.mark.usefixtures("foreign")

DTYPES = [torch.float32, torch.bfloat16]


def to_foreign(value: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("foreign"), value)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_equal(foreign: Any, host: Any) -> None:
    """To the bit, and in all that is known of a tensor but for its device."""
    (values, structure), (expected, expected_structure) = tree_flatten(foreign), tree_flatten(host)
    assert structure == expected_structure
    for ours, theirs in zip(values, expected, strict=True):
        if not isinstance(theirs, torch.Tensor):
            assert ours == theirs
            continue
        assert (ours.device, theirs.device) == (torch.device("foreign", 0), torch.device("cpu"))
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        there, here = (t.detach().cpu().resolve_conj().contiguous().reshape(-1) for t in (ours, theirs))
        assert torch.equal(there.view(torch.uint8), here.view(torch.uint8))


def cache_write(cache: torch.Tensor, index: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    cache.index_copy_(2, index, new)
    return cache.index_add_(2, index, new)


OPERATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "add": lambda x, y: x + y,
    "scalars": lambda x, y: 2 * x - y / 3 + 1,
    "in place": lambda x, y: x.add_(y).mul_(2).clamp_(-1, 1),
    "out": lambda x, y: torch.add(x, y, out=torch.empty_like(x)),
    "out of another size": lambda x, y: torch.mul(x, y, out=torch.empty(0, dtype=x.dtype, device=x.device)),
    "matmul": lambda x, y: x @ y.mT,
    "bmm": lambda x, y: torch.bmm(x, y.transpose(1, 2)),
    "addmm": lambda x, y: torch.addmm(y[0, 0, :6], x[0], y[1].mT),
    "linear": lambda x, y: F.linear(x, y[0]),
    "linear with bias": lambda x, y: F.linear(x, y[0], y[1, 0, :6]),
    "einsum": lambda x, y: torch.einsum("bij,bkj->bik", x, y),
    "embedding": lambda x, y: F.embedding(torch.tensor([[5, 0], [1, 1]], device=x.device), x[0]),
    "layer_norm": lambda x, y: F.layer_norm(x, (8,), y[0, 0], y[0, 1]),
    "rms_norm": lambda x, y: F.rms_norm(x, (8,), y[0, 0]),
    "group_norm": lambda x, y: F.group_norm(x, 2),
    "softmax": lambda x, y: (x.softmax(-1), x.log_softmax(1), torch.softmax(x, -1, dtype=torch.float32)),
    "activations": lambda x, y: (F.gelu(x), F.silu(x), F.relu(x), x.tanh(), x.sigmoid(), F.softplus(y)),
    "attention": lambda x, y: F.scaled_dot_product_attention(x[:, None], y[:, None], y[:, None]),
    "causal attention": lambda x, y: F.scaled_dot_product_attention(x[:, None], y[:, None], y[:, None], is_causal=True),
    "masked attention": lambda x, y: F.scaled_dot_product_attention(
        x[:, None], y[:, None], y[:, None], attn_mask=torch.ones(6, 6, dtype=torch.bool, device=x.device).tril()
    ),
    "convolution": lambda x, y: F.conv2d(x[:, None], y[0, None, None, :3, :3], padding=1),
    "pooling": lambda x, y: (F.max_pool1d(x, 2, return_indices=True), F.avg_pool1d(x, 2), F.adaptive_avg_pool1d(x, 3)),
    "interpolate": lambda x, y: F.interpolate(x[None], scale_factor=2, mode="bilinear"),
    "sums": lambda x, y: (x.sum(), x.sum(1), x.mean(-1), x.var(0), x.cumsum(1), x.norm(), x.logsumexp(1)),
    "most": lambda x, y: (x.topk(3), x.argmax(-1), x.max(1), x.amin(), x.sort(1, descending=True), x.argsort()),
    "comparing": lambda x, y: (x > y, x.eq(x), (x > 0).any(), (x > 0).all(1), torch.isnan(x), torch.maximum(x, y)),
    "where": lambda x, y: (torch.where(x > 0, x, y), torch.where(x > 0, x, 0.0), (x > 0).nonzero()),
    "masks": lambda x, y: (x.masked_fill(y > 0, -1.0), x[y > 0], x.masked_scatter(y > 0, y), x.tril(), x.triu(1)),
    "cat": lambda x, y: (torch.cat([x, y], 1), torch.stack([x, y]), F.pad(x, (1, 2)), x.repeat(2, 1, 1), x.roll(1, 0)),
    "views": lambda x, y: (
        x[0], x[:, 1:3], x.mT, x.permute(2, 0, 1), x.unfold(1, 2, 2), x.expand(3, 2, 6, 8), x.split(4, -1), x.chunk(2),
        x.flatten(), x.view(12, 8), x.diagonal(0, 1, 2), x[..., None], x.unbind(1), x.movedim(0, 2), x.view(torch.int8),
    ),
    "index": lambda x, y: (x[torch.tensor([1, 0], device=x.device)], x[:, [1, 2], [0, 3]], x[1, ..., 2]),
    "index with indices of the CPU": lambda x, y: x[torch.tensor([1, 0])],
    "index_put_": lambda x, y: x.index_put_((torch.tensor([1], device=x.device),), y[0]),
    "assignment": lambda x, y: (x.__setitem__((0, slice(1, 3)), y[0, :2]), x.__setitem__(y > 0, 3.0), x)[-1],
    "gather": lambda x, y: (x.gather(2, y.argsort()), x.take_along_dim(y.argmax(-1, keepdim=True), -1)),
    "scatter": lambda x, y: (x.scatter(1, y.argsort(1), y), x.scatter_add(1, y.argsort(1), y)),
    "index_select": lambda x, y: x.index_select(1, torch.tensor([3, 1], device=x.device)),
    "a cache": lambda x, y: cache_write(x[None], torch.tensor([4, 2], device=x.device), y[None, :, :2]),
    "casts": lambda x, y: (x.to(torch.float64), x.bfloat16(), x.long(), x.bool(), x.half().float(), x.type_as(y)),
    "copies": lambda x, y: (x.clone(), x.mT.contiguous(), torch.empty_like(x).copy_(y), x.mT.reshape(-1)),
    "complex": lambda x, y: (
        torch.complex(x.float(), y.float()).conj() * 2j, torch.complex(x.float(), y.float()).conj().imag + 1,
        torch.view_as_real(torch.polar(x.float().abs(), y.float())),
    ),
    "factories": lambda x, y: (
        torch.zeros(2, 3, device=x.device), torch.ones_like(x), torch.full((2,), 7, device=x.device), x.new_ones(3),
        torch.arange(2, 9, 3, device=x.device), torch.eye(3, device=x.device), torch.linspace(0, 1, 7, device=x.device),
        torch.tensor([[1, 2], [3, 4]], device=x.device), torch.tril_indices(3, 3, device=x.device),
        torch.zeros((), device=x.device), torch.scalar_tensor(2.0, device=x.device), torch.empty(0, 3, device=x.device),
    ),
    "values": lambda x, y: (x[0, 0, 0].item(), x.tolist(), bool((x > 0).any()), torch.equal(x, y), x.allclose(x)),
    "foreach": lambda x, y: torch._foreach_add([x, y], [y, x], alpha=2),
    "einops of rotary positions": lambda x, y: torch.cat((-x[..., 4:], x[..., :4]), -1) * y.cos() + x * y.sin(),
    "losses": lambda x, y: (F.mse_loss(x, y), F.cross_entropy(x[0], y[0].argmax(-1))),
    "searching": lambda x, y: (torch.unique(x.round()), torch.bucketize(x, y[0, 0].sort()[0]), x.histc(4)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_give_the_bits_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    inputs = random(2, 6, 8, dtype=dtype), random(2, 6, 8, dtype=dtype, seed=1)
    copies = to_foreign(inputs)
    assert_equal(OPERATORS[name](*copies), OPERATORS[name](*inputs))
    assert_equal(copies, inputs)  # what is written in place is, and nothing else


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["in place", "views", "cat", "a cache", "linear with bias", "attention"])
def test_operators_without_gradients(name: str, mode: Callable[[], Any]) -> None:
    inputs = random(2, 6, 8), random(2, 6, 8, seed=1)
    normal = to_foreign(inputs)
    with mode():
        born_here = to_foreign(inputs)
        assert born_here[0].is_inference() == (mode is torch.inference_mode)
        expected = OPERATORS[name](*(tensor.clone() for tensor in inputs))
        assert_equal(OPERATORS[name](*born_here), expected)
        assert_equal(OPERATORS[name](*normal), expected)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 4, 12).transpose(1, 2).split(4, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 8), (2, 5, 16)),
    "linear without bias": (lambda: nn.Linear(16, 8, bias=False), (5, 16)),
    "norms": (lambda: nn.Sequential(nn.LayerNorm(16), nn.RMSNorm(16)), (2, 5, 16)),
    "attention": (Attention, (2, 5, 16)),
    "transformer": (lambda: nn.TransformerEncoderLayer(16, 4, 32, dropout=0.2, batch_first=True), (2, 5, 16)),
    "transformer in evaluation": (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), (2, 5, 16)),
    "dropout": (lambda: nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.Linear(16, 4)), (2, 16)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.ConvTranspose2d(8, 4, 2)
        ),
        (2, 4, 12, 12),
    ),
    "convolution in one dimension": (lambda: nn.Conv1d(16, 8, 3, padding=1), (2, 16, 9)),
    "gru": (lambda: nn.GRU(16, 8, num_layers=2, batch_first=True), (2, 5, 16)),
    "lstm": (lambda: nn.LSTM(16, 8, num_layers=2, bidirectional=True), (5, 2, 16)),
    "rnn": (lambda: nn.RNN(16, 8), (5, 2, 16)),
    "cells": (lambda: nn.LSTMCell(16, 8), (2, 16)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_modules_give_the_bits_of_the_cpu_and_so_do_their_gradients(name: str, dtype: torch.dtype) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    module = make().to(dtype)
    copied = copy.deepcopy(module).to("foreign")
    x = random(*shape, dtype=dtype)
    ours, theirs = x.to("foreign").requires_grad_(), x.clone().requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outputs = []
            for network, value in ((copied, x.to("foreign")), (module, x)):
                torch.manual_seed(1)
                outputs.append(network(value))
            assert_equal(*outputs)
    outputs = []
    for network, value in ((copied, ours), (module, theirs)):
        torch.manual_seed(1)
        outputs.append(network(value))
        torch.stack([out.float().square().sum() for out in tree_flatten(outputs[-1])[0]]).sum().backward()
    assert_equal(*outputs)
    assert_equal(ours.grad, theirs.grad)
    gradients = [[p.grad for p in network.parameters()] for network in (copied, module)]
    assert all(gradient is not None for gradient in gradients[1])
    assert_equal(*gradients)
    assert_equal(dict(copied.named_buffers()), dict(module.named_buffers()))


def test_packed_sequences() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(4, 3)
    x, lengths = random(5, 2, 4), torch.tensor([5, 3])
    results = []
    for network, value in ((copy.deepcopy(module).to("foreign"), x.to("foreign")), (module, x)):
        packed, _ = network(nn.utils.rnn.pack_padded_sequence(value, lengths))
        results.append(nn.utils.rnn.pad_packed_sequence(packed)[0])
    assert_equal(*results)


def test_an_optimizer_trains_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
    copied = copy.deepcopy(module).to("foreign")
    for network, x in ((copied, random(4, 8).to("foreign")), (module, random(4, 8))):
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
    assert_equal(list(copied.state_dict().values()), list(module.state_dict().values()))


X, Y = random(4, 4), random(4, 4, seed=1)
ROWS = torch.tensor([0, 2])
MISMATCHES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "add": lambda f, c: f + c,
    "add the other way": lambda f, c: c + f,
    "add_": lambda f, c: f.add_(c),
    "add_ the other way": lambda f, c: c.add_(f),
    "add_ to a scalar of the CPU": lambda f, c: c.sum().add_(f.sum()),
    "out": lambda f, c: torch.add(f, f, out=torch.empty_like(c)),
    "out of the other": lambda f, c: torch.add(c, c, out=torch.empty_like(f)),
    "matmul": lambda f, c: f @ c,
    "bmm": lambda f, c: torch.bmm(c[None], f[None]),
    "linear": lambda f, c: F.linear(f, c),
    "linear whose bias": lambda f, c: F.linear(f, f, c[0]),
    "addmm with a scalar": lambda f, c: torch.addmm(c.sum(), f, f),
    "embedding": lambda f, c: F.embedding(ROWS.to("foreign"), c),
    "embedding whose indices": lambda f, c: F.embedding(ROWS, f),
    "index": lambda f, c: c[ROWS.to("foreign")],
    "index_select": lambda f, c: f.index_select(0, ROWS),
    "index_copy_": lambda f, c: f.index_copy_(0, ROWS.to("foreign"), c[:2]),
    "index_put_": lambda f, c: f.index_put_((ROWS,), c[:2]),
    "gather": lambda f, c: f.gather(0, c.argsort(0)),
    "where": lambda f, c: torch.where(f > 0, f, c),
    "where whose condition": lambda f, c: torch.where(c > 0, f, f),
    "masked_fill": lambda f, c: f.masked_fill(c > 0, 0.0),
    "cat": lambda f, c: torch.cat([f, c]),
    "stack": lambda f, c: torch.stack([c, f]),
    "layer_norm": lambda f, c: F.layer_norm(f, (4,), c[0]),
    "rms_norm": lambda f, c: F.rms_norm(f, (4,), c[0]),
    "convolution": lambda f, c: F.conv1d(f[None], c[:, :, None]),
    "attention": lambda f, c: F.scaled_dot_product_attention(f[None], c[None], c[None]),
    "gru": lambda f, c: nn.GRU(4, 4)(f),
    "loss": lambda f, c: F.mse_loss(f, c),
    "equal": lambda f, c: torch.equal(f, c),
    "foreach": lambda f, c: torch._foreach_add([f], [c]),
}


@pytest.mark.parametrize("name", MISMATCHES)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_devices_do_not_mix(name: str) -> None:
    foreign, host = X.to("foreign"), Y.clone()
    message = (
        "Expected all tensors to be on the same device|indices should be either on cpu or on the same device|"
        "Expected query, key, and value to have the same device type"
    )
    with pytest.raises(RuntimeError, match=message):
        MISMATCHES[name](foreign, host)
    assert_equal(foreign, X)
    assert torch.equal(host, Y)


def test_what_cuda_takes_from_the_cpu_is_taken() -> None:
    foreign, two = X.to("foreign"), torch.tensor(2.0)
    assert_equal(foreign * two, X * two)
    assert_equal(two * foreign, two * X)
    assert_equal(foreign.clone().add_(two), X + two)
    assert_equal(foreign.masked_fill(foreign > 0, two), X.masked_fill(X > 0, two))
    assert_equal(torch.where(foreign > 0, foreign, two), torch.where(X > 0, X, two))
    assert_equal(foreign.clone().fill_(two), X.clone().fill_(two))
    assert_equal(foreign[ROWS, :], X[ROWS, :])
    assert_equal(foreign[X > 0], X[X > 0])
    for index in (ROWS, X > 0):
        written, expected = foreign.clone(), X.clone()
        written[index] = two
        expected[index] = two
        assert_equal(written, expected)
    # One way and the other, and in a copy of another dtype or shape.
    assert_equal(torch.empty(4, 4, device="foreign").copy_(Y), Y)
    assert torch.equal(torch.empty(4, 4).copy_(foreign), X)
    assert torch.equal(torch.empty(2, 4, 4, dtype=torch.float64).copy_(foreign)[1], X.double())
    assert_equal(X.to("foreign", torch.bfloat16, non_blocking=True), X.to(torch.bfloat16))
    assert torch.equal(foreign.mT.to("cpu"), X.mT)


def test_numpy_and_the_cpus_generators_are_refused() -> None:
    with pytest.raises(TypeError, match="can't convert foreign:0 device type tensor to numpy"):
        X.to("foreign").numpy()
    with pytest.raises(TypeError, match="can't convert foreign:0"):
        np.asarray(X.to("foreign"))
    with pytest.raises(RuntimeError, match="Expected a 'foreign' device type for generator but found 'cpu'"):
        torch.randn(3, device="foreign", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="Only dense CPU tensors can be pinned"):
        torch.empty(3, device="foreign", pin_memory=True)


def test_a_tensor_says_where_it_is(foreign: ModuleType) -> None:
    tensor = torch.empty(2, 3, device="foreign")
    assert (tensor.device.type, str(tensor.device), tensor.is_cpu, tensor.is_foreign) == (
        "foreign", "foreign:0", False, True,
    )  # fmt: skip
    assert tensor.untyped_storage().device == torch.device("foreign", 0)
    assert "device='foreign:0'" in repr(tensor)
    assert X.foreign().device == tensor.device
    assert torch.get_device_module("foreign") is foreign
    with torch.device("foreign"):
        assert nn.Linear(2, 2).weight.device == tensor.device
    assert nn.Linear(2, 2).to("foreign").bias.device == tensor.device


def test_views_share_memory() -> None:
    tensor = torch.zeros(4, 6, device="foreign")
    row, part = tensor[1], tensor.view(2, 12)[1:, ::2]
    assert row.untyped_storage()._cdata == part.untyped_storage()._cdata == tensor.untyped_storage()._cdata
    assert row.data_ptr() == tensor.data_ptr() + 24
    version = tensor._version
    row.fill_(3.0)
    part.copy_(torch.ones(1, 6))
    assert tensor._version == row._version == version + 2
    expected = torch.zeros(4, 6)
    expected[1] = 3.0
    expected.view(2, 12)[1:, ::2] = 1.0
    assert_equal(tensor, expected)


def test_autograd_notices_what_is_overwritten() -> None:
    weight = random(4, 4).to("foreign").requires_grad_()
    used = weight * 2
    result = (used * used).sum()
    used.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_gradients_cross_devices() -> None:
    weight = random(4, 4).requires_grad_()
    (weight.to("foreign") @ X.to("foreign")).square().cpu().sum().backward()
    expected = random(4, 4).requires_grad_()
    (expected @ X).square().sum().backward()
    assert torch.equal(weight.grad, expected.grad)  # type: ignore[arg-type]


def test_random_numbers_are_the_cpus() -> None:
    def draw(device: str) -> Any:
        torch.manual_seed(3)
        weights = torch.full((8,), 0.5, device=device)
        own = torch.Generator(device=device).manual_seed(7)
        return (
            torch.randn(5, device=device), torch.rand(5, device=device), torch.randint(9, (5,), device=device),
            torch.randperm(6, device=device), torch.multinomial(weights, 3), torch.bernoulli(weights),
            torch.randn(5, device=device, generator=own), torch.multinomial(weights, 3, generator=own),
            torch.empty(4, device=device).exponential_(), F.dropout(weights, 0.5),
        )  # fmt: skip

    assert_equal(draw("foreign"), draw("cpu"))
    state = torch.foreign.get_rng_state()  # type: ignore[attr-defined]
    first = torch.randn(3, device="foreign")
    torch.foreign.set_rng_state(state)  # type: ignore[attr-defined]
    assert torch.equal(torch.randn(3, device="foreign"), first)


def test_copies_of_all_kinds() -> None:
    module = nn.Linear(3, 3).to("foreign")
    copied = copy.deepcopy(module)
    assert copied.weight.device.type == "foreign"
    assert copied.weight.data_ptr() != module.weight.data_ptr()
    assert torch.equal(copied.weight, module.weight)
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    for where in ("foreign", "cpu"):
        stored.seek(0)
        loaded = torch.load(stored, map_location=where)["weight"]
        assert (loaded.device.type, torch.equal(loaded.cpu(), module.weight.cpu())) == (where, True)


def test_memory_is_counted_and_given_back(foreign: ModuleType) -> None:
    gc.collect()
    before = foreign.memory_allocated()
    foreign.reset_peak_memory_stats()
    x = torch.empty(1024, dtype=torch.float32, device="foreign")
    assert foreign.memory_allocated() == before + 4096
    views = x.view(32, 32).mT[1:], x.detach(), x.view(torch.uint8)
    x.add_(1)
    torch.add(x, x, out=x)
    assert foreign.memory_allocated() == foreign.max_memory_allocated() == before + 4096
    y = x + x  # made by a kernel of the CPU
    assert foreign.memory_allocated() == before + 8192
    del x
    assert foreign.memory_allocated() == before + 8192, "the views hold it"
    del views
    assert foreign.memory_allocated() == before + 4096
    y.resize_(2048)
    assert foreign.memory_allocated() == before + 8192
    y.untyped_storage().resize_(0)
    assert foreign.memory_allocated() == before
    assert foreign.max_memory_allocated() >= before + 8192
    foreign.reset_peak_memory_stats()
    assert foreign.max_memory_allocated() == before


def test_resizing_keeps_what_is_there() -> None:
    for tensor in (torch.arange(6, device="foreign"), torch.arange(6, device="foreign").clone()):
        view = tensor[2:4]
        tensor.resize_(1000)
        tensor[2] = 70
        assert tensor[:6].tolist() == [0, 1, 70, 3, 4, 5]
        assert view.tolist() == [70, 3], "one storage"
        tensor.untyped_storage().resize_(32)
        assert view.tolist() == [70, 3]


def test_a_tensor_takes_the_storage_of_another() -> None:
    tensor, other = torch.empty(0, device="foreign"), X.to("foreign")
    tensor.set_(other.untyped_storage(), 4, (2, 2), (4, 1))
    assert_equal(tensor, X[1:3, :2])
    tensor.data = other[0]
    assert_equal(tensor, X[0])
    with pytest.raises(RuntimeError, match="storage"):
        tensor.set_(X.untyped_storage())


def test_a_tensor_on_memory_of_others_holds_it_for_as_long_as_its_storage_lives(foreign: ModuleType) -> None:
    before = foreign.memory_allocated()
    memory = ctypes.create_string_buffer(64)
    kept = Kept()
    died = kept.died
    tensor = foreign_tensor(ctypes.addressof(memory), 64, kept)
    del kept
    assert (tensor.dtype, tensor.shape, tensor.device.type) == (torch.uint8, (64,), "foreign")
    assert tensor.data_ptr() == ctypes.addressof(memory)
    assert foreign.memory_allocated() == before, "it is not torch's"
    part = tensor.view(torch.float32)[1:3]
    del tensor
    part.fill_(1.5)
    assert np.frombuffer(memory, dtype=np.float32)[:4].tolist() == [0.0, 1.5, 1.5, 0.0]
    with pytest.raises(RuntimeError, match="not resizable"):
        part.resize_(100)
    assert not died.is_set()
    held = [part]
    del part
    thread = threading.Thread(target=held.clear)  # whoever drops the last one
    thread.start()
    thread.join()
    assert died.is_set()


class Kept:
    def __init__(self) -> None:
        self.died = threading.Event()

    def __del__(self) -> None:
        self.died.set()


class Exchange(TorchDispatchMode):
    """Has operators read copies on the device for weights that lie on the CPU, as whoever keeps them there does."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        # They want gradients as the weights do, since ATen chooses kernels by that.
        self.copies = {w.untyped_storage()._cdata: w.detach().to("foreign").requires_grad_() for w in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def exchanged(tensor: torch.Tensor) -> torch.Tensor:
            copied = self.copies.get(tensor.untyped_storage()._cdata)
            if copied is None or func._schema.name in ("aten::t", "aten::view", "aten::detach"):
                return tensor  # views stay views of what is at home
            if copied.shape == tensor.shape and copied.stride() == tensor.stride():
                return copied
            return copied.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        return func(
            *tree_map_only(torch.Tensor, exchanged, args), **tree_map_only(torch.Tensor, exchanged, kwargs or {})
        )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", [name for name in MODULES if name != "convolutions"])  # they have buffers
def test_weights_that_lie_on_the_cpu_are_exchanged_by_a_mode(name: str, mode: Callable[[], Any]) -> None:
    """No operator looks at devices before a mode has seen it, so weights may be elsewhere than inputs."""
    make, shape = MODULES[name]
    torch.manual_seed(0)
    module, x = make(), random(*shape)
    with mode():
        with pytest.raises(RuntimeError, match=r"same device|on the same"):
            module(x.to("foreign"))
        torch.manual_seed(1)
        with Exchange([]):  # a mode that does nothing changes bits on the CPU too, under inference mode
            expected = module(x)
        torch.manual_seed(1)
        with Exchange(list(module.parameters())):
            assert_equal(module(x.to("foreign")), expected)


def test_streams_and_events_are_accepted(foreign: ModuleType) -> None:
    stream, tensor = torch.Stream("foreign"), torch.ones(3, device="foreign")
    assert stream != foreign.current_stream()
    with foreign.stream(stream):
        assert foreign.current_stream() == stream
        event = stream.record_event()
    tensor.record_stream(stream)
    foreign.current_stream().wait_event(event)
    event.synchronize()
    foreign.synchronize()
    assert event.query()
    assert stream != foreign.current_stream()


def test_autocast_casts_as_for_a_gpu() -> None:
    foreign = X.to("foreign")
    with torch.autocast("foreign", dtype=torch.bfloat16):
        assert_equal(foreign @ foreign, X.bfloat16() @ X.bfloat16())
        assert foreign.bfloat16().rsqrt().dtype == torch.float32
        assert (foreign + foreign).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):  # is not for what the CPU computes here
        result = F.scaled_dot_product_attention(foreign[None], foreign[None], foreign[None])
    assert_equal(result, F.scaled_dot_product_attention(X[None], X[None], X[None]))


@pytest.mark.usefixtures("new_dynamo")
def test_dynamo_captures(foreign: ModuleType) -> None:
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    copied = copy.deepcopy(module).to("foreign")
    x, graphs = random(2, 5, 16), []

    def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        graphs.append({example.device.type for example in examples if isinstance(example, torch.Tensor)})
        return graph.forward

    with torch.no_grad():
        expected = module(x)
        assert_equal(torch.compile(copied, backend="eager", fullgraph=True)(x.to("foreign")), expected)
        torch._dynamo.reset()
        assert_equal(torch.compile(copied, backend=backend, fullgraph=True)(x.to("foreign")), expected)
    assert graphs == [{"foreign"}]
    interface = get_interface_for_device("foreign")
    assert (interface.device_count(), interface.current_stream()) == (1, foreign.current_stream())


@pytest.mark.usefixtures("new_dynamo")
def test_aot_autograd_makes_graphs_of_basic_operators() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), Attention(), nn.Linear(16, 2))
    copied = copy.deepcopy(module).to("foreign")
    compiled = torch.compile(copied, backend="aot_eager", fullgraph=True)
    results = []
    for network, x in ((compiled, random(2, 5, 8).to("foreign")), (module, random(2, 5, 8))):
        results.append(network(x))
        results[-1].square().sum().backward()
    assert_equal(*results)
    assert_equal([p.grad for p in copied.parameters()], [p.grad for p in module.parameters()])


@pytest.mark.usefixtures("new_dynamo")
def test_inductor_compiles_for_the_cpu_as_before() -> None:
    compiled = torch.compile(lambda x: x.softmax(-1) * 2 + 1, backend="inductor", fullgraph=True)
    torch.testing.assert_close(compiled(X), X.softmax(-1) * 2 + 1)


@pytest.mark.parametrize("cache", [None, "static"], ids=["a growing cache", "a static cache"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_a_llama_says_the_very_tokens(do_sample: bool, cache: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=128, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(1, 128, (2, 7))
    settings = {"do_sample": do_sample, "max_new_tokens": 12, "disable_compile": True, "cache_implementation": cache}
    said = []
    for network, prompt in ((copy.deepcopy(model).to("foreign"), tokens.to("foreign")), (model, tokens)):
        torch.manual_seed(2)
        said.append(network.generate(prompt, attention_mask=torch.ones_like(prompt), **settings))
    assert said[1].shape == (2, 19)
    assert_equal(*said)


IN_A_PROCESS_OF_ITS_OWN = '''
import ctypes
import os
import time
from pathlib import Path
import torch
torch.ones(3, requires_grad=True).sum().backward()  # autograd has started its threads
from tests.foreign import device
device.load()
device.load()
x = torch.ones(3, device="foreign", requires_grad=True)
(x * 2).sum().backward()
assert x.grad.tolist() == [2.0, 2.0, 2.0]
# Lives longer than the interpreter.
memory = ctypes.create_string_buffer(8)
torch.kept = [device.foreign_tensor(ctypes.addressof(memory), 8, memory)]


def others():
    """What each other thread does, and how often it has slept."""
    told = [task.joinpath("status").read_text().splitlines() for task in Path("/proc/self/task").iterdir()]
    told = [dict(line.split(":", 1) for line in lines) for lines in told]
    return [(each["State"], each["voluntary_ctxt_switches"]) for each in told if int(each["Pid"]) != os.getpid()]


# Autograd's thread lets go of what the pass knew of Python after it has told that the pass is over. Where the
# interpreter ends just then, torch ends the process, whichever device it is. So the thread is waited for: asleep, and
# still so after a moment in which anyone might have had the interpreter.
before = None
while (now := others()) != before or not all("S" in state for state, _ in now):
    before = now
    time.sleep(0.001)
print("done")
'''


def test_it_may_be_loaded_when_autograd_has_begun_and_be_there_at_the_end_of_the_process() -> None:
    command = [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (finished.returncode, finished.stdout) == (0, "done\n"), finished.stderr
