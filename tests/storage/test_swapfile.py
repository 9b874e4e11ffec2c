"""The swap file: layout, nothing left behind, and full disks (a real one where the test may mount)."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mball.errors import StorageError
from mball.storage import DirectIO, SwapFile, SwapSettings, swapfile
from mball.storage.mounts import IN_MEMORY, FileSystem, file_system_of
from mball.units import MIB, PAGE_BYTES
from tests.storage.reads import memory


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    point = tmp_path / "small"
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(point)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield point
    subprocess.run(["umount", str(point)], check=True)


def free_bytes(directory: Path) -> int:
    facts = os.statvfs(directory)
    return facts.f_bfree * facts.f_frsize


def test_swap_that_is_memory_is_said_once(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    with SwapFile.create(small_disk) as swap:
        assert not caplog.records, "nothing is swapped yet"
        for _ in range(2):
            swap.free(swap.allocate(PAGE_BYTES))
            swap.trim()
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert warning.getMessage() == (
        f"swap goes to {small_disk}, which is memory (tmpfs) and in no budget: choose a directory on a disk, by "
        "swap_dir or by the variable MBALL_SWAP_DIR"
    )


@pytest.mark.parametrize(
    ("mode", "expected"), [(DirectIO.AUTO, False), (DirectIO.UNCACHED, False), (DirectIO.ALWAYS, True)]
)
def test_swap_on_a_network_is_written_through_its_cache(
    mode: DirectIO, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(kind: str) -> bool:
        there = FileSystem(device="server:/export", mount_point=str(tmp_path), kind=kind)
        monkeypatch.setattr(swapfile, "file_system_of", lambda path: there)
        with SwapFile.create(tmp_path, SwapSettings(direct=mode)) as swap:
            swap.write(swap.allocate(MIB), memory(MIB))
            return swap.statistics.direct_bytes > 0

    if not write("ext4"):
        pytest.skip("this file system has no direct writes")
    assert write("nfs4") is expected


def test_swap_on_a_disk_is_not_worth_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if file_system_of(str(tmp_path)).kind in IN_MEMORY:
        pytest.skip("files of tests are in memory here")
    with SwapFile.create(tmp_path) as swap:
        swap.allocate(PAGE_BYTES)
    assert not caplog.records


def test_private_unlinked_and_given_back(tmp_path: Path) -> None:
    swap = SwapFile.create(tmp_path)
    facts = os.fstat(swap.fd)
    assert stat.S_IMODE(facts.st_mode) == 0o600
    assert facts.st_nlink == 0
    assert list(tmp_path.iterdir()) == []
    descriptor = swap.fd
    swap.close()
    swap.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)
    with pytest.raises(StorageError, match="is closed"):
        swap.write(0, b"")


def test_without_o_tmpfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with SwapFile.create(tmp_path) as swap:
        assert stat.S_IMODE(os.fstat(swap.fd).st_mode) == 0o600
        assert os.fstat(swap.fd).st_nlink == 0
        assert list(tmp_path.iterdir()) == []


def test_extents_are_congruent_and_share_no_page(tmp_path: Path) -> None:
    with SwapFile.create(tmp_path) as swap:
        taken: set[int] = set()
        for size, like in ((1, 0), (4096, 0), (4096, 1), (5000, 4095), (0, 0), (8192, 123_457), (1, 4096)):
            offset = swap.allocate(size, congruent_to=like)
            assert offset % 4096 == like % 4096
            pages = set(range(offset // 4096, -(-(offset + size) // 4096)))
            assert not pages & taken
            taken |= pages
            assert offset + size <= swap.size_bytes
        assert os.fstat(swap.fd).st_size == swap.size_bytes
        assert os.fstat(swap.fd).st_blocks * 512 >= swap.size_bytes


def test_write_takes_arrays_and_checks_bounds(tmp_path: Path) -> None:
    data = torch.randn(1000)
    with SwapFile.create(tmp_path) as swap:
        offset = swap.allocate(4000, congruent_to=77)
        swap.write(offset, data.numpy())
        assert os.pread(swap.fd, 4000, offset) == data.numpy().tobytes()
        swap.flush()
        with pytest.raises(StorageError, match="outside the 4096 B allocated"):
            swap.write(8000, bytes(193))
        with pytest.raises(StorageError, match="-1 B"):
            swap.allocate(-1)


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset: real(fd, views[0][:1000], offset))
    with SwapFile.create(tmp_path) as swap:
        offset = swap.allocate(4096)
        swap.write(offset, bytes(range(256)) * 16)
        assert os.pread(swap.fd, 4096, offset) == bytes(range(256)) * 16


def test_full_disk_fails_before_anything_is_written(small_disk: Path) -> None:
    before = free_bytes(small_disk)
    with SwapFile.create(small_disk) as swap:
        first = swap.allocate(4096)
        swap.write(first, b"a" * 4096)
        with pytest.raises(
            StorageError, match=r"2\.00 MiB \(2097152 B\) of swap in .*small.* are free there"
        ) as caught:
            swap.allocate(2 * MIB)
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.ENOSPC
        assert swap.size_bytes == os.fstat(swap.fd).st_size == 4096
        assert free_bytes(small_disk) == before - 4096
        swap.write(swap.allocate(4096), b"b" * 4096)
        assert os.pread(swap.fd, 1, first) == b"a"
    assert free_bytes(small_disk) == before
    assert list(small_disk.iterdir()) == []


def test_what_a_failed_allocation_had_reserved_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems leave the part that still fitted."""
    real = os.posix_fallocate

    def half(descriptor: int, offset: int, length: int) -> None:
        real(descriptor, offset, length // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    with SwapFile.create(tmp_path) as swap:
        swap.allocate(4096)
        monkeypatch.setattr(os, "posix_fallocate", half)
        with pytest.raises(StorageError, match="No space left"):
            swap.allocate(MIB)
        assert os.fstat(swap.fd).st_size == swap.size_bytes == 4096


def test_full_disk_while_writing(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = free_bytes(small_disk)
    with SwapFile.create(small_disk) as swap:
        offset = swap.allocate(2 * MIB)
        swap.allocate(1)
        assert len([record for record in caplog.records if "cannot preallocate" in record.message]) == 1
        with pytest.raises(StorageError, match=r"writing 2\.00 MiB .* at offset \d+ B .*\(No space left"):
            swap.write(offset, bytes(2 * MIB))
    assert free_bytes(small_disk) == before


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no swap file can be made in .*nowhere \(No such file"):
        SwapFile.create(tmp_path / "nowhere")


def test_names_are_unique_and_dropping_closes(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    first, second = SwapFile.create(tmp_path), SwapFile.create(tmp_path)
    assert first.name != second.name
    assert first.name.startswith("swap-")
    del first, second
    assert len(os.listdir("/proc/self/fd")) == before
