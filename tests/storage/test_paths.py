"""Which way files are read: past the page cache or through it, by file system, alignment and what is cached."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from mball.storage import DirectIO, FileTable, Reader, file_system_of
from mball.storage import files as files_module
from mball.storage.alignment import Alignment, alignment_of
from mball.storage.cached import is_all_cached
from mball.storage.mounts import FileSystem, page_cache_reason
from tests.preads import SetPreadv
from tests.storage.reads import FILE_BYTES, MakeReader, memory, opened, read
from tests.storage.test_reader_direct import is_direct

KIB_64 = 65536


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs", "fuse.gcsfuse", "fuse", "tmpfs", "ramfs"]
)
def test_networks_and_memory_are_read_through_the_page_cache(
    kind: str, path: str, content: bytes, make_reader: MakeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = FileSystem(device="server:/export", mount_point="/mnt", kind=kind)
    monkeypatch.setattr(files_module, "file_system_of", lambda _: place)
    reason = page_cache_reason(kind)
    assert reason is not None
    for mode in (DirectIO.AUTO, DirectIO.UNCACHED):
        files = FileTable(direct=mode)
        files.add_path(path)
        assert not files.is_direct(path)
        reader = make_reader(files)
        destination = memory(FILE_BYTES)
        reader.submit([read(path, 0, FILE_BYTES, destination)]).wait()
        assert bytes(destination) == content
        assert reader.path == f"buffered ({reason})"
        assert reader.statistics.direct_bytes == 0
        reader.close()
        files.close()
    files = opened(path)  # by a user who knows better
    assert files.is_direct(path)
    files.close()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "lustre", "virtiofs", "?"])
def test_disks_are_read_past_it(kind: str) -> None:
    assert page_cache_reason(kind) is None


def test_the_file_system_of_each_file_counts(tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(bytes(8192))
    shm = Path("/dev/shm") / f"mball-test-{os.getpid()}"
    try:
        shm.write_bytes(bytes(8192))
        files = FileTable()
        here, there = files.add_path(tmp_path / "here"), files.add_path(shm)
        in_memory = page_cache_reason(file_system_of(str(tmp_path)).kind) is not None
        assert not files.is_direct(there)
        assert files.is_direct(here) != in_memory
        files.close()
    finally:
        shm.unlink()


def test_the_kernel_tells_the_alignment(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    told = alignment_of(descriptor)
    os.close(descriptor)
    if told is None:
        pytest.skip("this kernel or file system does not tell")
    assert told.offset_bytes % told.address_bytes == told.address_bytes % 4096 == 0


@pytest.fixture(params=["told", "found out"])
def coarse_disk(
    request: pytest.FixtureRequest, set_preadv: SetPreadv, monkeypatch: pytest.MonkeyPatch
) -> Alignment | None:
    """A disk that refuses direct reads that are not aligned to 64 KiB; returns what the kernel says of it."""
    real = os.preadv

    def coarse(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if is_direct(descriptor) and (offset % KIB_64 or len(buffers[0]) % KIB_64):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, buffers, offset)

    set_preadv(coarse)
    told = Alignment(offset_bytes=KIB_64) if request.param == "told" else None
    monkeypatch.setattr(files_module, "alignment_of", lambda _: told)
    return told


@pytest.mark.parametrize("chunk_bytes", [4096, 16384, 131072])
def test_a_disk_that_wants_64_kib(
    coarse_disk: Alignment | None, chunk_bytes: int, path: str, content: bytes, make_reader: MakeReader
) -> None:
    files = opened(path)
    reader = make_reader(files, chunk_bytes=chunk_bytes)
    extents = random.Random(chunk_bytes)
    for number in range(20):
        begin = extents.randrange(FILE_BYTES // 4096) * 4096
        size = FILE_BYTES - begin if number == 0 else extents.randrange(1, FILE_BYTES - begin)
        destination = memory(size)
        reader.submit([read(path, begin, size, destination)]).wait()
        assert bytes(destination) == content[begin : begin + size]
    assert not files.buffered_reasons, "the file system was given up"
    before = reader.statistics.direct_bytes
    reader.submit([read(path, 4096, 3 * KIB_64 - 4096, memory(3 * KIB_64))]).wait()
    assert reader.statistics.direct_bytes - before == 2 * KIB_64
    reader.close()
    files.close()


def test_what_is_cached_is_read_from_there_if_asked(path: str, content: bytes, make_reader: MakeReader) -> None:
    with open(path, "rb") as file:
        file.read()
        if not is_all_cached(file.fileno(), 0, FILE_BYTES):
            pytest.skip("this kernel does not tell what is cached")
        assert not is_all_cached(file.fileno(), 0, FILE_BYTES + 65536), "there is no more"
    for mode, direct_bytes in ((DirectIO.UNCACHED, 0), (DirectIO.ALWAYS, 3 * KIB_64)):
        files = FileTable(direct=mode)
        files.add_path(path)
        if not files.is_direct(path):
            pytest.skip("the file is not on a disk")
        reader = make_reader(files)
        destination = memory(FILE_BYTES)
        reader.submit([read(path, 0, FILE_BYTES, destination)]).wait()
        assert bytes(destination) == content
        assert reader.statistics.direct_bytes == direct_bytes
        assert ("cached, or not aligned" in reader.path) == (mode is DirectIO.UNCACHED)
        reader.close()
        files.close()


def test_what_is_not_cached_is_read_past_the_page_cache(
    path: str, content: bytes, make_reader: MakeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = FileTable(direct=DirectIO.UNCACHED)
    files.add_path(path)
    if not files.is_direct(path):
        pytest.skip("the file is not on a disk")
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if is_all_cached(file.fileno(), 0, 4096):
            pytest.skip("the page cache keeps it")
    reader: Reader = make_reader(files)
    destination = memory(FILE_BYTES)
    reader.submit([read(path, 0, FILE_BYTES, destination)]).wait()
    assert bytes(destination) == content
    assert reader.statistics.direct_bytes == 3 * KIB_64
    reader.close()
    files.close()
