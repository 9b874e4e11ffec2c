"""Memory of a device: addresses and pages, the arena, homes mapped from files, and the ledger."""

from mball.memory.arena import Arena
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
    "Device",
    "Event",
    "Gauge",
    "HostMemory",
    "Kind",
    "Ledger",
    "PrivateMapping",
    "VirtualMemory",
    "scan_written",
]
