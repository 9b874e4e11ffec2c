"""Which reader reads, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from mball.config import Io
from mball.errors import DeviceError
from mball.storage.chunks import DEFAULT_CHUNK_BYTES, DEFAULT_NUM_THREADS
from mball.storage.files import FileTable
from mball.storage.native import NativeReader, ReadPoolLibrary, load_read_pool
from mball.storage.threads import ThreadedReader
from mball.units import format_bytes

FileReader = NativeReader | ThreadedReader


class Threads(Enum):
    """Whose threads read.

    AUTO is C where its library is there or can be compiled, else PYTHON: those of C are never slower, and go on while
    Python is busy.
    """

    AUTO = "auto"
    C = "C"
    PYTHON = "Python"

    @classmethod
    def of(cls, io: Io) -> Threads:
        """Returns whose a user asks for by `io`."""
        return {Io.NATIVE: cls.C, Io.THREADS: cls.PYTHON}.get(io, cls.AUTO)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderChoice:
    """A kind of reader, to be opened for any files.

    Attributes:
        library: for threads of C; None is for Python's.
        reason: why these, for people.
        num_threads: requests under way at one time.
        chunk_bytes: of each.
    """

    library: ReadPoolLibrary | None = None
    reason: str = "asked for"
    num_threads: int = DEFAULT_NUM_THREADS
    chunk_bytes: int = DEFAULT_CHUNK_BYTES

    def __str__(self) -> str:
        whose = Threads.PYTHON if self.library is None else Threads.C
        return f"{self.num_threads} threads of {whose.value}, {format_bytes(self.chunk_bytes)} a request"

    def open(self, files: FileTable) -> FileReader:
        """Returns a reader of these files."""
        if self.library is None:
            return ThreadedReader(files, num_threads=self.num_threads, chunk_bytes=self.chunk_bytes)
        return NativeReader(files, self.library, num_threads=self.num_threads, chunk_bytes=self.chunk_bytes)


def choose_reader(
    threads: Threads = Threads.AUTO, *, num_threads: int = DEFAULT_NUM_THREADS, cache: Path | None = None
) -> ReaderChoice:
    """Returns the reader that is best here; `cache` is where its library is compiled once, see `CLibrary.load`.

    Raises:
        DeviceError: threads of C are asked for, and their library is not there.
    """
    if threads is Threads.PYTHON:
        return ReaderChoice(num_threads=num_threads)
    try:
        library = load_read_pool(cache)
    except DeviceError as error:
        if threads is Threads.C:
            raise
        return ReaderChoice(num_threads=num_threads, reason=str(error).splitlines()[0])
    reason = "asked for" if threads is Threads.C else "they go on while Python is busy"
    return ReaderChoice(library=library, num_threads=num_threads, reason=reason)
