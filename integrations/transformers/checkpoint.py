"""Which tensor of a checkpoint belongs to which name of a transformers model.

transformers renames keys while it loads (old names, a base model saved alone), and for some models it converts
tensors (Mixtral's experts are fused). The renaming is asked of transformers itself; a conversion is only noticed.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

import mball
from mball.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_TORCH_SINGLE_FILE = "pytorch_model.bin"
_TORCH_INDEX_FILE = "pytorch_model.bin.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of a checkpoint; its bytes stay on disk. `dtype` is None where torch has no such type."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMap:
    """How a checkpoint fits a model.

    Attributes:
        sources: model name -> checkpoint name; has an entry for every name that was found.
        converted: checkpoint names that transformers does not load as they are.
        extra: checkpoint names that the model has no place for and does not know as harmless.
    """

    sources: Mapping[str, str]
    converted: tuple[str, ...]
    extra: tuple[str, ...]


def list_names(directory: Path) -> list[str] | None:
    """Returns the sorted names in `directory`; None where there is no directory.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(
            f"{directory} cannot be read ({error.strerror}); give a local directory that this user may read"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{str(directory)!r} cannot be read ({error}); give a local directory") from error


def check_readable(file: Path) -> None:
    """Raises CheckpointError unless `file` is a regular file that can be read."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise CheckpointError(f"{file} is not a regular file; fetch the checkpoint again")
        file.open("rb").close()
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); check its rights, or fetch the checkpoint again"
        ) from error


def read_entries(directory: Path) -> dict[str, Entry]:
    """Returns the tensors of the safetensors checkpoint in `directory` by name; empty where there is none.

    Without one an index of PyTorch's own files is only checked: transformers opens whatever it names.

    Raises:
        CheckpointError: an index is wrong, names a file that is not there, or disagrees with one, or a file is damaged.
    """
    names = list_names(directory) or []
    # The same order of preference as transformers'. By name: what is there and cannot be read is no reason to go on.
    for name in (SINGLE_FILE, INDEX_FILE):
        if name in names:
            return _read_entries(directory / name)
    if _TORCH_INDEX_FILE in names and _TORCH_SINGLE_FILE not in names:
        with mball.open(directory / _TORCH_INDEX_FILE) as checkpoint:
            _check_any(directory / _TORCH_INDEX_FILE, checkpoint.keys())
    return {}


def _read_entries(path: Path) -> dict[str, Entry]:
    # Strict: whatever the index says is true of the shards, and it names no file elsewhere.
    with mball.open(path) as checkpoint:
        names = checkpoint.keys()
        _check_any(path, names)
        files = dict.fromkeys(names, path.name)
        if path.name == INDEX_FILE:
            files = json.loads(path.read_bytes())["weight_map"]
        entries = {}
        for name in sorted(names, key=lambda name: (files[name], name)):
            part = checkpoint.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype())
            entries[name] = Entry(file=path.parent / files[name], shape=tuple(part.get_shape()), dtype=dtype)
    return entries


def _check_any(path: Path, names: list[str]) -> None:
    if not names:
        raise CheckpointError(f"{path} has no tensors; download or save the checkpoint again")


def map_keys(model: PreTrainedModel, entries: Mapping[str, Entry]) -> KeyMap:
    """Returns which entry belongs to which name of `model`, by transformers' own rules."""
    expected = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    prefix = model.base_model_prefix
    sources: dict[str, str] = {}
    converted, extra = [], []
    for key in entries:
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            # A rule for an older layout fired on a name that is current already.
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        if name not in expected:
            extra.append(key)
        elif pattern is not None:
            converted.append(key)
        elif name not in sources or key == name:
            sources[name] = key
    return KeyMap(sources=sources, converted=tuple(converted), extra=_without_harmless(model, extra))


def _without_harmless(model: PreTrainedModel, extra: list[str]) -> tuple[str, ...]:
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    known = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    # A buffer that older versions saved (MiniLM's `embeddings.position_ids`) is rebuilt, wherever it now lives.
    return tuple(
        key
        for key in extra
        if key.rpartition(".")[2] not in buffers and not any(pattern.search(key) for pattern in known)
    )
