"""Every private or unstable torch API that mball uses, in one place, probed at start.

If one of them is missing, `capture_available` says so and mball runs the model through the dispatch
mode alone: the same results and the same budget, without the knowledge that a captured graph gives.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateApi:
    """One private API: where it lives, what mball does with it, and whether this torch has it."""

    name: str
    purpose: str
    found: bool


_USED = (
    ("torch.utils._python_dispatch.TorchDispatchMode", "binds weights that operators outside graphs read"),
    (
        "torch.utils._python_dispatch.TorchDispatchMode.ignore_compile_internals",
        "lets graphs be captured while the dispatch mode is active",
    ),
    ("torch.nn.Module._call_impl", "opens a pass at every module call"),
    ("torch.nn.Module._compiled_call_impl", "opens a pass at every module call"),
    (
        "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
        "keeps the dispatch mode away from captured graphs",
    ),
    ("torch._C._DisableTorchDispatch", "keeps the dispatch mode away from captured graphs"),
    ("torch._dynamo.config.skip_nnmodule_hook_guards", "notices hooks that come after capture"),
    ("torch._dynamo.callback.callback_handler", "says when a capture begins, so that its memory is known"),
    ("torch._ops.OpOverload", "tells views and writes from reads"),
    ("torch.utils.flop_counter.flop_registry", "counts floating point operations"),
    ("torch.autograd.graph.increment_version", "makes autograd notice that a slot was reused"),
)
__all__ = [
    "PrivateApi",
    "TorchDispatchMode",
    "capturing",
    "compile_faithfully",
    "count_flops",
    "example_value",
    "get_call",
    "hint_of",
    "is_only_mode",
    "is_subclass",
    "missing_for_capture",
    "no_autocast_cache",
    "plain_call",
    "probe",
    "set_call",
    "storage_key",
    "symbol_of",
    "without_dispatch",
    "writes_and_aliases",
]

CAPTURE_NEEDS = frozenset(
    {
        "torch.utils._python_dispatch.TorchDispatchMode.ignore_compile_internals",
    }
)


def probe() -> list[PrivateApi]:
    """Returns all private APIs that mball uses, found or not."""
    return [PrivateApi(name=name, purpose=purpose, found=_exists(name)) for name, purpose in _USED]


def _exists(name: str) -> bool:
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for attribute in parts[split:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def missing_for_capture() -> list[str]:
    """Returns the names without which graphs cannot be captured beside the dispatch mode."""
    return [api.name for api in probe() if api.name in CAPTURE_NEEDS and not api.found]


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


def storage_key(tensor: torch.Tensor) -> int:
    """Returns a number that all tensors over the same storage share while it lives."""
    key: int = tensor.untyped_storage()._cdata
    return key


def example_value(node: torch.fx.Node) -> Any:
    """Returns the fake value that Dynamo recorded for `node`, or None."""
    return node.meta.get("example_value")


def writes_and_aliases(func: Any) -> tuple[frozenset[str | int], bool]:
    """Returns which arguments operator `func` writes (positions and names), and whether it returns an alias of one.

    The facts come from the operator's schema.
    """
    schema = func._schema
    writes: set[str | int] = set()
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            writes.add(argument.name)
            if not argument.kwarg_only:
                writes.add(position)
    return frozenset(writes), any(result.alias_info is not None for result in schema.returns)


def count_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Returns the floating point operations of one operator call, 0 when no formula is known."""
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(func._overloadpacket) if hasattr(func, "_overloadpacket") else None
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0


def symbol_of(value: Any) -> Any:
    """Returns the sympy expression of a symbolic int, or the int itself."""
    return value.node.expr if isinstance(value, torch.SymInt) else value


def hint_of(value: Any) -> int:
    """Returns the value that a symbolic int had while tracing, or the int itself."""
    return int(value.node.hint) if isinstance(value, torch.SymInt) else int(value)


def is_only_mode(mode: TorchDispatchMode) -> bool:
    """Returns whether `mode` is the one dispatch mode that is active in this thread."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    stack = _get_current_dispatch_mode_stack()
    return len(stack) == 1 and stack[0] is mode


def without_dispatch() -> AbstractContextManager[None]:
    """Returns a context without dispatch modes. It is C++, so that Ctrl-C cannot leave it half entered."""
    context: AbstractContextManager[None] = torch._C._DisableTorchDispatch()
    return context


def is_subclass(value: object) -> bool:
    """Returns whether `value` is a tensor that may have its own ideas of what an operator does."""
    return isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, torch.nn.Parameter)


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Under autocast: keeps no cast copies of weights until its region ends."""
    if not (torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()):
        yield
        return
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(True)


class _Capture(threading.local):
    active = False


_capture = _Capture()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's decorator has no types
def capturing() -> bool:
    """Returns whether a wrapped model runs, and is perhaps captured, in this thread. Dynamo takes it as a constant."""
    return _capture.active


def compile_faithfully(
    call: Callable[..., Any], backend: Callable[..., Any], *, before_capture: Callable[[], None]
) -> Callable[..., Any]:
    """Returns `torch.compile(call, backend=backend)`, made to do what `call` does uncompiled.

    By default Dynamo does not look whether hooks came or went since it captured a graph. `before_capture` is called
    in the calling thread whenever Dynamo begins to capture.
    """
    import torch._dynamo
    from torch._dynamo.callback import callback_handler

    compiled = torch.compile(call, backend=backend)

    def started(_: object) -> None:
        if _capture.active:
            before_capture()

    def run(*args: Any, **kwargs: Any) -> Any:
        before = _capture.active
        try:
            _capture.active = True
            # Here and not once for all: `torch._dynamo.reset()` removes what is registered.
            callback_handler.register_start_callback(started)
            with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
                return compiled(*args, **kwargs)
        finally:
            with contextlib.suppress(ValueError):
                callback_handler.remove_start_callback(started)
            _capture.active = before

    return run
