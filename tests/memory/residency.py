"""What the kernel says is in memory at some addresses of this process."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


def resident_bytes(address: int, size_bytes: int, field: str = "Rss") -> int:
    """Sums a field of smaps over the mappings that begin in the range."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        match = _RANGE.match(line)
        if match:
            inside = address <= int(match[1], 16) < address + size_bytes
        elif inside and line.startswith(f"{field}:"):
            total += int(line.split()[1]) * 1024
    return total


def is_mapped(address: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    vector = (ctypes.c_ubyte * 1)()
    return bool(libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(4096), vector) == 0)
