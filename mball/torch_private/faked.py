"""Where Dynamo takes weights to be while it captures: on the compute device, though they lie at home.

[Note: devices in a graph] Dynamo runs a call with fakes of its tensors, and each operator refuses fakes of two devices.
A home is host memory, and what is bound for it when the graph runs is on the compute device, so its fake says that it
is there too. Guards are made from the tensors themselves, and hold. Nothing is bound outside of passes, so homes are
host memory to whoever captures there, unless it is for a backend whose graphs open a pass.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch


class Homes(Protocol):
    """What knows which tensors lie at home."""

    def has(self, tensor: torch.Tensor) -> bool:
        """Returns whether a plain tensor is a home, or a view of one."""


class _Passes(threading.local):
    homes: tuple[Homes, ...] = ()  # of those that are open


_BackendT = TypeVar("_BackendT", bound=Callable[..., Any])

_lock = threading.Lock()
_places: weakref.WeakKeyDictionary[Homes, torch.device] = weakref.WeakKeyDictionary()
_passes = _Passes()
_own_backends: list[Callable[..., Any]] = []


def fake_homes_on(place: torch.device, homes: Homes) -> None:
    """Has fakes of these homes be on `place` within their passes, and in captures for backends that open one."""
    if place.type != "cpu":
        _watch_fakes()
        with _lock:
            _places[homes] = place


@contextmanager
def in_pass_of(homes: Homes) -> Iterator[None]:
    """A pass of these homes, in this thread."""
    before = _passes.homes
    try:
        _passes.homes = (*before, homes)
        yield
    finally:
        _passes.homes = before


def opens_passes(backend: _BackendT) -> _BackendT:
    """Says of a backend of Dynamo that its graphs open a pass of the homes that they read. Returns it."""
    _own_backends.append(backend)
    return backend


@functools.cache
def _watch_fakes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    make = FakeTensorMode.from_tensor

    @functools.wraps(make)
    def from_tensor(self: FakeTensorMode, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        fake = make(self, tensor, *args, **kwargs)
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided:
            place = _place_of(tensor)
            if place is not None:
                fake.fake_device = place
        return fake

    FakeTensorMode.from_tensor = from_tensor  # type: ignore[method-assign]


def _place_of(tensor: torch.Tensor) -> torch.device | None:
    """Returns where a tensor is bound in what this thread captures or runs; None for one that stays where it lies."""
    with _lock:
        places = list(_places.items())
    for homes, place in places:
        if homes.has(tensor):
            return place if any(each is homes for each in _passes.homes) or _captures_for_own_backend() else None
    return None


def _captures_for_own_backend() -> bool:
    dynamo = sys.modules.get("torch._dynamo.symbolic_convert")
    try:
        backend = None if dynamo is None else dynamo.InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # nothing is being captured in this thread
        return False
    while backend is not None and backend not in _own_backends:
        # What was wrapped around the backend: by Dynamo, and by `torch.compile`.
        backend = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None)
    return backend is not None
