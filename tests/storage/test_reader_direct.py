"""O_DIRECT: what is read with it, and what is not and why."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
from pathlib import Path

import pytest

from tests.preads import SetPreadv
from tests.storage.reads import FILE_BYTES, MakeReader, aligned, memory, opened, read


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("shift", [0, 1, 512, 4095])
def test_ragged_ends_are_buffered_and_the_middle_is_direct(
    path: str, content: bytes, shift: int, make_reader: MakeReader
) -> None:
    files = opened(path)
    reader = make_reader(files, chunk_bytes=16384)
    destination = memory(200_000)
    reader.submit([read(path, shift, 100_000, destination[shift : shift + 100_000])]).wait()
    assert bytes(destination[shift : shift + 100_000]) == content[shift : shift + 100_000]
    assert reader.statistics.direct_bytes == (shift + 100_000) // 4096 * 4096 - aligned(shift)
    assert "buffered (not aligned)" in reader.path
    reader.close()
    files.close()


def test_an_odd_address_is_buffered_and_not_blamed_on_the_file_system(
    path: str, content: bytes, make_reader: MakeReader
) -> None:
    """This kernel may allow it; others answer EINVAL, which would switch the whole file system to buffered reads."""
    files = opened(path)
    reader = make_reader(files)
    destination = memory(65537)
    reader.submit([read(path, 0, 65536, destination[1:])]).wait()
    assert bytes(destination[1:]) == content[:65536]
    assert reader.statistics.direct_bytes == 0
    assert files.any_direct
    reader.submit([read(path, 0, 65536, destination)]).wait()
    assert reader.statistics.direct_bytes == 65536
    reader.close()
    files.close()


def test_short_direct_reads_are_finished(
    path: str, content: bytes, set_preadv: SetPreadv, make_reader: MakeReader
) -> None:
    """A device that brings odd pieces and, as most do, refuses to go on from them with O_DIRECT."""
    real = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if is_direct(descriptor):
            if offset % 512:
                raise OSError(errno.EINVAL, "Invalid argument")
            return min(real(descriptor, buffers, offset), 4096 if offset % 32768 else 1000)
        return real(descriptor, buffers, offset)

    set_preadv(short)
    files = opened(path)
    reader = make_reader(files, chunk_bytes=16384)
    destination = memory(65536)
    reader.submit([read(path, 0, 65536, destination)]).wait()
    assert bytes(destination) == content[:65536]
    assert not files.buffered_reasons
    reader.close()
    files.close()


@pytest.mark.parametrize("where", ["open", "read"])
def test_falls_back_to_buffered_with_one_line(
    tmp_path: Path,
    content: bytes,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    set_preadv: SetPreadv,
    caplog: pytest.LogCaptureFixture,
    make_reader: MakeReader,
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
    set_preadv(preadv)
    caplog.set_level(logging.INFO)
    files = opened()
    for name in "ab":
        (tmp_path / name).write_bytes(content)
        files.add_path(tmp_path / name)
    reader = make_reader(files, chunk_bytes=4096)
    for name in files.names:
        destination = memory(aligned(FILE_BYTES))
        reader.submit([read(name, 0, len(destination), destination)]).wait()
        assert bytes(destination[:FILE_BYTES]) == content
    assert reader.path == "buffered (O_DIRECT refused: Invalid argument)"
    assert reader.statistics.direct_bytes == 0
    # Several threads may meet the refusal at once.
    files[files.names[1]].fall_back(OSError(errno.EINVAL, "Invalid argument"), 4096)
    assert len([record for record in caplog.records if "refuses O_DIRECT" in record.getMessage()]) == 1
    assert bool(direct) == (where == "read")
    reader.close()
    files.close()


def test_file_systems_without_o_direct(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture, make_reader: MakeReader
) -> None:
    """ramfs refuses it; tmpfs refuses it on older kernels: either way the bytes are right and the path says so."""
    point = tmp_path / "ram"
    point.mkdir()
    mount = ["mount", "-t", "ramfs", "none", str(point)]
    mounted = not os.geteuid() and not subprocess.run(mount, capture_output=True, check=False).returncode
    shm = Path("/dev/shm") / f"mball-test-{os.getpid()}"
    try:
        files = opened()
        for file in [shm, point / "data"] if mounted else [shm]:
            file.write_bytes(content)
            files.add_path(file)
        reader = make_reader(files)
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
