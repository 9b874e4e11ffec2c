"""A control group that caps the memory of one process and whatever it starts; version 1 or 2."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Self

CGROUPS = Path("/sys/fs/cgroup")
PAGE_BYTES = os.sysconf("SC_PAGESIZE")


class NoCgroupError(RuntimeError):
    """This process may not make memory control groups here; the message says why."""


class MemoryGroup:
    """One control group. Every page that a process touches after it joined is charged to it, kernel memory included."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_v1 = (path / "memory.limit_in_bytes").exists()

    @classmethod
    def create(cls, name: str, root: Path = CGROUPS) -> Self:
        """Makes an empty group without a limit. Raises NoCgroupError when there is no hierarchy that may be written."""
        reasons = []
        for parent in (root / "memory", root):
            path = parent / name
            try:
                path.mkdir()
            except OSError as error:
                reasons.append(f"{path}: {error.strerror}")
                continue
            if any((path / limit).exists() for limit in ("memory.limit_in_bytes", "memory.max")):
                return cls(path)
            reasons.append(f"{path}: the memory controller is not on")
            path.rmdir()
        raise NoCgroupError("no memory control group can be made here: " + "; ".join(reasons))

    @property
    def members(self) -> Path:
        """The file to which a process writes its number to join."""
        return self.path / "cgroup.procs"

    def pids(self) -> list[int]:
        """Returns the processes in the group."""
        return [int(line) for line in self.members.read_text().split()]

    def set_limit(self, limit_bytes: int) -> None:
        """Caps memory, and memory and swap together, at `limit_bytes`, a multiple of the page.

        Raises OSError when more is in use already and cannot be taken back.
        """
        if self._is_v1:
            self._write("memory.limit_in_bytes", limit_bytes)
            if (self.path / "memory.memsw.limit_in_bytes").exists():
                self._write("memory.memsw.limit_in_bytes", limit_bytes)
        else:
            if (self.path / "memory.swap.max").exists():
                self._write("memory.swap.max", 0)
            self._write("memory.max", limit_bytes)

    def limit_bytes(self) -> int | None:
        """Returns the cap that the kernel says is in force; None for none."""
        text = (self.path / ("memory.limit_in_bytes" if self._is_v1 else "memory.max")).read_text().strip()
        return None if text == "max" or int(text) >= 1 << 60 else int(text)

    def usage_bytes(self) -> int:
        """Returns what is charged now: anonymous pages, page cache, kernel memory."""
        return int((self.path / ("memory.usage_in_bytes" if self._is_v1 else "memory.current")).read_text())

    def times_at_limit(self) -> int:
        """Returns how often the group was at its cap, so that the kernel had to take something back."""
        if self._is_v1:
            return int((self.path / "memory.failcnt").read_text())
        return self._table("memory.events")["max"]

    def oom_kills(self) -> int:
        """Returns how many of its processes the kernel killed because nothing could be taken back."""
        return self._table("memory.oom_control" if self._is_v1 else "memory.events")["oom_kill"]

    def stat(self) -> dict[str, int]:
        """Returns the kernel's own account of what is charged, in bytes and counts, by the names of its version."""
        return self._table("memory.stat")

    def remove(self) -> None:
        """Kills what is still in the group, and removes it with the page cache it was charged for. Idempotent."""
        for _ in range(500):
            try:
                pids = self.pids()
            except FileNotFoundError:
                return
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:  # it went by itself
                    continue
            if not pids:
                try:
                    if self._is_v1:
                        self._write("memory.force_empty", 0)
                    self.path.rmdir()
                    return
                except OSError:  # pages of a process that just died are still charged
                    pass
            time.sleep(0.02)
        raise RuntimeError(
            f"{self.path} cannot be removed: it has processes {self.pids()} and {self.usage_bytes()} bytes"
        )

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))

    def _table(self, name: str) -> dict[str, int]:
        lines = (line.split() for line in (self.path / name).read_text().splitlines())
        return {name: int(value) for name, value in lines}
