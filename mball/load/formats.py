"""Which format a path is of, and what reads it."""

from __future__ import annotations

import os
from pathlib import Path

from mball.errors import CheckpointError
from mball.load.gguf_source import GgufSource
from mball.load.safetensors_source import SafetensorsSource
from mball.load.source import Settings, Source
from mball.load.torch_source import TORCH, TorchSource
from mball.storage.shards import SAFETENSORS, choose, list_names

_GGUF = ".gguf"


def open_source(path: str | os.PathLike[str], settings: Settings) -> Source:
    """Opens a checkpoint by its name; in a directory safetensors come first, then PyTorch's files, then GGUF.

    A file of any other name is taken for safetensors. Raises as `mball.open`.
    """
    root = Path(os.path.abspath(path))
    names = list_names(root)
    chosen = root if names is None else _choose(root, names)
    if chosen.name.endswith((TORCH.index_suffix, *TORCH.suffixes)):
        return TorchSource(chosen, settings)
    if chosen.suffix == _GGUF:
        return GgufSource(chosen, settings)
    return SafetensorsSource(chosen, settings)


def _choose(directory: Path, names: list[str]) -> Path:
    for layout in (SAFETENSORS, TORCH):
        if chosen := choose(directory, names, layout):
            return chosen
    gguf = [name for name in names if name.endswith(_GGUF)]
    if len(gguf) != 1:
        raise CheckpointError(
            f"checkpoint directory {directory} has no .safetensors, .bin, .pt or .pth file, and {len(gguf)} "
            ".gguf files; give the path of the one to use"
        )
    return directory / gguf[0]
