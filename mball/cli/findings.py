"""What a machine has and lacks for mball: one `Finding` a fact, with what to do where it falls short."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from enum import Enum

from mball.observe.gpus import Gpu
from mball.observe.nvml import NoGpuError, open_nvml
from mball.observe.told import NotTold
from mball.units import format_bytes

PYTHON_NEEDED = (3, 11)
TORCH_NEEDED = (2, 11)


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


def gpus() -> list[Finding]:
    """Returns the NVIDIA driver and its GPUs."""
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
    return [
        *findings,
        _package(section, "cuda-bindings", "a budget on the GPU cannot grow and shrink: pip install cuda-bindings"),
    ]


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
