"""What the driver tells of a machine's GPUs at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from mball.observe.told import NotTold, Told
from mball.units import format_bytes


class Use(Enum):
    """What a process uses a GPU for. MPS: it computes through the server that shares a GPU between processes."""

    COMPUTE = "compute"
    GRAPHICS = "graphics"
    MPS = "mps"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process that holds memory of a GPU.

    Attributes:
        pid: as the driver counts: drivers of before 2021 or so tell the machine's number inside a container too.
        uses: one or more.
        used_bytes: memory of this GPU that it holds, its CUDA context included.
        name: of its program.
    """

    pid: int
    uses: tuple[Use, ...]
    used_bytes: Told[int]
    name: Told[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, or one slice of a GPU that is partitioned (MIG). Each value may be one that the driver does not tell.

    Attributes:
        label: the driver's index, "0"; slices have their own after it, "0:1". CUDA may count in another order.
        uuid: what CUDA knows the GPU by too.
        total_bytes: all memory; `used_bytes + free_bytes`, and `reserved_bytes` where the driver tells it apart.
        used_bytes: what processes and their contexts hold; what the driver reserves too where that is not told apart.
        reserved_bytes: what the driver keeps for itself.
        busy_percent: the part of the driver's last sample (up to a second) in which a kernel ran.
        memory_busy_percent: the part of it in which memory was read or written.
        pcie_generation, pcie_lanes: of the link at its best; a GPU at rest may run it slower.
        pcie_received_bytes_per_s, pcie_sent_bytes_per_s: by the GPU, in the 20 ms before.
        nvlink_received_bytes_per_s, nvlink_sent_bytes_per_s: payload of all links since the last look.
        processes: by number; those that the driver lists. In a container it may hide the others.
        not_listed: lists that the driver refuses, such as the compute processes, and why.
        slices: of a GPU that is partitioned. Its processes are then with its slices.
    """

    label: str
    uuid: Told[str]
    name: Told[str]
    total_bytes: Told[int]
    used_bytes: Told[int]
    free_bytes: Told[int]
    reserved_bytes: Told[int]
    busy_percent: Told[int]
    memory_busy_percent: Told[int]
    pcie_generation: Told[int]
    pcie_lanes: Told[int]
    pcie_received_bytes_per_s: Told[int]
    pcie_sent_bytes_per_s: Told[int]
    nvlink_received_bytes_per_s: Told[int]
    nvlink_sent_bytes_per_s: Told[int]
    processes: tuple[GpuProcess, ...]
    not_listed: tuple[tuple[str, NotTold], ...]
    slices: tuple[Gpu, ...] = ()

    @property
    def elsewhere_bytes(self) -> Told[int]:
        """What is used and no listed process holds: hidden processes, and the driver where it is not told apart."""
        if isinstance(self.used_bytes, NotTold):
            return self.used_bytes
        if self.slices:
            return NotTold(why="its processes are with its slices")
        held_bytes = 0
        for process in self.processes:
            if isinstance(process.used_bytes, NotTold):
                return NotTold(why=f"not what process {process.pid} holds: {process.used_bytes.why}")
            held_bytes += process.used_bytes
        if held_bytes > self.used_bytes:
            return NotTold(
                why=f"processes hold {format_bytes(held_bytes)}, more than the {format_bytes(self.used_bytes)} in use"
            )
        return self.used_bytes - held_bytes

    def held_by(self, pid: int) -> Told[int]:
        """Returns how many bytes a process holds."""
        for process in self.processes:
            if process.pid == pid:
                return process.used_bytes
        if self.not_listed:
            return NotTold(why="; ".join(f"{what}: {reason.why}" for what, reason in self.not_listed))
        return NotTold(why=f"process {pid} is not listed; a container may hide it")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSnapshot:
    """All GPUs at one moment.

    Attributes:
        driver_version: such as "580.65.06".
        cuda_version: the newest that the driver can, such as "13.0".
        gpus: in the driver's order.
    """

    driver_version: Told[str]
    cuda_version: Told[str]
    gpus: tuple[Gpu, ...]

    def units(self) -> tuple[Gpu, ...]:
        """Returns every GPU followed by its slices."""
        return tuple(unit for gpu in self.gpus for unit in (gpu, *gpu.slices))

    def find(self, uuid: str) -> Gpu | None:
        """Returns the GPU or slice of that name, with or without what kind of name it is ("GPU-", "MIG-")."""
        for unit in self.units():
            if not isinstance(unit.uuid, NotTold) and _bare(unit.uuid) == _bare(uuid):
                return unit
        return None


def _bare(uuid: str) -> str:
    """CUDA leaves out what NVML begins with."""
    return uuid.removeprefix("GPU-").removeprefix("MIG-")
