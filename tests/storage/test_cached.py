"""Whether a stretch of a file is in the page cache."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mball.storage import cached
from mball.storage.cached import is_cached
from mball.storage.mounts import FileSystem
from mball.units import MIB


def test_what_was_just_written_and_what_was_dropped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * (4 * MIB))
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        assert is_cached(descriptor, 0, 4 * MIB)
        assert is_cached(descriptor, 5, 9)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if cached.file_system_of(str(tmp_path)).kind in ("tmpfs", "ramfs"):
            pytest.skip("the directory for temporary files is in memory")
        assert not is_cached(descriptor, 0, 4 * MIB)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(("num_missing", "expected"), [(0, True), (8, True), (9, False), (256, False)])
def test_a_few_pages_may_be_missing(num_missing: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def preadv(descriptor: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        asked.append(offset)
        if len(asked) <= num_missing:
            raise BlockingIOError
        return 1

    monkeypatch.setattr(os, "preadv", preadv)
    assert is_cached(3, 1000, 1000 + 256 * 5000) is expected
    assert asked == [1000 + 5000 * number for number in range(256 if expected else 9)]


@pytest.mark.parametrize(("kind", "expected"), [("tmpfs", True), ("9p", False)])
def test_a_file_system_that_does_not_tell(kind: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr(os, "preadv", preadv)
    where = FileSystem(device="?", mount_point="/", kind=kind)
    monkeypatch.setattr(cached, "file_system_of", lambda _: where)
    assert is_cached(3, 0, 100) is expected
