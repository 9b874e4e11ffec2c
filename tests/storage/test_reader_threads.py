"""The threads of the reader: when they start, what they hold, and how they end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable

import numpy
import pytest

from mball.errors import DeviceError, StorageError
from mball.storage import FileTable, Reader
from tests.preads import read_pool
from tests.storage.conftest import HeldReads
from tests.storage.reads import MakeReader, memory, num_descriptors, num_threads, opened, read, soon


def test_no_thread_before_the_first_submit_and_nothing_left_after(path: str, make_reader: MakeReader) -> None:
    gc.collect()  # what tests before this one dropped
    threads, descriptors = num_threads(), num_descriptors()
    for _ in range(5):
        files = opened(path)
        reader = make_reader(files)
        assert num_threads() == threads
        reader.submit([read(path, 0, 65536, memory(65536))]).wait()
        assert num_threads() == threads + 8
        reader.close()
        reader.close()
        with pytest.raises(StorageError, match="closed"):
            reader.submit([])
        files.close()
        files.close()
        assert soon(lambda: num_threads() == threads)
        assert num_descriptors() == descriptors


def test_dropping_a_reader_gives_everything_back(path: str, make_reader: MakeReader) -> None:
    gc.collect()  # what tests before this one dropped
    threads, descriptors = num_threads(), num_descriptors()
    files = opened(path)
    reader = make_reader(files)
    handle = reader.submit([read(path, 0, 65536, memory(65536))])
    handle.wait()
    gone = weakref.ref(reader)
    del reader, files
    gc.collect()
    assert gone() is None
    assert soon(lambda: num_threads() == threads)
    assert num_descriptors() == descriptors


def test_idle_threads_hold_no_destination(reader: Reader, path: str) -> None:
    array = numpy.empty(65536, dtype=numpy.uint8)
    gone = weakref.ref(array)
    good = reader.submit([read(path, 0, 65536, array.data)])
    good.wait()
    reader.drain()
    del array
    assert gone() is None


def test_what_nobody_waited_for_is_let_go_of_too(reader: Reader, path: str, held_reads: HeldReads) -> None:
    for look in (lambda: reader.submit([]), reader.drain, lambda: reader.statistics):
        held_reads.begun.clear()
        held_reads.let_go.clear()
        array = numpy.empty(4096, dtype=numpy.uint8)
        gone = weakref.ref(array)
        reader.submit([read(path, 0, 4096, array.data)])  # and the handle is dropped
        del array
        assert held_reads.begun.wait(60)
        gc.collect()
        assert gone() is not None, "memory went away under a read"
        held_reads.let_go.set()

        def is_gone(gone: weakref.ref[object] = gone, look: Callable[[], object] = look) -> bool:
            look()
            return gone() is None

        assert soon(is_gone)


def test_a_reader_closed_before_its_first_submit_stays_closed(files: FileTable, make_reader: MakeReader) -> None:
    reader = make_reader(files)
    reader.close()
    with pytest.raises(StorageError, match="closed"):
        reader.submit([])


def test_close_fails_what_has_not_begun(path: str, held_reads: HeldReads, make_reader: MakeReader) -> None:
    files = opened(path)
    reader = make_reader(files, num_threads=1)
    first = reader.submit([read(path, 0, 4096, memory(4096))])
    second = reader.submit([read(path, 0, 4096, memory(4096))])
    held_reads.begun.wait()
    threading.Timer(0.05, held_reads.let_go.set).start()
    reader.close()
    first.wait()
    with pytest.raises(StorageError, match="reader was closed"):
        second.wait()
    files.close()


def test_an_interrupted_wait_can_be_waited_again(
    path: str, content: bytes, held_reads: HeldReads, make_reader: MakeReader
) -> None:
    files = opened(path)
    reader = make_reader(files)
    destination = memory(65536)
    handle = reader.submit([read(path, 0, 65536, destination)])
    for blocked in (handle.wait, reader.drain, handle.wait):
        timer = threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            blocked()
        timer.join()
        assert not handle.done()
    held_reads.let_go.set()
    handle.wait()
    assert bytes(destination) == content[:65536]
    reader.submit([read(path, 0, 4096, destination)]).wait()
    reader.close()
    files.close()


def test_a_forked_child_is_refused(reader: Reader, path: str, held_reads: HeldReads) -> None:
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
    held_reads.let_go.set()
    handle.wait()


def test_closing_in_a_child_does_not_hang_on_a_lock_held_at_the_fork(reader: Reader, path: str) -> None:
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


def test_a_reader_not_started_yet_works_in_a_child(path: str, make_reader: MakeReader) -> None:
    files = opened(path)
    reader = make_reader(files)
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
@pytest.mark.parametrize("kind", ["threads", "native"])
def test_the_interpreter_exits_cleanly_with_reads_under_way(path: str, ending: str, kind: str) -> None:
    if kind == "native" and read_pool() is None:
        pytest.skip("needs a C compiler, cc")
    made = "ThreadedReader(files, " if kind == "threads" else "NativeReader(files, load_read_pool(cache_directory()), "
    code = (
        "import mmap, sys\n"
        "from mball.config import cache_directory\n"
        "from mball.storage import FileTable, NativeReader, Read, ThreadedReader, load_read_pool\n"
        "files = FileTable(); files.add_path(sys.argv[1])\n"
        f"reader = {made}chunk_bytes=4096)\n"
        "buffer = memoryview(mmap.mmap(-1, 65536))\n"
        "for _ in range(200):\n"
        "    reader.submit([Read(file=sys.argv[1], offset_bytes=0, size_bytes=65536, destination=buffer)])\n" + ending
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
