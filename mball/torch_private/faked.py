"""Where Dynamo takes weights to be while it captures: on the compute device, though they lie at home.

[Note: devices in a graph] Dynamo runs a call with fakes of its tensors, and each operator refuses fakes of two devices.
A home is host memory, and what is bound for it when the graph runs is on the compute device, so its fake says that it
is there too. Guards are made from the tensors themselves, and hold.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, Protocol

import torch


class Homes(Protocol):
    """What knows which tensors lie at home."""

    def has(self, tensor: torch.Tensor) -> bool:
        """Returns whether a plain tensor is a home, or a view of one."""


_places: weakref.WeakKeyDictionary[Homes, torch.device] = weakref.WeakKeyDictionary()


def fake_homes_on(place: torch.device, homes: Homes) -> None:
    """Has fakes of these homes be on `place`, for as long as there are `homes`."""
    if place.type != "cpu":
        _watch_fakes()
        _places[homes] = place


@functools.cache
def _watch_fakes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    make = FakeTensorMode.from_tensor

    @functools.wraps(make)
    def from_tensor(self: FakeTensorMode, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        fake = make(self, tensor, *args, **kwargs)
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided:
            place = next((place for homes, place in list(_places.items()) if homes.has(tensor)), None)
            if place is not None:
                fake.fake_device = place
        return fake

    FakeTensorMode.from_tensor = from_tensor  # type: ignore[method-assign]
