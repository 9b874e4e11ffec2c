"""Runs a model operator by operator first, and captures graphs of it once that has paid.

[Note: when capture pays] Capturing is Python for every operator of the model: seconds, in which nothing is computed.
Watching an operator as it runs takes about a hundredth of that, and nothing at all where the pass waits for reads
anyway. So a kind of pass is captured after it ran that often without waiting: whatever comes then, waiting for the
capture and watching together took at most twice what the better of the two would have taken alone. Both are Python, so
their ratio is about the same on every machine.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from mball.errors import BudgetError
from mball.run.binding import BindingMode
from mball.run.engine import Engine

logger = logging.getLogger(__name__)

# A Llama of 1.1 B parameters on two cores: 1743 operators a pass, 0.06 ms each to watch, 7 ms each to capture.
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
        self._passes: Counter[Hashable] = Counter()
        self._sizes: dict[Hashable, Hashable] = {}  # of the first call of each kind
        self._vary: set[Hashable] = set()
        self._refused: set[Hashable] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = self._engine.kind
        if self._passes[kind] >= PASSES_BEFORE_CAPTURE and kind not in self._refused:
            return self._run_captured(kind, args, kwargs)
        sizes = sizes_of(args, kwargs)
        if self._sizes.setdefault(kind, sizes) != sizes:
            self._vary.add(kind)
        counters = self._engine.execution.counters
        stall_s, watched = counters.stall_s, self._mode.watched
        result = self._plain(*args, **kwargs)
        if counters.stall_s - stall_s < (self._mode.watched - watched) * WATCHING_S:
            self._passes[kind] += 1
            if self._passes[kind] == PASSES_BEFORE_CAPTURE:
                logger.info(
                    "%d passes did not wait for reads: from the next on such calls are captured as graphs, which takes "
                    "seconds once (capture='operators' has none captured, capture='graphs' all at once)",
                    PASSES_BEFORE_CAPTURE,
                )
        return result

    def _run_captured(self, kind: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._captured_dynamic if kind in self._vary else self._captured
        self._engine.captured = True
        try:
            with self._engine.live.without_inputs():
                return call(*args, **kwargs)
        except BudgetError as error:
            self._refused.add(kind)
            logger.warning("graphs need more room than operators did (%s): later calls run operator by operator", error)
            raise
