"""The CUDA driver's calls that memory is made of: each checked, each failure an error that says what to do."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from mball.errors import DeviceError
from mball.memory.cuda_errors import NOT_READY, DriverError, error_type, way_out
from mball.units import format_bytes

_log = logging.getLogger(__name__)


class CudaDriver:
    """One GPU's memory calls, in its primary context, which is torch's too.

    Calls that touch memory are made inside `with driver.current():`. Sizes and addresses are multiples of
    `granularity_bytes`. A handle stands for physical pages, which live until it is released and no mapping is left.
    Not ordered with any stream. CUDA does not survive a fork: a forked child gets a DeviceError.
    """

    def __init__(self, ordinal: int = 0, *, shareable: bool = False) -> None:
        """Starts CUDA on GPU `ordinal` (as CUDA_VISIBLE_DEVICES counts), where nobody did, and holds its context.

        With `shareable`, pages can be handed to other processes (`export_handle`).

        Raises:
            DeviceError: no bindings, no driver, one that is too old, no such GPU, or pages cannot be shared there.
        """
        self._cuda = _bindings()
        self._ordinal = ordinal
        self._process = os.getpid()
        self._context: Any = None
        self.call("cuInit", 0)
        self._device = self.call("cuDeviceGet", ordinal)
        self._place = self._placed(shareable)
        self._has_virtual_memory = self._attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED")
        if shareable and not (
            self._has_virtual_memory and self._attribute("HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED")
        ):
            raise DeviceError(f"memory of GPU {ordinal} cannot be shared between processes; do not ask for it")
        self._access = self._cuda.CUmemAccessDesc()
        self._access.location = self._place.location
        self._access.flags = self._cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        minimum = self._cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self._granularity_bytes = (
            int(self.call("cuMemGetAllocationGranularity", self._place, minimum)) if self._has_virtual_memory else 0
        )
        self._context = self.call("cuDevicePrimaryCtxRetain", self._device)

    @property
    def ordinal(self) -> int:
        """Which GPU."""
        return self._ordinal

    @property
    def has_virtual_memory(self) -> bool:
        """Whether addresses and pages can be had apart; some virtual GPUs offer plain allocations only."""
        return self._has_virtual_memory

    @property
    def granularity_bytes(self) -> int:
        """The smallest piece of physical memory, as the driver says; 0 without virtual memory."""
        return self._granularity_bytes

    @property
    def is_forked(self) -> bool:
        """Whether this is a child of the process that CUDA was started in: all of it belongs to the parent."""
        return os.getpid() != self._process

    def refuse_fork(self) -> None:
        """Raises DeviceError in a forked child, as every call does."""
        if self.is_forked:
            raise DeviceError(
                f"process {os.getpid()} was forked from {self._process}, where CUDA runs, and CUDA does not survive a "
                "fork; start processes with torch.multiprocessing's method 'spawn', or fork before the GPU is used"
            )

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Makes the context current on this thread, and what was current before at the end. Raises DeviceError."""
        self.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            try:
                self.call("cuCtxPopCurrent")
            except DriverError as error:
                # Somebody took it away meanwhile, so nothing is left to put right; what was done inside stays done.
                _log.warning("the context that was current before could not be made current again: %s", error)

    def free_and_total_bytes(self) -> tuple[int, int]:
        """Returns how much of the GPU's memory is free, and how much there is. Raises DriverError."""
        free_bytes, total_bytes = self.call("cuMemGetInfo")
        return int(free_bytes), int(total_bytes)

    def reserve(self, size_bytes: int, alignment_bytes: int) -> int:
        """Returns the address of a range without memory; the alignment is a power of two. Raises DriverError."""
        return int(self.call("cuMemAddressReserve", size_bytes, alignment_bytes, 0, 0, size_bytes=size_bytes))

    def unreserve(self, address: int, size_bytes: int) -> None:
        """Gives a reserved range up, in which nothing is mapped. Raises DriverError."""
        self.call("cuMemAddressFree", address, size_bytes, size_bytes=size_bytes)

    def create(self, size_bytes: int) -> int:
        """Returns the handle of new physical pages. Raises DriverError."""
        return int(self.call("cuMemCreate", size_bytes, self._place, 0, size_bytes=size_bytes))

    def destroy(self, handle: int) -> None:
        """Gives a handle up; its pages go once they are not mapped any more. Raises DriverError."""
        self.call("cuMemRelease", handle)

    def map(self, address: int, size_bytes: int, handle: int) -> None:
        """Puts a handle's pages, from its first, at an address; nobody may access them yet. Raises DriverError."""
        self.call("cuMemMap", address, size_bytes, 0, handle, 0, size_bytes=size_bytes)

    def allow(self, address: int, size_bytes: int) -> None:
        """Lets the GPU read and write whole mappings that lie side by side. Raises DriverError."""
        self.call("cuMemSetAccess", address, size_bytes, [self._access], 1, size_bytes=size_bytes)

    def unmap(self, address: int, size_bytes: int) -> None:
        """Takes whole mappings that lie side by side out of a reserved range, as NVIDIA's sample vectorAddMMAP does.

        Not ordered with any stream: the events of the last work that used them have been waited for. Raises
        DriverError; all are then as before.
        """
        self.call("cuMemUnmap", address, size_bytes, size_bytes=size_bytes)

    def allocate(self, size_bytes: int) -> int:
        """Returns the address of a plain allocation. Raises DriverError."""
        return int(self.call("cuMemAlloc", size_bytes, size_bytes=size_bytes))

    def free(self, address: int) -> None:
        """Gives a plain allocation back. Raises DriverError."""
        self.call("cuMemFree", address)

    def export_handle(self, handle: int) -> int:
        """Returns a file descriptor of the pages, for another process; the caller closes it. Raises DriverError."""
        return int(self.call("cuMemExportToShareableHandle", handle, self._descriptor_type(), 0))

    def import_handle(self, descriptor: int) -> int:
        """Returns a handle of another process's pages, to be destroyed like one's own. Raises DriverError."""
        return int(self.call("cuMemImportFromShareableHandle", descriptor, self._descriptor_type()))

    def is_ready(self, function: str, *arguments: Any) -> bool:
        """Returns the answer of a call that asks whether work is done. Raises DeviceError when that work failed."""
        self.refuse_fork()
        code, *_ = self._answer(function, *arguments)
        if int(code) and code.name != NOT_READY:
            raise self._error(function, code, 0)
        return not int(code)

    def reads_pinned_memory(self) -> bool:
        """Returns whether kernels reach pinned host memory at the host's own addresses. Raises DriverError."""
        return self._attribute("CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM")

    def pci_address(self) -> str:
        """Returns where the GPU is on its bus, as the kernel writes it: "0000:3b:00.0". Raises DriverError."""
        name: bytes = self.call("cuDeviceGetPCIBusId", 32, self._device)
        return name.partition(b"\0")[0].decode().lower()

    def close(self) -> None:
        """Gives the context up, after all that was taken through it. Idempotent. Raises DriverError."""
        if self._context is not None and not self.is_forked:
            self.call("cuDevicePrimaryCtxRelease", self._device)
        self._context = None

    def _placed(self, shareable: bool) -> Any:
        place = self._cuda.CUmemAllocationProp()
        place.type = self._cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        place.location.type = self._cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        place.location.id = int(self._device)
        if shareable:
            place.requestedHandleTypes = self._descriptor_type()
        return place

    def _descriptor_type(self) -> Any:
        return self._cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _attribute(self, name: str) -> bool:
        attribute = getattr(self._cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return bool(self.call("cuDeviceGetAttribute", attribute, self._device))

    def call(self, function: str, *arguments: Any, size_bytes: int = 0) -> Any:
        """Returns what a call of the driver gives back, for the modules beside this one. Raises DeviceError."""
        self.refuse_fork()
        code, *values = self._answer(function, *arguments)
        if int(code):
            raise self._error(function, code, size_bytes)
        return values[0] if len(values) == 1 else tuple(values)

    def _answer(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        try:
            answer: tuple[Any, ...] = getattr(self._cuda, function)(*arguments)
        except RuntimeError as error:  # no libcuda.so.1, or one without this call
            raise DeviceError(
                f"the CUDA driver has no {function}: {error}; install or update NVIDIA's driver, or use the CPU"
            ) from error
        except (ValueError, KeyError) as error:  # a newer driver's code, which the bindings do not know: as they say it
            raise DriverError(
                f"{function} failed on GPU {self._ordinal}: {error}; update cuda-bindings to learn its name",
                code_name="unknown",
            ) from error
        return answer

    def _error(self, function: str, code: Any, size_bytes: int) -> DriverError:
        asked = f" for {format_bytes(size_bytes)} ({size_bytes} bytes)" if size_bytes else ""
        return error_type(code.name)(
            f"{function}{asked} failed on GPU {self._ordinal}: {code.name} ({int(code)}), {self._text(code)}; "
            f"{self._free_text()}; {way_out(code.name)}",
            code_name=code.name,
        )

    def _text(self, code: Any) -> str:
        failed, text = self._answer("cuGetErrorString", code)
        return "no description" if int(failed) or text is None else text.decode()

    def _free_text(self) -> str:
        if self._context is not None:
            failed, free_bytes, total_bytes = self._answer("cuMemGetInfo")
            if not int(failed):
                return f"{format_bytes(free_bytes)} ({free_bytes} bytes) of its {format_bytes(total_bytes)} are free"
        return "how much of its memory is free is not known"


def _bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise DeviceError(
            f"the package cuda-bindings is needed for memory of a GPU: {error}; pip install 'mball[cuda]'"
        ) from error
