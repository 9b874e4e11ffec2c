"""What operators allocate inside themselves, as far as it is known before they run.

The numbers are those of PyTorch's CPU kernels, as measured: a convolution reorders its whole weight before it
computes; a half-precision matrix product whose left operand cannot be seen as one matrix becomes a batched one,
which copies the right operand (ATen's `matmul` folds the batch when the strides allow it, or the right operand requires
grad). What is not known here is measured in the first run.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from mball.torch_private.nodes import example_value
from mball.torch_private.symbols import hint_of

_CONVOLUTIONS = frozenset(
    (
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
        torch.ops.aten.convolution.default,
    )
)
_PRODUCTS = frozenset((torch.nn.functional.linear, torch.matmul, operator.matmul))
# What becomes of products that do not fold, after AOTAutograd; those that do are `mm` and `addmm`, which copy nothing.
_BATCHED_PRODUCT = torch.ops.aten.bmm.default
_HALF = (torch.bfloat16, torch.float16)


def assumed_workspace_bytes(node: torch.fx.Node) -> int:
    """Returns the bytes that `node` is assumed to allocate besides its results."""
    if node.op != "call_function" or len(node.args) < 2:
        return 0
    left, right = _tensor(node.args[0]), _tensor(node.args[1])
    if left is None or right is None:
        return 0
    if node.target in _CONVOLUTIONS:
        return _bytes(right)
    if node.target in _PRODUCTS and right.dtype in _HALF and not _has_bias(node) and not _folds(left, right):
        return _bytes(right)
    if node.target is _BATCHED_PRODUCT and right.dtype in _HALF and _repeats(right) and not _is_loop(left, right):
        return _bytes(right)
    return 0


def _tensor(argument: Any) -> torch.Tensor | None:
    value = example_value(argument) if isinstance(argument, torch.fx.Node) else argument
    return value if isinstance(value, torch.Tensor) else None


def _has_bias(node: torch.fx.Node) -> bool:
    return (node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")) is not None


def _folds(left: torch.Tensor, right: torch.Tensor) -> bool:
    if right.requires_grad:  # ATen folds then, for the sake of a backward pass, even where none will come
        return True
    # Hints, not the symbols themselves: asking a symbol would add a guard to the graph.
    sizes = [hint_of(size) for size in left.shape]
    strides = [hint_of(stride) for stride in left.stride()]
    return all(strides[i] == strides[i + 1] * sizes[i + 1] for i in range(len(sizes) - 2))


def _repeats(batch: torch.Tensor) -> bool:
    """Returns whether all matrices of a batch are one, as a weight that was expanded; others are not copied."""
    return hint_of(batch.stride(0)) == 0 or hint_of(batch.shape[0]) == 1


def _is_loop(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Returns whether Inductor computes a batched product in a loop of its own, which copies nothing."""
    return 1 in (hint_of(left.shape[1]), hint_of(right.shape[2]))


def _bytes(tensor: torch.Tensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= hint_of(size)
    return count * tensor.element_size()
