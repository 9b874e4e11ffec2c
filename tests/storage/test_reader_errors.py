"""Reads that cannot be done: the error says which file, where and why, and the reader goes on."""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from pathlib import Path

import numpy
import pytest

from mball.errors import StorageError
from mball.storage import DirectIO, FileTable, Reader
from tests.preads import SetPreadv, preadv_is
from tests.storage.reads import FILE_BYTES, MakeReader, memory, opened, read, with_one


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    [
        (0, 8193, "8193 B at offset 0 B of .* does not fit its destination of 8192 B"),
        (-1, 10, "does not fit"),
        (0, -1, "does not fit"),
        (FILE_BYTES, 1, f"begins past its end, {FILE_BYTES} B"),
    ],
)
def test_reads_that_do_not_fit(reader: Reader, path: str, offset: int, size: int, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        reader.submit([read(path, 0, 8192, memory(8192)), read(path, offset, size, memory(8192))])
    reader.drain()
    assert reader.statistics.num_requests == 0, "a read was started although another of the same submit is wrong"


def test_unknown_and_missing_files(reader: Reader, files: FileTable, path: str) -> None:
    with pytest.raises(StorageError, match="'other' is not among the 1 open files"):
        reader.submit([read("other", 0, 1, memory(1))])
    with pytest.raises(StorageError, match=r"/no/such cannot be opened \(No such file"):
        files.add_path("/no/such")
    with pytest.raises(StorageError, match="already"):
        files.add_descriptor(path, 0)
    with pytest.raises(StorageError, match="must be writable"):
        reader.submit([read(path, 0, 1, memoryview(b"x"))])


def test_a_file_that_shrinks_while_in_use(tmp_path: Path, make_reader: MakeReader) -> None:
    file = tmp_path / "data"
    for mode, left in ((DirectIO.ALWAYS, 8192), (DirectIO.ALWAYS, 8200), (DirectIO.OFF, 8200)):
        file.write_bytes(b"a" * 65536)
        files = FileTable(direct=mode)
        files.add_path(file)
        reader = make_reader(files)
        os.truncate(file, left)
        handle = reader.submit([read(str(file), 0, 65536, memory(65536))])
        for _ in range(2):
            with pytest.raises(
                StorageError, match=f"65536 B at offset 0 B of .*data failed: the file ends at {left} B"
            ):
                handle.wait()
        # Going on at an odd offset with O_DIRECT would be refused, and blamed on the file system.
        assert files.any_direct == (mode is DirectIO.ALWAYS)
        reader.close()
        files.close()


def test_a_read_error_in_the_middle(reader: Reader, path: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset == 16384:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    destination = memory(65536)
    with preadv_is(broken):
        handle = reader.submit([read(path, 0, 65536, destination)])
        with pytest.raises(
            StorageError, match=r"8192 B at offset 16384 B of .*data failed: Input/output error"
        ) as caught:
            handle.wait()
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.EIO
    reader.submit([read(path, 0, 65536, destination)]).wait()
    assert bytes(destination) == content[:65536]


def test_a_failed_submit_reads_no_further(path: str, set_preadv: SetPreadv, make_reader: MakeReader) -> None:
    begun = []

    def broken(_: int, __: list[memoryview], offset: int) -> int:
        begun.append(offset)
        raise OSError(errno.EIO, "broken")

    set_preadv(broken)
    with_one(
        path, make_reader, lambda reader: [reader.submit([read(path, o, 4096, memory(4096)) for o in (0, 4096, 8192)])]
    )
    assert begun == [0]


def test_a_failed_handle_waits_for_its_other_chunks(path: str, set_preadv: SetPreadv, make_reader: MakeReader) -> None:
    gate = threading.Event()

    def broken(_: int, buffers: list[memoryview], offset: int) -> int:
        if not offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        gate.wait()
        buffers[0][:] = b"z" * len(buffers[0])
        return len(buffers[0])

    set_preadv(broken)
    files = opened(path)
    reader = make_reader(files, num_threads=2, chunk_bytes=4096)
    # The second thread is inside its request before the first fails.
    slow = reader.submit([read(path, 4096, 4096, memory(4096))])
    both = reader.submit([read(path, 8192, 4096, memory(4096)), read(path, 0, 4096, memory(4096))])
    time.sleep(0.05)
    assert not both.done()
    gate.set()
    slow.wait()
    with pytest.raises(StorageError, match="Input/output error"):
        both.wait()
    reader.close()
    files.close()


def test_a_failed_handle_holds_no_destination(reader: Reader, path: str, set_preadv: SetPreadv) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "broken")

    set_preadv(broken)
    array = numpy.empty(65536, dtype=numpy.uint8)
    gone = weakref.ref(array)
    handle = reader.submit([read(path, 0, 65536, array.data)])
    with pytest.raises(StorageError):
        handle.wait()
    reader.drain()
    del array
    assert gone() is None
