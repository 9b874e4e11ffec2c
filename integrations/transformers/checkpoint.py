"""Which tensor of a checkpoint belongs to which name of a transformers model.

transformers renames keys while it loads (old names, a base model saved alone), and for some models it converts
tensors (Mixtral's experts are fused). The renaming is asked of transformers itself; a conversion is only noticed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mball.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

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


def read_entries(directory: Path) -> dict[str, Entry]:
    """Returns the tensors of the safetensors checkpoint in `directory` by name; empty where there is none.

    Raises:
        CheckpointError: the index names a file that is not there, or a file is damaged.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is no checkpoint index: {error!r}; fetch the checkpoint again") from error
    elif (directory / SINGLE_FILE).is_file():
        files = [SINGLE_FILE]
    else:
        return {}
    entries: dict[str, Entry] = {}
    for path in (directory / name for name in files):
        try:
            with safe_open(path, framework="pt") as checkpoint:
                for name in checkpoint.keys():  # noqa: SIM118 - safe_open is no mapping
                    part = checkpoint.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype())
                    entries[name] = Entry(file=path, shape=tuple(part.get_shape()), dtype=dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; fetch the checkpoint again") from error
    return entries


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
