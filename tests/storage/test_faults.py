"""The readers that make things worse do exactly that."""

from __future__ import annotations

import numpy
import pytest

from mball.errors import StorageError
from mball.storage import Reader
from tests.storage.faults import POISON, DelayedReader, FailingReader, LastMomentReader, PoisonedReader
from tests.storage.reads import memory, read


def test_faults(reader: Reader, path: str, content: bytes) -> None:
    late = LastMomentReader(PoisonedReader(reader))
    destination = memory(4096)
    handle = late.submit([read(path, 0, 4096, destination)])
    assert not handle.done()
    assert set(destination) == {0xEE}
    handle.wait()
    assert bytes(destination) == content[:4096]

    failing = FailingReader(reader, fail={1})
    failing.submit([read(path, 0, 4096, destination)]).wait()
    with pytest.raises(StorageError, match=r"4096 B at offset 4096 B of .*Input/output error"):
        failing.submit([read(path, 4096, 4096, destination)]).wait()
    failing.submit([read(path, 4096, 4096, destination)]).wait()
    assert bytes(destination) == content[4096:8192]
    assert failing.num_failed == 1

    delayed = PoisonedReader(DelayedReader(reader, seed=3, max_delay_s=0.05))
    handle = delayed.submit([read(path, 0, 4096, destination)])
    assert set(destination) == {POISON}
    assert numpy.isnan(numpy.frombuffer(destination, dtype=numpy.float32)).all()
    delayed.drain()
    assert handle.done()
    handle.wait()
    assert bytes(destination) == content[:4096]
    delayed.close()
