"""The threaded reader: the right bytes on every path, and what happens when something breaks."""

from __future__ import annotations

import errno
import fcntl
import gc
import logging
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mball.errors import DeviceError, StorageError
from mball.storage import CheckpointIndex, DirectIO, FileTable, Read, SwapFile, ThreadedReader
from tests.storage.faults import POISON, DelayedReader, FailingReader, LastMomentReader, PoisonedReader
from tests.storage.test_checkpoint import tensors_of_all_dtypes

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


def test_a_whole_file_past_its_end(files: FileTable, reader: ThreadedReader, path: str, content: bytes) -> None:
    destination = memory(aligned(FILE_BYTES))
    handle = reader.submit([read(path, 0, aligned(FILE_BYTES), destination)])
    handle.wait()
    assert handle.done()
    assert handle.size_bytes == FILE_BYTES
    assert bytes(destination[:FILE_BYTES]) == content
    statistics = reader.statistics
    assert statistics.size_bytes == FILE_BYTES
    assert statistics.num_requests == -(-FILE_BYTES // 8192)
    assert statistics.busy_s > 0
    if files.mode is DirectIO.OFF:
        assert reader.path == "buffered (asked for)"
        assert statistics.direct_bytes == 0
    else:
        assert reader.path == "O_DIRECT"
        assert statistics.direct_bytes == FILE_BYTES


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    extents=st.lists(
        st.tuples(
            st.integers(0, FILE_BYTES - 1) | st.integers(0, FILE_BYTES // 4096).map(lambda page: page * 4096),
            st.integers(0, 40_000) | st.integers(0, 20).map(lambda pages: pages * 4096),
            st.integers(0, 4096) | st.just(0),
        ),
        max_size=6,
    )
)
def test_any_extents(reader: ThreadedReader, path: str, content: bytes, extents: list[tuple[int, int, int]]) -> None:
    reads, buffers = [], []
    for offset, size, lead in extents:
        buffer = memory(lead + size + 64)
        reads.append(read(path, offset, size, buffer[lead : lead + size]))
        buffers.append(buffer)
    reader.submit(reads).wait()
    for (offset, size, lead), buffer in zip(extents, buffers, strict=True):
        expected = content[offset : offset + size]
        assert bytes(buffer[lead : lead + len(expected)]) == expected
        assert set(buffer[:lead]) <= {0xEE}, "bytes before the destination were overwritten"
        assert set(buffer[lead + size :]) == {0xEE}, "bytes after the destination were overwritten"


@pytest.mark.parametrize("shift", [0, 1, 512, 4095])
def test_ragged_ends_are_buffered_and_the_middle_is_direct(path: str, content: bytes, shift: int) -> None:
    files = FileTable()
    files.add_path(path)
    reader = ThreadedReader(files, chunk_bytes=16384)
    destination = memory(200_000)
    reader.submit([read(path, shift, 100_000, destination[shift : shift + 100_000])]).wait()
    assert bytes(destination[shift : shift + 100_000]) == content[shift : shift + 100_000]
    assert reader.statistics.direct_bytes == (shift + 100_000) // 4096 * 4096 - aligned(shift)
    assert "buffered (not aligned)" in reader.path
    reader.close()
    files.close()


def test_an_odd_address_is_buffered_and_not_blamed_on_the_file_system(path: str, content: bytes) -> None:
    """This kernel may allow it; others answer EINVAL, which would switch the whole file system to buffered reads."""
    files = FileTable()
    files.add_path(path)
    reader = ThreadedReader(files)
    destination = memory(65537)
    reader.submit([read(path, 0, 65536, destination[1:])]).wait()
    assert bytes(destination[1:]) == content[:65536]
    assert reader.statistics.direct_bytes == 0
    assert files.any_direct
    reader.submit([read(path, 0, 65536, destination)]).wait()
    assert reader.statistics.direct_bytes == 65536
    reader.close()
    files.close()


def test_tensors_of_a_checkpoint(tmp_path: Path) -> None:
    many = {f"small.{i}": torch.full((i % 7 + 1,), float(i)) for i in range(500)}
    save_file(tensors_of_all_dtypes() | many, tmp_path / "model.safetensors")
    expected = load_file(tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    for mode in DirectIO:
        files = FileTable(direct=mode)
        for file in index.files:
            files.add_path(file.path)
        reader = ThreadedReader(files)
        out = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
        reads = [
            read(entry.file, entry.offset_bytes, entry.size_bytes, flat.data)
            for name, entry in index.entries.items()
            if len(flat := out[name].reshape(-1).view(torch.uint8).numpy())
        ]
        reader.submit(reads).wait()
        for name, tensor in expected.items():
            assert (
                torch.equal(out[name].view(torch.uint8), tensor.view(torch.uint8))
                if tensor.dim()
                else (torch.equal(out[name], tensor))
            )
        reader.close()
        files.close()


def test_a_swap_file_that_grows(tmp_path: Path) -> None:
    files = FileTable()
    with SwapFile.create(tmp_path) as swap:
        files.add_descriptor(swap.name, swap.fd)
        reader = ThreadedReader(files)
        for round_ in range(3):
            offset = swap.allocate(10_000)
            swap.write(offset, bytes([round_]) * 10_000)
            destination = memory(12_288)
            reader.submit([read(swap.name, offset, 12_288, destination)]).wait()
            assert bytes(destination[:10_000]) == bytes([round_]) * 10_000
        assert reader.path == "O_DIRECT"
    # The table has its own descriptor.
    reader.submit([read(swap.name, 0, 12_288, memory(12_288))]).wait()
    reader.close()
    files.close()


def test_many_submits_in_flight(reader: ThreadedReader, path: str, content: bytes) -> None:
    destination = memory(aligned(FILE_BYTES))
    handles = [
        reader.submit([read(path, page * 4096, 4096, destination[page * 4096 : (page + 1) * 4096])])
        for page in range(aligned(FILE_BYTES) // 4096)
    ]
    for handle in reversed(handles):
        handle.wait()
    assert bytes(destination[:FILE_BYTES]) == content
    reader.submit([]).wait()


def test_requests_begin_in_order(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    real = os.preadv

    def note(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        begun.append(offset)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", note)
    with_one(path, lambda reader: [reader.submit([read(path, o, 4096, memory(4096))]) for o in range(0, 65536, 4096)])
    assert begun == list(range(0, 65536, 4096))


def with_one(path: str, act: Callable[[ThreadedReader], object]) -> None:
    files = FileTable()
    files.add_path(path)
    reader = ThreadedReader(files, num_threads=1)
    act(reader)
    reader.drain()
    reader.close()
    files.close()


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    [
        (0, 8193, "8193 B at offset 0 B of .* does not fit its destination of 8192 B"),
        (-1, 10, "does not fit"),
        (0, -1, "does not fit"),
        (FILE_BYTES, 1, f"begins past its end, {FILE_BYTES} B"),
    ],
)
def test_reads_that_do_not_fit(reader: ThreadedReader, path: str, offset: int, size: int, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        reader.submit([read(path, 0, 8192, memory(8192)), read(path, offset, size, memory(8192))])
    reader.drain()
    assert reader.statistics.num_requests == 0, "a read was started although another of the same submit is wrong"


def test_unknown_and_missing_files(reader: ThreadedReader, files: FileTable, path: str) -> None:
    with pytest.raises(StorageError, match="'other' is not among the 1 open files"):
        reader.submit([read("other", 0, 1, memory(1))])
    with pytest.raises(StorageError, match=r"/no/such cannot be opened \(No such file"):
        files.add_path("/no/such")
    with pytest.raises(StorageError, match="already"):
        files.add_descriptor(path, 0)
    with pytest.raises(StorageError, match="must be writable"):
        reader.submit([read(path, 0, 1, memoryview(b"x"))])


def test_a_file_that_shrinks_while_in_use(tmp_path: Path) -> None:
    file = tmp_path / "data"
    for mode, left in ((DirectIO.AUTO, 8192), (DirectIO.AUTO, 8200), (DirectIO.OFF, 8200)):
        file.write_bytes(b"a" * 65536)
        files = FileTable(direct=mode)
        files.add_path(file)
        reader = ThreadedReader(files)
        os.truncate(file, left)
        handle = reader.submit([read(str(file), 0, 65536, memory(65536))])
        for _ in range(2):
            with pytest.raises(
                StorageError, match=f"65536 B at offset 0 B of .*data failed: the file ends at {left} B"
            ):
                handle.wait()
        # Going on at an odd offset with O_DIRECT would be refused, and blamed on the file system.
        assert files.any_direct == (mode is DirectIO.AUTO)
        reader.close()
        files.close()


def test_a_read_error_in_the_middle(
    reader: ThreadedReader, path: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset == 16384:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    destination = memory(65536)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        handle = reader.submit([read(path, 0, 65536, destination)])
        with pytest.raises(
            StorageError, match=r"8192 B at offset 16384 B of .*data failed: Input/output error"
        ) as caught:
            handle.wait()
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.EIO
    reader.submit([read(path, 0, 65536, destination)]).wait()
    assert bytes(destination) == content[:65536]


def test_a_failed_submit_reads_no_further(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def broken(_: int, __: list[memoryview], offset: int) -> int:
        begun.append(offset)
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "preadv", broken)
    with_one(path, lambda reader: [reader.submit([read(path, o, 4096, memory(4096)) for o in (0, 4096, 8192)])])
    assert begun == [0]


def test_short_direct_reads_are_finished(path: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that brings odd pieces and, as most do, refuses to go on from them with O_DIRECT."""
    real = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            if offset % 512:
                raise OSError(errno.EINVAL, "Invalid argument")
            return min(real(descriptor, buffers, offset), 4096 if offset % 32768 else 1000)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", short)
    files = FileTable()
    files.add_path(path)
    reader = ThreadedReader(files, chunk_bytes=16384)
    destination = memory(65536)
    reader.submit([read(path, 0, 65536, destination)]).wait()
    assert bytes(destination) == content[:65536]
    assert not files.buffered_reasons
    reader.close()
    files.close()


def test_a_reader_closed_before_its_first_submit_stays_closed(files: FileTable) -> None:
    reader = ThreadedReader(files)
    reader.close()
    with pytest.raises(StorageError, match="closed"):
        reader.submit([])


def test_a_failed_handle_waits_for_its_other_chunks(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def broken(_: int, buffers: list[memoryview], offset: int) -> int:
        if not offset:
            raise OSError(errno.EIO, "broken")
        gate.wait()
        buffers[0][:] = b"z" * len(buffers[0])
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", broken)
    files = FileTable()
    files.add_path(path)
    reader = ThreadedReader(files, num_threads=2, chunk_bytes=4096)
    # The second thread is inside its request before the first fails.
    slow = reader.submit([read(path, 4096, 4096, memory(4096))])
    both = reader.submit([read(path, 8192, 4096, memory(4096)), read(path, 0, 4096, memory(4096))])
    time.sleep(0.05)
    assert not both.done()
    gate.set()
    slow.wait()
    with pytest.raises(StorageError, match="broken"):
        both.wait()
    reader.close()
    files.close()


@pytest.mark.parametrize("where", ["open", "read"])
def test_falls_back_to_buffered_with_one_line(
    tmp_path: Path, content: bytes, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    direct: set[int] = set()
    real_open, real_preadv = os.open, os.preadv

    def open_(name: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT and where == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        descriptor = real_open(name, flags, *rest)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    caplog.set_level(logging.INFO)
    files = FileTable()
    for name in "ab":
        (tmp_path / name).write_bytes(content)
        files.add_path(tmp_path / name)
    reader = ThreadedReader(files, chunk_bytes=4096)
    for name in files.names:
        destination = memory(aligned(FILE_BYTES))
        reader.submit([read(name, 0, len(destination), destination)]).wait()
        assert bytes(destination[:FILE_BYTES]) == content
    assert reader.path == "buffered (O_DIRECT refused: Invalid argument)"
    assert reader.statistics.direct_bytes == 0
    # Several threads may meet the refusal at once.
    files[files.names[1]].fall_back(OSError(errno.EINVAL, "Invalid argument"))
    assert len([record for record in caplog.records if "refuses O_DIRECT" in record.getMessage()]) == 1
    assert bool(direct) == (where == "read")
    reader.close()
    files.close()


def test_file_systems_without_o_direct(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """ramfs refuses it; tmpfs refuses it on older kernels: either way the bytes are right and the path says so."""
    point = tmp_path / "ram"
    point.mkdir()
    mount = ["mount", "-t", "ramfs", "none", str(point)]
    mounted = not os.geteuid() and not subprocess.run(mount, capture_output=True, check=False).returncode
    shm = Path("/dev/shm") / f"mball-test-{os.getpid()}"
    try:
        files = FileTable()
        for file in [shm, point / "data"] if mounted else [shm]:
            file.write_bytes(content)
            files.add_path(file)
        reader = ThreadedReader(files)
        for name in files.names:
            destination = memory(aligned(FILE_BYTES))
            reader.submit([read(name, 0, len(destination), destination)]).wait()
            assert bytes(destination[:FILE_BYTES]) == content
        lines = [record for record in caplog.records if "refuses O_DIRECT" in record.getMessage()]
        assert len(lines) >= mounted
        if mounted:
            assert "buffered (O_DIRECT refused: Invalid argument)" in reader.path
        reader.close()
        files.close()
    finally:
        shm.unlink(missing_ok=True)
        if mounted:
            subprocess.run(["umount", str(point)], check=True)


def test_no_thread_before_the_first_submit_and_nothing_left_after(path: str) -> None:
    gc.collect()  # what tests before this one dropped
    threads, descriptors = threading.active_count(), num_descriptors()
    for _ in range(5):
        files = FileTable()
        files.add_path(path)
        reader = ThreadedReader(files)
        assert threading.active_count() == threads
        reader.submit([read(path, 0, 65536, memory(65536))]).wait()
        assert threading.active_count() == threads + 4
        reader.close()
        reader.close()
        with pytest.raises(StorageError, match="closed"):
            reader.submit([])
        files.close()
        files.close()
        assert threading.active_count() == threads
        assert num_descriptors() == descriptors


def test_dropping_a_reader_gives_everything_back(path: str) -> None:
    gc.collect()  # what tests before this one dropped
    threads, descriptors = threading.active_count(), num_descriptors()
    files = FileTable()
    files.add_path(path)
    reader = ThreadedReader(files)
    handle = reader.submit([read(path, 0, 65536, memory(65536))])
    handle.wait()
    gone = weakref.ref(reader)
    del reader, files
    gc.collect()
    assert gone() is None
    assert threading.active_count() == threads
    assert num_descriptors() == descriptors


def test_idle_threads_hold_no_destination(reader: ThreadedReader, path: str) -> None:
    array = numpy.empty(65536, dtype=numpy.uint8)
    gone = weakref.ref(array)
    good = reader.submit([read(path, 0, 65536, array.data)])
    good.wait()
    reader.drain()
    del array
    assert gone() is None


def test_a_failed_handle_holds_no_destination(
    reader: ThreadedReader, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "preadv", broken)
    array = numpy.empty(65536, dtype=numpy.uint8)
    gone = weakref.ref(array)
    handle = reader.submit([read(path, 0, 65536, array.data)])
    with pytest.raises(StorageError):
        handle.wait()
    reader.drain()
    del array
    assert gone() is None


def test_close_fails_what_has_not_begun(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, inside = threading.Event(), threading.Event()
    real = os.preadv

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        inside.set()
        gate.wait()
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    files = FileTable()
    files.add_path(path)
    reader = ThreadedReader(files, num_threads=1)
    first = reader.submit([read(path, 0, 4096, memory(4096))])
    second = reader.submit([read(path, 0, 4096, memory(4096))])
    inside.wait()
    threading.Timer(0.05, gate.set).start()
    reader.close()
    first.wait()
    with pytest.raises(StorageError, match="reader was closed"):
        second.wait()
    files.close()


def test_an_interrupted_wait_can_be_waited_again(path: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = os.preadv

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        gate.wait()
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    files = FileTable()
    files.add_path(path)
    reader = ThreadedReader(files)
    destination = memory(65536)
    handle = reader.submit([read(path, 0, 65536, destination)])
    for blocked in (handle.wait, reader.drain, handle.wait):
        timer = threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            blocked()
        timer.join()
        assert not handle.done()
    gate.set()
    handle.wait()
    assert bytes(destination) == content[:65536]
    reader.submit([read(path, 0, 4096, destination)]).wait()
    reader.close()
    files.close()


def test_a_forked_child_is_refused(reader: ThreadedReader, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = os.preadv

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        gate.wait()
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    handle = reader.submit([read(path, 0, 4096, memory(4096))])
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(10)
            refused = 0
            for forbidden in (handle.wait, reader.drain, lambda: reader.submit([read(path, 0, 1, memory(1))])):
                try:
                    forbidden()
                except DeviceError as error:
                    refused += "fork" in str(error) and "spawn" in str(error)
            reader.close()
            code = 0 if refused == 3 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.set()
    handle.wait()


def test_closing_in_a_child_does_not_hang_on_a_lock_held_at_the_fork(reader: ThreadedReader, path: str) -> None:
    reader.submit([read(path, 0, 4096, memory(4096))]).wait()
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with reader._pool.lock:
            held.set()
            over.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(10)
            assert reader.statistics.size_bytes == 0
            assert reader.path
            reader.close()
            code = 0
        finally:
            os._exit(code)
    over.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_reader_not_started_yet_works_in_a_child(path: str) -> None:
    files = FileTable()
    files.add_path(path)
    reader = ThreadedReader(files)
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(10)
            reader.submit([read(path, 0, 4096, memory(4096))]).wait()
            reader.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    files.close()


@pytest.mark.parametrize("ending", ["", "reader.close()", "sys.exit(0)", "del reader"])
def test_the_interpreter_exits_cleanly_with_reads_under_way(path: str, ending: str) -> None:
    code = (
        "import mmap, sys\n"
        "from mball.storage import FileTable, Read, ThreadedReader\n"
        "files = FileTable(); files.add_path(sys.argv[1]); reader = ThreadedReader(files, chunk_bytes=4096)\n"
        "buffer = memoryview(mmap.mmap(-1, 65536))\n"
        "for _ in range(200):\n"
        "    reader.submit([Read(file=sys.argv[1], offset_bytes=0, size_bytes=65536, destination=buffer)])\n" + ending
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_faults(reader: ThreadedReader, path: str, content: bytes) -> None:
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
