"""Facts, from this machine and from written-down ones."""

from __future__ import annotations

import mmap
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mball.memory import facts
from mball.units import GIB, KIB, MIB


def test_this_process() -> None:
    before = facts.process_memory()
    # New memory: the C library might have as much to spare.
    block = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    torch.frombuffer(block, dtype=torch.uint8).fill_(1)
    after = facts.process_memory()
    assert 60 * MIB < after.anonymous_bytes - before.anonymous_bytes < 80 * MIB
    assert after.pss_bytes is not None
    assert 0 < after.pss_bytes <= after.rss_bytes
    assert after.peak_rss_bytes >= 64 * MIB
    del block


def test_this_machine() -> None:
    machine = facts.machine_memory()
    assert 0 < machine.available_bytes <= machine.total_bytes
    assert 0 < facts.headroom_bytes() <= machine.total_bytes
    assert facts.transparent_huge_pages() in (None, "always", "madvise", "never")


def group(directory: Path, names: tuple[str, str], limit: str, usage: int, stat: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names[0]).write_text(limit + "\n")
    (directory / names[1]).write_text(f"{usage}\n")
    (directory / "memory.stat").write_text(stat)


def proc(tmp_path: Path, text: str) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(text)
    return tmp_path / "proc"


def test_version_2_takes_the_tightest_group_above(tmp_path: Path) -> None:
    names = ("memory.max", "memory.current")
    stat = "anon 1\nfile 400\ninactive_file 100\nactive_file 50\n"
    group(tmp_path / "root/a/b", names, "max", 7, stat)
    group(tmp_path / "root/a", names, str(2 * GIB), GIB, stat)
    group(tmp_path / "root", names, str(4 * GIB), 3 * GIB, stat)
    found = facts.cgroup_memory(proc(tmp_path, "0::/a/b\n"), tmp_path / "root")
    assert found == facts.CgroupMemory(limit_bytes=2 * GIB, usage_bytes=GIB, cache_bytes=150)


def test_version_1_beside_an_empty_version_2(tmp_path: Path) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 30\ntotal_active_file 20\n"
    group(tmp_path / "root/memory/job", names, str(512 * MIB), 100 * MIB, stat)
    group(tmp_path / "root/memory", names, "9223372036854771712", GIB, stat)
    text = "8:pids:/\n4:memory:/job\n1:name=systemd:/\n0::/\n"
    found = facts.cgroup_memory(proc(tmp_path, text), tmp_path / "root")
    assert found == facts.CgroupMemory(limit_bytes=512 * MIB, usage_bytes=100 * MIB, cache_bytes=50)


def test_a_container_that_sees_its_group_as_the_root(tmp_path: Path) -> None:
    names = ("memory.max", "memory.current")
    group(tmp_path / "root", names, str(GIB), 5, "inactive_file 1\nactive_file 2\n")
    found = facts.cgroup_memory(proc(tmp_path, "0::/not/visible/here\n"), tmp_path / "root")
    assert found == facts.CgroupMemory(limit_bytes=GIB, usage_bytes=5, cache_bytes=3)


def test_no_groups_at_all(tmp_path: Path) -> None:
    assert facts.cgroup_memory(tmp_path, tmp_path) is None
    assert facts.cgroup_memory(proc(tmp_path, "0::/\n"), tmp_path / "root") is None


def test_huge_page_settings(tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    assert facts.transparent_huge_pages(setting) is None
    setting.write_text("always [madvise] never\n")
    assert facts.transparent_huge_pages(setting) == "madvise"


def test_another_process() -> None:
    hold = "import sys; held = b'x' * (64 << 20); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        quick = facts.process_memory(process=process.pid, shares=False)
        exact = facts.process_memory(process=process.pid)
        process.kill()
    assert quick.pss_bytes is None
    assert 64 << 20 < quick.anonymous_bytes < 128 << 20
    assert exact.pss_bytes is None or 64 << 20 < exact.pss_bytes < 128 << 20
    with pytest.raises(OSError, match=str(process.pid)):
        facts.process_memory(process=process.pid)


def test_a_kernel_without_rollup(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text("Name:\tx\nVmHWM:\t  30 kB\nVmRSS:\t  20 kB\nRssAnon:\t 10 kB\n")
    assert facts.process_memory(tmp_path) == facts.ProcessMemory(
        rss_bytes=20 * KIB, pss_bytes=None, anonymous_bytes=10 * KIB, peak_rss_bytes=30 * KIB
    )


def test_addresses_are_free_unless_something_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tmp_path / "sys/vm/overcommit_memory"
    assert facts.addresses_are_free(tmp_path), "a kernel that does not say"
    setting.parent.mkdir(parents=True)
    for text, free in (("0\n", True), ("1\n", True), ("2\n", False)):
        setting.write_text(text)
        assert facts.addresses_are_free(tmp_path) is free
    setting.write_text("0\n")
    for limited in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        with monkeypatch.context() as patch:
            limits = dict.fromkeys((resource.RLIMIT_AS, resource.RLIMIT_DATA), resource.RLIM_INFINITY)
            limits[limited] = 1 << 40
            patch.setattr(resource, "getrlimit", lambda which, limits=limits: (limits[which], limits[which]))
            assert not facts.addresses_are_free(tmp_path)
