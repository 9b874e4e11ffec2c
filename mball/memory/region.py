"""A range of addresses that stays mapped for as long as anything reads it."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Sequence

import torch

from mball.errors import DeviceError
from mball.memory import libc


class Region:
    """Owns `[address, address + size_bytes)` of host memory and makes tensors on it.

    Tensors, their numpy views and memoryviews hold the region: `release` runs once, when `close` was
    called (or the Region is gone) and the last of them has died, on whichever thread drops it.
    """

    def __init__(self, address: int, size_bytes: int, release: Callable[[], None], *, what: str) -> None:
        self.address = address
        self.size_bytes = size_bytes
        self._what = what
        self._bytes: ctypes.Array[ctypes.c_char] | None = libc.as_bytes(address, size_bytes)
        finalizer = weakref.finalize(self._bytes, release)
        # At exit tensors may still be in use by other threads; the system unmaps everything anyway.
        finalizer.atexit = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._bytes is None

    def view(self, offset: int, size: int) -> memoryview:
        """Returns a writable view (format "B") of `size` bytes from `offset`. Raises DeviceError out of range."""
        return memoryview(self._held(offset, size)).cast("B")[offset : offset + size]

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """Returns a contiguous tensor of `shape` on the bytes from `offset`, which needs no alignment.

        Each call makes a tensor with a storage of its own (so its own version counter). A tensor without
        elements reads nothing. It is a normal tensor under inference mode too, so it may be kept and
        used outside. Raises DeviceError out of range.
        """
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self.tensor(offset, dtype, shape)
        num_elements = math.prod(shape)
        memory = self._held(offset, num_elements * dtype.itemsize)
        if num_elements == 0:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        flat = torch.frombuffer(memory, dtype=dtype, count=num_elements, offset=offset)
        return flat.view(tuple(shape))

    def fill(self, offset: int, size: int, byte: int) -> None:
        """Sets `size` bytes from `offset` to `byte`. Raises DeviceError out of range."""
        self._held(offset, size)
        ctypes.memset(self.address + offset, byte, size)

    def close(self) -> None:
        """Gives up this object's hold on the memory; tensors keep theirs. Idempotent."""
        self._bytes = None

    def _held(self, offset: int, size: int) -> ctypes.Array[ctypes.c_char]:
        if self._bytes is None:
            raise DeviceError(f"the {self._what} is closed; make a new one, or close it after its last use")
        if offset < 0 or size < 0 or offset + size > self.size_bytes:
            raise DeviceError(
                f"bytes [{offset}, {offset + size}) lie outside the {self._what} of {self.size_bytes} bytes; "
                "map or reserve more"
            )
        return self._bytes
