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
from torch.utils._pytree import tree_leaves

from mball.run.binding import BindingMode
from mball.run.engine import Engine

logger = logging.getLogger(__name__)

# A Llama of 1.1 B parameters on two cores: 1743 operators a pass, 0.06 ms each to watch, 7 ms each to capture.
PASSES_BEFORE_CAPTURE = 100
WATCHING_S = 60e-6


def kind_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """Returns what tells calls apart that take different room or other graphs: a prompt from the tokens after it.

    Sizes do not count, but whether they are 1, as for Dynamo.
    """
    leaves = tree_leaves((tuple(args), dict(kwargs)))
    return tuple(
        (leaf.dtype, tuple(size == 1 for size in leaf.shape)) for leaf in leaves if isinstance(leaf, torch.Tensor)
    )


class TieredCall:
    """Calls a model plainly, or captured, as pays.

    Args:
        engine: runs the passes, one of which is open.
        mode: watches operators.
        plain: the model's call.
        captured: the same through `torch.compile`.
    """

    def __init__(
        self, engine: Engine, mode: BindingMode, plain: Callable[..., Any], captured: Callable[..., Any]
    ) -> None:
        self._engine = engine
        self._mode = mode
        self._plain = plain
        self._captured = captured
        self._passes: Counter[Hashable] = Counter()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        engine = self._engine
        if self._passes[engine.kind] >= PASSES_BEFORE_CAPTURE:
            with engine.live.without_inputs():
                return self._captured(*args, **kwargs)
        counters = engine.execution.counters
        stall_s, watched = counters.stall_s, self._mode.watched
        result = self._plain(*args, **kwargs)
        if counters.stall_s - stall_s < (self._mode.watched - watched) * WATCHING_S:
            self._passes[engine.kind] += 1
            if self._passes[engine.kind] == PASSES_BEFORE_CAPTURE:
                logger.info(
                    "%d passes did not wait for reads: from the next on such calls are captured as graphs, which takes "
                    "seconds once (capture='operators' has none captured, capture='graphs' all at once)",
                    PASSES_BEFORE_CAPTURE,
                )
        return result
