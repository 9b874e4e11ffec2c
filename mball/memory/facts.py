"""What this machine and this process say about memory. Linux; every number is in bytes.

Judge a process by its PSS or its cgroup, not by RSS: RSS counts a page once for each mapping of it.
"""

from __future__ import annotations

import contextlib
import resource
from dataclasses import dataclass
from pathlib import Path

from mball.units import KIB

_PROC = Path("/proc")
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_NEVER_OVERCOMMIT = "2"
_NO_LIMIT_BYTES = 1 << 60  # cgroup v1 writes "no limit" as a number close to 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """Memory of a process now.

    Attributes:
        rss_bytes: pages that are mapped; shared ones count whole.
        pss_bytes: the same, a page shared by n mappings counts 1/n. None where the kernel does not say.
        anonymous_bytes: pages that no file backs.
        peak_rss_bytes: the largest `rss_bytes` of the process so far.
    """

    rss_bytes: int
    pss_bytes: int | None
    anonymous_bytes: int
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineMemory:
    """Memory of the machine: all of it, and what the kernel could hand out now without swapping."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupMemory:
    """The tightest memory limit above this process.

    Attributes:
        limit_bytes: the limit, None when no group of this process has one.
        usage_bytes: what is charged to the group with that limit (to the own group when there is none).
        cache_bytes: the part of `usage_bytes` that is page cache, which the kernel can take back.
    """

    limit_bytes: int | None
    usage_bytes: int
    cache_bytes: int


def process_memory(proc: Path = _PROC, *, process: int | str = "self", shares: bool = True) -> ProcessMemory:
    """Reads the memory use of this process, or of process number `process`. Raises OSError where that has ended.

    Without `shares` PSS is None. It takes a walk over all pages, in which the process can map no memory: much to ask of
    somebody else's every second.
    """
    status = _kib_table(proc / f"{process}/status")
    rollup = {}
    if shares:
        with contextlib.suppress(OSError):  # an old or restricted kernel
            rollup = _kib_table(proc / f"{process}/smaps_rollup")
    return ProcessMemory(
        rss_bytes=rollup.get("Rss", status.get("VmRSS", 0)),
        pss_bytes=rollup.get("Pss"),
        anonymous_bytes=rollup.get("Anonymous", status.get("RssAnon", 0)),
        peak_rss_bytes=status.get("VmHWM", 0),
    )


def machine_memory(proc: Path = _PROC) -> MachineMemory:
    """Reads total and available memory of the machine."""
    table = _kib_table(proc / "meminfo")
    return MachineMemory(total_bytes=table["MemTotal"], available_bytes=table.get("MemAvailable", table["MemFree"]))


def cgroup_memory(proc: Path = _PROC, root: Path = _CGROUP_ROOT) -> CgroupMemory | None:
    """Finds the memory limit of this process's control groups, version 1 or 2; None where there are none."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return None
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    tightest: CgroupMemory | None = None
    for controllers, path in paths.items():
        if "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        elif controllers == "":
            base, names = root, ("memory.max", "memory.current")
        else:
            continue
        # A container may see its own group as the root of the tree, so the path need not exist.
        group = base / path.strip("/")
        for directory in (group, *group.parents):
            if not directory.is_relative_to(base):
                break
            found = _read_group(directory, *names)
            if found is None:
                continue
            limit, best = found.limit_bytes, tightest.limit_bytes if tightest else None
            if tightest is None or (limit is not None and (best is None or limit < best)):
                tightest = found
    return tightest


def transparent_huge_pages(setting: Path = _HUGE_PAGES) -> str | None:
    """Returns ``"always"``, ``"madvise"`` or ``"never"``; None when the kernel has no huge pages."""
    try:
        text = setting.read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None


def addresses_are_free(proc: Path = _PROC) -> bool:
    """Returns whether addresses that are reserved count towards no limit."""
    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    if any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits):
        return False
    try:
        return (proc / "sys/vm/overcommit_memory").read_text().strip() != _NEVER_OVERCOMMIT
    except OSError:
        return True


def headroom_bytes() -> int:
    """Returns how many more bytes this process can back before the machine or its cgroup runs out."""
    headroom = machine_memory().available_bytes
    group = cgroup_memory()
    if group is not None and group.limit_bytes is not None:
        headroom = min(headroom, group.limit_bytes - group.usage_bytes + group.cache_bytes)
    return max(headroom, 0)


def numa_node(pci_address: str, devices: Path = _PCI_DEVICES) -> int | None:
    """Returns the NUMA node that a device is at, None where there is one only or the kernel does not say."""
    try:
        node = int((devices / pci_address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def locked_limit_bytes() -> int | None:
    """Returns how much memory this process may lock (ulimit -l), None without a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if limit == resource.RLIM_INFINITY else limit


def _kib_table(path: Path) -> dict[str, int]:
    table = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB":
            table[name] = int(words[0]) * KIB
    return table


def _read_group(directory: Path, limit_name: str, usage_name: str) -> CgroupMemory | None:
    try:
        usage = int((directory / usage_name).read_text())
        limit = (directory / limit_name).read_text().strip()
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except OSError:  # the root group has no limit file; other groups may be hidden
        return None
    prefix = "total_" if "total_inactive_file" in stat else ""
    unlimited = limit == "max" or int(limit) >= _NO_LIMIT_BYTES
    return CgroupMemory(
        limit_bytes=None if unlimited else int(limit),
        usage_bytes=usage,
        cache_bytes=int(stat.get(f"{prefix}inactive_file", 0)) + int(stat.get(f"{prefix}active_file", 0)),
    )
