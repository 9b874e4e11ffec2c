"""Records the traces: `python -m bench.traces.record [MODEL ...]`, or all of them.

Each model has random weights in a checkpoint, and its graphs are captured by mball as a user's would be. The budget
lets all weights stay, so what steps take is compute alone. Run it where little else runs.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers.initialization import no_init_weights

import mball
from bench import traces
from bench.traces.subjects import SUBJECTS, Subject
from mball.api import _states
from mball.integrations.transformers import from_pretrained
from mball.schema import Tensor, Trace
from mball.units import GIB, format_bytes

# Steps are measured at least so often, and again and again while this lasts.
LEAST_TIMINGS, TIMING_S = 3, 15.0


def record(subject: Subject, folder: Path) -> dict[str, Trace]:
    """Returns a trace for each pass of the model, by name; `folder` holds its weights meanwhile."""
    with no_init_weights():
        model = subject.model_class._from_config(subject.config(), dtype=subject.dtype)
    _fill(model)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder / "model")
    del model
    found = {}
    for name, prepare in subject.passes.items():
        # A model of its own for each pass: what one pass leaves to be kept would be in the other's trace.
        wrapped = from_pretrained(
            folder / "model",
            budget=2 * weight_bytes + 2 * GIB,
            model_class=subject.model_class,
            capture="graphs",
            swap_dir=folder,
        )
        with torch.no_grad():
            run = prepare(wrapped)
            run()  # captures, and counts operations
            _time_steps(wrapped, run)
            run()  # is planned with those times
        path = mball.save_trace(wrapped, folder / f"{name}.json")
        found[name] = portable(Trace.from_json(path.read_text(encoding="utf-8")), name)
        mball.unwrap(wrapped)
    return found


def _fill(model: torch.nn.Module) -> None:
    """Gives norms ones, biases zeros and all else the same few random numbers over and over: that is quick."""
    numbers = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(7))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            repeated = numbers.to(parameter.dtype).repeat(-(-parameter.numel() // len(numbers)))
            parameter.data.copy_(repeated[: parameter.numel()].view_as(parameter))
        else:
            parameter.data.fill_(float(name.endswith("weight")))


def _time_steps(wrapped: torch.nn.Module, run: Callable[[], object]) -> None:
    """Has each step take the least of many measurements: whatever else runs on the machine only adds to them.

    mball itself measures once and holds that against later passes, which tell nothing of single steps.
    """
    programs = [program for runner in _states[wrapped].backend.runners for program in runner._programs]
    steps = [step for program in programs for step in program.graph.steps]
    least = [math.inf] * len(steps)
    ends_s, count = time.perf_counter() + TIMING_S, 0
    while count < LEAST_TIMINGS or time.perf_counter() < ends_s:
        count += 1
        for program in programs:
            program._times_due = True
        run()
        least = [min(before, step.time_s or math.inf) for before, step in zip(least, steps, strict=True)]
    for step, time_s in zip(steps, least, strict=True):
        step.time_s = time_s if time_s < math.inf else None


def portable(trace: Trace, name: str) -> Trace:
    """Returns the trace under another name, its homes without the folders of the machine it was recorded on."""
    return replace(trace, name=name, tensors=tuple(_without_folder(tensor) for tensor in trace.tensors))


def _without_folder(tensor: Tensor) -> Tensor:
    if tensor.home is None:
        return tensor
    return replace(tensor, home=replace(tensor.home, file=Path(tensor.home.file).name))


def main() -> None:
    """Records the models that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m bench.traces.record", description="Records traces of models.")
    parser.add_argument("models", nargs="*", help=f"any of {', '.join(SUBJECTS)}; default all")
    asked = parser.parse_args().models or list(SUBJECTS)
    # Threads that wait for each other take many times as long where something else runs too.
    torch.set_num_threads(1)
    if unknown := [model for model in asked if model not in SUBJECTS]:
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(SUBJECTS)}")
    for model in asked:
        with tempfile.TemporaryDirectory() as folder:
            for name, trace in record(SUBJECTS[model], Path(folder)).items():
                path = traces.save(trace, name)
                weights = sum(tensor.size_bytes for _, tensor in trace.homed())
                seconds = sum(step.time_s or 0.0 for step in trace.steps)
                print(
                    f"{name}: {len(trace.steps)} steps, {format_bytes(weights)} of weights, {seconds:.3f} s of "
                    f"compute; {format_bytes(path.stat().st_size)} as {path.name}"
                )


if __name__ == "__main__":
    main()
