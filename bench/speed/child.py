"""A process that runs the model one way, step by step as it is told. Run by `bench.speed.contender`."""

from __future__ import annotations

import time

_BEGAN_S = time.perf_counter()

import gc  # noqa: E402 - imports are timed
import hashlib  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402 - else whoever captures first pays for it
import transformers.generation  # noqa: E402 - lazily imported, and both load and generate by these
import transformers.models.llama.modeling_llama  # noqa: E402, F401

from bench.speed import ways  # noqa: E402
from bench.speed.preadv import huge_pages  # noqa: E402
from bench.speed.protocol import serve  # noqa: E402
from bench.speed.workload import Burst, Kind, Workload  # noqa: E402
from mball.memory.facts import process_memory  # noqa: E402

_IMPORTS_S = time.perf_counter() - _BEGAN_S


class Child:
    """What a process holds between two lines; each method answers one kind of line."""

    def __init__(self) -> None:
        self._model: Any = None
        self._workload: Workload | None = None

    def hello(self) -> dict[str, Any]:
        """Says what the process is like before anything is loaded."""
        return {
            "imports_s": _IMPORTS_S,
            "anonymous_bytes": process_memory().anonymous_bytes,
            "num_threads": torch.get_num_threads(),
        }

    def take_memory(self, size_bytes: int) -> dict[str, Any]:
        """Takes so much memory and gives it back.

        A virtual machine whose host took free memory from it gets that back more slowly than a disk reads, and huge
        pages are what the host takes: nobody who loads is to blame for that.
        """
        huge_pages(size_bytes).release()
        return {}

    def load(self, prompt_tokens: int, **loading: Any) -> dict[str, Any]:
        """Loads a model; returns the seconds that took."""
        began_s = time.perf_counter()
        asked = _loading(loading)
        self._model = ways.load(asked)
        self._workload = Workload(self._model, prompt_tokens, collects=asked.way is ways.Way.ACCELERATE)
        return {"load_s": time.perf_counter() - began_s}

    def rehearse(self, prompt_tokens: int, **loading: Any) -> dict[str, Any]:
        """Loads a small model, runs it and drops it: what stays is the machinery that this way needs."""
        self.load(prompt_tokens, **loading)
        assert self._workload is not None
        for kind in Kind:
            self._workload.logits(kind)
        self._model = self._workload = None
        torch._dynamo.reset()
        gc.collect()
        return self.hello()

    def logits(self, kind: str, path: str) -> dict[str, Any]:
        """Writes the logits as float32 to `path`; returns a hash of their bits."""
        assert self._workload is not None
        found = self._workload.logits(Kind(kind))
        numpy.save(path, found.float().numpy())
        ways.settle(self._model)
        return {"sha256": hashlib.sha256(found.view(torch.uint8).numpy().tobytes()).hexdigest()}

    def burst(self, kind: str, warm: int, timed: int) -> dict[str, Any]:
        """Runs a burst; returns the seconds of its steps, and mball's report after it."""
        assert self._workload is not None
        times = self._workload.run(Kind(kind), Burst(warm=warm, timed=timed))
        report = ways.facts(self._model)
        ways.settle(self._model)
        return {"steps_s": times, "report": report}

    def spans(self) -> dict[str, Any]:
        """Returns what mball reads in each pass like the last."""
        return {"spans": [asdict(span) for span in ways.streamed_spans(self._model)]}

    def offload(self, checkpoint: str, folder: str) -> dict[str, Any]:
        """Writes what accelerate offloads, unless it is there."""
        return {"at": str(ways.write_offload(Path(checkpoint), Path(folder)))}

    def first_tokens(self, prompt_tokens: int, num_tokens: int, **loading: Any) -> dict[str, Any]:
        """Loads and generates; returns the seconds from before loading to each token, and to the loaded model."""
        began_s = time.perf_counter()
        self._model = ways.load(_loading(loading))
        loaded_s = time.perf_counter() - began_s
        clock = _Clock(began_s)
        prompt = torch.arange(1, prompt_tokens + 1).reshape(1, -1)
        with torch.no_grad():
            tokens = self._model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_tokens, min_new_tokens=num_tokens,
                do_sample=False, pad_token_id=0, streamer=clock,
            )  # fmt: skip
        return {
            "load_s": loaded_s,
            "tokens_s": clock.times_s[1:],  # the first call brings the prompt
            "token_ids": tokens[0, prompt_tokens:].tolist(),
            "report": ways.facts(self._model),
        }


class _Clock:
    """A streamer that notes when tokens came."""

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s
        self.times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times_s.append(time.perf_counter() - self._began_s)

    def end(self) -> None:
        """Nothing to do."""


def _loading(values: dict[str, Any]) -> ways.Loading:
    offload = values["offload"]
    return ways.Loading(
        way=ways.Way(values["way"]),
        mode=ways.Mode(values["mode"]),
        checkpoint=Path(values["checkpoint"]),
        budget_bytes=values["budget_bytes"],
        capture=values["capture"],
        step_bytes=values["step_bytes"],
        offload=Path(offload) if offload else None,
        resident_bytes=values["resident_bytes"],
    )


if __name__ == "__main__":
    serve(Child())
