"""One sample: so many bytes of a file, asked for at one time, while the main thread does something else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from mball.storage import (
    DirectIO,
    FileReader,
    FileTable,
    NativeReader,
    Read,
    ReadHandle,
    ReadPoolLibrary,
    ThreadedReader,
)
from mball.units import MIB

_MATRIX = 512


class Whose(Enum):
    """Whose threads read."""

    PYTHON = "python"
    C = "c"


class Medium(Enum):
    """Where the bytes are: on the disk (past the page cache), in the page cache, or in a file system in memory."""

    DISK = "disk"
    CACHE = "cache"
    TMPFS = "tmpfs"


class Beside(Enum):
    """What the main thread does meanwhile: it waits, works on Python's objects, or multiplies matrices."""

    IDLE = "idle"
    PYTHON = "busy"
    COMPUTE = "compute"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """How it is read: requests of a size, and so many of them at one time."""

    num_threads: int
    block_bytes: int

    @property
    def name(self) -> str:
        return f"{self.num_threads}x{self.block_bytes // 1024}k"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What came of one.

    Attributes:
        time_s: from submit until all is over.
        cpu_s: that all threads of the process took; the main thread's own work is in it.
        work_per_s: multiplications of matrices beside it, or rounds of busy Python.
    """

    time_s: float
    cpu_s: float
    work_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A file, and memory that it is read to over and over: twice what is under way at most."""

    path: str
    medium: Medium
    memory: memoryview
    library: ReadPoolLibrary

    def open(self, whose: Whose, cell: Cell) -> tuple[FileTable, FileReader]:
        """Returns files and a reader of them, whose threads have started."""
        files = FileTable(direct=DirectIO.ALWAYS if self.medium is Medium.DISK else DirectIO.OFF)
        files.add_path(self.path)
        settings = {"num_threads": cell.num_threads, "chunk_bytes": cell.block_bytes}
        reader: FileReader = (
            ThreadedReader(files, **settings)
            if whose is Whose.PYTHON
            else NativeReader(files, self.library, **settings)
        )
        reader.submit([self._read(0, 4096)]).wait()
        return files, reader

    def run(self, whose: Whose, cell: Cell, beside: Beside, size_bytes: int) -> Sample:
        """Reads `size_bytes`, from the beginning of the file on."""
        files, reader = self.open(whose, cell)
        try:
            step = len(self.memory)
            reads = [self._read(begin, min(step, size_bytes - begin)) for begin in range(0, size_bytes, step)]
            began_s, cpu_s = time.perf_counter(), time.process_time()
            handle = reader.submit(reads)
            num_done = _BESIDE[beside](handle)
            handle.wait()
            cpu_s = time.process_time() - cpu_s
            assert handle.ended_s is not None
            # The main thread looks now and then only.
            time_s = handle.ended_s - began_s
        finally:
            reader.close()
            files.close()
        return Sample(time_s=time_s, cpu_s=cpu_s, work_per_s=num_done / time_s)

    def check(self, whose: Whose, cell: Cell) -> None:
        """Raises AssertionError where the bytes are not those of the file."""
        files, reader = self.open(whose, cell)
        try:
            size_bytes = min(len(self.memory), os.path.getsize(self.path)) - 777
            self.memory[:size_bytes] = bytes(size_bytes)
            reader.submit([self._read(0, size_bytes)]).wait()
            with open(self.path, "rb") as file:
                assert file.read(size_bytes) == self.memory[:size_bytes], f"{whose.value}, {cell.name}: other bytes"
        finally:
            reader.close()
            files.close()

    def prepare(self) -> None:
        """Brings the file to where it is read from."""
        with open(self.path, "rb", buffering=0) as file:
            if self.medium is Medium.DISK:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            elif self.medium is Medium.CACHE:
                while file.read(16 * MIB):
                    pass

    def _read(self, offset_bytes: int, size_bytes: int) -> Read:
        return Read(
            file=self.path, offset_bytes=offset_bytes, size_bytes=size_bytes, destination=self.memory[:size_bytes]
        )


def multiply(is_over: Callable[[], bool]) -> int:
    """Multiplies matrices until it is over, and returns how often."""
    left, right = torch.ones(_MATRIX, _MATRIX), torch.ones(_MATRIX, _MATRIX)
    out = torch.empty(_MATRIX, _MATRIX)
    count = 0
    while not is_over():
        torch.mm(left, right, out=out)
        count += 1
    return count


def _busy(handle: ReadHandle) -> int:
    table: dict[int, list[int]] = {}
    count = 0
    while not handle.done():
        for number in range(1000):
            table[number] = [number]
        count += 1
    return count


def _idle(handle: ReadHandle) -> int:
    handle.wait()
    return 0


_BESIDE = {Beside.IDLE: _idle, Beside.PYTHON: _busy, Beside.COMPUTE: lambda handle: multiply(handle.done)}
