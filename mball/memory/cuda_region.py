"""A range of a GPU's addresses, and torch tensors on it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mball.errors import DeviceError
from mball.memory.region import Region


class CudaRegion(Region):
    """Owns `[address, address + size_bytes)` of GPU `ordinal` and makes tensors on it; nothing else reads its bytes.

    As with any region, tensors hold it. torch's allocator does not know them: `record_stream` does nothing for them, so
    whoever takes memory from under a tensor waits for the events of what used it.
    """

    def __init__(
        self, address: int, size_bytes: int, release: Callable[[], None], *, what: str, ordinal: int = 0
    ) -> None:
        super().__init__(address, size_bytes, release, what=what)
        self._device = torch.device("cuda", ordinal)

    def view(self, offset: int, size: int) -> memoryview:
        """Raises DeviceError: the host cannot read a GPU's memory."""
        raise DeviceError(f"the {self._what} is memory of {self._device}, which the host cannot read; use a tensor")

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """Returns a contiguous tensor of `shape` on the bytes from `offset`, copying nothing; see `Region.tensor`.

        torch needs no alignment to make it; kernels want the one of the dtype. Raises DeviceError out of range.
        """
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self.tensor(offset, dtype, shape)
        size = math.prod(shape) * dtype.itemsize
        memory = self._held(offset, size)
        if size == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=self._device)
        # Bytes first: the interface has no names for bfloat16 and the 8-bit floats.
        flat = torch.as_tensor(_Exported(self.address + offset, size, memory), device=self._device)
        return flat.view(dtype).view(tuple(shape))

    def fill(self, offset: int, size: int, byte: int) -> None:
        """Sets `size` bytes from `offset` to `byte`, on the current stream. Raises DeviceError out of range."""
        self.tensor(offset, torch.uint8, (size,)).fill_(byte)


class _Exported:
    """What torch makes a tensor from when the memory is not its own, and keeps for as long as there is the tensor."""

    def __init__(self, address: int, size_bytes: int, memory: ctypes.Array[ctypes.c_char]) -> None:
        self._memory = memory
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }
