"""Finds the weights and buffers of modules: what mball has to manage, each tensor once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from mball.errors import WrapError


@dataclass(frozen=True, slots=True)
class Owner:
    """A module that holds a weight, and the attribute it holds it under."""

    module: torch.nn.Module
    attribute: str


@dataclass(slots=True, kw_only=True)
class OwnedWeight:
    """One distinct weight: all names and owners under which the modules hold it."""

    names: list[str]
    parameter: torch.nn.Parameter
    owners: list[Owner] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """All weights that hold bytes, and all buffers, in module order."""

    weights: tuple[OwnedWeight, ...]
    buffers: dict[str, torch.Tensor]
    buffer_owners: dict[str, Owner]

    def buffer_bytes(self) -> int:
        """Returns the bytes of all buffers that hold any, shared storage counted once."""
        held = [buffer.untyped_storage() for buffer in self.buffers.values() if not buffer.is_meta]
        return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def take_census(roots: Sequence[torch.nn.Module]) -> Census:
    """Returns the weights and buffers of `roots`, tied and shared ones once.

    Raises:
        WrapError: a weight is of a kind that cannot be streamed; the message names it.
    """
    weights: dict[object, OwnedWeight] = {}
    buffers: dict[str, torch.Tensor] = {}
    buffer_owners: dict[str, Owner] = {}
    for path, module in _modules(roots):
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{attribute}" if path else attribute
            check_streamable(name, parameter)
            if parameter.numel() == 0:
                continue
            owned = weights.setdefault(identity_of(parameter), OwnedWeight(names=[], parameter=parameter))
            owned.names.append(name)
            owned.owners.append(Owner(module, attribute))
        for attribute, buffer in module._buffers.items():
            if buffer is not None:
                name = f"{path}.{attribute}" if path else attribute
                buffers[name] = buffer
                buffer_owners[name] = Owner(module, attribute)
    found = tuple(weights.values())
    check_overlap(found)
    return Census(weights=found, buffers=buffers, buffer_owners=buffer_owners)


def count_weights(roots: Sequence[torch.nn.Module]) -> int:
    """Returns how many distinct weights `roots` have that hold bytes, those that cannot be streamed included."""
    found: set[object] = set()
    for _, module in _modules(roots):
        for parameter in module._parameters.values():
            if parameter is None or isinstance(parameter, torch.nn.UninitializedParameter) or not parameter.numel():
                continue
            plain = type(parameter.data) is torch.Tensor and parameter.layout is torch.strided
            found.add(identity_of(parameter) if plain else id(parameter))
    return len(found)


def _modules(roots: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Module]]:
    seen: set[torch.nn.Module] = set()
    for number, root in enumerate(roots):
        prefix = f"{number}" if len(roots) > 1 else ""
        yield from root.named_modules(memo=seen, prefix=prefix)


def identity_of(parameter: torch.nn.Parameter) -> object:
    """Returns what is equal for parameters that are one weight: those that have the same memory in the same way."""
    if parameter.is_meta:
        return id(parameter)
    return (parameter.data_ptr(), parameter.dtype, tuple(parameter.shape), parameter.stride())


def check_streamable(name: str, parameter: torch.nn.Parameter) -> None:
    """Raises WrapError when this weight is of a kind that cannot be streamed."""
    kind = type(parameter)
    if isinstance(parameter, torch.nn.UninitializedParameter):
        raise WrapError(f"weight {name!r} is not initialised yet; run the model once, then wrap it")
    if type(parameter.data) is not torch.Tensor:
        raise WrapError(f"weight {name!r} is a {type(parameter.data).__name__}; mball streams plain dense tensors only")
    if parameter.layout is not torch.strided:
        raise WrapError(f"weight {name!r} has layout {parameter.layout}; mball streams dense tensors only")
    if parameter.device.type not in ("cpu", "meta"):
        raise WrapError(
            f"weight {name!r} ({kind.__name__}) lies on {parameter.device}; its home is to be in host memory, whatever "
            "device the model runs on: call model.to('cpu') first"
        )


def check_overlap(weights: Sequence[OwnedWeight]) -> None:
    """Raises WrapError when two weights share part of their memory."""
    spans = []
    for weight in weights:
        if not weight.parameter.is_meta:
            first = weight.parameter.data_ptr()
            spans.append((first, first + span_bytes(weight.parameter), weight.name))
    spans.sort()
    for (_, end, name), (first, _, other) in itertools.pairwise(spans):
        if first < end:
            raise WrapError(
                f"weights {name!r} and {other!r} are different views of the same memory; "
                "give each its own memory (clone one) or make them one Parameter, then wrap again"
            )


def span_bytes(tensor: torch.Tensor) -> int:
    """Returns the bytes from the tensor's first element to the end of its last, holes included."""
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
