"""Where each tensor of a safetensors checkpoint lies: file, offset, size, dtype, shape.

Only headers are read. The checkpoint is never rewritten, so that it must not change while in use either:
`CheckpointIndex.verify_unchanged` notices when it does.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from mball.errors import CheckpointError
from mball.units import format_bytes

_LENGTH_PREFIX_BYTES = 8
# The limit of the format itself: a larger length prefix is garbage, not a header.
_MAX_HEADER_BYTES = 100_000_000
_SINGLE_FILE = "model.safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_AGAIN = "download or save the checkpoint again"

# safetensors name: (torch name, bytes an element)
DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor on disk.

    Attributes:
        file: absolute path of the file that holds it.
        offset_bytes: where its bytes begin, counted from the start of the file; any alignment.
        dtype: torch's name, such as ``bfloat16``.
    """

    name: str
    file: str
    offset_bytes: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """What must stay the same for the bytes of a file to be trusted."""

    path: str
    size_bytes: int
    mtime_ns: int
    device: int
    inode: int

    def changes(self, now: os.stat_result) -> list[str]:
        """Returns for a person what differs between this identity and `now`; empty when nothing does."""
        changes = []
        if now.st_size != self.size_bytes:
            changes.append(f"size {self.size_bytes} B is now {now.st_size} B")
        if now.st_mtime_ns != self.mtime_ns:
            changes.append(f"modification time {self.mtime_ns} ns is now {now.st_mtime_ns} ns")
        if (now.st_dev, now.st_ino) != (self.device, self.inode):
            changes.append(f"inode {self.inode} is now {now.st_ino}, so another file took its place")
        return changes


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIndex:
    """All tensors of a checkpoint, by name.

    Attributes:
        path: the file or directory that was opened.
        entries: by tensor name, in the order of the index or header.
        files: the files that hold the entries, as they were when their headers were read.
    """

    path: Path
    entries: Mapping[str, TensorEntry]
    files: tuple[FileIdentity, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Reads the headers of a checkpoint.

        `path` is a ``.safetensors`` file, a ``*.safetensors.index.json``, or a directory with either.

        Raises:
            CheckpointError: something is missing, truncated, corrupt, or of an unknown dtype.
        """
        root = Path(os.path.abspath(path))
        chosen = _choose(root)
        if chosen.name.endswith(_INDEX_SUFFIX):
            entries, files = _read_shards(chosen)
        else:
            entries, identity = _read_file(chosen)
            files = (identity,)
        return cls(path=root, entries=MappingProxyType(entries), files=files)

    def verify_unchanged(self, look: Callable[[str], os.stat_result] = os.stat) -> None:
        """Costs one `stat` a file.

        Args:
            look: tells of a file; `FileTable.stat` of the one that is open, whatever has its name now.

        Raises:
            CheckpointError: a file was written to since `open`; also if it was replaced or deleted, if `look` says so.
        """
        for file in self.files:
            try:
                changes = file.changes(look(file.path))
            except OSError as error:
                changes = [f"it cannot be found any more ({error.strerror})"]
            if changes:
                raise CheckpointError(
                    f"checkpoint file {file.path} changed while in use: {'; '.join(changes)}. Its weights are read in "
                    "place, so results would be wrong: put the file back, or unwrap the model and wrap it anew"
                )


def _choose(root: Path) -> Path:
    """Returns the safetensors file or the index to read."""
    try:
        mode = os.stat(root).st_mode
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {root} cannot be opened ({error.strerror}); give a .safetensors file or a directory with one"
        ) from error
    if not stat.S_ISDIR(mode):
        return root
    indices = sorted(root.glob(f"*{_INDEX_SUFFIX}"))
    files = sorted(root.glob("*.safetensors"))
    # The same order of preference as the libraries that write such directories.
    for usual in (root / _SINGLE_FILE, root / f"model{_INDEX_SUFFIX}"):
        if usual in files or usual in indices:
            return usual
    candidates = indices or files
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = ", ".join(candidate.name for candidate in candidates)
        raise CheckpointError(
            f"checkpoint directory {root} has {len(candidates)} candidates ({names}) and neither {_SINGLE_FILE} nor "
            f"model{_INDEX_SUFFIX}; give the path of the one to use"
        )
    other = sorted(entry.name for entry in root.iterdir() if entry.suffix in {".bin", ".pt", ".pth", ".gguf"})
    found = f"; found {', '.join(other)}: convert to safetensors first" if other else ""
    raise CheckpointError(f"checkpoint directory {root} has no .safetensors file{found}")


def _read_shards(index_path: Path) -> tuple[dict[str, TensorEntry], tuple[FileIdentity, ...]]:
    try:
        index = _parse_object(index_path.read_bytes())
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError("it has no 'weight_map' from tensor names to file names")
    except OSError as error:
        raise CheckpointError(f"index {index_path} cannot be read ({error.strerror}); {_AGAIN}") from error
    except ValueError as error:
        raise CheckpointError(f"index {index_path} is corrupt: {error}; {_AGAIN}") from error
    shards: dict[str, tuple[dict[str, TensorEntry], FileIdentity]] = {}
    entries = {}
    for name, shard in weight_map.items():
        if shard not in shards:
            if os.path.isabs(shard) or ".." in Path(shard).parts:
                raise CheckpointError(
                    f"index {index_path} places tensor {name!r} in {shard!r}, outside its own directory; name a file "
                    "beside the index"
                )
            shard_path = index_path.parent / shard
            if not shard_path.exists():
                count = sum(1 for other in weight_map.values() if other == shard)
                raise CheckpointError(
                    f"shard {shard_path} is missing; index {index_path.name} places {count} tensors in it, "
                    f"{name!r} among them; {_AGAIN}"
                )
            shards[shard] = _read_file(shard_path)
        entry = shards[shard][0].get(name)
        if entry is None:
            raise CheckpointError(
                f"tensor {name!r} is not in {index_path.parent / shard} ({len(shards[shard][0])} tensors), where index "
                f"{index_path.name} places it; {_AGAIN}"
            )
        entries[name] = entry
    return entries, tuple(identity for _, identity in shards.values())


def _read_file(path: Path) -> tuple[dict[str, TensorEntry], FileIdentity]:
    """Returns the entries of one file and the identity of exactly the file they were read from."""
    try:
        # A pipe would block an open that waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise CheckpointError(f"checkpoint {path} is not a regular file; give a .safetensors file")
            prefix = os.pread(descriptor, _LENGTH_PREFIX_BYTES, 0)
            header_bytes = _check_header_length(path, prefix, facts.st_size)
            header = os.pread(descriptor, header_bytes, _LENGTH_PREFIX_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error.strerror}); check the path and its rights"
        ) from error
    try:
        tensors = _parse_object(header)
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {path}: its header of {header_bytes} B is corrupt: {error}; {_AGAIN}"
        ) from error
    tensors.pop("__metadata__", None)
    data_start = _LENGTH_PREFIX_BYTES + header_bytes
    entries = {name: _entry(path, data_start, name, facts_of) for name, facts_of in tensors.items()}
    _check_cover(path, entries, data_start, facts.st_size)
    identity = FileIdentity(
        path=str(path),
        size_bytes=facts.st_size,
        mtime_ns=facts.st_mtime_ns,
        device=facts.st_dev,
        inode=facts.st_ino,
    )
    return entries, identity


def _check_header_length(path: Path, prefix: bytes, file_bytes: int) -> int:
    if len(prefix) < _LENGTH_PREFIX_BYTES:
        raise CheckpointError(
            f"checkpoint {path} is truncated: it has {file_bytes} B, and a safetensors file begins with "
            f"{_LENGTH_PREFIX_BYTES} B that say how long its header is; {_AGAIN}"
        )
    header_bytes = int.from_bytes(prefix, "little")
    if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"checkpoint {path} is corrupt or no safetensors file: it claims a header of {header_bytes} B, a header "
            f"has 2 to {_MAX_HEADER_BYTES} B; {_AGAIN}"
        )
    if _LENGTH_PREFIX_BYTES + header_bytes > file_bytes:
        raise CheckpointError(
            f"checkpoint {path} is truncated: its header ends at {_LENGTH_PREFIX_BYTES + header_bytes} B and the file "
            f"has {file_bytes} B; {_AGAIN}"
        )
    return header_bytes


def _parse_object(text: bytes) -> dict[str, Any]:
    """Returns the JSON object in `text`; raises ValueError when it is none or names a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
        return result

    try:
        parsed = json.loads(text.decode(), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(parsed, dict):
        raise ValueError("it is not a JSON object")
    return parsed


def _entry(path: Path, data_start: int, name: str, facts: Any) -> TensorEntry:
    def corrupt(why: str) -> CheckpointError:
        return CheckpointError(f"checkpoint {path}: the header entry of tensor {name!r} is corrupt: {why}; {_AGAIN}")

    if not isinstance(facts, dict) or facts.keys() != {"dtype", "shape", "data_offsets"}:
        raise corrupt("it must have exactly 'dtype', 'shape' and 'data_offsets'")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"checkpoint {path}: tensor {name!r} has dtype {dtype!r}, which is not supported (known: "
            f"{', '.join(DTYPES)}); convert the checkpoint to one of those"
        )
    if not _are_counts(shape):
        raise corrupt(f"shape {shape!r} is no list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt(f"offsets {offsets!r} are no pair [begin, end)")
    torch_name, item_bytes = DTYPES[dtype]
    begin, end = offsets
    if end - begin != math.prod(shape) * item_bytes:
        raise corrupt(
            f"offsets [{begin}, {end}) hold {end - begin} B, but {dtype} of shape {shape} takes "
            f"{math.prod(shape) * item_bytes} B"
        )
    return TensorEntry(
        name=name,
        file=str(path),
        offset_bytes=data_start + begin,
        size_bytes=end - begin,
        dtype=torch_name,
        shape=tuple(shape),
    )


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(path: Path, entries: Mapping[str, TensorEntry], data_start: int, file_bytes: int) -> None:
    """Raises unless the tensors cover the rest of the file without holes or overlap, as the format demands."""
    end = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset_bytes, entry.size_bytes)):
        if entry.offset_bytes != end:
            raise CheckpointError(
                f"checkpoint {path} is corrupt: tensor {entry.name!r} begins at {entry.offset_bytes} B where "
                f"{end} B is due, so that tensors overlap or leave a hole; {_AGAIN}"
            )
        end += entry.size_bytes
        if end > file_bytes:
            raise CheckpointError(
                f"checkpoint {path} is truncated: tensor {entry.name!r} ends at {end} B and the file has {file_bytes} "
                f"B ({format_bytes(end - file_bytes)} of it missing); {_AGAIN}"
            )
    if end != file_bytes:
        raise CheckpointError(
            f"checkpoint {path} is corrupt: its tensors end at {end} B and the file has {file_bytes} B; {_AGAIN}"
        )
