"""What calling a module runs: its own call, or another in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def set_call(module: torch.nn.Module, call: Callable[..., Any] | None) -> None:
    """Makes `module(...)` run `call(...)`; None restores the plain call.

    This is the attribute that `Module.compile` sets. Dynamo traces through the module's own call and
    does not see it, and pickling drops it.
    """
    module._compiled_call_impl = call


def get_call(module: torch.nn.Module) -> Callable[..., Any] | None:
    """Returns what `set_call` or `Module.compile` set, or None."""
    call: Callable[..., Any] | None = module._compiled_call_impl
    return call


def plain_call(module: torch.nn.Module) -> Callable[..., Any]:
    """Returns the module's call with its hooks, without any replacement."""
    call: Callable[..., Any] = module._call_impl
    return call


def inner_module(module: torch.nn.Module) -> torch.nn.Module:
    """Returns the module that `torch.compile(module)` made this one of, or itself."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None or not isinstance(module, torch._dynamo.OptimizedModule) else inner
