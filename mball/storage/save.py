"""Writes safetensors files whole or not at all, a tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mball.errors import StorageError
from mball.storage.header import SAFETENSORS_NAMES
from mball.units import round_up
from mball.whole_files import whole_file, write_all

_ALIGNMENT_BYTES = 8


def save_tensors(
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    metadata: Mapping[str, str] | None,
    *,
    written: Callable[[str], None] = lambda name: None,
) -> None:
    """Writes a safetensors file, which takes the place of `path` once all of it is on the disk.

    No tensor is copied that is contiguous in host memory, any other one while it is written.

    Args:
        tensors: by name, of any device.
        path: where to.
        metadata: text for the header.
        written: called with the name of each tensor that was written.

    Raises:
        StorageError: a tensor cannot be saved, or the file cannot be written. `path` is then as it was.
    """
    for name, tensor in tensors.items():
        _check(name, tensor)
    # As safetensors does it: large elements first, so that each is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, size_bytes = _header(tensors, names, metadata)
    with whole_file(path, size_bytes, "checkpoint") as descriptor:
        write_all(descriptor, memoryview(header))
        for name in names:
            write_all(descriptor, _bytes(tensors[name]))
            written(name)
        _check_header(descriptor, path, names)


def _check(name: object, tensor: object) -> None:
    if not isinstance(name, str) or name == "__metadata__":
        raise StorageError(f"{name!r} cannot be the name of a tensor in a safetensors file; rename it")
    if not isinstance(tensor, torch.Tensor):
        raise StorageError(
            f"{name!r} is a {type(tensor).__name__}, and safetensors files hold tensors only; leave it out"
        )
    if tensor.is_meta:
        raise StorageError(f"tensor {name!r} is on the meta device, so it has no bytes to save; load it first")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise StorageError(
            f"tensor {name!r} is {tensor.layout}, and safetensors files hold dense tensors: call to_dense()"
        )
    if str(tensor.dtype).removeprefix("torch.") not in SAFETENSORS_NAMES:
        raise StorageError(f"tensor {name!r} is {tensor.dtype}, which safetensors does not know; convert it")


def _header(
    tensors: Mapping[str, torch.Tensor], names: list[str], metadata: Mapping[str, str] | None
) -> tuple[bytes, int]:
    header: dict[str, Any] = {}
    if metadata is not None:
        wrong = [key for key, value in metadata.items() if not (isinstance(key, str) and isinstance(value, str))]
        if wrong:
            raise StorageError(f"metadata must be text, and that of {wrong[0]!r} is not; call str() on it")
        header["__metadata__"] = dict(metadata)
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        dtype = SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(round_up(len(text), _ALIGNMENT_BYTES))
    return struct.pack("<Q", len(text)) + text, _ALIGNMENT_BYTES + len(text) + end


def _bytes(tensor: torch.Tensor) -> memoryview:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
    flat: Any = plain.reshape(-1).view(torch.uint8).numpy()  # numpy says that it is a buffer from Python 3.12 on
    return memoryview(flat)


def _check_header(descriptor: int, path: Path, names: list[str]) -> None:
    """Has safetensors read what was written, before it takes anything's place."""
    try:
        with safe_open(f"/proc/self/fd/{descriptor}", framework="pt") as file:
            same = set(file.keys()) == set(names)
    except SafetensorError as error:
        raise StorageError(
            f"{path}: safetensors does not read what was written ({error}); nothing was replaced"
        ) from error
    if not same:
        raise StorageError(f"{path}: safetensors reads other names than were written; nothing was replaced")
