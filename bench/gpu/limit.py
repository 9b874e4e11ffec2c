"""The time that a part of a bench has."""

from __future__ import annotations

import time
from collections.abc import Callable


class Limit:
    """The time that a part has: rounds end when it is over, and there is always one."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begins now. `clock` is in seconds."""
        self._clock = clock
        self._end_s = clock() + seconds

    def left_s(self) -> float:
        """Returns how many seconds are left."""
        return self._end_s - self._clock()
