"""The C library's functions, with their types."""

from __future__ import annotations

import ctypes
from pathlib import Path

from mball.c_library import CLibrary
from mball.memory.allocator.records import EntryRecord, FailureRecord, Offer, SegmentRecord, StatisticsRecord

SEGMENTS = CLibrary(source=Path(__file__).with_name("segments.c"), title="the allocator's C library")


def load_library(cache: Path | None = None) -> ctypes.CDLL:
    """Returns the library, whose functions have their types; see `CLibrary.load`. Does not start CUDA.

    Raises:
        DeviceError: there is none, and why, in one line.
    """
    return _typed(SEGMENTS.load(cache))


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """Gives every function its types: a size that is passed as an int loses its upper half."""
    number, address, size, code = ctypes.c_int, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int
    pointer = ctypes.POINTER
    for name, result, arguments in (
        ("malloc", ctypes.c_void_p, [ctypes.c_ssize_t, number, ctypes.c_void_p]),
        ("free", None, [ctypes.c_void_p, ctypes.c_ssize_t, number, ctypes.c_void_p]),
        ("open", code, [number, size, size]),
        ("close", code, [number]),
        ("set_limit", code, [number, size]),
        ("fit_limit", code, [number, size, pointer(size)]),
        ("trim", code, [number, size, pointer(size)]),
        ("lend", code, [number, size, pointer(address), pointer(size)]),
        ("take_back", code, [number, size, size, pointer(address), pointer(size), pointer(size)]),
        ("owns", number, [number, address]),
        ("offer", code, [number, address, size, address, ctypes.c_void_p, pointer(Offer)]),
        ("withdraw", code, [number, pointer(Offer)]),
        ("taken", size, [number, size, pointer(address)]),
        ("generation", ctypes.c_void_p, [number]),
        ("statistics", code, [number, pointer(StatisticsRecord)]),
        ("list", size, [number, size, pointer(SegmentRecord)]),
        ("history", size, [number, size, pointer(EntryRecord)]),
        ("failure", None, [number, pointer(FailureRecord)]),
    ):
        function = getattr(library, f"mball_{name}")
        function.restype, function.argtypes = result, arguments
    return library
