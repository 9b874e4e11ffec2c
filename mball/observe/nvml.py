"""Asks NVIDIA's driver what its GPUs do, through NVML: the only module that loads pynvml.

NVML is the driver's own library for this. It needs no CUDA context, so looking takes no memory of a GPU. Each question
may be refused (virtual GPUs, MIG, containers, old drivers), and then the answer is a `NotTold`.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pynvml

from mball.errors import DeviceError
from mball.observe.gpus import Gpu, GpuProcess, GpuSnapshot, Use
from mball.observe.told import NotTold, Told
from mball.units import KIB

_WAYS_OUT = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
        "install NVIDIA's driver, or start the container with its GPUs (docker run --gpus all)"
    ),
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "load the kernel part of the driver (sudo modprobe nvidia), or reboot",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "library and kernel part of the driver are of two versions: reboot",
    pynvml.NVML_ERROR_NO_PERMISSION: "give this user, or this container, access to /dev/nvidia*",
}
_ALL_LINKS = ctypes.c_uint(-1).value  # as a field's scope: the sum over all NVLinks
FIRST_LOOK = NotTold(why="a rate needs a second look")
"""Stands for rates at the first look; the driver has only counters."""

_KB = 1000  # NVML's word for the unit of PCIe throughput
_NUMBERS = {
    pynvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
}
# What NVML writes where it has no number.
_NO_NUMBERS = (pynvml.NVML_VALUE_NOT_AVAILABLE_uint.value, pynvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value)

_T = TypeVar("_T")


class NoGpuError(DeviceError):
    """No GPU can be seen.

    Attributes:
        reason: what NVML says.
        way_out: what to do.
    """

    def __init__(self, reason: str, *, way_out: str) -> None:
        super().__init__(f"{reason}; {way_out}")
        self.reason = reason
        self.way_out = way_out


@contextlib.contextmanager
def open_nvml() -> Iterator[Nvml]:
    """Opens NVML for as long as the block lasts. Starting it may take a second where nothing else uses the GPU.

    Raises:
        NoGpuError: no driver, or it does not answer; the message says what to do.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise _no_gpu(error) from error
    try:
        yield Nvml()
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


class Nvml:
    """NVML while it is open. Not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Use `open_nvml`. `clock` is in seconds."""
        self._clock = clock
        self._counters: dict[tuple[str, int], tuple[float, int]] = {}

    def snapshot(self) -> GpuSnapshot:
        """Looks at every GPU. Takes about 40 ms a GPU, in which the driver counts what crosses PCIe.

        Rates of NVLink are since the last call.

        Raises:
            NoGpuError: the driver does not answer any more, or sees no GPU.
        """
        try:
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            raise _no_gpu(error) from error
        if count == 0:
            raise NoGpuError(
                "NVIDIA's driver sees no GPU",
                way_out="check that one is built in (lspci) and given to this machine or container",
            )
        cuda = _ask(pynvml.nvmlSystemGetCudaDriverVersion)
        return GpuSnapshot(
            driver_version=_ask(pynvml.nvmlSystemGetDriverVersion),
            cuda_version=cuda if isinstance(cuda, NotTold) else f"{cuda // 1000}.{cuda % 1000 // 10}",
            gpus=tuple(self._gpu(index) for index in range(count)),
        )

    def _gpu(self, index: int) -> Gpu:
        label = str(index)
        handle = _ask(pynvml.nvmlDeviceGetHandleByIndex, index)
        slices, refused = self._slices(handle, label)
        return self._unit(handle, label, slices, refused)

    def _slices(self, handle: Any, label: str) -> tuple[tuple[Gpu, ...], tuple[tuple[str, NotTold], ...]]:
        """Returns the slices of a GPU that is partitioned, and why they cannot be seen."""
        mode = _of(handle, pynvml.nvmlDeviceGetMigMode)
        if isinstance(mode, NotTold):
            # Few GPUs can be partitioned, so of the others there is nothing to say.
            return (), () if mode.why == _why_of(pynvml.NVML_ERROR_NOT_SUPPORTED) else (("slices", mode),)
        if mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return (), ()
        count = _of(handle, pynvml.nvmlDeviceGetMaxMigDeviceCount)
        if isinstance(count, NotTold):
            return (), (("slices", count),)
        slices, refused = [], []
        for number in range(count):
            part = _of(handle, pynvml.nvmlDeviceGetMigDeviceHandleByIndex, number)
            if not isinstance(part, NotTold):
                slices.append(self._unit(part, f"{label}:{number}", (), ()))
            elif part.why != _why_of(pynvml.NVML_ERROR_NOT_FOUND):  # not every number has a slice
                refused.append((f"slice {number}", part))
        return tuple(slices), tuple(refused)

    def _unit(self, handle: Any, label: str, slices: tuple[Gpu, ...], refused: tuple[tuple[str, NotTold], ...]) -> Gpu:
        memory = _of(handle, pynvml.nvmlDeviceGetMemoryInfo, pynvml.nvmlMemory_v2)
        if isinstance(memory, NotTold):  # before driver 510 there was one call, which counts in what is reserved
            reserved: Told[int] = memory
            memory = _of(handle, pynvml.nvmlDeviceGetMemoryInfo)
        else:
            reserved = _number(memory, "reserved")
        busy = _of(handle, pynvml.nvmlDeviceGetUtilizationRates)
        processes, not_listed = ((), ()) if slices else _processes(handle)
        return Gpu(
            label=label,
            uuid=_of(handle, pynvml.nvmlDeviceGetUUID),
            name=_of(handle, pynvml.nvmlDeviceGetName),
            total_bytes=_number(memory, "total"),
            used_bytes=_number(memory, "used"),
            free_bytes=_number(memory, "free"),
            reserved_bytes=reserved,
            busy_percent=_number(busy, "gpu"),
            memory_busy_percent=_number(busy, "memory"),
            pcie_generation=_number(_of(handle, pynvml.nvmlDeviceGetMaxPcieLinkGeneration)),
            pcie_lanes=_number(_of(handle, pynvml.nvmlDeviceGetMaxPcieLinkWidth)),
            pcie_received_bytes_per_s=_pcie(handle, pynvml.NVML_PCIE_UTIL_RX_BYTES),
            pcie_sent_bytes_per_s=_pcie(handle, pynvml.NVML_PCIE_UTIL_TX_BYTES),
            nvlink_received_bytes_per_s=self._nvlink(handle, label, pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX),
            nvlink_sent_bytes_per_s=self._nvlink(handle, label, pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX),
            processes=processes,
            not_listed=(*refused, *not_listed),
            slices=slices,
        )

    def _nvlink(self, handle: Any, label: str, field: int) -> Told[int]:
        """Returns the rate since the last look: the driver has only counters, of KiB."""
        now_s = self._clock()
        fields = _of(handle, pynvml.nvmlDeviceGetFieldValues, [(field, _ALL_LINKS)])
        if isinstance(fields, NotTold):
            return fields
        if fields[0].nvmlReturn != pynvml.NVML_SUCCESS:
            return NotTold(why=_why_of(fields[0].nvmlReturn))
        if fields[0].valueType not in _NUMBERS:
            return NotTold(why=f"the driver's counter is of type {fields[0].valueType}")
        counter = getattr(fields[0].value, _NUMBERS[fields[0].valueType])
        before = self._counters.get((label, field))
        self._counters[label, field] = now_s, counter
        if before is None:
            return FIRST_LOOK
        if counter < before[1]:
            return NotTold(why="the driver's counter began anew")
        elapsed_s = now_s - before[0]
        return round((counter - before[1]) * KIB / elapsed_s) if elapsed_s > 0 else FIRST_LOOK


