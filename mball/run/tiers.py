"""Runs a model operator by operator first, and captures graphs of it once that has paid.

[Note: when capture pays] Capturing is Python for every operator of the model: seconds, in which nothing is computed.
Watching an operator as it runs is taken to cost a hundredth of that, and nothing at all where the pass waits for reads
anyway. So a kind of pass is captured after it ran that often without waiting: if the ratio is right, watching and
capturing together take at most twice what the better of the two would have taken alone, whatever comes. Both are
Python, so the ratio depends little on the machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mball.errors import BudgetError
from mball.run.binding import BindingMode
from mball.run.engine import Engine

logger = logging.getLogger(__name__)

# Assumptions, not measured here: they decide when graphs are captured, and nothing else.
PASSES_BEFORE_CAPTURE = 100
WATCHING_S = 60e-6
MAX_LEAVES = 16


def kind_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """Returns what tells calls apart that take different room or other graphs: a prompt from the tokens after it.

    Sizes do not count, but whether they are 1, as for Dynamo; nor do numbers, but flags. What is inside other objects
    is not looked at.
    """
    return tuple(
        (leaf.dtype, tuple(size == 1 for size in leaf.shape)) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in _leaves((args, kwargs))
    )


def sizes_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """Returns the sizes of the tensors among the arguments."""
    return tuple(tuple(leaf.shape) for leaf in _leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))


def _leaves(value: Any) -> list[Any]:
    """Returns the tensors whose sizes are numbers, and the flags, in `value` and its containers; only the first few."""
    found: list[Any] = []
    waiting = [value]
    while waiting and len(found) < MAX_LEAVES:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if not value.is_nested and all(isinstance(size, int) for size in value.shape):
                found.append(value)
        elif isinstance(value, (tuple, list)):
            waiting += reversed(value)
        elif isinstance(value, Mapping):
            waiting += [value[key] for key in sorted(value, key=str, reverse=True)]
        elif value is None or isinstance(value, bool):
            found.append(value)
    return found


@dataclass(slots=True, kw_only=True)
class _Kind:
    """What is known of one kind of call.

    Attributes:
        sizes: of the first one.
        varies: whether others had other sizes.
        passes: that did not wait for reads.
        refused_bytes: the budget that its graphs did not fit, 0 if they did.
    """

    sizes: Hashable
    varies: bool = False
    passes: int = 0
    refused_bytes: int = 0


class TieredCall:
    """Calls a model plainly, or captured, as pays.

    Args:
        engine: runs the passes, one of which is open.
        mode: watches operators.
        plain: the model's call.
        captured: the same through `torch.compile`.
        captured_dynamic: the same for calls whose sizes differ.
    """

    def __init__(
        self,
        engine: Engine,
        mode: BindingMode,
        plain: Callable[..., Any],
        captured: Callable[..., Any],
        captured_dynamic: Callable[..., Any],
    ) -> None:
        self._engine = engine
        self._mode = mode
        self._plain = plain
        self._captured = captured
        self._captured_dynamic = captured_dynamic
        self._kinds: dict[Hashable, _Kind] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sizes = sizes_of(args, kwargs)
        kind = self._kinds.setdefault(self._engine.room.kind, _Kind(sizes=sizes))
        if kind.passes >= PASSES_BEFORE_CAPTURE and self._engine.budget_bytes > kind.refused_bytes:
            return self._run_captured(kind, args, kwargs)
        kind.varies |= sizes != kind.sizes
        counters = self._engine.execution.counters
        stall_s, watched = counters.stall_s, self._mode.watched
        result = self._plain(*args, **kwargs)
        if counters.stall_s - stall_s < (self._mode.watched - watched) * WATCHING_S:
            kind.passes += 1
            if kind.passes == PASSES_BEFORE_CAPTURE:
                logger.info(
                    "%d passes did not wait for reads: from the next on such calls are captured as graphs, which takes "
                    "seconds once (capture='operators' has none captured, capture='graphs' all at once)",
                    PASSES_BEFORE_CAPTURE,
                )
        return result

    def _run_captured(self, kind: _Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._captured_dynamic if kind.varies else self._captured
        self._engine.room.captured = True
        try:
            with self._engine.live.without_inputs():
                return call(*args, **kwargs)
        except BudgetError as error:
            kind.refused_bytes = self._engine.budget_bytes
            logger.warning(
                "graphs need more room than operators did (%s): later calls run operator by operator under this budget",
                error,
            )
            raise
