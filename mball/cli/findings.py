"""What a machine has and lacks for mball: one `Finding` a fact, with what to do where it falls short."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from mball.cli.calibrate import figures
from mball.config import calibration_directory
from mball.errors import StorageError
from mball.observe.gpus import Gpu
from mball.observe.nvml import NoGpuError, open_nvml
from mball.observe.told import NotTold
from mball.schema import Tier
from mball.storage import DirectoryFacts, file_system_of, load_calibration, probe_directory
from mball.units import format_bytes

PYTHON_NEEDED = (3, 11)
TORCH_NEEDED = (2, 11)
# Below this, even a small model waits seconds for every token.
SLOW_DISK_BYTES_PER_S = 2e8


class Need(Enum):
    """MANDATORY: mball does not work without it. OPTIONAL: it works, and the finding says what is lost."""

    MANDATORY = "mandatory"
    OPTIONAL = "optional"


class State(Enum):
    """FOUND: as it should be. LIMITED: there, and something is lost. MISSING: not there."""

    FOUND = "found"
    LIMITED = "limited"
    MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fact. `value` is for people; `advice` says what to do without it, and is empty where all is well."""

    section: str
    name: str
    need: Need
    state: State
    value: str
    advice: str = ""


def check(section: str, name: str, ok: bool, value: str, advice: str, need: Need = Need.OPTIONAL) -> Finding:
    """Returns a Finding that is found, or missing with `advice`."""
    state = State.FOUND if ok else State.MISSING
    return Finding(section=section, name=name, need=need, state=state, value=value, advice="" if ok else advice)


def limit(section: str, name: str, ok: bool, value: str, advice: str, need: Need = Need.OPTIONAL) -> Finding:
    """Returns a Finding that is found, or limited with `advice`."""
    state = State.FOUND if ok else State.LIMITED
    return Finding(section=section, name=name, need=need, state=state, value=value, advice="" if ok else advice)


def software() -> list[Finding]:
    """Returns what is installed: the system, Python, torch, a compiler, packages."""
    section = "software"
    system = platform.system()
    torch_version = _version("torch")
    torch_ok = torch_version is not None and _leading_numbers(torch_version) >= TORCH_NEEDED
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    optional = (
        ("transformers", "mball.integrations.transformers and the demo need it: pip install transformers"),
        ("accelerate", "only the demo's conversion needs it: pip install accelerate"),
        ("gguf", "only the demo's conversion needs it: pip install gguf"),
        ("triton", "torch brings it with its CUDA builds; the CPU device does without"),
    )
    return [
        check(
            section, "Linux", system == "Linux", f"{system} {platform.release()}",
            "mball reads /proc and uses Linux's memory calls; run it on Linux", Need.MANDATORY,
        ),
        check(
            section, "Python", sys.version_info >= PYTHON_NEEDED, platform.python_version(),
            "install Python 3.11 or newer", Need.MANDATORY,
        ),
        check(
            section, "torch", torch_ok, torch_version or "not installed", "pip install 'torch>=2.11'", Need.MANDATORY
        ),
        *(_package(section, package, advice) for package, advice in optional),
        check(
            section, "C++ compiler", compiler is not None, compiler or "none on the PATH",
            "steps run as torch runs them, uncompiled; install g++ to compile them",
        ),
    ]  # fmt: skip


def disk(directory: str | Path) -> tuple[list[Finding], DirectoryFacts | None]:
    """Returns what the disk under `directory` can do, measured with a temporary file there, and the raw facts."""
    section = f"disk of {directory}"
    try:
        facts = probe_directory(directory)
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
    ]  # fmt: skip
    speeds = (
        ("read past the page cache", facts.direct_bandwidth_bytes_per_s),
        ("read through it, cold", facts.buffered_bandwidth_bytes_per_s),
    )
    for name, speed in speeds:
        if speed is not None:
            advice = "every streamed byte comes at this speed; keep checkpoints on a faster disk"
            findings.append(limit(section, name, speed >= SLOW_DISK_BYTES_PER_S, f"{speed / 1e9:.2f} GB/s", advice))
    if facts.latency_s is not None:
        latency = f"{facts.latency_s * 1e6:.0f} µs"
        findings.append(check(section, "latency of a read on the idle disk", True, latency, ""))
    findings.append(_calibration(section, facts.directory))
    return findings, facts


def _calibration(section: str, directory: str) -> Finding:
    found = load_calibration(calibration_directory(), file_system_of(directory))
    link = None if found is None else found.find_link(Tier.DISK, Tier.DEVICE)
    value = "none" if found is None or link is None else f"{found.day}: {figures(link)}"
    advice = f"each start measures the disk for 0.1 s: mball doctor --calibrate {directory} measures it well, once"
    return check(section, "calibration", link is not None, value, advice)


def gpus() -> list[Finding]:
    """Returns the NVIDIA driver and its GPUs, and what reaches them from disk."""
    section = "GPU"
    try:
        with open_nvml() as nvml:
            seen = nvml.snapshot()
    except NoGpuError as error:
        advice = f"models run on the CPU device; for a GPU: {error.way_out}"
        return [check(section, "NVIDIA driver", False, error.reason, advice)]
    driver, cuda = (
        "unknown" if isinstance(version, NotTold) else version for version in (seen.driver_version, seen.cuda_version)
    )
    findings = [check(section, "NVIDIA driver", True, f"{driver}, CUDA {cuda}", "")]
    findings += [_gpu(section, gpu) for gpu in seen.units()]
    has_gds = Path("/proc/driver/nvidia-fs/stats").exists()
    return [
        *findings,
        _package(section, "cuda-bindings", "a budget on the GPU cannot grow and shrink: pip install cuda-bindings"),
        check(
            section, "GPUDirect Storage", has_gds, "nvidia-fs is loaded" if has_gds else "nvidia-fs is not loaded",
            "reads go through pinned host memory, which is a good way too",
        ),
    ]  # fmt: skip


def _gpu(section: str, gpu: Gpu) -> Finding:
    parts = ["name unknown" if isinstance(gpu.name, NotTold) else gpu.name]
    if isinstance(gpu.total_bytes, NotTold) or isinstance(gpu.free_bytes, NotTold):
        parts.append("memory unknown")
    else:
        parts.append(f"{format_bytes(gpu.total_bytes)}, {format_bytes(gpu.free_bytes)} free")
    if isinstance(gpu.pcie_generation, NotTold) or isinstance(gpu.pcie_lanes, NotTold):
        parts.append("PCIe link unknown")  # virtual machines often hide it
    else:
        parts.append(f"PCIe {gpu.pcie_generation} x{gpu.pcie_lanes}")
    advice = "mball computes on the CPU device so far; CUDA comes behind the same seam"
    return limit(section, f"GPU {gpu.label}", False, ", ".join(parts), advice)


def _package(section: str, name: str, advice: str) -> Finding:
    version = _version(name)
    return check(section, name, version is not None, version or "not installed", advice)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _leading_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