def needs_second_look(snapshot: GpuSnapshot) -> bool:
    """Returns whether a second snapshot would tell rates that this one cannot."""
    return any(
        FIRST_LOOK in (unit.nvlink_received_bytes_per_s, unit.nvlink_sent_bytes_per_s) for unit in snapshot.units()
    )


def _processes(handle: Any) -> tuple[tuple[GpuProcess, ...], tuple[tuple[str, NotTold], ...]]:
    """Returns the processes that the driver lists, and the lists that it refuses."""
    lists = {
        Use.COMPUTE: pynvml.nvmlDeviceGetComputeRunningProcesses_v3,
        Use.GRAPHICS: pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3,
        Use.MPS: pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3,
    }
    uses: dict[int, list[Use]] = {}
    held: dict[int, list[int]] = {}
    refused = []
    for use, call in lists.items():
        listed = _of(handle, call)
        if isinstance(listed, NotTold):
            refused.append((f"{use.value} processes", listed))
            continue
        for process in listed:
            uses.setdefault(process.pid, []).append(use)
            num_bytes = held.setdefault(process.pid, [])
            if process.usedGpuMemory is not None:
                num_bytes.append(process.usedGpuMemory)
    processes = tuple(
        GpuProcess(
            pid=pid,
            uses=tuple(uses[pid]),
            # In two lists it is the same memory.
            used_bytes=max(held[pid]) if held[pid] else NotTold(why="the driver lists the process without a number"),
            name=_ask(pynvml.nvmlSystemGetProcessName, pid),
        )
        for pid in sorted(uses)
    )
    return processes, tuple(refused)


def _pcie(handle: Any, direction: int) -> Told[int]:
    throughput = _number(_of(handle, pynvml.nvmlDeviceGetPcieThroughput, direction))
    return throughput if isinstance(throughput, NotTold) else throughput * _KB


def _number(answer: Any, name: str = "") -> Told[int]:
    """Returns the answer, or one number of it where it is a structure."""
    if isinstance(answer, NotTold):
        return answer
    value = getattr(answer, name) if name else answer
    return NotTold(why="the driver gives no number") if value in _NO_NUMBERS else value


def _of(handle: Any, call: Callable[..., Any], *arguments: Any) -> Any:
    """Asks about a GPU; of one that cannot be reached nothing is told."""
    return handle if isinstance(handle, NotTold) else _ask(call, handle, *arguments)


def _ask(call: Callable[..., _T], *arguments: Any) -> Told[_T]:
    try:
        return call(*arguments)
    except pynvml.NVMLError as error:
        return NotTold(why=str(error))
    except UnicodeDecodeError:
        return NotTold(why="the driver's answer is no text")


def _why_of(code: int) -> str:
    return str(pynvml.NVMLError(code))


def _no_gpu(error: Any) -> NoGpuError:
    way_out = _WAYS_OUT.get(error.value, "see whether nvidia-smi works")
    return NoGpuError(f"NVIDIA's driver does not answer ({error})", way_out=way_out)
