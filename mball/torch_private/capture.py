"""How Dynamo is had to capture a call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mball.torch_private.dispatch import without_casts


class _Capture(threading.local):
    active = False


_capture = _Capture()


class _Running(threading.local):
    here = False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's decorator has no types
def capturing() -> bool:
    """Returns whether a wrapped model runs whose numbers are to be those of the uncompiled one, in this thread.

    Perhaps it is being captured. Dynamo takes it as a constant.
    """
    return _capture.active


def compile_call(
    call: Callable[..., Any],
    backend: Callable[..., Any],
    *,
    before_capture: Callable[[], None],
    faithful: bool,
    fullgraph: bool,
    dynamic: bool | None,
) -> Callable[..., Any]:
    """Returns `torch.compile(call, backend=backend)`, made to notice hooks that come or go after capture.

    With `faithful` the model is told by `capturing` to do what it does uncompiled. `before_capture` is called in
    the calling thread whenever Dynamo begins to capture. Only the first call asks for `torch.compile`, which imports
    for half a second: many models are never captured.
    """
    import torch._dynamo
    import torch._inductor.config  # which the line above imports too, and no more of it
    from torch._dynamo.callback import callback_handler

    compiled: Callable[..., Any] | None = None
    running = _Running()

    def started(_: object) -> None:
        if running.here:
            before_capture()

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = torch.compile(call, backend=backend, fullgraph=fullgraph, dynamic=dynamic)
        before = _capture.active, running.here
        try:
            _capture.active, running.here = faithful, True
            # Here and not once for all: `torch._dynamo.reset()` removes what is registered.
            callback_handler.register_start_callback(started)
            with (
                _weights_as_arguments(),
                without_casts(),  # else Dynamo would capture what the mode does
                torch._dynamo.config.patch(skip_nnmodule_hook_guards=False),
            ):
                return compiled(*args, **kwargs)
        finally:
            with contextlib.suppress(ValueError):
                callback_handler.remove_start_callback(started)
            _capture.active, running.here = before

    return run


@contextmanager
def _weights_as_arguments() -> Iterator[None]:
    """Keeps Dynamo from putting weights into graphs as constants, which it does where Inductor is to freeze them."""
    frozen, prepared = torch._inductor.config.freezing, torch._dynamo.config.prepare_freezing
    if not frozen and not prepared:
        yield
        return
    with torch._inductor.config.patch(freezing=False), torch._dynamo.config.patch(prepare_freezing=False):
        yield
