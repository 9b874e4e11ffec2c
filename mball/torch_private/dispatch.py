"""The dispatch modes of this thread, and autocast: what it does to operators, and what it keeps between them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
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


class _Casts(threading.local):
    are_kept = True


_casts = _Casts()


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Keeps autocast from holding casts of weights, also in regions that begin within and ask for it."""
    _watch_regions()
    before = torch.is_autocast_cache_enabled(), _casts.are_kept
    try:
        _casts.are_kept = False
        torch.set_autocast_cache_enabled(False)
        yield
    finally:
        torch.set_autocast_cache_enabled(before[0])
        _casts.are_kept = before[1]


@functools.cache
def _watch_regions() -> None:
    # A region sets what was noted when its object was made, perhaps before any pass: a decorator is made on import.
    enter = torch.autocast.__enter__

    @functools.wraps(enter)
    def entered(self: torch.autocast) -> Any:
        region = enter(self)  # type: ignore[no-untyped-call]  # torch does not type it
        if not _casts.are_kept:
            torch.set_autocast_cache_enabled(False)
        return region

    torch.autocast.__enter__ = entered  # type: ignore[method-assign]


def is_any_autocast_on() -> bool:
    """Returns whether autocast is on in this thread, for whichever device."""
    return bool(torch._C._is_any_autocast_enabled())


def casts_here(device_type: str) -> bool:
    """Returns whether the operator that a dispatch mode was handed was called under autocast for such a device.

    Within the mode itself autocast is never on: it is told by what torch noted when the call came.
    """
    with torch._C._RestorePythonTLSSnapshot():  # type: ignore[attr-defined]  # torch does not declare it
        return torch.is_autocast_enabled(device_type)


@contextmanager
def autocast_again(device_type: str) -> Iterator[None]:
    """Has operators that a dispatch mode calls cast what they read, as if they were called outside of it."""
    torch.set_autocast_enabled(device_type, True)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, False)


class CastWeights(TorchFunctionMode):
    """Casts homes under autocast for such a device where a function is more than one operator.

    What it is made of a dispatch mode sees, and not what it was: the bias of a linear layer may be added like any other
    tensor, which would widen the result, and convolutions compare dtypes before any operator runs.

    Attributes:
        num_open: calls that it was asked about and that did not return yet.
    """

    def __init__(self, device_type: str, is_home: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self.num_open = 0
        self._device_type = device_type
        self._is_home = is_home

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = self.num_open
        try:
            self.num_open = before + 1
            if func in _MADE_OF_OTHERS and torch.is_autocast_enabled(self._device_type):
                stay = _STAY.get(func, ())
                args = tuple(value if place in stay else self._cast(value) for place, value in enumerate(args))
                kwargs = {name: self._cast(value) for name, value in kwargs.items()}
            return func(*args, **kwargs)
        finally:
            self.num_open = before

    def _cast(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._cast(each) for each in value]
        dtype = torch.get_autocast_dtype(self._device_type)
        if not isinstance(value, torch.Tensor) or value.dtype in (dtype, torch.float64) or not self._is_home(value):
            return value
        return torch.ops.aten._to_copy.default(value, dtype=dtype)  # which reads it in its slot, whatever the mode


_MADE_OF_OTHERS = frozenset(
    {
        torch.nn.functional.linear,
        torch.nn.functional.multi_head_attention_forward,
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
        torch.prelu,
        torch.einsum,
        torch.lstm_cell,
        torch.gru_cell,
        torch.rnn_tanh_cell,
        torch.rnn_relu_cell,
    }
)
# Of its arguments the keys and values that are appended: not what linear layers read.
_STAY = {torch.nn.functional.multi_head_attention_forward: (7, 8)}


@contextmanager
def without_casts() -> Iterator[None]:
    """Takes `CastWeights` off this thread for a while, if that is the mode that was entered last."""
    from torch.overrides import _get_current_function_mode, _pop_mode_temporarily

    if not isinstance(_get_current_function_mode(), CastWeights):
        yield
        return
    with _pop_mode_temporarily():
        yield
