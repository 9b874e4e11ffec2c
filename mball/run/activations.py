"""Counts the memory that operators outside captured graphs hold."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch

from mball import torch_private


class LiveBytes:
    """Bytes of the tensors born during a pass, and their peak. One thread at a time.

    What is still live when the pass ends is the caller's from then on, and counted no more, unless a later pass reads
    it (a cache of keys and values) and inputs are counted: then it is that pass's from its first use on.
    """

    def __init__(self) -> None:
        self._uncounted: set[int] | None = None
        self._kept: list[torch.Tensor] = []
        self.current = 0
        self.peak = 0
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def counts_inputs(self) -> bool:
        """Whether `read` counts."""
        return self._uncounted is not None

    def count_inputs(self, buffers: Iterable[torch.Tensor]) -> None:
        """Has what operators read counted too, but for weights and these buffers, which are counted elsewhere.

        For engines that capture no graphs: a graph's inputs are known before it runs.
        """
        self._kept = list(buffers)  # a storage's number is its own while it lives
        self._uncounted = {torch_private.storage_key(buffer) for buffer in self._kept}

    def read(self, tensor: torch.Tensor) -> None:
        """Says that an operator reads the tensor, which is no weight."""
        if self._uncounted is not None and torch_private.storage_key(tensor) not in self._uncounted:
            self.born(tensor)

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
