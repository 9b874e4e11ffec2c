"""Any fault at any operation: the right bytes or one clear error, and the reader goes on."""

from __future__ import annotations

import errno
import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mball.errors import DeviceError, StorageError
from mball.storage import FileTable, NativeReader
from tests.preads import Preadv, preadv_is, read_pool
from tests.storage.reads import FILE_BYTES, MakeReader, memory, opened, read
from tests.storage.test_reader_direct import is_direct

OFFSETS = (0, 8192, 50_000, 3 * 65536 - 100)
SIZE = 40_000


def faulty(faults: dict[int, str], made: list[int]) -> Preadv:
    """Does to the operations of these numbers what their faults say, and counts."""
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        made.append(offset)
        fault = faults.get(len(made) - 1)
        if fault == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if fault == "EINVAL":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if fault == "short":
            return real(descriptor, [buffers[0][: max(len(buffers[0]) // 3, 1)]], offset)
        if fault == "the end":
            return 0
        return real(descriptor, buffers, offset)

    return preadv


def read_all(make_reader: MakeReader, files: FileTable, path: str, content: bytes) -> list[str]:
    """Returns the errors; what had none has the right bytes."""
    reader = make_reader(files, num_threads=2, chunk_bytes=8192)
    # As far behind a page boundary as in the file: their middles are read past the page cache.
    destinations = [memory(4096 + SIZE)[offset % 4096 : offset % 4096 + SIZE] for offset in OFFSETS]
    handles = [
        reader.submit([read(path, offset, SIZE, destination)])
        for offset, destination in zip(OFFSETS, destinations, strict=True)
    ]
    errors = []
    for handle, offset, destination in zip(handles, OFFSETS, destinations, strict=True):
        try:
            handle.wait()
        except StorageError as error:
            errors.append(str(error))
        else:
            expected = content[offset : offset + SIZE]
            assert bytes(destination[: len(expected)]) == expected
    reader.close()
    return errors


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    faults=st.dictionaries(st.integers(0, 30), st.sampled_from(["EIO", "EINVAL", "short", "the end"]), max_size=8),
)
def test_any_fault_at_any_operation(faults: dict[int, str], make_reader: MakeReader, path: str, content: bytes) -> None:
    files = opened(path)
    made: list[int] = []
    with preadv_is(faulty(faults, made)):
        errors = read_all(make_reader, files, path, content)
    met = {fault for number, fault in faults.items() if number < len(made)}
    assert len(errors) <= sum(number < len(made) and fault != "short" for number, fault in faults.items())
    assert bool(errors) >= bool(met & {"EIO", "the end"})
    for error in errors:
        assert path in error
        assert " B at offset " in error
    # And the next ones are right.
    assert not read_all(make_reader, files, path, content)
    files.close()


def test_an_operation_is_tried_again_until_no_signal_interrupts_it(path: str, content: bytes) -> None:
    """Python does that itself; C has to."""
    library = read_pool()
    if library is None:
        pytest.skip("needs a C compiler, cc")
    real, chances, interrupted = os.preadv, random.Random(0), 0

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal interrupted
        if chances.random() < 0.5:
            interrupted += 1
            raise OSError(errno.EINTR, os.strerror(errno.EINTR))
        return real(descriptor, buffers, offset)

    files = opened(path)
    with preadv_is(preadv):
        for _ in range(10):
            assert not read_all(lambda files, **some: NativeReader(files, library, **some), files, path, content)
    assert interrupted > 10
    files.close()


def test_a_refusal_past_the_page_cache_costs_no_byte(path: str, content: bytes, make_reader: MakeReader) -> None:
    """As a disk that is changed below a file system may do at any moment."""
    real = os.preadv

    def refusing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if is_direct(descriptor) and offset >= 65536:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, buffers, offset)

    files = opened(path)
    with preadv_is(refusing):
        for _ in range(3):
            assert not read_all(make_reader, files, path, content)
    assert files.buffered_reasons == ("O_DIRECT refused: Invalid argument",)
    files.close()


def test_more_threads_than_there_may_be_are_refused(path: str) -> None:
    library = read_pool()
    if library is None:
        pytest.skip("needs a C compiler, cc")
    files = opened(path)
    reader = NativeReader(files, library, num_threads=65)
    for _ in range(2):
        with pytest.raises((DeviceError, StorageError), match=r"65 threads cannot be started|is closed"):
            reader.submit([read(path, 0, FILE_BYTES, memory(FILE_BYTES))])
    reader.close()
    files.close()
