"""transformers models under mball: `from_pretrained` for a local directory, without materialising weights."""

from __future__ import annotations

import logging
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

import mball
from mball.errors import CheckpointError, ConfigError
from mball.integrations.transformers.checkpoint import Entry, KeyMap, check_readable, list_names, map_keys, read_entries
from mball.integrations.transformers.meta import build, load_buffers

__all__ = ["from_pretrained"]

_log = logging.getLogger(__name__)


def from_pretrained(
    path: str | Path,
    *,
    budget: int | str,
    dtype: torch.dtype | str | None = None,
    model_class: Any = None,
    **settings: Any,
) -> PreTrainedModel:
    """Returns the transformers model in the local directory `path`, wrapped by mball, in eval mode.

    The weights stay in the checkpoint and are read from there in place: the model is built on the meta device. Where
    that cannot be, transformers loads the model whole and mball writes it to swap, with one log line: for a
    `dtype` other than the checkpoint's, for a layout that transformers converts, and without safetensors files.
    `path` may be a GGUF file too, or a directory with one and no config.json: transformers dequantises it.

    `model_class` is a model class of transformers or one of its Auto classes; default the first of the config's
    `architectures`, else AutoModelForCausalLM. `budget` and `settings` are those of `mball.wrap`.

    Raises:
        CheckpointError: `path` is no model directory, or the checkpoint cannot be read, lacks weights, is damaged,
            contradicts itself or does not fit.
        StorageError: a read failed.
        ConfigError: the checkpoint is quantised, or a setting cannot be read.
        BudgetError: the budget is too small.
    """
    directory = Path(path)
    names = list_names(directory)
    if (gguf := _find_gguf(directory, names)) is not None:
        return _from_gguf(gguf, budget, dtype, model_class, settings)
    if names is None or "config.json" not in names:
        raise CheckpointError(f"{directory} is no directory with a config.json; give a local directory of a model")
    config = _read_config(directory)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{directory} is quantised ({config.quantization_config}); give the unquantised checkpoint")
    model_class = model_class or _default_class(config)
    entries = read_entries(directory)
    target = _resolve_dtype(dtype, config, entries)
    model = build(model_class, config, target)
    keys = map_keys(model, entries)
    why = _why_not_in_place(model, keys, entries)
    if why is not None:
        _log.info("%s: %s; transformers loads it whole and it goes to swap", directory, why)
        del model
        whole = _load_whole(model_class, directory, target)
        mball.wrap(whole, budget=budget, **settings)
        return whole
    rename = _parameter_sources(model, keys, directory)
    load_buffers(model, keys, entries)
    if keys.extra:
        _log.warning("%s: %d tensors are not used: %s", directory, len(keys.extra), ", ".join(keys.extra[:5]))
    model.config.name_or_path = str(directory)
    if model.can_generate() and (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    mball.wrap(model, budget=budget, weights=directory, rename=rename, **settings)
    return model


def _load_whole(model_class: Any, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model: PreTrainedModel = model_class.from_pretrained(directory, dtype=dtype, local_files_only=True)
    # What transformers and torch.load say of files that are missing or damaged.
    except (OSError, ValueError, LookupError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{directory} cannot be loaded whole: {error}. If a file is damaged fetch it again; if host memory is "
            "short, give the checkpoint as safetensors, which is read in place"
        ) from error
    return model


def _read_config(directory: Path) -> PretrainedConfig:
    file = directory / "config.json"
    check_readable(file)
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    # What transformers says of text that is no JSON, and of a model that it does not know.
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; correct it, or fetch it again") from error


def _find_gguf(path: Path, names: list[str] | None) -> Path | None:
    """Returns the GGUF file to load; `names` are those in the directory `path`, None where it is none."""
    if names is None:
        return path if path.suffix == ".gguf" and path.is_file() else None
    if "config.json" in names:
        return None
    found = [name for name in names if name.endswith(".gguf")]
    if len(found) > 1:
        raise CheckpointError(
            f"{path} has no config.json and {len(found)} GGUF files ({', '.join(found)}); give the path of one"
        )
    return path / found[0] if found else None


def _from_gguf(
    file: Path, budget: int | str, dtype: torch.dtype | str | None, model_class: Any, settings: dict[str, Any]
) -> PreTrainedModel:
    where = {"gguf_file": file.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(file.parent, **where)
        model_class = model_class or _default_class(config)
        _log.info("%s: a GGUF file; transformers dequantises it whole and it goes to swap", file)
        whole: PreTrainedModel = model_class.from_pretrained(
            file.parent, dtype=_resolve_dtype(dtype, config, {}),
            quantization_config=transformers.GgufConfig(dequantize=True), **where,
        )  # fmt: skip
    except ImportError as error:
        raise ConfigError(f"{file} is a GGUF file, which the package gguf reads: pip install gguf") from error
    except ConfigError:
        raise
    except (ValueError, LookupError, ArithmeticError, OSError, struct.error) as error:
        raise CheckpointError(f"{file} cannot be loaded: {error}; convert it, or fetch it again") from error
    mball.wrap(whole.eval(), budget=budget, **settings)
    return whole


def _default_class(config: PretrainedConfig) -> Any:
    for name in config.architectures or ():
        if (found := getattr(transformers, name, None)) is not None:
            return found
    return AutoModelForCausalLM


def _resolve_dtype(
    dtype: torch.dtype | str | None, config: PretrainedConfig, entries: Mapping[str, Entry]
) -> torch.dtype:
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise ConfigError(f"dtype is {dtype!r}; give a name such as 'bfloat16', or a torch.dtype")
        dtype = found
    if isinstance(dtype, torch.dtype):
        return dtype
    # As transformers resolves it: what the config says, else what the first floating tensor has.
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    floating = (entry.dtype for entry in entries.values() if entry.dtype is not None and entry.dtype.is_floating_point)
    return next(floating, torch.get_default_dtype())


def _why_not_in_place(model: PreTrainedModel, keys: KeyMap, entries: Mapping[str, Entry]) -> str | None:
    if not entries:
        return "it has no safetensors files"
    if keys.converted:
        return f"transformers converts {len(keys.converted)} tensors on load, such as {keys.converted[0]!r}"
    # transformers keeps some weights in float32 whatever is asked for; its own loading knows which.
    kept = model._get_dtype_plan(model.dtype)
    if kept:
        return f"transformers keeps {', '.join(sorted(kept))} in another dtype than {model.dtype}"
    for name, parameter in model.named_parameters():
        key = keys.sources.get(name)
        if key is not None and entries[key].dtype != parameter.dtype:
            return f"{key!r} is {entries[key].dtype}, the model wants {parameter.dtype}"
    for names in _tied_names(model):
        saved = sorted({keys.sources[name] for name in names if name in keys.sources})
        if any(not _same(entries, saved[0], other) for other in saved[1:]):
            return f"the config ties {' and '.join(saved)}, but their values differ"
    return None


def _tied_names(model: PreTrainedModel) -> list[list[str]]:
    """Returns all names of each parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _same(entries: Mapping[str, Entry], first: str, second: str) -> bool:
    with (
        mball.open(entries[first].file) as first_file,
        mball.open(entries[second].file) as second_file,
    ):
        return torch.equal(first_file.get_tensor(first), second_file.get_tensor(second))


def _parameter_sources(model: PreTrainedModel, keys: KeyMap, directory: Path) -> dict[str, str]:
    """Returns parameter name -> checkpoint name for all parameters; tied names share their one source."""
    aliases = _tied_names(model)
    sources: dict[str, str] = {}
    missing = []
    for names in aliases:
        source = next((keys.sources[name] for name in names if name in keys.sources), None)
        if source is None:
            missing.append(names[0])
        else:
            sources.update(dict.fromkeys(names, source))
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of {len(aliases)} weights of {type(model).__name__}, such as "
            f"{', '.join(missing[:3])}; give model_class= the class that the checkpoint was saved from"
        )
    return sources
