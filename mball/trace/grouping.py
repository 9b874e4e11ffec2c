"""Which weights one step reads: where a captured graph may be cut.

Steps that run as they were captured are cut at every weight: a plan merges them again, and a cut costs a call.
Compiled steps are cut more coarsely, because nothing is fused across a cut, and so that the layers of a
model become equal steps, which are compiled once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mball.units import MIB

# Below this, reading a weight takes less time than the calls around one more step.
_WORTH_A_STEP_BYTES = 8 * MIB


class Grouping(Protocol):
    """Decides where steps begin."""

    def joins(self, weights: Sequence[int], reads: Sequence[int]) -> bool:
        """Returns whether a step that reads `reads` may read all of `weights` too; neither is empty."""


class EveryWeight:
    """A step a weight."""

    def joins(self, weights: Sequence[int], reads: Sequence[int]) -> bool:
        return False


class Whole:
    """One step for the whole graph."""

    def joins(self, weights: Sequence[int], reads: Sequence[int]) -> bool:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Weights of one block of the model, as long as they are no more than `step_bytes` together.

    A block is an entry of the outermost list of modules (a layer), or a module outside of any. A weight that is larger
    has a step to itself.

    Attributes:
        names: of all weights.
        sizes_bytes: of all weights.
    """

    names: Sequence[str]
    sizes_bytes: Sequence[int]
    step_bytes: int

    def joins(self, weights: Sequence[int], reads: Sequence[int]) -> bool:
        together = (*reads, *weights)
        if len({_block(self.names[weight]) for weight in together}) > 1:
            return False
        return sum(self.sizes_bytes[weight] for weight in together) <= self.step_bytes


def default_step_bytes(budget_bytes: int) -> int:
    """Returns what one compiled step reads at most by default.

    Small enough that a step computes while others are brought in: a part in 64 of the budget, for small budgets up to
    an eighth.
    """
    return max(budget_bytes // 64, min(_WORTH_A_STEP_BYTES, budget_bytes // 8))


def _block(name: str) -> str:
    parts = name.split(".")
    for number, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: number + 1])
    return name.rpartition(".")[0]
