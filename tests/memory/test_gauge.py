"""The gauge sees memory that no allocator of torch tells of."""

from __future__ import annotations

import mmap
from pathlib import Path

from mball.memory.gauge import HostGauge
from mball.units import MIB

SIZE = 64 * MIB
SLACK = 8 * MIB  # what other threads and the kernel's own counting add


def touch(size_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, size_bytes, mmap.PAGESIZE):
        memory[offset] = 1
    return memory


def test_a_rise_that_is_over_is_seen() -> None:
    gauge = HostGauge()
    gauge.reset()
    touch(SIZE).close()
    assert SIZE - SLACK < gauge.rise_bytes() < SIZE + SLACK
    gauge.reset()
    assert gauge.rise_bytes() < SLACK


def test_what_is_used_now() -> None:
    gauge = HostGauge()
    before = gauge.used_bytes()
    memory = touch(SIZE)
    assert SIZE - SLACK < gauge.used_bytes() - before < SIZE + SLACK
    memory.close()
    assert abs(gauge.used_bytes() - before) < SLACK


def test_a_kernel_that_does_not_tell(tmp_path: Path) -> None:
    gauge = HostGauge(tmp_path / "nowhere")
    gauge.reset()
    assert gauge.rise_bytes() == 0
    assert gauge.used_bytes() == 0
    (tmp_path / "status").write_text("Name: something else\n")
    (tmp_path / "clear_refs").write_text("")
    gauge = HostGauge(tmp_path)
    gauge.reset()
    assert gauge.rise_bytes() == 0
