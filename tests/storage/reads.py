"""What the tests of the reader read, and where to."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

from mball.storage import FileTable, Read, ThreadedReader

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


def with_one(path: str, act: Callable[[ThreadedReader], object]) -> None:
    files = FileTable()
    files.add_path(path)
    reader = ThreadedReader(files, num_threads=1)
    act(reader)
    reader.drain()
    reader.close()
    files.close()
