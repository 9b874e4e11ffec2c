"""What every format of checkpoints offers to `mball.open`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mball.config import Io
from mball.errors import CheckpointError
from mball.storage import FileIdentity

# Told how many more bytes are there.
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How tensors are loaded; see `mball.open`."""

    device: torch.device
    copy: bool | None
    in_flight_bytes: int
    io: Io = Io.AUTO


class Facts(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def size_bytes(self) -> int:
        """What it takes in memory."""

    @property
    def dtype(self) -> str:
        """torch's name, such as ``bfloat16``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


class Source(Protocol):
    """An open checkpoint."""

    @property
    def metadata(self) -> Mapping[str, str] | None:
        """Texts by name, None where the checkpoint has none."""

    def entries(self) -> Mapping[str, Facts]:
        """Returns the facts of each tensor, by name."""

    def offset_keys(self) -> list[str]:
        """Returns the names in the order of the files."""

    def load(self, names: Iterable[str], advance: Advance) -> dict[str, torch.Tensor]:
        """Returns tensors in the order of `names`, which are all there.

        Raises:
            CheckpointError: a file changed since it was opened.
            StorageError: a read failed.
            DeviceError: there is not enough memory.
        """

    def part(self, name: str, index: Any) -> torch.Tensor:
        """Returns `tensor[index]` in memory of its own. Raises as `load`, and IndexError and the like as torch does."""

    def close(self) -> None:
        """Gives files and threads back; tensors stay. May be called again."""


def refuse_changed(files: Iterable[FileIdentity], look: Callable[[str], os.stat_result] = os.stat) -> None:
    """Raises CheckpointError when one of the files, which `look` finds by its path, is no longer what was opened."""
    for file in files:
        if changes := file.changes_on_disk(look):
            raise CheckpointError(
                f"checkpoint file {file.path} changed while it was open: {'; '.join(changes)}. What was read may be of "
                "both versions and is not given out: open it again when it is whole"
            )
