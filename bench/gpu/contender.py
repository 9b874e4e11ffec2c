"""A contender on a GPU: a process that is ended at once, so that nothing of it is left on the GPU for the next."""

from __future__ import annotations

import os
from typing import Any

from bench.gpu.ways import Loading
from bench.speed.contender import Contender


class GpuContender(Contender):
    """One child process that runs `bench.gpu.child`; a context manager that kills it."""

    def __init__(self, name: str, *, num_threads: int | None = None) -> None:
        """`num_threads` compute on the host; default all cores that this process may run on."""
        threads = num_threads or len(os.sched_getaffinity(0))
        super().__init__(name, module="bench.gpu.child", num_threads=threads)

    def bring(self, loading: Loading) -> float:
        """Has it load a model; returns the seconds that took. Raises ContenderError."""
        return float(self.tell("load", **loading.order())["load_s"])

    def close(self) -> None:
        """Ends the process, whatever it does. Idempotent."""
        self._process.kill()
        super().close()


def step_s(reply: dict[str, Any]) -> float:
    """Returns the mean step of a burst: a stall in one of them counts."""
    steps: list[float] = reply["steps_s"]
    return sum(steps) / len(steps)
