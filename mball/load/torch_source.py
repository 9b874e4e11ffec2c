"""Tensors of PyTorch's own files, unpickled without running code."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mball.errors import CheckpointError
from mball.load.source import Advance, Settings, refuse_changed
from mball.storage import FileIdentity
from mball.storage.header import AGAIN
from mball.storage.shards import Layout, check_names, check_regular, read_weight_map

TORCH = Layout(
    single_file="pytorch_model.bin",
    index_file="pytorch_model.bin.index.json",
    suffixes=(".bin", ".pt", ".pth"),
    index_suffix=".bin.index.json",
)

# What else unpickling of damaged bytes ends in.
_DAMAGED = (LookupError, ArithmeticError, MemoryError, struct.error)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFacts:
    """`Facts` of a tensor that is there already."""

    size_bytes: int
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorFacts:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(size_bytes=tensor.nbytes, dtype=dtype, shape=tuple(tensor.shape))


class TorchSource:
    """A `Source` of mapped files; old ones, which cannot be mapped, are read whole when they are opened.

    Raises:
        CheckpointError: a file is damaged, holds anything but a dict of tensors, or would run code.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self._settings = settings
        if path.name.endswith(TORCH.index_suffix):
            promised = read_weight_map(path)
            self._files = [FileIdentity.of(shard, check_regular(shard)) for shard in promised]
            shards = {shard: _read(shard) for shard in promised}
            check_names(path, promised, shards)
            self._tensors = {name: shards[shard][name] for shard, names in promised.items() for name in names}
        else:
            self._files = [FileIdentity.of(path, check_regular(path))]
            self._tensors = _read(path)
        self._entries = {name: TensorFacts.of(tensor) for name, tensor in self._tensors.items()}

    @property
    def metadata(self) -> Mapping[str, str] | None:
        return None

    def entries(self) -> Mapping[str, TensorFacts]:
        return self._entries

    def offset_keys(self) -> list[str]:
        return list(self._entries)

    def load(self, names: Iterable[str], advance: Advance) -> dict[str, torch.Tensor]:
        refuse_changed(self._files)
        wanted = list(names)
        if len(wanted) == len(self._entries) and (self._settings.copy or self._settings.device.type != "cpu"):
            self._read_ahead()
        # Tensors that share memory go on sharing it.
        storages: dict[int, torch.UntypedStorage] = {}
        loaded = {}
        for name in wanted:
            tensor = self._tensors[name]
            loaded[name] = self._moved(tensor, storages)
            advance(tensor.nbytes)
        refuse_changed(self._files)
        return loaded

    def part(self, name: str, index: Any) -> torch.Tensor:
        refuse_changed(self._files)
        return self._tensors[name][index].clone().to(self._settings.device)

    def close(self) -> None:
        self._tensors = {}

    def _read_ahead(self) -> None:
        """Has the kernel bring the files: touching pages one after another would wait for each."""
        for file in self._files:
            # A hint: what cannot be read is told where it is.
            with contextlib.suppress(OSError), open(file.path, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def _moved(self, tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage]) -> torch.Tensor:
        if self._settings.device.type == "cpu" and not self._settings.copy:
            return tensor
        old = tensor.untyped_storage()
        if (new := storages.get(old.data_ptr())) is None:
            flat = torch.empty(0, dtype=torch.uint8).set_(old)
            new = storages[old.data_ptr()] = flat.to(self._settings.device, copy=True).untyped_storage()
        like = torch.empty(0, dtype=tensor.dtype, device=self._settings.device)
        return like.set_(new, tensor.storage_offset(), tensor.shape, tensor.stride())


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        with path.open("rb") as file:
            is_mappable = file.read(4) == b"PK\x03\x04"
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mappable)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error.strerror or error}); check the path and its rights"
        ) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} holds more than tensors, or is damaged: {_first_line(error)} Nothing of it was run; "
            "if you trust it, load it with torch.load(weights_only=False) and save its tensors as safetensors"
        ) from error
    except (RuntimeError, ValueError, TypeError, AttributeError, EOFError, AssertionError, *_DAMAGED) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged or no file of torch.save ({type(error).__name__}: {_first_line(error)}); "
            f"{AGAIN}"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(found).__name__}, not a dict of tensors; load it with torch.load"
        )
    others = [name for name, value in found.items() if not (isinstance(name, str) and isinstance(value, torch.Tensor))]
    if others:
        raise CheckpointError(
            f"checkpoint {path} holds {len(others)} things that are no tensors by name, such as {others[0]!r} "
            f"({type(found[others[0]]).__name__}); load it with torch.load(weights_only=True) and choose what you want"
        )
    for name, value in found.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            kind = "quantised" if value.is_quantized else "meta" if value.is_meta else f"of layout {value.layout}"
            raise CheckpointError(
                f"checkpoint {path}: tensor {name!r} is {kind}, not plain numbers in memory; load it with torch.load"
            )
    # What is conjugated or negated lazily is not what lies in its storage.
    return {name: value.detach().resolve_conj().resolve_neg() for name, value in found.items()}


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else ""
