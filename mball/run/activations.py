"""Counts the memory that operators outside captured graphs hold."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from mball.torch_private.tensors import storage_key


class _Birth(weakref.ref[torch.UntypedStorage]):
    """Refers to a storage that is counted."""

    __slots__ = ("key", "size_bytes")
    key: int
    size_bytes: int


class LiveBytes:
    """Bytes of the tensors born during a pass, and their peak. One thread at a time.

    What is still live when the pass ends is the caller's from then on, and counted no more, unless a later pass reads
    it (a cache of keys and values) and inputs are counted: then it is that pass's from its first use on.
    """

    def __init__(self, place: torch.device) -> None:
        """Counts tensors that are on `place`."""
        self._kind = place.type
        self._uncounted: set[int] | None = None
        self._counting = True
        self._kept: list[torch.Tensor] = []
        self.current = 0
        self.peak = 0
        self._live: dict[int, _Birth] = {}

    def count_inputs(self, buffers: Iterable[torch.Tensor]) -> None:
        """Has what operators read counted too, but for weights and these buffers, which are counted elsewhere.

        For passes without captured graphs: a graph's inputs are known before it runs.
        """
        self._kept = list(buffers)  # a storage's number is its own while it lives
        self._uncounted = {storage_key(buffer) for buffer in self._kept}

    @contextmanager
    def without_inputs(self) -> Iterator[None]:
        """Counts no inputs while captured graphs run: what they read is in their plans."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    def read(self, tensor: torch.Tensor, key: int) -> None:
        """Says that an operator reads the tensor, which is no weight. `key` is its storage's."""
        if self._counting and self._uncounted is not None and key not in self._uncounted:
            self.born(tensor, key)

    def born(self, tensor: torch.Tensor, key: int) -> None:
        """Counts the tensor's storage, which has this key, once, until it is freed."""
        if key in self._live or tensor.device.type != self._kind:
            return
        storage = tensor.untyped_storage()
        birth = self._live[key] = _Birth(storage, self._died)
        birth.key, birth.size_bytes = key, storage.nbytes()
        self.current += birth.size_bytes
        self.peak = max(self.peak, self.current)

    def _died(self, birth: _Birth) -> None:
        # The key may belong to another storage by now: addresses are used again.
        if self._live.get(birth.key) is birth:
            del self._live[birth.key]
            self.current -= birth.size_bytes

    def end_pass(self) -> int:
        """Returns the peak of the pass and forgets its tensors."""
        peak = self.peak
        self.clear()
        return peak

    def clear(self) -> None:
        """Forgets everything."""
        self._live.clear()
        self._counting = True  # whatever an interrupt left
        self.current = self.peak = 0
