"""Counts the memory that operators outside captured graphs hold."""

from __future__ import annotations

import weakref

import torch

from mball import torch_private


class LiveBytes:
    """Bytes of the tensors born during a pass, and their peak. One thread at a time.

    What is still live when the pass ends is the caller's from then on, and counted no more.
    """

    def __init__(self) -> None:
        self.current = 0
        self.peak = 0
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def born(self, tensor: torch.Tensor) -> None:
        """Counts the tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key = torch_private.storage_key(tensor)
        if key in self._live:
            return
        size_bytes = storage.nbytes()

        def died(reference: weakref.ref[torch.UntypedStorage]) -> None:
            # The key may belong to another storage by now: addresses are used again.
            if self._live.get(key) is reference:
                del self._live[key]
                self.current -= size_bytes

        self._live[key] = weakref.ref(storage, died)
        self.current += size_bytes
        self.peak = max(self.peak, self.current)

    def end_pass(self) -> int:
        """Returns the peak of the pass and forgets its tensors."""
        peak = self.peak
        self.clear()
        return peak

    def clear(self) -> None:
        """Forgets everything."""
        self._live.clear()
        self.current = self.peak = 0
