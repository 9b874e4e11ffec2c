"""Tenants: the model's own parameters and buffers, as they move into their homes and out again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from mball.errors import DeviceError
from mball.run.census import Census
from mball.run.homes import Home
from mball.units import format_bytes

logger = logging.getLogger(__name__)


def move_in(census: Census, homes: Sequence[Home]) -> list[tuple[torch.nn.Parameter, int]]:
    """Makes every parameter its home; returns all parameters with the weight each of them is."""
    parameters = []
    for number, (weight, home) in enumerate(zip(census.weights, homes, strict=True)):
        moved: dict[int, torch.nn.Parameter] = {}
        for owner in weight.owners:
            old = owner.module._parameters[owner.attribute]
            assert old is not None
            if id(old) not in moved:
                moved[id(old)] = _at_home(old, home.tensor)
                parameters.append((moved[id(old)], number))
            if moved[id(old)] is not old:
                # Through setattr, since some modules keep lists of their own parameters.
                setattr(owner.module, owner.attribute, moved[id(old)])
    return parameters


def buffer_bytes(census: Census, new: Mapping[str, torch.Tensor], place: torch.device) -> int:
    """Returns what all buffers take on the compute device.

    Args:
        census: of the modules.
        new: what takes the place of buffers on the meta device.
        place: where steps compute.
    """
    if place.type == "cpu":
        return census.buffer_bytes() + sum(tensor.nbytes for tensor in new.values())
    found = {id(buffer): buffer for buffer in {**census.buffers, **new}.values() if not buffer.is_meta}
    # Elsewhere each becomes a tensor of its own.
    return sum(buffer.numel() * buffer.element_size() for buffer in found.values())


def move_buffers(census: Census, new: Mapping[str, torch.Tensor], place: torch.device) -> dict[str, torch.Tensor]:
    """Returns those buffers that are elsewhere as they are on the compute device, under each of their names.

    Raises:
        DeviceError: there is not so much memory.
    """
    moved: dict[int, torch.Tensor] = {}
    there: dict[str, torch.Tensor] = {}
    for name, buffer in {**census.buffers, **new}.items():
        if buffer.device != place and not buffer.is_meta:
            if id(buffer) not in moved:
                try:
                    with torch.inference_mode(False), torch.no_grad():
                        moved[id(buffer)] = buffer.to(place)
                except torch.OutOfMemoryError as error:
                    size = format_bytes(buffer.nbytes)
                    raise DeviceError(f"buffer {name!r} of {size} does not fit on {place}: {error}") from error
            there[name] = moved[id(buffer)]
    return there


def place_buffers(census: Census, tensors: Mapping[str, torch.Tensor]) -> None:
    """Makes the buffers of these names these tensors."""
    for name, tensor in tensors.items():
        owner = census.buffer_owners[name]
        owner.module._buffers[owner.attribute] = tensor


def return_buffers(owners: Sequence[tuple[torch.nn.Module, str]]) -> None:
    """Moves these modules' buffers of these names to host memory, where they were; one that two have stays one.

    Of a GPU whose work is lost none can be had: they stay there, and the log says so.
    """
    moved: dict[int, torch.Tensor] = {}
    for module, name in owners:
        buffer = module._buffers.get(name)
        if buffer is None:
            continue
        if id(buffer) not in moved:
            try:
                moved[id(buffer)] = buffer.cpu()
            except RuntimeError as error:
                logger.warning("buffer %r of a %s is lost: %s", name, type(module).__name__, error)
                continue
        module._buffers[name] = moved[id(buffer)]


def move_out(pairs: Sequence[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    """Gives parameters ordinary memory with the bytes of their homes, tied ones the same.

    Args:
        pairs: each parameter with its home.
    """
    fresh: dict[int, torch.Tensor] = {}
    for parameter, home in pairs:
        if id(home) not in fresh:
            fresh[id(home)] = home.clone(memory_format=torch.preserve_format)
        parameter.data = fresh[id(home)]


def _at_home(parameter: torch.nn.Parameter, home: torch.Tensor) -> torch.nn.Parameter:
    if parameter.is_meta:
        fresh = torch.nn.Parameter(home, requires_grad=parameter.requires_grad)
        fresh.__dict__.update(parameter.__dict__)
        return fresh
    parameter.data = home
    return parameter
