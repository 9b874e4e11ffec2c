"""Swap files and readers of them, for tests."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mball.config import SwapCheck
from mball.storage import CheckedReader, DirectIO, FileTable, Read, SwapFile, SwapSettings, ThreadedReader
from mball.storage.write_queue import QueueLimits
from mball.storage.writes import Write
from tests.storage.reads import memory


@dataclass(frozen=True, slots=True)
class HeldWrites:
    """Every write waits, once it has begun, until it is let go."""

    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    let_go: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def opened(
    directory: Path,
    check: SwapCheck = SwapCheck.FIRST,
    *,
    direct: DirectIO = DirectIO.AUTO,
    limit_bytes: int | None = None,
    **limits: float,
) -> Iterator[tuple[SwapFile, CheckedReader]]:
    """A swap file, and a reader of it."""
    queue = QueueLimits(**limits)  # type: ignore[arg-type]
    files = FileTable(direct=direct)
    swap = SwapFile.create(directory, SwapSettings(check=check, queue=queue, direct=direct, limit_bytes=limit_bytes))
    files.add_swap(swap)
    reader = CheckedReader(ThreadedReader(files, num_threads=2), files)
    try:
        yield swap, reader
    finally:
        reader.close()
        files.close()
        swap.close()


def content(size_bytes: int, seed: int = 0) -> memoryview:
    """Page-aligned random bytes."""
    view = memory(size_bytes)
    view[:] = random.Random(seed).randbytes(size_bytes)
    return view


def write(offset_bytes: int, source: memoryview) -> Write:
    return Write(offset_bytes=offset_bytes, source=source)


def read_back(swap: SwapFile, reader: CheckedReader, offset_bytes: int, size_bytes: int) -> bytes:
    destination = memory(size_bytes)
    read = Read(file=swap.name, offset_bytes=offset_bytes, size_bytes=size_bytes, destination=destination)
    reader.submit([read]).wait()
    return bytes(destination)


def flip(swap: SwapFile, offset_bytes: int) -> None:
    """Changes one bit of the file, behind its back."""
    path = f"/proc/self/fd/{swap.fd}"
    descriptor = os.open(path, os.O_RDWR)
    try:
        (byte,) = os.pread(descriptor, 1, offset_bytes)
        os.pwrite(descriptor, bytes([byte ^ 1]), offset_bytes)
    finally:
        os.close(descriptor)
