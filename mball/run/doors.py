"""Doors: the places where a call enters a wrapped model. Every door opens a pass.

A door stands on every module that holds weights in its subtree, because users call parts of a model directly
(`generate()` calls an encoder, `m.head(x)`). The outermost door opens the pass, the others find it open.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from mball.errors import AutogradError, WrapError
from mball.run.binding import BindingMode
from mball.run.engine import Engine
from mball.run.homes import Home
from mball.run.household import Household
from mball.run.placed import names_of
from mball.run.tiers import kind_of
from mball.torch_private.calls import plain_call, set_call
from mball.torch_private.dispatch import CastWeights, is_active, is_only_mode, no_autocast_cache, without_dispatch
from mball.torch_private.faked import in_pass_of
from mball.torch_private.tensors import is_subclass

_R = TypeVar("_R")


class Tenant(NamedTuple):
    """A parameter at its home: the home, its address, and which weight it is."""

    parameter: torch.nn.Parameter
    home: Home
    address: int
    weight: int


def tenant_of(engine: Engine, parameter: torch.nn.Parameter, weight: int) -> Tenant:
    """Returns the tenant that `parameter` is of the engine's home `weight`."""
    home = engine.homes.homes[weight]
    return Tenant(parameter, home, home.tensor.data_ptr(), weight)


