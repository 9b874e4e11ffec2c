"""The header of one safetensors file: which tensor lies where, and all that makes a file none.

Strict where the format is: whatever is accepted here, the library of the format accepts too, and reads the same bits.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mball.errors import CheckpointError
from mball.units import format_bytes

AGAIN = "download or save the checkpoint again"
_LENGTH_PREFIX_BYTES = 8
# The limit of the format itself: a larger length prefix is garbage, not a header.
_MAX_HEADER_BYTES = 100_000_000
# Sizes and offsets are 64 bits in the format.
_MAX_COUNT = (1 << 64) - 1
_METADATA = "__metadata__"

# safetensors name: (torch name, bytes an element)
_DTYPES = {
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

# What a hostile header says may be as long as the header.
_shortened = reprlib.Repr()
_shortened.maxlist = 16
_shortened.maxstring = _shortened.maxother = 200
_brief = _shortened.repr
# torch name: safetensors name
SAFETENSORS_NAMES = {torch_name: name for name, (torch_name, _) in _DTYPES.items()}


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

    @classmethod
    def of(cls, path: str | os.PathLike[str], facts: os.stat_result) -> Self:
        """Returns the identity of the file that `facts` are of."""
        return cls(
            path=os.fspath(path),
            size_bytes=facts.st_size,
            mtime_ns=facts.st_mtime_ns,
            device=facts.st_dev,
            inode=facts.st_ino,
        )

    def changes_on_disk(self, look: Callable[[str], os.stat_result] = os.stat) -> list[str]:
        """Returns `changes` of the file that `look` finds for the path: the one that is there now."""
        try:
            return self.changes(look(self.path))
        except OSError as error:
            return [f"it cannot be found any more ({error.strerror})"]

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
class Header:
    """What the header of a file says.

    Attributes:
        entries: by tensor name, in the order of the header.
        metadata: texts by name; None where the file has none.
        file: the file as it was when the header was read.
    """

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] | None
    file: FileIdentity


def read_header(path: Path) -> Header:
    """Reads the header of exactly the file that its identity is of.

    Raises:
        CheckpointError: it cannot be read, is truncated or corrupt, or holds an unknown dtype.
    """
    try:
        # A pipe would block an open that waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise CheckpointError(f"checkpoint {path} is not a regular file; give a .safetensors file")
            prefix = _read(descriptor, _LENGTH_PREFIX_BYTES, 0)
            header_bytes = _check_header_length(path, prefix, facts.st_size)
            text = _read(descriptor, header_bytes, _LENGTH_PREFIX_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error.strerror}); check the path and its rights"
        ) from error
    try:
        if not text.startswith(b"{"):
            raise ValueError(f"it begins with {text[:1]!r}, not with '{{'")
        tensors = parse_object(text, only_counts=True)
        metadata = tensors.pop(_METADATA, None)
        if metadata is not None and not _are_texts(metadata):
            raise ValueError(f"{_METADATA!r} is no object of texts by name")
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {path}: its header of {header_bytes} B is corrupt: {error}; {AGAIN}"
        ) from error
    data_start = _LENGTH_PREFIX_BYTES + header_bytes
    entries = {name: _entry(path, data_start, name, facts_of) for name, facts_of in tensors.items()}
    _check_cover(path, entries, data_start, facts.st_size)
    return Header(entries=entries, metadata=metadata, file=FileIdentity.of(path, facts))


def parse_object(text: bytes, *, only_counts: bool = False) -> dict[str, Any]:
    """Returns the JSON object in `text`. With `only_counts` every number has to be one, of 64 bits.

    Raises ValueError when it is none, names a key twice, or has text that is no Unicode.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise ValueError(f"{_brief(twice)} appears twice")
        for word in (word for pair in pairs for word in pair if isinstance(word, str)):
            word.encode()  # half of a surrogate pair is no text
        return result

    def refuse(number: str) -> Any:
        raise ValueError(f"the number {_brief(number)[1:-1]} is no size or offset")

    def count(number: str) -> int:
        # Python would read "-0" as a count, and digits for minutes.
        if number.startswith("-") or len(number) > len(str(_MAX_COUNT)) or int(number) > _MAX_COUNT:
            refuse(number)
        return int(number)

    numbers: dict[str, Any] = {"parse_int": count, "parse_float": refuse} if only_counts else {}
    try:
        parsed = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse, **numbers)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(parsed, dict):
        raise ValueError("it is not a JSON object")
    return parsed


