"""The stand-in for NVIDIA's driver, as tests use it. It is loaded in a process that is not the other tests'."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from enum import Enum
from pathlib import Path

from mball.units import KIB, MIB

LIBRARY_VARIABLE = "MBALL_STANDIN_FOR_CUDA"  # names the built library; set only in processes that shall load it
CUFILE = "libcufile.so.0"
SOURCE = Path(__file__).with_name("standin.c")
CODES = {
    "INVALID_VALUE": 1,
    "OUT_OF_MEMORY": 2,
    "INVALID_CONTEXT": 201,
    "ILLEGAL_ADDRESS": 700,
    "LAUNCH_FAILED": 719,
    "NOT_SUPPORTED": 801,
}
FILE_CODES = {
    "DRIVER_NOT_INITIALIZED": 5001,
    "DRIVER_VERSION_MISMATCH": 5004,
    "IO_NOT_SUPPORTED": 5008,
    "GPU_MEMORY_PINNING_FAILED": 5036,
}
# Small, so that examples with many pieces are quick.
GRANULE_BYTES = 64 * KIB
EXTENT_BYTES = 4 * GRANULE_BYTES
MEMORY_BYTES = 64 * MIB


def missing() -> str:
    """Returns what keeps the stand-in from being used on this machine, or an empty string."""
    if shutil.which("cc") is None:
        return "needs a C compiler, cc, for the stand-in for the CUDA driver"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "needs the package cuda-bindings"
    return ""


def build(folder: Path) -> Path:
    """Compiles the stand-in; returns the library."""
    library = folder / "libcuda.so.1"
    # Bindings take calls of cuFile from any library that has them, and load its own for those that none has.
    for name, source in ((library.name, [str(SOURCE)]), (CUFILE, ["-x", "c", os.devnull])):
        command = ["cc", "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
        command += ["-o", str(folder / name), *source, "-ldl", "-lpthread"]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
    return library


class Order(Enum):
    """When the work of streams runs: at once, only when somebody waits for it, or by chance."""

    EARLIEST = 0
    LATEST = 1
    RANDOM = 2


class StandIn:
    """The loaded stand-in: its settings, failures and counters."""

    def __init__(self, library: Path) -> None:
        """Loads it before anybody asks for a driver: bindings take the libcuda.so.1 that is there."""
        self._library = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        found = ctypes.CDLL("libcuda.so.1", os.RTLD_NOLOAD)
        assert hasattr(found, "standin_calls"), "a driver was loaded before the stand-in"
        ctypes.CDLL(str(library.with_name(CUFILE)))
        for name in ("taken_bytes", "mapped_bytes", "handle_bytes", "registered_bytes", "opened_bytes"):
            getattr(self._library, f"standin_{name}").restype = ctypes.c_size_t
        counts = ("handles", "ranges", "retained", "contexts", "streams", "events", "waiting")
        files = ("file_handles", "open", "late", "reading", "compat_reads")
        for name in ("calls", "most_reading", *(f"num_{what}" for what in (*counts, *files))):
            getattr(self._library, f"standin_{name}").restype = ctypes.c_long
        self.configure()

    def configure(
        self,
        *,
        granule_bytes: int = GRANULE_BYTES,
        memory_bytes: int = MEMORY_BYTES,
        virtual_memory: bool = True,
        descriptors: bool = True,
        num_devices: int = 1,
        host_addresses: bool = True,
    ) -> None:
        """Says what device there is from now on."""
        self._library.standin_set(
            ctypes.c_size_t(granule_bytes),
            ctypes.c_size_t(memory_bytes),
            virtual_memory,
            descriptors,
            num_devices,
            host_addresses,
        )

    def set_files(self, *, straight: bool = True, forced: bool = False, most_bytes: int = 0) -> None:
        """Says what cuFile there is from now on.

        Args:
            straight: whether there is nvidia-fs; else cuFile opens only where it may read through host memory.
            forced: whether cufile.json has it read through host memory, whatever else it is told.
            most_bytes: what a read brings at most; 0: all.
        """
        self._library.standin_files(straight, forced, ctypes.c_size_t(most_bytes))

    def hold_reads(self, held: bool) -> None:
        """Has cuFile's reads not come back as long as this is so."""
        self._library.standin_hold_reads(held)

    def fail(self, first: int, last: int | None = None, *, code: int, function: str = "") -> None:
        """Has calls number `first` to `last` from now on fail, of `function` or of any; the first is number 1."""
        last = first if last is None else last
        self._library.standin_fail(function.encode(), ctypes.c_long(first), ctypes.c_long(last), code)

    def forget(self) -> None:
        """Ends all failures and counts from 0 again."""
        self._library.standin_forget()

    def calls(self, function: str = "") -> int:
        """How often `function`, or any, was called since `forget`."""
        return int(self._library.standin_calls(function.encode()))

    def run_in(self, order: Order, seed: int = 0) -> None:
        """Chooses when work of streams runs; `seed` is for chance."""
        self._library.standin_order(order.value, ctypes.c_ulonglong(seed))

    def spin(self, stream: int, seconds: float) -> None:
        """Gives a stream work that takes time, by the clock of its events; other work takes none."""
        self._library.standin_spin(ctypes.c_void_p(stream), ctypes.c_double(seconds))

    def run(self) -> None:
        """Runs all that streams were given."""
        self._library.standin_run()

    def lose(self, code: int) -> None:
        """Breaks the context, as a kernel that goes astray does: every call says so from now on, until `forget`."""
        self._library.standin_lose(code)

    def capture(self, stream: int, begins: bool) -> None:
        """Begins or ends to capture a stream. Meanwhile threads that are not relaxed may not ask or wait for events."""
        self._library.standin_capture(ctypes.c_void_p(stream), begins)

    @property
    def is_relaxed(self) -> bool:
        """Whether this thread may do what breaks a capture."""
        return bool(self._library.standin_capture_mode())

    def pop_contexts(self) -> None:
        """Empties this thread's stack of contexts, for tests that had the call fail that does it."""
        self._library.standin_pop_contexts()

    def sweep(self) -> None:
        """Gives up all there is, after a test that lost some of it."""
        self._library.standin_sweep()

    @property
    def taken_bytes(self) -> int:
        """Bytes of the device's memory that are taken: by handles, mappings and plain allocations."""
        return int(self._library.standin_taken_bytes())

    @property
    def mapped_bytes(self) -> int:
        """Bytes of all mappings."""
        return int(self._library.standin_mapped_bytes())

    @property
    def handle_bytes(self) -> int:
        """Bytes of the pages of all handles that were not released."""
        return int(self._library.standin_handle_bytes())

    @property
    def num_ranges(self) -> int:
        """Reservations and plain allocations."""
        return int(self._library.standin_num_ranges())

    @property
    def num_retained(self) -> int:
        """How often the primary context is held."""
        return int(self._library.standin_num_retained())

    @property
    def num_contexts(self) -> int:
        """How many contexts are on this thread's stack."""
        return int(self._library.standin_num_contexts())

    @property
    def registered_bytes(self) -> int:
        """Bytes of host memory that are pinned."""
        return int(self._library.standin_registered_bytes())

    @property
    def num_streams(self) -> int:
        """Streams that were made and not destroyed."""
        return int(self._library.standin_num_streams())

    @property
    def num_events(self) -> int:
        """Events that were made and not destroyed."""
        return int(self._library.standin_num_events())

    @property
    def num_waiting(self) -> int:
        """How much work of streams did not run yet."""
        return int(self._library.standin_num_waiting())

    @property
    def opened_bytes(self) -> int:
        """Bytes of the device's memory that cuFile has opened to disks."""
        return int(self._library.standin_opened_bytes())

    @property
    def num_file_handles(self) -> int:
        """Files that are registered with cuFile."""
        return int(self._library.standin_num_file_handles())

    @property
    def num_reading(self) -> int:
        """Reads of cuFile that are under way."""
        return int(self._library.standin_num_reading())

    @property
    def most_reading(self) -> int:
        """The most there were at a time since `set_files`."""
        return int(self._library.standin_most_reading())

    @property
    def num_compat_reads(self) -> int:
        """Reads since `set_files` that cuFile was free to make through host memory."""
        return int(self._library.standin_num_compat_reads())

    @property
    def falls_back(self) -> bool:
        """Whether cuFile may read through host memory."""
        return bool(self._library.standin_falls_back())

    def has_no_files(self) -> bool:
        """Whether cuFile is closed, and nothing is registered with it, nor was longer than it was open."""
        num_open, num_late = int(self._library.standin_num_open()), int(self._library.standin_num_late())
        return (self.opened_bytes, self.num_file_handles, num_open, num_late) == (0, 0, 0, 0)

    def sweep_files(self) -> None:
        """Closes cuFile, and sets it back, after a test that lost some of it."""
        self._library.standin_sweep_files()

    def is_idle(self) -> bool:
        """Whether no streams, events, pinned memory and work are left."""
        return (self.num_streams, self.num_events, self.registered_bytes, self.num_waiting) == (0, 0, 0, 0)

    def is_empty(self) -> bool:
        """Whether everything that was taken was given back."""
        return (self.taken_bytes, self.mapped_bytes, self.handle_bytes, self.num_ranges) == (0, 0, 0, 0)
