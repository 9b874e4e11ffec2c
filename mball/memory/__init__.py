"""Memory of a device: addresses and pages, the arena, homes mapped from files, and the ledger."""

from mball.memory.arena import Arena
from mball.memory.cuda_device import CudaDevice
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_errors import DriverError, GpuLostError
from mball.memory.cuda_plain import PlainCudaMemory
from mball.memory.cuda_region import CudaRegion
from mball.memory.cuda_virtual import CudaMemory, open_cuda_memory
from mball.memory.device import ArenaRead, CopySource, CpuDevice, Device, Event, Gauge
from mball.memory.ledger import Account, Kind, Ledger
from mball.memory.mapping import PrivateMapping, scan_written
from mball.memory.pinned import PinnedSlab
from mball.memory.pinned_homes import PinnedHomes, PinnedRange
from mball.memory.virtual import HostMemory, VirtualMemory

__all__ = [
    "Account",
    "Arena",
    "ArenaRead",
    "CopySource",
    "CpuDevice",
    "CudaDevice",
    "CudaDriver",
    "CudaMemory",
    "CudaRegion",
    "Device",
    "DriverError",
    "Event",
    "Gauge",
    "GpuLostError",
    "HostMemory",
    "Kind",
    "Ledger",
    "PinnedHomes",
    "PinnedRange",
    "PinnedSlab",
    "PlainCudaMemory",
    "PrivateMapping",
    "VirtualMemory",
    "open_cuda_memory",
    "scan_written",
]