def _read(descriptor: int, size_bytes: int, offset_bytes: int) -> bytes:
    """Returns that many bytes, fewer where the file ends. Raises OSError."""
    parts = []
    while size_bytes and (part := os.pread(descriptor, size_bytes, offset_bytes)):
        parts.append(part)
        size_bytes -= len(part)
        offset_bytes += len(part)
    return b"".join(parts)


def _check_header_length(path: Path, prefix: bytes, file_bytes: int) -> int:
    if len(prefix) < _LENGTH_PREFIX_BYTES:
        raise CheckpointError(
            f"checkpoint {path} is truncated: it has {file_bytes} B, and a safetensors file begins with "
            f"{_LENGTH_PREFIX_BYTES} B that say how long its header is; {AGAIN}"
        )
    header_bytes = int.from_bytes(prefix, "little")
    if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"checkpoint {path} is corrupt or no safetensors file: it claims a header of {header_bytes} B, a header "
            f"has 2 to {_MAX_HEADER_BYTES} B; {AGAIN}"
        )
    if _LENGTH_PREFIX_BYTES + header_bytes > file_bytes:
        raise CheckpointError(
            f"checkpoint {path} is truncated: its header ends at {_LENGTH_PREFIX_BYTES + header_bytes} B and the file "
            f"has {file_bytes} B; {AGAIN}"
        )
    return header_bytes


def _entry(path: Path, data_start: int, name: str, facts: Any) -> TensorEntry:
    def corrupt(why: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {path}: the header entry of tensor {_brief(name)} is corrupt: {why}; {AGAIN}"
        )

    if not isinstance(facts, dict) or facts.keys() != {"dtype", "shape", "data_offsets"}:
        raise corrupt("it must have exactly 'dtype', 'shape' and 'data_offsets'")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(
            f"checkpoint {path}: tensor {_brief(name)} has dtype {_brief(dtype)}, which is not supported "
            f"(known: {', '.join(_DTYPES)}); convert the checkpoint to one of those"
        )
    if not _are_counts(shape):
        raise corrupt(f"shape {_brief(shape)} is no list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt(f"offsets {_brief(offsets)} are no pair [begin, end)")
    torch_name, item_bytes = _DTYPES[dtype]
    begin, end = offsets
    expected_bytes = item_bytes
    for size in shape:
        # Of a size of zero the others count too: they have to be sizes that torch can take.
        expected_bytes *= max(size, 1)
        if expected_bytes > _MAX_COUNT >> 1:
            raise corrupt(f"shape {_brief(shape)} of {dtype} is more than 63 bits can count")
    expected_bytes = 0 if 0 in shape else expected_bytes
    if end - begin != expected_bytes:
        raise corrupt(
            f"offsets [{begin}, {end}) hold {end - begin} B, but {dtype} of shape {_brief(shape)} takes "
            f"{expected_bytes} B"
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


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _check_cover(path: Path, entries: Mapping[str, TensorEntry], data_start: int, file_bytes: int) -> None:
    """Raises unless the tensors cover the rest of the file without holes or overlap, as the format demands."""
    end = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset_bytes, entry.size_bytes)):
        if entry.offset_bytes != end:
            raise CheckpointError(
                f"checkpoint {path} is corrupt: tensor {_brief(entry.name)} begins at {entry.offset_bytes} B "
                f"where {end} B is due, so that tensors overlap or leave a hole; {AGAIN}"
            )
        end += entry.size_bytes
        if end > file_bytes:
            raise CheckpointError(
                f"checkpoint {path} is truncated: tensor {_brief(entry.name)} ends at {end} B and the file has "
                f"{file_bytes} B ({format_bytes(end - file_bytes)} of it missing); {AGAIN}"
            )
    if end != file_bytes:
        raise CheckpointError(
            f"checkpoint {path} is corrupt: its tensors end at {end} B and the file has {file_bytes} B; {AGAIN}"
        )
