"""Memory of a device: addresses and pages, the arena, homes mapped from files, and the ledger.

The names below are loaded when first used, so that `mball top` can look at memory without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mball.memory.arena import Arena as Arena
    from mball.memory.cuda_plain import PlainCudaMemory as PlainCudaMemory
    from mball.memory.cuda_region import CudaRegion as CudaRegion
    from mball.memory.cuda_virtual import CudaMemory as CudaMemory
    from mball.memory.cuda_virtual import open_cuda_memory as open_cuda_memory
    from mball.memory.device import ArenaRead as ArenaRead
    from mball.memory.device import CopySource as CopySource
    from mball.memory.device import CpuDevice as CpuDevice
    from mball.memory.device import Device as Device
    from mball.memory.device import Event as Event
    from mball.memory.device import Gauge as Gauge
    from mball.memory.ledger import Account as Account
    from mball.memory.ledger import Kind as Kind
    from mball.memory.ledger import Ledger as Ledger
    from mball.memory.ledger_page import LedgerPage as LedgerPage
    from mball.memory.mapping import PrivateMapping as PrivateMapping
    from mball.memory.mapping import scan_written as scan_written
    from mball.memory.virtual import HostMemory as HostMemory
    from mball.memory.virtual import VirtualMemory as VirtualMemory

_HOMES = {
    "Account": "mball.memory.ledger",
    "Arena": "mball.memory.arena",
    "ArenaRead": "mball.memory.device",
    "CopySource": "mball.memory.device",
    "CpuDevice": "mball.memory.device",
    "CudaMemory": "mball.memory.cuda_virtual",
    "CudaRegion": "mball.memory.cuda_region",
    "Device": "mball.memory.device",
    "Event": "mball.memory.device",
    "Gauge": "mball.memory.device",
    "HostMemory": "mball.memory.virtual",
    "Kind": "mball.memory.ledger",
    "Ledger": "mball.memory.ledger",
    "LedgerPage": "mball.memory.ledger_page",
    "PlainCudaMemory": "mball.memory.cuda_plain",
    "PrivateMapping": "mball.memory.mapping",
    "VirtualMemory": "mball.memory.virtual",
    "open_cuda_memory": "mball.memory.cuda_virtual",
    "scan_written": "mball.memory.mapping",
}

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
    "LedgerPage",
    "PlainCudaMemory",
    "PrivateMapping",
    "VirtualMemory",
    "open_cuda_memory",
    "scan_written",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mball.memory' has no attribute {name!r}")
