"""A process that runs the model one way on a GPU, as it is told. Run by `bench.gpu.contender`."""

from __future__ import annotations

import time
from typing import Any

import torch

from bench.gpu.ways import Loading, load, report, settle
from bench.speed.protocol import serve
from bench.speed.workload import Burst, Kind, Workload


class Child:
    """What a process holds between two lines; each method answers one kind of line."""

    def __init__(self) -> None:
        self._model: Any = None
        self._device = "cpu"
        self._workload: Workload | None = None
        self._yardstick: Any = None

    def load(self, **order: Any) -> dict[str, Any]:
        """Loads a model; returns the seconds that took."""
        loading = Loading.of(order)
        began_s = time.perf_counter()
        self._model, self._device = load(loading), loading.device
        return {"load_s": time.perf_counter() - began_s}

    def work(self, prompt_tokens: int) -> dict[str, Any]:
        """Prepares a prompt of that length, and drops the last one."""
        self._workload = None
        self._workload = Workload(self._model, prompt_tokens, device=self._device)
        return {}

    def settle(self, kind: str, passes: int) -> dict[str, Any]:
        """Runs passes until plans and pinned memory are as they stay; returns seconds of each and of pinning.

        mball measures a graph's steps in its first passes and plans anew, and what is streamed is pinned beside them.
        """
        assert self._workload is not None
        times = self._workload.run(Kind(kind), Burst(warm=0, timed=max(passes // 2, 1)))
        began_s = time.perf_counter()
        settle(self._model)
        pin_s = time.perf_counter() - began_s
        times += self._workload.run(Kind(kind), Burst(warm=0, timed=max(passes - passes // 2, 1)))
        settle(self._model)
        return {"steps_s": times, "pin_s": pin_s, "report": report(self._model)}

    def burst(self, kind: str, warm: int, timed: int) -> dict[str, Any]:
        """Runs a burst; returns the seconds of its steps, and a report after it."""
        assert self._workload is not None
        times = self._workload.run(Kind(kind), Burst(warm=warm, timed=timed))
        return {"steps_s": times, "report": report(self._model)}

    def bare(self, num_copies: int) -> dict[str, Any]:
        """Copies out of pinned memory and nothing else; returns the bytes a second."""
        if self._yardstick is None:
            from bench.gpu.link import Yardstick
            from mball.memory.cuda_driver import CudaDriver

            self._yardstick = Yardstick(CudaDriver(torch.device(self._device).index or 0))
        return {"bytes_per_s": self._yardstick.bytes_per_s(num_copies)}

    def logits(self, kind: str) -> dict[str, Any]:
        """Returns the tokens that are the likeliest after each step, and the sum of their logits."""
        assert self._workload is not None
        found = self._workload.logits(Kind(kind)).float().cpu()
        return {"tokens": found.argmax(-1).tolist(), "finite": bool(found.isfinite().all())}


if __name__ == "__main__":
    serve(Child())
