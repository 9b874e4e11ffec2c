"""The dispatch modes of this thread, and what autocast keeps between operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode


def is_active(mode: TorchDispatchMode) -> bool:
    """Returns whether `mode` is active in this thread; autograd's threads have the modes of who waits for them."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return any(each is mode for each in _get_current_dispatch_mode_stack())


def is_only_mode(mode: TorchDispatchMode) -> bool:
    """Returns whether `mode` is the one dispatch mode that is active in this thread."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    stack = _get_current_dispatch_mode_stack()
    return len(stack) == 1 and stack[0] is mode


def without_dispatch() -> AbstractContextManager[None]:
    """Returns a context without dispatch modes. It is C++, so that Ctrl-C cannot leave it half entered."""
    context: AbstractContextManager[None] = torch._C._DisableTorchDispatch()
    return context


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Under autocast: keeps no cast copies of weights until its region ends."""
    enabled = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    if not (enabled and torch.is_autocast_cache_enabled()):
        yield
        return
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(True)
