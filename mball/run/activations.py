"""Counts the memory that operators outside captured graphs hold."""

from __future__ import annotations

import weakref

import torch

from mball import torch_private


class LiveBytes:
    """Bytes of the tensors born during a pass, and their peak. One thread at a time."""

    def __init__(self) -> None:
        self.current = 0
        self.peak = 0
        self._live: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def born(self, tensor: torch.Tensor) -> None:
        """Counts the tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key = torch_private.storage_key(tensor)
        if key in self._live:
            return
        size_bytes = storage.nbytes()

        def died(_: object) -> None:
            if self._live.pop(key, None) is not None:
                self.current -= size_bytes

        self._live[key] = (size_bytes, weakref.ref(storage, died))
        self.current += size_bytes
        self.peak = max(self.peak, self.current)

    def end_pass(self) -> int:
        """Returns the peak since the last call. What is still live (results, a cache) stays counted."""
        peak, self.peak = self.peak, self.current
        return peak

    def clear(self) -> None:
        """Forgets everything."""
        self._live.clear()
        self.current = self.peak = 0
