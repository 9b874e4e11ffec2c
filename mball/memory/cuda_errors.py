"""Errors of the CUDA driver, and the way out of each."""

from __future__ import annotations

from mball.errors import DeviceError

OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
INVALID_VALUE = "CUDA_ERROR_INVALID_VALUE"
NOT_READY = "CUDA_ERROR_NOT_READY"

# After one of these every call of the process fails: the context is broken, and what is in the GPU's memory is lost.
_STICKY = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        "ECC_UNCORRECTABLE",
        "NVLINK_UNCORRECTABLE",
        "CONTAINED",
        "ILLEGAL_ADDRESS",
        "LAUNCH_TIMEOUT",
        "CONTEXT_IS_DESTROYED",
        "ASSERT",
        "HARDWARE_STACK_ERROR",
        "ILLEGAL_INSTRUCTION",
        "MISALIGNED_ADDRESS",
        "INVALID_ADDRESS_SPACE",
        "INVALID_PC",
        "LAUNCH_FAILED",
        "EXTERNAL_DEVICE",
    )
)
_LOST = (
    "the GPU's work in this process is lost, and no call of it works any more: save what is in host memory, and start "
    "anew (weights are whole in their homes; what was on the GPU only is not)"
)
_WAYS_OUT = {
    OUT_OF_MEMORY: "lower the budget, or free memory of that GPU (nvidia-smi shows who holds it)",
    INVALID_VALUE: "the driver refuses what mball asks: update the driver, or report this message",
    "CUDA_ERROR_NO_DEVICE": "check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_INVALID_DEVICE": "name a GPU that is there (nvidia-smi and CUDA_VISIBLE_DEVICES say which are)",
    "CUDA_ERROR_NOT_SUPPORTED": "this GPU or driver cannot do it: update the driver, or use another GPU",
    "CUDA_ERROR_NOT_PERMITTED": "this process may not do it: a container or virtual GPU may forbid it",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "install the user and kernel parts of one driver version",
    "CUDA_ERROR_DEINITIALIZED": "the process is ending; use the GPU before that",
    "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED": "somebody else has pinned that memory: pin it once",
} | dict.fromkeys(_STICKY, _LOST)


class DriverError(DeviceError):
    """A call of the CUDA driver failed.

    Attributes:
        code_name: the driver's name of the error, such as "CUDA_ERROR_OUT_OF_MEMORY".
    """

    def __init__(self, message: str, *, code_name: str) -> None:
        super().__init__(message)
        self.code_name = code_name


class GpuLostError(DriverError):
    """The GPU's work in this process is lost: a kernel or copy went wrong so that no later call can work.

    Any call may report it, long after what caused it. Homes are in host memory and files, so weights can be saved.
    """


def error_type(code_name: str) -> type[DriverError]:
    """Returns the kind of error that a code is."""
    return GpuLostError if code_name in _STICKY else DriverError


def way_out(code_name: str) -> str:
    """Returns what to do about a code."""
    return _WAYS_OUT.get(code_name, "update the driver; if it stays, report this message")
