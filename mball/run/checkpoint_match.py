"""Matches what a model holds with what a checkpoint holds. All that does not fit is refused, and nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mball.errors import CheckpointError
from mball.run.census import Census, OwnedWeight
from mball.storage import CheckpointIndex, TensorEntry


def match_weights(census: Census, index: CheckpointIndex, rename: Mapping[str, str]) -> list[TensorEntry]:
    """Returns the checkpoint's entry of every weight.

    Raises:
        CheckpointError: a weight is missing, or has another shape or dtype there.
    """
    entries = []
    for weight in census.weights:
        entry = _find(weight.names, index, rename)
        if entry is None:
            near = ", ".join(list(index.entries)[:3])
            raise CheckpointError(
                f"weight {weight.name!r} is not in checkpoint {index.path} ({len(index.entries)} tensors: {near}, …); "
                "use the checkpoint of this model, or rename={parameter: name in the checkpoint}"
            )
        _check_entry(weight, entry, index)
        entries.append(entry)
    return entries


def _find(names: Sequence[str], index: CheckpointIndex, rename: Mapping[str, str]) -> TensorEntry | None:
    # A tied weight is stored under one of its names.
    return next((e for name in names if (e := index.entries.get(rename.get(name, name))) is not None), None)


def _check_entry(weight: OwnedWeight, entry: TensorEntry, index: CheckpointIndex) -> None:
    parameter = weight.parameter
    dtype = str(parameter.dtype).removeprefix("torch.")
    if entry.shape != tuple(parameter.shape):
        raise CheckpointError(
            f"weight {weight.name!r} has shape {tuple(parameter.shape)}, but {entry.name!r} in checkpoint {index.path} "
            f"has {entry.shape}; use the checkpoint of this model"
        )
    if entry.dtype != dtype:
        raise CheckpointError(
            f"weight {weight.name!r} is {dtype}, but {entry.name!r} in checkpoint {index.path} is {entry.dtype}, and a "
            f"checkpoint is read in place: build the model in {entry.dtype} "
            f"(model.to(torch.{entry.dtype})), or load it and wrap it without weights="
        )


def load_buffers(census: Census, index: CheckpointIndex | None, rename: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Returns real tensors for the buffers that are on the meta device, read from the checkpoint.

    Raises:
        CheckpointError: such a buffer is missing there, or has another shape or dtype.
    """
    loaded: dict[str, torch.Tensor] = {}
    for name, buffer in census.buffers.items():
        if not buffer.is_meta:
            continue
        entry = None if index is None else index.entries.get(rename.get(name, name))
        if entry is None:
            raise CheckpointError(
                f"buffer {name!r} is on the meta device and not in the checkpoint: build the model with real buffers "
                "(only its parameters on the meta device), or use mball.integrations.transformers.from_pretrained"
            )
        if entry.shape != tuple(buffer.shape) or entry.dtype != str(buffer.dtype).removeprefix("torch."):
            raise CheckpointError(
                f"buffer {name!r} is {buffer.dtype} {tuple(buffer.shape)}, but {entry.name!r} in the checkpoint is "
                f"{entry.dtype} {entry.shape}; use the checkpoint of this model"
            )
        loaded[name] = _read_tensor(entry)
    return loaded


def _read_tensor(entry: TensorEntry) -> torch.Tensor:
    tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    if entry.size_bytes:
        with open(entry.file, "rb") as file:
            file.seek(entry.offset_bytes)
            num_read = file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if num_read != entry.size_bytes:
            raise CheckpointError(
                f"{entry.file} ends at byte {entry.offset_bytes + num_read}, in the middle of {entry.name!r} "
                f"({entry.size_bytes} bytes from {entry.offset_bytes}): it is truncated; copy or download it again"
            )
    return tensor