class Gate:
    """Opens and closes passes of one engine.

    Args:
        engine: runs the passes.
        parameters: all managed parameters, as the user holds them, each with the weight it is.
        roots: the modules that hold them.
    """

    def __init__(
        self, engine: Engine, parameters: Sequence[tuple[torch.nn.Parameter, int]], roots: Sequence[torch.nn.Module]
    ) -> None:
        self.engine = engine
        self._casting = CastWeights(engine.place.type, engine.homes.has)
        self.mode = BindingMode(engine, self._casting)
        self._tenants = [tenant_of(engine, parameter, weight) for parameter, weight in parameters]
        self._require_grad: list[bool] = []
        self._managed = {id(parameter) for parameter, _ in parameters}
        self._household = Household(roots)

    def pairs(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Returns every managed parameter with its home."""
        return [(tenant.parameter, tenant.home.tensor) for tenant in self._tenants]

    def run(self, call: Callable[..., _R], args: Sequence[Any], kwargs: Mapping[str, Any]) -> _R:
        """Returns `call(*args, **kwargs)`, in a pass of its own unless one is open in this thread.

        Locks alone say whether a pass is open, because a `with` statement releases them whenever Ctrl-C strikes.

        Raises:
            AutogradError: autograd would record through streamed weights.
            WrapError: a weight was exchanged, converted or added behind mball's back; or autocast is on for the CPU
                where steps compute elsewhere.
            DeviceError: an operator found no memory.
        """
        engine = self.engine
        # Also in a thread of autograd's, which computes a checkpoint again: who holds the lock waits for it to end.
        if is_active(self.mode):
            return call(*args, **kwargs)
        with engine.lock:
            if engine.passing.locked():
                return call(*args, **kwargs)
            with engine.passing:
                return self._pass(call, args, kwargs)

    def _pass(self, call: Callable[..., _R], args: Sequence[Any], kwargs: Mapping[str, Any]) -> _R:
        try:
            self.engine.begin_pass(kind_of(args, kwargs))
            self._check_household()
            check_tenants(self._tenants)
            check_autograd(self._tenants, args, kwargs)
            check_autocast(self.engine.place)
            self._follow_requires_grad()
            self.mode.paused = False
            place = self.engine.place.type
            casting = self._casting if place != "cpu" and torch.is_autocast_enabled(place) else nullcontext()
            inside = in_pass_of(self.engine.homes)
            with no_autocast_cache(), inside, self.engine.execution.device.allocating(), self.mode, casting:
                result = call(*args, **kwargs)
            self.engine.end_pass()
        except torch.OutOfMemoryError as error:
            self.engine.recover()
            raise self.engine.refused(error) from error
        except BaseException:
            self.engine.recover()
            raise
        return result

    def run_graph(self, call: Callable[..., _R], args: Sequence[Any], *, higher_order: bool = False) -> _R:
        """Returns `call(*args)` for a captured graph. It binds its own weights: the mode need not see its operators.

        An operator of higher order looks for modes itself, and must find ours where it is active.
        """
        plain = not higher_order and not any(map(is_subclass, args))
        if plain and is_only_mode(self.mode):
            with without_dispatch():
                return call(*args)
        # A mode of the user's sees them all, and so does ours.
        self.mode.paused = True
        try:
            return call(*args)
        finally:
            self.mode.paused = False

    def _check_household(self) -> None:
        if not self._household.changed():
            return
        new = [name for name, parameter in self._household.parameters() if id(parameter) not in self._managed]
        if new:
            raise WrapError(
                f"{len(new)} parameters came to the model after it was wrapped ({', '.join(map(repr, new[:4]))}"
                f"{', …' if len(new) > 4 else ''}), so nothing would stream them or count them: mball.unwrap(model), "
                "then wrap it again with them"
            )
        self._household.accept()

    def _follow_requires_grad(self) -> None:
        now = [tenant.parameter.requires_grad for tenant in self._tenants]
        if now != self._require_grad:
            flags = [False] * len(self.engine.homes)
            for tenant, flag in zip(self._tenants, now, strict=True):
                flags[tenant.weight] |= flag
            self.engine.execution.set_requires_grad(flags)
            self._require_grad = now


def check_tenants(tenants: Iterable[Tenant]) -> None:
    """Raises WrapError when a parameter is not at its home any more."""
    for parameter, home, address, _ in tenants:
        tensor = home.tensor
        if parameter.data_ptr() != address or parameter.dtype != tensor.dtype or parameter.shape != tensor.shape:
            raise WrapError(
                f"weight {home.name!r} was given other memory, dtype or shape (now {parameter.dtype} "
                f"{tuple(parameter.shape)}, its home is {tensor.dtype} {tuple(tensor.shape)}): copy values into it "
                "instead (p.copy_(...)), or mball.unwrap(model), change it, and wrap it again"
            )


def check_autograd(tenants: Iterable[Tenant], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises AutogradError when autograd would record a call with these arguments that reads these parameters."""
    if not torch.is_grad_enabled():
        return
    why = None
    for parameter, home, _, _ in tenants:
        if parameter.requires_grad:
            why = f"weight {home.name!r} requires grad"
            break
    else:
        if any(
            isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves((tuple(args), dict(kwargs)))
        ):
            why = "an input requires grad"
    if why:
        raise AutogradError(
            f"{why} and grad mode is on, so autograd would record through streamed weights: "
            "run the model under torch.no_grad() or torch.inference_mode()"
        )


def check_autocast(place: torch.device) -> None:
    """Raises WrapError under autocast for the CPU where steps compute elsewhere: it would cast homes, and no input."""
    if place.type != "cpu" and torch.is_autocast_enabled("cpu"):
        raise WrapError(
            f"torch.autocast('cpu') is on, and the model computes on {str(place)!r}, where that casts nothing: use "
            f"torch.autocast({place.type!r}), or leave it out"
        )


def hang_door(module: torch.nn.Module, gate: Gate, inner: Callable[..., Any] | None = None) -> None:
    """Makes `module(...)` open a pass; `inner` replaces the module's own call (a compiled one)."""
    run = inner or plain_call(module)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]  # torch's decorator has no types
    @functools.wraps(run)
    def through_door(*args: Any, **kwargs: Any) -> Any:
        return gate.run(run, args, kwargs)

    set_call(module, through_door)


class Wrapped:
    """Mixed into the class of a wrapped model: the same object, with what a streamed model cannot do refused."""

    _mball_gate: Gate

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = next((p for p in self.parameters()), None)  # type: ignore[attr-defined]
        place = self._mball_gate.engine.place
        if before is not None and recurse:
            with torch.no_grad():
                probe = fn(torch.empty(1, dtype=before.dtype, device=place))
            if probe.dtype == before.dtype and probe.device == place:
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


def mixed_class(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Returns a class that derives from `Wrapped` and `original`, under the name of the latter."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original.forward(self, *args, **kwargs)
        return self._mball_gate.run(original.forward, (self, *args), kwargs)

    return type(original.__name__, (Wrapped, original), {**names_of(original), "forward": forward})


def mix_in(module: torch.nn.Module, mixed: type[Any], gate: Gate) -> None:
    """Gives `module` the class that was made of its own."""
    mixed._mball_gate = gate
    module.__class__ = mixed


def mix_out(module: torch.nn.Module) -> None:
    """Undoes `mix_in`."""
    module.__class__ = type(module).__mro__[2]
