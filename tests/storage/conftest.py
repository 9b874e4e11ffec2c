"""A file of random bytes and readers of it, with O_DIRECT and without."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from mball.storage import DirectIO, FileTable, ThreadedReader
from tests.storage.reads import FILE_BYTES


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(0).randbytes(FILE_BYTES).replace(b"\xee", b"\x11")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> str:
    file = tmp_path_factory.mktemp("reader") / "data"
    file.write_bytes(content)
    return str(file)


@pytest.fixture(params=[DirectIO.AUTO, DirectIO.OFF])
def files(request: pytest.FixtureRequest, path: str) -> Iterator[FileTable]:
    table = FileTable(direct=request.param)
    table.add_path(path)
    yield table
    table.close()


@pytest.fixture
def reader(files: FileTable) -> Iterator[ThreadedReader]:
    result = ThreadedReader(files, num_threads=3, chunk_bytes=8192)
    yield result
    result.close()


@dataclass(frozen=True, slots=True)
class HeldReads:
    """Every read of the reader's waits, once it has begun, until it is let go."""

    begun: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def held_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldReads]:
    held = HeldReads()
    real = os.preadv

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        held.begun.set()
        held.let_go.wait()
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    yield held
    held.let_go.set()
