"""What a result has to say of the machine it was measured on; nothing that names the machine or its user."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mball.memory.facts import machine_memory
from mball.observe.nvml import NoGpuError, open_nvml
from mball.observe.told import or_none

_ROOT = Path(__file__).parents[1]
_CPU_INFO = Path("/proc/cpuinfo")
# What a bench run itself changes does not make it a run of another mball.
_NOT_SOURCE = (":(exclude)bench/results", ":(exclude)README.md")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """The machine, at one moment.

    Attributes:
        date: UTC, ISO 8601, to the second.
        cpu: the model, as the kernel names it.
        cores: those that this process may run on.
        memory_bytes: all of the machine's.
        kernel: its version, without what a distributor or host adds.
        transformers: version, None where it is not installed.
        gpu: name of the first GPU, None without one.
        gpu_driver: version, None without a GPU.
        commit: of mball, with ``+changes`` where the sources differ from it; None outside a git checkout.
    """

    date: str
    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    python: str
    torch: str
    transformers: str | None
    gpu: str | None
    gpu_driver: str | None
    commit: str | None


def machine_facts() -> MachineFacts:
    """Returns the facts of this machine, now."""
    gpu, driver = _gpu()
    return MachineFacts(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=machine_memory().total_bytes,
        kernel=platform.release().partition("-")[0],
        python=platform.python_version(),
        torch=importlib.metadata.version("torch"),
        transformers=_version("transformers"),
        gpu=gpu,
        gpu_driver=driver,
        commit=commit_of(),
    )


def _cpu(cpu_info: Path = _CPU_INFO) -> str:
    for line in cpu_info.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()  # not every architecture names its model


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> tuple[str | None, str | None]:
    """Returns name and driver version of the first GPU."""
    try:
        with open_nvml() as nvml:
            seen = nvml.snapshot()
    except NoGpuError:
        return None, None
    return or_none(seen.gpus[0].name), or_none(seen.driver_version)


def commit_of(root: Path = _ROOT) -> str | None:
    """Returns which commit a checkout is of, and whether it was changed; None where that is not known."""
    if not (root / ".git").exists():  # else git would find some repository further up
        return None
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    changes = _git(root, "status", "--porcelain", "--", ".", *_NOT_SOURCE)
    return f"{commit}+changes" if changes else commit


def _git(root: Path, *arguments: str) -> str | None:
    command = ("git", "--no-optional-locks", "-C", str(root), *arguments)
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
