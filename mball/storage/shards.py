"""Which files a checkpoint directory consists of, and what an index of shards may say."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mball.errors import CheckpointError
from mball.storage.header import AGAIN, parse_object
from mball.units import format_names


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the files of a format are called.

    Attributes:
        single_file: what libraries call the file where there is only one.
        index_file: what they call the index of several.
        suffixes: of files.
        index_suffix: of indices.
    """

    single_file: str
    index_file: str
    suffixes: tuple[str, ...]
    index_suffix: str


SAFETENSORS = Layout(
    single_file="model.safetensors",
    index_file="model.safetensors.index.json",
    suffixes=(".safetensors",),
    index_suffix=".safetensors.index.json",
)


def list_names(path: Path) -> list[str] | None:
    """Returns the sorted names in the directory `path`, None where it is a file. Raises CheckpointError for neither."""
    try:
        return sorted(os.listdir(path)) if stat.S_ISDIR(os.stat(path).st_mode) else None
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be opened ({error.strerror}); give the path of a checkpoint file, or of a "
            "directory with one, that this user may read"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {str(path)!r} cannot be opened ({error}); give the path of a file"
        ) from error


def check_regular(path: Path) -> os.stat_result:
    """Returns what the system says of a file. Raises CheckpointError unless it is a regular one."""
    try:
        facts = os.stat(path)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error.strerror}); check the path") from error
    if not stat.S_ISREG(facts.st_mode):
        raise CheckpointError(f"checkpoint {path} is not a regular file; give the path of one")
    return facts


def choose(directory: Path, names: Collection[str], layout: Layout) -> Path | None:
    """Returns the file or index of a layout to read among `names`; None where there is none.

    Raises:
        CheckpointError: there are several, and none has the usual name.
    """
    # The same order of preference as the libraries that write such directories.
    for usual in (layout.single_file, layout.index_file):
        if usual in names:
            return directory / usual
    indices = [name for name in names if name.endswith(layout.index_suffix)]
    candidates = indices or [name for name in names if name.endswith(layout.suffixes)]
    if len(candidates) > 1:
        raise CheckpointError(
            f"checkpoint directory {directory} has {len(candidates)} candidates ({format_names(candidates, 8)}) and "
            f"neither {layout.single_file} nor {layout.index_file}; give the path of the one to use"
        )
    return directory / candidates[0] if candidates else None


def read_weight_map(index_path: Path) -> dict[Path, list[str]]:
    """Returns the tensors that an index places in each shard, both in its order. All shards are there.

    Raises:
        CheckpointError: it cannot be read, is corrupt, names a file outside its directory, or a shard is missing.
    """
    try:
        if not stat.S_ISREG(os.stat(index_path).st_mode):
            raise ValueError("it is not a regular file")
        weight_map = parse_object(index_path.read_bytes()).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError("it has no 'weight_map' from tensor names to file names")
        shards: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            shards.setdefault(shard, []).append(name)
        for shard in shards:
            if not shard or "\0" in shard:
                raise ValueError(f"{shard!r} is no file name")
    except OSError as error:
        raise CheckpointError(f"index {index_path} cannot be read ({error.strerror}); {AGAIN}") from error
    except ValueError as error:
        raise CheckpointError(f"index {index_path} is corrupt: {error}; {AGAIN}") from error
    for shard, names in shards.items():
        # The text alone counts: caches of downloads link to files elsewhere.
        if os.path.isabs(shard) or ".." in Path(shard).parts:
            raise CheckpointError(
                f"index {index_path} places tensor {names[0]!r} in {shard!r}, outside its own directory; name a file "
                "beside the index"
            )
        try:
            os.stat(index_path.parent / shard)
        except OSError as error:
            what = "is missing" if error.errno == errno.ENOENT else f"cannot be opened ({error.strerror})"
            raise CheckpointError(
                f"shard {index_path.parent / shard} {what}; index {index_path.name} places {len(names)} tensors in it, "
                f"{names[0]!r} among them; {AGAIN}"
            ) from error
    return {index_path.parent / shard: names for shard, names in shards.items()}


def check_names(index_path: Path, promised: Mapping[Path, Iterable[str]], held: Mapping[Path, Collection[str]]) -> None:
    """Raises CheckpointError unless each shard holds what the index promised of it, and no more."""
    for path, names in promised.items():
        expected = set(names)
        if missing := sorted(expected.difference(held[path])):
            raise CheckpointError(
                f"tensor {missing[0]!r} is not in {path} ({len(held[path])} tensors), where index {index_path.name} "
                f"places it; {AGAIN}"
            )
        if extra := sorted(set(held[path]) - expected):
            raise CheckpointError(
                f"shard {path} holds {len(extra)} tensors that index {index_path.name} does not place there, "
                f"{extra[0]!r} among them; {AGAIN}, or give the path of the shard"
            )
