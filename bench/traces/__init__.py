"""Passes of real model classes, recorded once, for the planners to be tried on: no torch is needed to read them.

`bench/traces/record.py` wrote the files in `recorded/`. Weights were random, but sizes, reads, lifetimes and the
times of steps are those of a real run on a CPU. Files are named without their folders.
"""

from __future__ import annotations

import gzip
from pathlib import Path

from mball.errors import SchemaError
from mball.schema import Trace

RECORDED = Path(__file__).parent / "recorded"
_SUFFIX = ".json.gz"


def names(directory: Path = RECORDED) -> tuple[str, ...]:
    """Returns the names of all recorded traces, sorted."""
    return tuple(sorted(path.name.removesuffix(_SUFFIX) for path in directory.glob(f"*{_SUFFIX}")))


def load(name: str, directory: Path = RECORDED) -> Trace:
    """Returns a recorded trace.

    Raises:
        SchemaError: there is none of that name, or its file is damaged or of another version.
    """
    path = directory / f"{name}{_SUFFIX}"
    if not path.is_file():
        raise SchemaError(f"no trace {name!r} was recorded; there are {', '.join(names(directory)) or 'none'}")
    try:
        text = gzip.decompress(path.read_bytes()).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SchemaError(f"the trace {str(path)!r} is damaged: {error}") from error
    return Trace.from_json(text)


def save(trace: Trace, name: str, directory: Path = RECORDED) -> Path:
    """Writes a trace under `name`, without folders; returns its file. Equal traces give equal files."""
    path = directory / f"{name}{_SUFFIX}"
    # A time of writing in the header would make each file new.
    path.write_bytes(gzip.compress(trace.to_json().encode(), compresslevel=9, mtime=0))
    return path
