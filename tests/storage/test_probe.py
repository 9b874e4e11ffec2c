"""The probe: its facts agree with what the reader then does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mball.errors import StorageError
from mball.storage import FileTable, SwapFile, file_system_of, measure_link, probe_directory
from mball.units import MIB


def test_facts_of_a_directory(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    facts = probe_directory(tmp_path, size_bytes=16 * MIB)
    assert facts.measured_bytes == 16 * MIB
    assert facts.free_bytes > 0
    assert facts.buffered_bandwidth_bytes_per_s is not None
    assert facts.buffered_bandwidth_bytes_per_s > 1e6
    assert facts.latency_s is not None
    assert 0 < facts.latency_s < 1
    if facts.direct:
        assert facts.offset_alignment_bytes in [512 << power for power in range(8)]
        assert facts.address_alignment_bytes in [512 << power for power in range(8)]
        assert facts.length_alignment_bytes in [512 << power for power in range(8)]
        assert facts.direct_bandwidth_bytes_per_s is not None
        assert facts.direct_bandwidth_bytes_per_s > 1e6
    else:
        assert facts.direct_bandwidth_bytes_per_s is None
    assert facts.cached_bandwidth_bytes_per_s is not None
    assert facts.cached_bandwidth_bytes_per_s > 1e6
    assert str(tmp_path).startswith(facts.mount_point)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_known_file_systems() -> None:
    shm = probe_directory("/dev/shm", size_bytes=MIB)
    assert (shm.mount_point, shm.file_system) == ("/dev/shm", "tmpfs")
    assert shm.page_cache_reason == "tmpfs is memory"


def test_a_file_system_is_known_by_path_and_by_an_open_file_without_one(tmp_path: Path) -> None:
    assert str(file_system_of("/proc/self")).endswith(" on /proc type proc")
    with SwapFile.create(tmp_path) as swap:
        assert file_system_of(f"/proc/self/fd/{swap.fd}") == file_system_of(str(tmp_path))


def test_a_directory_that_is_not_there() -> None:
    with pytest.raises(StorageError, match=r"/no/such cannot be probed \(No such file"):
        probe_directory("/no/such")


def test_the_link_of_files(tmp_path: Path) -> None:
    files = FileTable()
    with pytest.raises(StorageError, match="none of 0 files"):
        measure_link(files)
    (tmp_path / "small").write_bytes(b"x")
    (tmp_path / "large").write_bytes(bytes(20 * MIB))
    (tmp_path / "empty").touch()
    names = [files.add_path(tmp_path / name) for name in ("small", "empty", "large")]
    with SwapFile.create(tmp_path) as swap:
        swap.write(swap.allocate(MIB), bytes(MIB))
        names.append(files.add_swap(swap))
        for link in (measure_link(files), measure_link(files, names[2]), measure_link(files, swap.name)):
            assert link.bandwidth_bytes_per_s > 1e6
            assert 0 < link.latency_s < 1
        assert measure_link(files, names[0]).bandwidth_bytes_per_s > 0
    files.close()
