"""Memory of a device: addresses and pages, the arena, homes mapped from files, and the ledger.

The names below are loaded when first used, so that `mball top` can look at memory without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mball.memory.allocator.library import load_library as load_library
    from mball.memory.allocator.segment_allocator import SegmentAllocator as SegmentAllocator
    from mball.memory.arena import Arena as Arena
    from mball.memory.cuda_device import CudaDevice as CudaDevice
    from mball.memory.cuda_driver import CudaDriver as CudaDriver
    from mball.memory.cuda_errors import DriverError as DriverError
    from mball.memory.cuda_errors import GpuLostError as GpuLostError
    from mball.memory.cuda_plain import PlainCudaMemory as PlainCudaMemory
    from mball.memory.cuda_region import CudaRegion as CudaRegion
    from mball.memory.cuda_virtual import CudaMemory as CudaMemory
    from mball.memory.cuda_virtual import open_cuda_memory as open_cuda_memory
    from mball.memory.device import ArenaRead as ArenaRead
    from mball.memory.device import CopySource as CopySource
    from mball.memory.device import CpuDevice as CpuDevice
    from mball.memory.device import Device as Device
    from mball.memory.device import Donors as Donors
    from mball.memory.device import Event as Event
    from mball.memory.device import Extent as Extent
    from mball.memory.device import Gauge as Gauge
    from mball.memory.device import Graphs as Graphs
    from mball.memory.device import Moment as Moment
    from mball.memory.device import Recorded as Recorded
    from mball.memory.ledger import Account as Account
    from mball.memory.ledger import Kind as Kind
    from mball.memory.ledger import Ledger as Ledger
    from mball.memory.ledger_page import LedgerPage as LedgerPage
    from mball.memory.mapping import PrivateMapping as PrivateMapping
    from mball.memory.mapping import scan_written as scan_written
    from mball.memory.pinned import PinnedSlab as PinnedSlab
    from mball.memory.pinned_homes import PinnedHomes as PinnedHomes
    from mball.memory.pinned_homes import PinnedRange as PinnedRange
    from mball.memory.virtual import HostMemory as HostMemory
    from mball.memory.virtual import VirtualMemory as VirtualMemory

_HOMES = {
    "Account": "mball.memory.ledger",
    "Arena": "mball.memory.arena",
    "ArenaRead": "mball.memory.device",
    "CopySource": "mball.memory.device",
    "CpuDevice": "mball.memory.device",
    "CudaDevice": "mball.memory.cuda_device",
    "Donors": "mball.memory.device",
    "Extent": "mball.memory.device",
    "CudaDriver": "mball.memory.cuda_driver",
    "CudaMemory": "mball.memory.cuda_virtual",
    "CudaRegion": "mball.memory.cuda_region",
    "Device": "mball.memory.device",
    "DriverError": "mball.memory.cuda_errors",
    "Event": "mball.memory.device",
    "Gauge": "mball.memory.device",
    "GpuLostError": "mball.memory.cuda_errors",
    "Graphs": "mball.memory.device",
    "HostMemory": "mball.memory.virtual",
    "Kind": "mball.memory.ledger",
    "Ledger": "mball.memory.ledger",
    "LedgerPage": "mball.memory.ledger_page",
    "PinnedHomes": "mball.memory.pinned_homes",
    "PinnedRange": "mball.memory.pinned_homes",
    "PinnedSlab": "mball.memory.pinned",
    "PlainCudaMemory": "mball.memory.cuda_plain",
    "PrivateMapping": "mball.memory.mapping",
    "Moment": "mball.memory.device",
    "Recorded": "mball.memory.device",
    "SegmentAllocator": "mball.memory.allocator.segment_allocator",
    "VirtualMemory": "mball.memory.virtual",
    "load_library": "mball.memory.allocator.library",
    "open_cuda_memory": "mball.memory.cuda_virtual",
    "scan_written": "mball.memory.mapping",
}

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
    "Donors",
    "DriverError",
    "Event",
    "Extent",
    "Gauge",
    "GpuLostError",
    "Graphs",
    "HostMemory",
    "Kind",
    "Ledger",
    "LedgerPage",
    "Moment",
    "PinnedHomes",
    "PinnedRange",
    "PinnedSlab",
    "PlainCudaMemory",
    "PrivateMapping",
    "Recorded",
    "SegmentAllocator",
    "VirtualMemory",
    "load_library",
    "open_cuda_memory",
    "scan_written",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mball.memory' has no attribute {name!r}")
