"""The doctor's findings about a disk: which way files there are read, how fast, and what else could read them."""

from __future__ import annotations

from pathlib import Path

from mball.cli.calibrate import figures
from mball.cli.findings import Finding, Need, check, limit
from mball.config import calibration_directory, own_cache
from mball.errors import StorageError
from mball.gds import NVIDIA_FS, kept_speeds
from mball.schema import Tier
from mball.storage import (
    LINK_TIME_LIMIT_S,
    DirectoryFacts,
    choose_reader,
    file_system_of,
    fitted_choice,
    load_calibration,
    probe_directory,
)
from mball.units import format_bytes

# Below this, even a small model waits seconds for every token.
SLOW_DISK_BYTES_PER_S = 2e8
# Those that NVIDIA lists for cuFile; there are more with modules of their vendors.
_KINDS_OF_CUFILE = ("ext4", "xfs", "nfs", "nfs4", "lustre", "beegfs", "gpfs", "wekafs")


def disk(directory: str | Path, *, has_gpu: bool) -> tuple[list[Finding], DirectoryFacts | None]:
    """Returns what the disk under `directory` can do, measured with a temporary file there, and the raw facts.

    With `has_gpu` also what reaches one from there.
    """
    section = f"disk of {directory}"
    choice = choose_reader(cache=own_cache())
    calibration = load_calibration(calibration_directory(), file_system_of(str(directory)))
    choice = fitted_choice(calibration, choice, (True, False))
    try:
        facts = probe_directory(directory, choice=choice)
    except StorageError as error:
        advice = "give --directory a directory that exists and can be written to"
        return [check(section, "directory", False, str(error), advice, Need.MANDATORY)], None
    alignment = (
        f"yes; smallest alignment of offset {facts.offset_alignment_bytes} B, "
        f"address {facts.address_alignment_bytes} B, length {facts.length_alignment_bytes} B"
    )
    findings = [
        limit(
            section, "directory", facts.measured_bytes > 0,
            f"{facts.file_system} on {facts.mount_point}, {format_bytes(facts.free_bytes)} free",
            "too full to be measured, and for a swap file; free some space", Need.MANDATORY,
        ),
        check(
            section, "O_DIRECT", facts.direct, alignment if facts.direct else "refused by the file system",
            "reads go through the page cache, which also takes memory; use a local disk",
        ),
        limit(
            section, "files are read", facts.direct and facts.page_cache_reason is None, _way(facts),
            "io='direct' goes past it; DISKS.md says when that is better" if facts.direct else "use a local disk",
        ),
        limit(
            section, "reader", choice.library is not None, f"{choice} ({choice.reason})",
            "reads wait while Python is busy; install a C compiler (cc)",
        ),
    ]  # fmt: skip
    speeds = (
        ("read past the page cache", facts.direct_bandwidth_bytes_per_s),
        ("read through it, cold", facts.buffered_bandwidth_bytes_per_s),
        ("read out of it", facts.cached_bandwidth_bytes_per_s),
    )
    for name, speed in speeds:
        if speed is not None:
            advice = "every streamed byte comes at this speed; keep checkpoints on a faster disk"
            findings.append(limit(section, name, speed >= SLOW_DISK_BYTES_PER_S, f"{speed / 1e9:.2f} GB/s", advice))
    if facts.latency_s is not None:
        latency = f"{facts.latency_s * 1e6:.0f} µs"
        findings.append(check(section, "latency of a read on the idle disk", True, latency, ""))
    findings.append(_calibration(section, facts.directory))
    if has_gpu:
        findings.append(_gpu_direct_storage(section, facts.file_system, facts.directory))
    return findings, facts


def _calibration(section: str, directory: str) -> Finding:
    found = load_calibration(calibration_directory(), file_system_of(directory))
    link = None if found is None else found.find_link(Tier.DISK, Tier.DEVICE)
    value = "none" if found is None or link is None else f"{found.day}: {figures(link)}"
    measured = f"each start measures the disk for {LINK_TIME_LIMIT_S:g} s"
    advice = f"{measured}: mball doctor --calibrate {directory} measures it well, once"
    return check(section, "calibration", link is not None, value, advice)


def _way(facts: DirectoryFacts) -> str:
    if facts.page_cache_reason is not None:
        return f"through the page cache: {facts.page_cache_reason}"
    return "past the page cache" if facts.direct else "through the page cache: O_DIRECT is refused"


def _gpu_direct_storage(section: str, kind: str, directory: str) -> Finding:
    """Whether cuFile could read from here to a GPU, and how fast it was, if a model was ever read so or nearly so."""
    obstacles = []
    try:
        from cuda.bindings import cufile

        version = str(cufile.get_version())
    except ImportError:
        obstacles.append("no package cuda-bindings with cufile")
    except RuntimeError as error:  # of cuda-bindings: no library, or one that is too old
        obstacles.append(str(error).partition(":")[0])
    if not NVIDIA_FS.exists():
        obstacles.append("nvidia-fs is not loaded")
    if kind not in _KINDS_OF_CUFILE:
        obstacles.append(f"{kind} is not a file system that it reads")
    if obstacles:
        value = "could not work here: " + "; ".join(obstacles)
    else:
        value = f"could work here, cuFile {version}: a model for a GPU is read so if that is faster (io='gds' insists)"
        value = "; ".join([value, *map(str, kept_speeds(str(file_system_of(directory))))])
    advice = "nothing to do: files go to a GPU through pinned host memory, read with O_DIRECT"
    return limit(section, "GPUDirect Storage", not obstacles, value, advice)
