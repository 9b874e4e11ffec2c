"""Tensors of GGUF files, through the package `gguf`."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from mball.errors import CheckpointError, ConfigError
from mball.load.source import Advance, Settings, refuse_changed
from mball.load.torch_source import TensorFacts
from mball.storage import FileIdentity
from mball.storage.header import AGAIN
from mball.storage.shards import check_regular

# GGUF's name: what holds the same bits in torch. Everything else is dequantised to float32.
_SAME_BITS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}


class GgufSource:
    """A `Source` of one mapped file; each tensor is made anew when it is asked for.

    Raises:
        CheckpointError: the file is damaged, of another byte order, or has a type that `gguf` cannot dequantise.
        ConfigError: the package is missing.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        try:
            import gguf
        except ImportError as error:
            raise ConfigError(f"{path} is a GGUF file, which the package gguf reads: pip install gguf") from error
        self._path = path
        self._settings = settings
        self._identity = FileIdentity.of(path, check_regular(path))
        self._dequantize = gguf.dequantize
        try:
            reader = gguf.GGUFReader(path)
            found = {tensor.name: tensor for tensor in reader.tensors}
            texts = {name: str(field.contents()) for name, field in reader.fields.items() if len(field.types) == 1}
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} cannot be read ({error.strerror or error})") from error
        except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError, struct.error) as error:
            raise CheckpointError(
                f"checkpoint {path} is damaged or no GGUF file: {type(error).__name__}: {str(error)[:200]}; {AGAIN}"
            ) from error
        if reader.byte_order == "S":
            raise CheckpointError(f"checkpoint {path} has the other byte order; convert it with gguf-convert-endian")
        self._tensors: dict[str, Any] = found
        self._texts = texts
        self._entries = {name: self._facts(tensor) for name, tensor in found.items()}

    @property
    def metadata(self) -> Mapping[str, str] | None:
        return self._texts

    def entries(self) -> Mapping[str, TensorFacts]:
        return self._entries

    def offset_keys(self) -> list[str]:
        return sorted(self._tensors, key=lambda name: int(self._tensors[name].data_offset))

    def load(self, names: Iterable[str], advance: Advance) -> dict[str, torch.Tensor]:
        refuse_changed([self._identity])
        loaded = {}
        for name in names:
            loaded[name] = self._read(name).to(self._settings.device)
            advance(self._entries[name].size_bytes)
        refuse_changed([self._identity])
        return loaded

    def part(self, name: str, index: Any) -> torch.Tensor:
        refuse_changed([self._identity])
        return self._read(name)[index].clone().to(self._settings.device)

    def close(self) -> None:
        self._tensors = {}

    def _facts(self, tensor: Any) -> TensorFacts:
        # GGUF counts dimensions from the fastest.
        shape = tuple(int(size) for size in reversed(tensor.shape))
        dtype = _SAME_BITS.get(tensor.tensor_type.name, torch.float32)
        size_bytes = int(tensor.n_elements) * dtype.itemsize
        return TensorFacts(size_bytes=size_bytes, dtype=str(dtype).removeprefix("torch."), shape=shape)

    def _read(self, name: str) -> torch.Tensor:
        tensor, shape = self._tensors[name], self._entries[name].shape
        kind = tensor.tensor_type.name
        if (dtype := _SAME_BITS.get(kind)) is not None:
            raw = numpy.array(tensor.data).reshape(-1).view(numpy.uint8)
            return torch.from_numpy(raw).view(dtype).view(shape)
        try:
            return torch.from_numpy(self._dequantize(tensor.data, tensor.tensor_type)).view(shape)
        except NotImplementedError as error:
            raise CheckpointError(
                f"checkpoint {self._path}: tensor {name!r} is {kind}, which the package gguf cannot dequantise; "
                "convert it"
            ) from error
