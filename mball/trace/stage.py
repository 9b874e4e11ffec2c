"""What stands around the steps of a compiled graph: it may run them as they are, or record and replay them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# compiled part of a graph: takes a list, which it empties, of the weights it reads and of the rest
CompiledPiece = Callable[[list[Any]], Sequence[Any]]


class Stage(Protocol):
    """Sees all that goes into the steps of a graph, and all that comes out, in one call after the other."""

    def arguments(self, values: Sequence[Any]) -> Sequence[Any]:
        """Returns what the graph runs with in place of its arguments; a call begins."""

    def compute(
        self, step: int, piece: CompiledPiece, weights: Sequence[torch.Tensor], inputs: Sequence[Any]
    ) -> Sequence[Any]:
        """Returns what `piece` makes of the weights that finest step `step` was handed, and of other values."""

    def results(self, values: Sequence[Any]) -> Sequence[Any]:
        """Returns what the caller is given in place of the graph's results; the call is over."""


class PlainStage:
    """Runs steps as they are."""

    def arguments(self, values: Sequence[Any]) -> Sequence[Any]:
        return values

    def compute(
        self, step: int, piece: CompiledPiece, weights: Sequence[torch.Tensor], inputs: Sequence[Any]
    ) -> Sequence[Any]:
        return piece([*weights, *inputs])

    def results(self, values: Sequence[Any]) -> Sequence[Any]:
        return values


PLAIN = PlainStage()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recordable:
    """What of a graph can be recorded with the memory it reads and writes.

    Attributes:
        copied: which arguments may be read of a copy of theirs.
        in_place: those that must be where the caller has them: what is written, buffers, and sizes.
        steps: for each finest step whether it does the same with the same memory each time.
    """

    copied: tuple[int, ...]
    in_place: tuple[int, ...]
    steps: tuple[bool, ...]
