"""Stories that need a process of their own: what a whole process takes of a GPU, and what breaks a context.

`python -m tests.run.gpu_child <story>` plays one on GPU 0 and ends with a line of JSON. Stories take a place and what
tells how much of its memory is used, so that machines without a GPU play them too.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import mball
from tests.run import scenes
from tests.run.harness import engine_of, make, run, weight_bytes
from tests.run.scenes import Hostility, Place, Row
from tests.run.there import There
from tests.run.zoo import ids, noise

Used = Callable[[], int]

LOOK_EVERY_S = 0.002


class Watch:
    """The most that is used while a block runs, by many looks from another thread."""

    def __init__(self, used_bytes: Used) -> None:
        self._used_bytes = used_bytes
        self._stop = threading.Event()
        self.peak_bytes = 0
        self.num_looks = 0

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        thread = threading.Thread(target=self._look_on, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()
            self._look()

    def _look_on(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._used_bytes())
        self.num_looks += 1


def budgets(place: Place, used_bytes: Used, folder: Path) -> dict[str, Any]:
    """Returns the most that was used above what the warm process used, under one budget after the other.

    Warm: a model of the same kind has run, streamed and whole, so that kernels and libraries' memory are there.
    """
    scenes.generates(place, capture="graphs", swap_dir=folder, num_calls=2)
    model: Any = make(place.llama)
    size = weight_bytes(model)
    _collect(place)
    baseline = used_bytes()
    found = []
    share, shares = 0.8, (0.8, 0.6, 1.3, 0.7)
    first_bytes = int(size * share) + place.activation_bytes
    with place.wrapped(model, first_bytes, swap_dir=folder, hostility=Hostility.NONE, capture="graphs"):
        for share in shares:
            budget_bytes = int(size * share) + place.activation_bytes
            mball.set_budget(model, budget_bytes)
            there = There(model, engine_of(model).homes, place.name)
            with Watch(used_bytes).watching() as watch:
                for rows, length in ((1, 8), (2, 24), (1, 1), (4, 24), (1, 1)):
                    run(there, lambda m, rows=rows, length=length: m(ids(rows, length), use_cache=False).logits)
                place.finish()
            report = mball.report(model)
            found.append({
                "share": share, "budget_bytes": budget_bytes, "above_baseline_bytes": watch.peak_bytes - baseline,
                "num_looks": watch.num_looks, "arena_bytes": report.arena_bytes,
                "activation_bytes": report.activation_bytes, "peak_bytes": report.peak_bytes,
                "bytes_read_last_pass": report.bytes_read_last_pass,
            })  # fmt: skip
    _collect(place)
    return {"baseline_bytes": baseline, "weight_bytes": size, "budgets": found, "left_bytes": used_bytes() - baseline}


def unwrapped(place: Place, used_bytes: Used, folder: Path) -> dict[str, Any]:
    """Returns what was used before a model was wrapped, while it was, and after; a first one was there before."""
    scenes.generates(place, capture="graphs", swap_dir=folder, num_calls=1)

    def settled_bytes() -> int:
        _collect(place)
        return used_bytes()

    return scenes.unwrapped_it_is_as_before(place, swap_dir=folder, used_bytes=settled_bytes)


def small(place: Place, used_bytes: Used, folder: Path) -> dict[str, Any]:
    """Little of everything, for tools that look at each access and take long for it."""
    model = make(lambda: Row(place.width))
    budget_bytes = 3 * place.layer_bytes + place.page_bytes + place.activation_bytes
    with place.wrapped(model, budget_bytes, swap_dir=folder, hostility=Hostility.NONE, capture="operators"):
        there = There(model, engine_of(model).homes, place.name)
        for _ in range(3):
            run(there, lambda m: m(noise(3, place.width)))
        read_bytes = mball.report(model).bytes_read
        mball.set_budget(model, budget_bytes + 2 * place.layer_bytes)
        run(there, lambda m: m(noise(3, place.width)))
    return {"read_bytes": read_bytes}


def lost(place: Place, used_bytes: Used, folder: Path) -> dict[str, Any]:
    """A kernel goes astray, which ends all work on the GPU in this process: what is in host memory can be saved."""
    model = make(place.llama)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    errors = []
    budget_bytes = int(weight_bytes(model) * 0.7) + place.activation_bytes
    said = unwrapping = ""
    whole = False
    try:
        with place.wrapped(model, budget_bytes, swap_dir=folder, hostility=Hostility.NONE, capture="operators"):
            there = There(model, engine_of(model).homes, place.name)
            run(there, lambda m: m(ids(1, 4)).logits)
            for number in (1 << 20, 3):  # no such row; then one that there is
                try:
                    run(there, lambda m, number=number: m(torch.full((1, 4), number)).logits)
                    place.finish()
                except Exception as error:
                    errors.append(f"{type(error).__name__}: {str(error)[:300]}")
            try:
                mball.set_budget(model, budget_bytes // 2 + place.activation_bytes)
            except Exception as error:
                said = f"{type(error).__name__}: {str(error)[:300]}"
            state = model.state_dict()
            whole = all(torch.equal(state[name].cpu(), value) for name, value in wanted.items() if name in state)
    except Exception as error:
        unwrapping = f"{type(error).__name__}: {str(error)[:300]}"
    return {"errors": errors, "budget": said, "weights_are_whole": whole, "unwrapping": unwrapping}


STORIES = {"budgets": budgets, "unwrapped": unwrapped, "small": small, "lost": lost}


def _collect(place: Place) -> None:
    gc.collect()
    place.finish()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def nvml_used() -> Used:
    """Returns what asks NVML how much of GPU 0 is used, by whomever."""
    import pynvml

    pynvml.nvmlInit()
    name = str(torch.cuda.get_device_properties(0).uuid)
    handle = pynvml.nvmlDeviceGetHandleByUUID(name if name.startswith("GPU-") else f"GPU-{name}")
    return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


def main() -> None:
    """Plays the story that is named on the command line."""
    from tests.run.gpu_place import gpu_place

    torch.set_num_threads(1)
    place = gpu_place()
    with tempfile.TemporaryDirectory() as folder:
        told = STORIES[sys.argv[1]](place, nvml_used(), Path(folder))
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
