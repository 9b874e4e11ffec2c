"""Slots that somebody still holds when their model is gone: said at exit, with the weights that they were for.

Slots are handed to operators only, so nobody should. Whoever does keeps all of the arena's memory.
"""

from __future__ import annotations

import atexit
import gc
import logging
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch

from mball.units import format_bytes, format_names

_log = logging.getLogger(__name__)


class SlotView(NamedTuple):
    """What was handed out of a slot: the weight, the storage that all tensors on it share, and what holds the slot."""

    weight: str
    storage: weakref.ref[torch.UntypedStorage]
    arena_bytes: int


class _Watch:
    """What was held when a model ended."""

    def __init__(self) -> None:
        self._held: list[SlotView] = []
        self._is_exiting = False
        atexit.register(self._exit)

    def add(self, views: Iterable[SlotView]) -> None:
        self._held = [view for view in (*self._held, *views) if view.storage() is not None]
        if self._is_exiting:  # a model that ends at exit, after us
            self._say()

    def _exit(self) -> None:
        self._is_exiting = True
        self._say()

    def _say(self) -> None:
        if self._held:
            gc.collect()  # what operators were handed may be in cycles
        held = [view for view in self._held if view.storage() is not None]
        self._held = []
        if held:
            _log.warning(
                "slots of %s are still held, though their model was unwrapped or is gone; that keeps the arena of %s: "
                "something kept what an operator was handed",
                format_names(sorted({view.weight for view in held})),
                format_bytes(max(view.arena_bytes for view in held)),
            )


_watch = _Watch()


def watch(views: Iterable[SlotView]) -> None:
    """Says at exit which of these views are still held then. Their owner has let go of them."""
    _watch.add(views)
