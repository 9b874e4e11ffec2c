"""A transformers model without its weights: parameters on the meta device, buffers with their values."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import initialization as transformers_init
from transformers.configuration_utils import PretrainedConfig

import mball
from mball.errors import CheckpointError
from mball.integrations.transformers.checkpoint import Entry, KeyMap


def build(model_class: Any, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a model of `config` with parameters of `dtype` on the meta device, in eval mode.

    `model_class` is a model class of transformers or one of its Auto classes. Non-persistent buffers
    (`inv_freq`) have their values; persistent ones are on the meta device until `load_buffers`.
    """
    create = getattr(model_class, "from_config", None) or model_class._from_config
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        # Some models compute with `.item()` while they are built, which the meta device cannot do.
        stack.enter_context(transformers_init.meta_device_safe_creation_ops())
        model: PreTrainedModel = create(config, dtype=dtype)
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._non_persistent_buffers_set:
            setattr(module, leaf, torch.zeros_like(buffer, device="cpu"))
    # The initialisers of transformers compute such buffers anew, as its own loading does. They leave parameters alone
    # that are marked so: random numbers for the meta device take a tenth of a second.
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.initialize_weights()
    return model.eval()


def load_buffers(model: PreTrainedModel, keys: KeyMap, entries: Mapping[str, Entry]) -> None:
    """Loads the persistent buffers of `model` (running statistics) from the checkpoint.

    Raises:
        CheckpointError: a buffer is missing or has another shape.
        StorageError: a read failed.
    """
    buffers = {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if buffer.is_meta}
    if missing := [name for name in buffers if name not in keys.sources]:
        raise CheckpointError(f"the checkpoint lacks the buffer {missing[0]!r} of {type(model).__name__}")
    values: dict[str, torch.Tensor] = {}
    by_file: dict[Path, list[str]] = {}
    for key in dict.fromkeys(keys.sources[name] for name in buffers):
        by_file.setdefault(entries[key].file, []).append(key)
    for file, wanted in by_file.items():
        with mball.open(file, copy=True) as checkpoint:
            values |= checkpoint.get_tensors(wanted)
    for name, buffer in buffers.items():
        key = keys.sources[name]
        # A copy: what was read together shares memory with what lies between.
        value = values[key].to(buffer.dtype, copy=True)
        if value.shape != buffer.shape:
            raise CheckpointError(
                f"buffer {name!r} has shape {tuple(buffer.shape)}, {key!r} in {entries[key].file} {tuple(value.shape)}"
            )
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value)
