"""Memory of a device: addresses and pages, the arena, homes mapped from files, and the ledger."""

from mball.memory.arena import Arena
from mball.memory.cuda_plain import PlainCudaMemory
from mball.memory.cuda_region import CudaRegion
from mball.memory.cuda_virtual import CudaMemory, open_cuda_memory
from mball.memory.device import ArenaRead, CopySource, CpuDevice, Device, Event, Gauge
from mball.memory.ledger import Account, Kind, Ledger
from mball.memory.mapping import PrivateMapping, scan_written
from mball.memory.virtual import HostMemory, VirtualMemory

__all__ = [
    "Account",
    "Arena",
    "ArenaRead",
    "CopySource",
    "CpuDevice",
    "CudaMemory",
    "CudaRegion",
    "Device",
    "Event",
    "Gauge",
    "HostMemory",
    "Kind",
    "Ledger",
    "PlainCudaMemory",
    "PrivateMapping",
    "VirtualMemory",
    "open_cuda_memory",
    "scan_written",
]
