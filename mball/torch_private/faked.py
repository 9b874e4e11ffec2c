"""Where Dynamo takes weights to be while it captures: on the compute device, though they lie at home.

[Note: devices in a graph] Dynamo runs a call with fakes of its tensors, and each operator refuses fakes of two devices.
A home is host memory, and what is bound for it when the graph runs is on the compute device, so its fake says that it
is there too. Guards are made from the tensors themselves, and hold.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Faking(threading.local):
    homes: tuple[torch.device, Callable[[torch.Tensor], bool]] | None = None


_faking = _Faking()


@contextmanager
def homes_on(place: torch.device, is_home: Callable[[torch.Tensor], bool]) -> Iterator[None]:
    """Has fakes of homes be on `place`, in this thread."""
    if place.type == "cpu":
        yield
        return
    _watch_fakes()
    before = _faking.homes
    try:
        _faking.homes = place, is_home
        yield
    finally:
        _faking.homes = before


@functools.cache
def _watch_fakes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    make = FakeTensorMode.from_tensor

    @functools.wraps(make)
    def from_tensor(self: FakeTensorMode, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        fake = make(self, tensor, *args, **kwargs)
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if _faking.homes is not None and plain and _faking.homes[1](tensor):
            fake.fake_device = _faking.homes[0]
        return fake

    FakeTensorMode.from_tensor = from_tensor  # type: ignore[method-assign]
