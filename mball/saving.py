"""save_file: weights as a safetensors file, which is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from mball.api import find_state
from mball.errors import StorageError, WrapError
from mball.run.homes import Homes
from mball.storage.save import save_tensors
from mball.torch_private.tensors import storage_key


def save_file(
    tensors: Mapping[str, torch.Tensor] | torch.nn.Module,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file that is there whole or not at all, whatever comes in between.

    The bytes are written beside `path`, brought to the disk, and only then take its place. That may be the checkpoint
    that a wrapped model is read from: the model goes on with the weights it has. No copy of the model is made.

    Args:
        tensors: by name, as for `safetensors.torch.save_file`; or a module, wrapped or not, whose state dict is saved.
            Of tied weights one is written; the file's metadata says which for the others, as with
            `safetensors.torch.save_model`.
        path: where to.
        metadata: text for the header.

    Raises:
        StorageError: a tensor cannot be saved, the file cannot be written, or the swap file was damaged. `path` is
            then as it was.
        WrapError: this is called in the middle of a call of the model.
    """
    if not isinstance(tensors, torch.nn.Module):
        twins = _twins(tensors)
        if twins:
            first, second = next(iter(twins.items()))
            raise StorageError(
                f"tensors {second!r} and {first!r} are the same memory: leave one out, or save the module"
            )
        save_tensors(tensors, Path(path), metadata)
        return
    state = find_state(tensors)
    with contextlib.ExitStack() as held:
        found: dict[str, torch.Tensor] = tensors.state_dict()
        twins = _twins(found)
        notes = {**twins, **(metadata or {})}
        for name in twins:
            del found[name]
        written: Callable[[str], None] = _nothing_to_give_back
        if state is not None:
            engine = state.engine
            held.enter_context(engine.lock)
            if engine.in_pass:
                raise WrapError("save_file was called in the middle of a call of the model; call it before or after")
            homes = engine.homes
            known = {name: weight for name, tensor in found.items() if (weight := _home_of(homes, tensor)) is not None}
            for weight in known.values():
                homes.verify(weight)
            written = partial(_give_back, homes, known)
        save_tensors(found, Path(path), notes or None, written=written)


def _twins(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Returns the names of tensors that are others, and of which."""
    seen: dict[object, str] = {}
    twins = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        if (
            isinstance(tensor, torch.Tensor)
            and tensor.numel()
            and not tensor.is_meta
            and tensor.layout is torch.strided
        ):
            identity = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if identity in seen:
                twins[name] = seen[identity]
            seen.setdefault(identity, name)
    return twins


def _home_of(homes: Homes, tensor: torch.Tensor) -> int | None:
    return homes.weight_of_storage.get(storage_key(tensor)) if isinstance(tensor, torch.Tensor) else None


def _give_back(homes: Homes, known: Mapping[str, int], name: str) -> None:
    """Lets go of the pages that were mapped to be written."""
    if name in known:
        homes.give_back(known[name])


def _nothing_to_give_back(name: str) -> None:
    """Ordinary memory stays."""
