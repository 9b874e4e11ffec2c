"""A range of host memory whose tensors are of the foreign device, as those of `CudaRegion` are of a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mball.errors import DeviceError
from mball.memory.region import Region
from mball.torch_private.dispatch import without_dispatch
from tests.foreign.device import foreign_tensor


class ForeignRegion(Region):
    """Owns `[address, address + size_bytes)` of host memory and makes foreign tensors on it.

    The host could read it, but what stands in for a GPU's memory must not be read as a GPU's cannot.
    """

    def view(self, offset: int, size: int) -> memoryview:
        """Raises DeviceError: the host cannot read a device's memory."""
        raise DeviceError(f"the {self._what} is memory of foreign:0, which the host cannot read; use a tensor")

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """Returns a contiguous foreign tensor of `shape` on the bytes from `offset`; see `Region.tensor`."""
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self.tensor(offset, dtype, shape)
        size = math.prod(shape) * dtype.itemsize
        memory = self._held(offset, size)
        if size == 0:
            return torch.empty(tuple(shape), dtype=dtype, device="foreign")
        with without_dispatch():  # no mode may put it elsewhere
            flat = foreign_tensor(self.address + offset, size, memory)
        return flat.view(dtype).view(tuple(shape))

    def fill(self, offset: int, size: int, byte: int) -> None:
        """Sets `size` bytes from `offset` to `byte`. Raises DeviceError out of range."""
        with without_dispatch():  # it is nothing that a caller computes
            self.tensor(offset, torch.uint8, (size,)).fill_(byte)
