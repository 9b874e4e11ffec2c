"""What the tests of the reader read, and where to."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from typing import Any

from mball.storage import DirectIO, FileTable, Read

# Takes a table and the settings of a reader.
MakeReader = Callable[..., Any]
FILE_BYTES = 3 * 65536 + 777


def memory(size_bytes: int) -> memoryview:
    """Page-aligned memory full of a byte that the files lack."""
    view = memoryview(mmap.mmap(-1, max(size_bytes, 1)))
    view[:] = b"\xee" * len(view)
    return view


def aligned(size_bytes: int) -> int:
    return -(-size_bytes // 4096) * 4096


def read(file: str, offset_bytes: int, size_bytes: int, destination: memoryview) -> Read:
    return Read(file=file, offset_bytes=offset_bytes, size_bytes=size_bytes, destination=destination)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def num_threads() -> int:
    """Those of C too; one that was joined may take a moment to go."""
    return len(os.listdir("/proc/self/task"))


def soon(is_so: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + 10
    while not is_so() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    return is_so()


def opened(*paths: Any) -> FileTable:
    """Files that are read past the page cache wherever that works, also in memory."""
    files = FileTable(direct=DirectIO.ALWAYS)
    for path in paths:
        files.add_path(path)
    return files


def with_one(path: str, make_reader: MakeReader, act: Callable[[Any], object]) -> None:
    files = opened(path)
    reader = make_reader(files, num_threads=1)
    act(reader)
    reader.drain()
    reader.close()
    files.close()
