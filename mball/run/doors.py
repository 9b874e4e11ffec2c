"""Doors: the places where a call enters a wrapped model. Every door opens a pass.

A door stands on every module that holds weights in its subtree, because users call parts of a model directly
(`generate()` calls an encoder, `m.head(x)`). The outermost door opens the pass, the others find it open.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from mball import torch_private
from mball.errors import AutogradError, WrapError
from mball.run.binding import BindingMode
from mball.run.engine import Engine


class Gate:
    """Opens and closes passes of one engine.

    Args:
        engine: runs the passes.
        parameters: all managed parameters, as the user holds them, each with the weight it is.
    """

    def __init__(self, engine: Engine, parameters: Sequence[tuple[torch.nn.Parameter, int]]) -> None:
        self.engine = engine
        self._mode = BindingMode(engine)
        self._parameters = [parameter for parameter, _ in parameters]
        self._homes = [engine.homes.homes[weight] for _, weight in parameters]
        self._addresses = [home.tensor.data_ptr() for home in self._homes]

    def pairs(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Returns every managed parameter with its home."""
        return [(parameter, home.tensor) for parameter, home in zip(self._parameters, self._homes, strict=True)]

    @contextmanager
    def open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """A pass, unless one is open in this thread.

        Raises:
            AutogradError: autograd would record through streamed weights.
            WrapError: a weight was exchanged or converted behind mball's back.
        """
        if not self.engine.begin_pass():
            yield
            return
        failed = True
        cache = torch.is_autocast_cache_enabled()
        try:
            self._check_weights()
            self._check_autograd(args, kwargs)
            # Autocast would keep a cast copy of every weight until its region ends.
            torch.set_autocast_cache_enabled(False)
            with self._mode:
                yield
            failed = False
        finally:
            torch.set_autocast_cache_enabled(cache)
            self.engine.end_pass(failed=failed)

    @contextmanager
    def unbound(self) -> Iterator[None]:
        """A captured graph binds its own weights: the mode need not look at its operators."""
        if not torch_private.is_innermost_mode(self._mode):
            yield  # a mode of the user's is above ours, and ours sees slots only
            return
        self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch does not type its modes
        try:
            yield
        finally:
            self._mode.__enter__()  # type: ignore[no-untyped-call]  # torch does not type its modes

    def _check_weights(self) -> None:
        for parameter, home, address in zip(self._parameters, self._homes, self._addresses, strict=True):
            tensor = home.tensor
            if parameter.data_ptr() != address or parameter.dtype != tensor.dtype or parameter.shape != tensor.shape:
                raise WrapError(
                    f"weight {home.name!r} was given other memory, dtype or shape (now {parameter.dtype} "
                    f"{tuple(parameter.shape)}, its home is {tensor.dtype} {tuple(tensor.shape)}): copy values into it "
                    "instead (p.copy_(...)), or mball.unwrap(model), change it, and wrap it again"
                )

    def _check_autograd(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        why = None
        for parameter, home in zip(self._parameters, self._homes, strict=True):
            if parameter.requires_grad:
                why = f"weight {home.name!r} requires grad"
                break
        else:
            if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs))):
                why = "an input requires grad"
        if why:
            raise AutogradError(
                f"{why} and grad mode is on, so autograd would record through streamed weights: "
                "run the model under torch.no_grad() or torch.inference_mode()"
            )


def check_graph_inputs(args: Iterable[Any]) -> None:
    """Raises AutogradError when grad mode is on and an input of a captured graph requires grad."""
    if torch.is_grad_enabled():
        for value in args:
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise AutogradError(
                    "a tensor that requires grad reaches a captured graph while grad mode is on, so autograd would "
                    "record through streamed weights: run the model under torch.no_grad() or torch.inference_mode()"
                )


def hang_door(module: torch.nn.Module, gate: Gate, inner: Callable[..., Any] | None = None) -> None:
    """Makes `module(...)` open a pass; `inner` replaces the module's own call (a compiled one)."""
    run = inner or torch_private.plain_call(module)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]  # torch's decorator has no types
    @functools.wraps(run)
    def through_door(*args: Any, **kwargs: Any) -> Any:
        with gate.open(args, kwargs):
            return run(*args, **kwargs)

    torch_private.set_call(module, through_door)


class Wrapped:
    """Mixed into the class of a wrapped model: the same object, with what a streamed model cannot do refused."""

    _mball_gate: Gate

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = next((p for p in self.parameters()), None)  # type: ignore[attr-defined]
        if before is not None and recurse:
            with torch.no_grad():
                probe = fn(torch.empty(1, dtype=before.dtype, device=before.device))
            if probe.dtype == before.dtype and probe.device == before.device:
                return self
        raise WrapError(
            "a wrapped model cannot be moved or converted, because its weights stay at their homes: "
            "call mball.unwrap(model), convert it, and wrap it again (or convert while loading: dtype=...)"
        )

    def __deepcopy__(self, memo: Any) -> Any:
        raise WrapError("a wrapped model cannot be copied: call mball.unwrap(model) first, or copy its state_dict()")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise WrapError(
            "a wrapped model cannot be pickled: save model.state_dict() instead, or call mball.unwrap(model) first"
        )


def mix_in(module: torch.nn.Module, gate: Gate) -> None:
    """Gives `module` a class that derives from `Wrapped` and its own, under the same name."""
    original = type(module)

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original.forward(self, *args, **kwargs)
        with gate.open(args, kwargs):
            return original.forward(self, *args, **kwargs)

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    module.__class__ = type(original.__name__, (Wrapped, original), {**names, "forward": forward, "_mball_gate": gate})


def mix_out(module: torch.nn.Module) -> None:
    """Undoes `mix_in`."""
    module.__class__ = type(module).__mro__[2]
