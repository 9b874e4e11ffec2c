"""Where each tensor of a safetensors checkpoint lies: file, offset, size, dtype, shape.

Only headers are read. The checkpoint is never rewritten, so that it must not change while in use either:
`CheckpointIndex.verify_unchanged` notices when it does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Self

from mball.errors import CheckpointError
from mball.storage.header import FileIdentity, Header, TensorEntry, read_header
from mball.storage.shards import SAFETENSORS, check_names, choose, list_names, read_weight_map
from mball.units import format_names


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIndex:
    """All tensors of a checkpoint, by name.

    Attributes:
        path: the file or directory that was opened.
        entries: by tensor name, in the order of the index or header.
        files: the files that hold the entries, as they were when their headers were read.
        metadata: texts by name, of the first file; None where it has none.
    """

    path: Path
    entries: Mapping[str, TensorEntry]
    files: tuple[FileIdentity, ...]
    metadata: Mapping[str, str] | None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Reads the headers of a checkpoint.

        `path` is a ``.safetensors`` file, a ``*.safetensors.index.json``, or a directory with either.

        Raises:
            CheckpointError: something is missing, truncated, corrupt, or of an unknown dtype; or an index and its
                shards disagree about which tensors there are.
        """
        root = Path(os.path.abspath(path))
        chosen = _choose(root)
        if chosen.name.endswith(SAFETENSORS.index_suffix):
            entries, headers = _read_shards(chosen)
        else:
            headers = [read_header(chosen)]
            entries = dict(headers[0].entries)
        return cls(
            path=root,
            entries=MappingProxyType(entries),
            files=tuple(header.file for header in headers),
            metadata=headers[0].metadata if headers else None,
        )

    def verify_unchanged(self, look: Callable[[str], os.stat_result] = os.stat) -> None:
        """Costs one `stat` a file.

        Args:
            look: tells of a file; `FileTable.stat` of the one that is open, whatever has its name now.

        Raises:
            CheckpointError: a file was written to since `open`; also if it was replaced or deleted, if `look` says so.
        """
        for file in self.files:
            if changes := file.changes_on_disk(look):
                raise CheckpointError(
                    f"checkpoint file {file.path} changed while in use: {'; '.join(changes)}. Its weights are read in "
                    "place, so results would be wrong: put the file back, or unwrap the model and wrap it anew"
                )


def _choose(root: Path) -> Path:
    """Returns the safetensors file or the index to read."""
    names = list_names(root)
    if names is None:
        return root
    if chosen := choose(root, names, SAFETENSORS):
        return chosen
    other = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf"))]
    found = f"; found {format_names(other, 8)}: convert to safetensors first" if other else ""
    raise CheckpointError(f"checkpoint directory {root} has no .safetensors file{found}")


def _read_shards(index_path: Path) -> tuple[dict[str, TensorEntry], list[Header]]:
    promised = read_weight_map(index_path)
    headers = {path: read_header(path) for path in promised}
    check_names(index_path, promised, {path: header.entries for path, header in headers.items()})
    places = {name: path for path, names in promised.items() for name in names}
    return {name: headers[path].entries[name] for name, path in places.items()}, list(headers.values())
