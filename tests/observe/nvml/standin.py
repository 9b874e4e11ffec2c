"""The stand-in for NVML, as tests use it. It is loaded in processes that are not the other tests'."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

LIBRARY_VARIABLE = "MBALL_STANDIN_FOR_NVML"  # names the built library; set only in processes that shall load it
SETTINGS_VARIABLE = "MBALL_NVML"  # what the library itself reads as it is loaded
SOURCE = Path(__file__).with_name("standin.c")
CODES = {
    "NOT_SUPPORTED": 3, "NO_PERMISSION": 4, "NOT_FOUND": 6, "DRIVER_NOT_LOADED": 9, "TIMEOUT": 10,
    "FUNCTION_NOT_FOUND": 13, "GPU_IS_LOST": 15, "VERSION_MISMATCH": 18, "UNKNOWN": 999, "OF_TOMORROW": 4711,
}  # fmt: skip
MAX_GPUS, MAX_SLICES = 8, 7
FOREVER = 1 << 40


def missing() -> str:
    """Returns what keeps the stand-in from being used on this machine, or an empty string."""
    return "" if shutil.which("cc") else "needs a C compiler, cc, for the stand-in for NVML"


def build(folder: Path) -> Path:
    """Compiles the stand-in; returns the library."""
    library = folder / "libnvidia-ml.so.1"
    command = ["cc", "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-shared", "-fPIC"]
    command += ["-Wl,-soname,libnvidia-ml.so.1", "-o", str(library), str(SOURCE)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return library


def slice_of(gpu: int, number: int) -> int:
    """Returns the unit that a slice of a GPU is, to be set and listed."""
    return MAX_GPUS + gpu * MAX_SLICES + number


class StandIn:
    """The loaded stand-in: its settings, failures and counters."""

    def __init__(self, library: Path) -> None:
        """Loads it before anybody asks for NVML: pynvml takes the libnvidia-ml.so.1 that is there."""
        self._library = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        found = ctypes.CDLL("libnvidia-ml.so.1", os.RTLD_NOLOAD)
        assert hasattr(found, "standin_num_calls"), "NVML was loaded before the stand-in"
        self._library.standin_num_calls.restype = ctypes.c_long
        self._library.standin_call.restype = ctypes.c_char_p

    def set(self, unit: int = 0, **values: int) -> None:
        """Sets answers of a GPU or slice: total, used, reserved, busy, pcie_sent, nvlink_sent, …"""
        for name, value in values.items():
            self._library.standin_set(name.encode(), unit, ctypes.c_ulonglong(value))

    def name(self, unit: int, name: bytes) -> None:
        """Names a GPU or slice."""
        self._library.standin_text(b"name", unit, name)

    def list(self, pid: int, num_bytes: int, *, name: bytes = b"", unit: int = 0, use: str = "compute") -> None:
        """Lists a process; 2**64 - 1 bytes is NVML's word for "no number"."""
        self._library.standin_list(use.encode(), unit, pid, ctypes.c_ulonglong(num_bytes))
        if name:
            self._library.standin_text(b"process", pid, name)

    def fail(self, function: str, code: str, *, first: int = 1, last: int = FOREVER) -> None:
        """Has calls number `first` to `last` from now on fail, of `function` or, if that is empty, of any."""
        self._library.standin_fail(function.encode(), ctypes.c_long(first), ctypes.c_long(last), CODES[code])

    def forget(self) -> None:
        """Forgets all settings, processes and failures, and counts from 0 again."""
        self._library.standin_forget()

    def forget_failures(self) -> None:
        """Forgets failures only, and counts from 0 again."""
        self._library.standin_forget_failures()

    @property
    def calls(self) -> list[str]:
        """The functions that were called, in order."""
        return [self._library.standin_call(number).decode() for number in range(self._library.standin_num_calls())]

    @property
    def num_open(self) -> int:
        """How often NVML is open."""
        return int(self._library.standin_num_open())
