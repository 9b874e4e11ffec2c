"""Checkpoints into memory at the speed of the disk, with the call shapes of safetensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import torch

from mball.config import Io
from mball.errors import CheckpointError, ConfigError
from mball.load.formats import open_source
from mball.load.progress import Report, shown
from mball.load.source import Settings, Source
from mball.memory.cuda_present import present_gpu
from mball.storage.header import SAFETENSORS_NAMES
from mball.units import format_names, parse_bytes

__all__ = ["Checkpoint", "Slice", "load_file", "open"]

_IN_FLIGHT = "256MiB"


def load_file(
    path: str | os.PathLike[str],
    device: str | int | torch.device = "cpu",
    *,
    copy: bool | None = None,
    in_flight_bytes: int | str = _IN_FLIGHT,
    io: str = "auto",
    progress: bool | Report = False,
) -> dict[str, torch.Tensor]:
    """Returns all tensors of a checkpoint, by name.

    Args:
        path, device, copy, in_flight_bytes, io: as for `mball.open`.
        progress: a function that is called with the bytes that are there and those that will be, from time to time;
            True draws a bar on stderr.

    Tensors that are mapped need their file as long as they are used: see `mball.open` for what happens without it.

    Raises:
        As `mball.open`; and DeviceError where there is not enough memory. Nothing is left behind then, or by Ctrl-C.
    """
    with open(path, device=device, copy=copy, in_flight_bytes=in_flight_bytes, io=io) as checkpoint:
        return checkpoint.get_tensors(progress=progress)


def open(
    path: str | os.PathLike[str],
    framework: str = "pt",
    device: str | int | torch.device = "cpu",
    *,
    copy: bool | None = None,
    in_flight_bytes: int | str = _IN_FLIGHT,
    io: str = "auto",
) -> Checkpoint:
    """Opens a checkpoint as safetensors' ``safe_open`` does: ``with mball.open(path) as f``. Only headers are read.

    Args:
        path: a file (``.safetensors``, ``.gguf``, or PyTorch's ``.bin``, ``.pt``, ``.pth``), an index of shards
            (``*.index.json``), or a directory with either; shards open as one. Of a GGUF file quantised tensors are
            dequantised to float32, as transformers does; that needs ``pip install gguf``. PyTorch's files are unpickled
            with ``weights_only=True``, and hold a dict of tensors; tensors that share memory there share it here.
        framework: ``"pt"``; there is no other.
        device: where tensors go, as `torch.device` takes it.
        copy: whether tensors on the CPU get memory of their own. False: they are the file, mapped privately (writing to
            one never changes the file); what is not in the page cache is read when it is touched. None maps what is in
            the page cache, and copies the rest, unless that does not fit into memory: the bytes are in memory once.
            PyTorch's files are mapped unless it is True; GGUF is always copied.
        in_flight_bytes: at most so many are being read at one time (one piece of 32 MiB always may); to another device
            that is what host memory is taken meanwhile. A number or text such as ``"256MiB"``. For safetensors alone:
            the packages that read PyTorch's files and GGUF take what they take.
        io: how safetensors are read that are not mapped, by the names of `mball.wrap` without ``"gds"``. ``"auto"``
            takes what is in the page cache from there and reads the rest past it, by threads of C where they can be
            had; ``"direct"`` always goes past it, ``"buffered"`` never, ``"cached"`` looks for each request;
            ``"native"`` insists on threads of C, ``"threads"`` on Python's. The logger ``mball`` tells the way that
            was taken, at the level DEBUG. PyTorch's files and GGUF have one way only.

    Memory of their own is one allocation for all tensors of a file that are loaded together. A tensor that is dropped
    gives its pages back, but for those at its two ends that it shares with its neighbours; tensors below 64 KiB go with
    the last one. A mapping is in memory as page cache, which the kernel takes back when it has to. Do not write into a
    file that tensors are mapped from, and do not truncate it: rename another one over it. What is open goes on with
    the old one, if it is safetensors; files of other formats are refused from then on.

    While this package reads safetensors, a file that is cut short and a disk that fails are errors. Later, when a
    mapped tensor that is in use touches a page that is not in memory, nobody can raise one: where the file was
    truncated or its disk fails the kernel ends the process with SIGBUS, as with any mapping, that of safetensors'
    ``safe_open`` too. Of PyTorch's files and GGUF that holds while they are loaded as well. With ``copy=True`` loaded
    tensors need no file.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, contradicts itself, or is of a kind that nobody here reads.
        StorageError: a read failed.
        ConfigError: an argument cannot be read, or a package is missing.
        DeviceError: the device is not there; or, from the first read on, threads of C that `io` insists on are not.
    """
    if framework not in ("pt", "torch", "pytorch"):
        raise ConfigError(f"framework is {framework!r}; tensors are PyTorch's here, so give 'pt' or nothing")
    settings = Settings(
        device=_device(device),
        copy=copy,
        in_flight_bytes=parse_bytes(in_flight_bytes, what="in_flight_bytes"),
        io=_io(io),
    )
    return Checkpoint(os.fspath(path), open_source(path, settings))


class Checkpoint:
    """An open checkpoint; made by `mball.open`, and closed by ``with`` or `close`. Tensors stay when it is closed."""

    def __init__(self, path: str, source: Source) -> None:
        self._path = path
        self._source: Source | None = source

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def keys(self) -> list[str]:
        """Returns the names of all tensors, sorted."""
        return sorted(self._open().entries())

    def offset_keys(self) -> list[str]:
        """Returns the names of all tensors, in the order in which they lie in their files."""
        return self._open().offset_keys()

    def metadata(self) -> dict[str, str] | None:
        """Returns what the header says besides tensors, of shards the first one's; None where it says nothing."""
        metadata = self._open().metadata
        return None if metadata is None else dict(metadata)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Returns one tensor.

        Raises:
            CheckpointError: there is none of that name, or the file changed since it was opened.
            StorageError: a read failed.
            DeviceError: there is not enough memory.
        """
        self._facts(name)
        return self._open().load([name], lambda _: None)[name]

    def get_tensors(
        self, names: Iterable[str] | None = None, *, progress: bool | Report = False
    ) -> dict[str, torch.Tensor]:
        """Returns tensors by name, those of `names` or all of them, and reads them in the order of their files.

        Raises as `get_tensor`. `progress` is as for `mball.load_file`.
        """
        source = self._open()
        wanted = list(source.entries() if names is None else dict.fromkeys(names))
        total_bytes = sum(self._facts(name).size_bytes for name in wanted)
        with shown(progress, total_bytes, os.path.basename(self._path)) as advance:
            return source.load(wanted, advance)

    def get_slice(self, name: str) -> Slice:
        """Returns what parts of a tensor can be taken from. Raises CheckpointError when there is none of that name."""
        facts = self._facts(name)
        return Slice(self, name, facts.dtype, facts.shape)

    def close(self) -> None:
        """Gives files and threads back. May be called again."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def _open(self) -> Source:
        if self._source is None:
            raise CheckpointError(f"checkpoint {self._path} was closed; open it again")
        return self._source

    def _facts(self, name: str) -> Any:
        entries: Mapping[str, Any] = self._open().entries()
        if name not in entries:
            raise CheckpointError(
                f"checkpoint {self._path} has no tensor {name!r}; it has {len(entries)}: "
                f"{format_names(list(entries), 3)}"
            )
        return entries[name]


class Slice:
    """A tensor of which parts can be read: ``f.get_slice(name)[2:4, ::2]``."""

    def __init__(self, checkpoint: Checkpoint, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self._dtype = dtype
        self._shape = shape

    def get_shape(self) -> list[int]:
        """Returns the shape of the whole tensor."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """Returns the type by safetensors' name, such as ``BF16``; by torch's, where that has none."""
        return SAFETENSORS_NAMES.get(self._dtype, self._dtype)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Returns a part, in memory of its own; indices are torch's. Only pages that it touches are read, but for GGUF.
        Of positions or a mask whole rows are.

        Raises as `Checkpoint.get_tensor`, and what torch raises for an index that does not fit.
        """
        return self._checkpoint._open().part(self._name, index)


def _io(io: str) -> Io:
    # Straight to a GPU only homes are read.
    ways = {way.value: way for way in Io if way is not Io.GDS}
    if io not in ways:
        raise ConfigError(f"io is {io!r}; choose one of {', '.join(map(repr, ways))}")
    return ways[io]


def _device(device: str | int | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device is {device!r}: {str(error).splitlines()[0]}") from error
    if found.type == "cuda":
        present_gpu(found.index)
    return found
