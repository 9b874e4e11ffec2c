"""A file of random bytes and readers of it, with O_DIRECT and without, in Python and in C."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from mball.storage import DirectIO, FileTable, NativeReader, ThreadedReader
from tests.preads import preadv_is, read_pool
from tests.storage.reads import FILE_BYTES, MakeReader
from tests.storage.swaps import HeldWrites


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(0).randbytes(FILE_BYTES).replace(b"\xee", b"\x11")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> str:
    file = tmp_path_factory.mktemp("reader") / "data"
    file.write_bytes(content)
    return str(file)


@pytest.fixture(params=["threads", "native"])
def make_reader(request: pytest.FixtureRequest) -> MakeReader:
    """Every kind of reader in turn: what it promises is the same."""
    if request.param == "threads":
        return ThreadedReader
    library = read_pool()
    if library is None:
        pytest.skip("needs a C compiler, cc")
    return lambda files, **settings: NativeReader(files, library, **settings)


# Always: where these tests run the temporary files may be in memory.
@pytest.fixture(params=[DirectIO.ALWAYS, DirectIO.OFF])
def files(request: pytest.FixtureRequest, path: str) -> Iterator[FileTable]:
    table = FileTable(direct=request.param)
    table.add_path(path)
    yield table
    table.close()


@pytest.fixture
def reader(files: FileTable, make_reader: MakeReader) -> Iterator[Any]:
    result = make_reader(files, num_threads=3, chunk_bytes=8192)
    yield result
    result.close()


@dataclass(frozen=True, slots=True)
class HeldReads:
    """Every read of the reader's waits, once it has begun, until it is let go."""

    begun: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def held_reads() -> Iterator[HeldReads]:
    held = HeldReads()
    real = os.preadv

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        held.begun.set()
        held.let_go.wait()
        return real(descriptor, buffers, offset)

    with preadv_is(slow):
        yield held
        held.let_go.set()


@pytest.fixture
def held_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldWrites]:
    held, real = HeldWrites(), os.pwritev

    def slow(*arguments: Any) -> int:
        held.begun.release()
        held.let_go.wait(60)  # a test that fails closes its file, which waits for its writes
        return real(*arguments)

    monkeypatch.setattr(os, "pwritev", slow)
    yield held
    held.let_go.set()
