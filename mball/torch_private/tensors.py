"""Tensors: which share a storage, and which are more than tensors."""

from __future__ import annotations

import torch


def storage_key(tensor: torch.Tensor) -> int:
    """Returns a number that all tensors over the same storage share while it lives."""
    key: int = tensor.untyped_storage()._cdata
    return key


def is_subclass(value: object) -> bool:
    """Returns whether `value` is a tensor that may have its own ideas of what an operator does."""
    return isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, torch.nn.Parameter)
