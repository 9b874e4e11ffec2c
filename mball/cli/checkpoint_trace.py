"""A trace of a checkpoint whose model is not at hand: what can be said of a pass from names and sizes alone."""

from __future__ import annotations

import re
from pathlib import Path

from mball.schema import Step, Tensor, Trace
from mball.storage import CheckpointIndex

_NUMBER = re.compile(r"(\d+)")


def trace_of_checkpoint(path: Path) -> Trace:
    """Returns a pass that reads each module's tensors at once, the modules in the order of their names.

    Numbers in names count as numbers, so layers come one after the other. No time was measured: each step is taken to
    read its weights from memory once. No activations are known.

    Raises:
        CheckpointError: the checkpoint is missing, truncated or corrupt.
    """
    index = CheckpointIndex.open(path)
    entries = list(index.entries.values())
    weights = tuple(
        Tensor.weight(
            entry.name,
            dtype=entry.dtype,
            shape=entry.shape,
            size_bytes=entry.size_bytes,
            file=entry.file,
            offset_bytes=entry.offset_bytes,
        )
        for entry in entries
    )
    modules: dict[str, list[int]] = {}
    for number, weight in enumerate(weights):
        modules.setdefault(weight.name.rpartition(".")[0] or weight.name, []).append(number)
    steps = tuple(
        Step(name=name, graph="checkpoint", reads=tuple(modules[name]), scratch_bytes=0, flops=0, time_s=None)
        for name in sorted(modules, key=_natural)
    )
    return Trace(name=path.name or str(path), tensors=weights, steps=steps)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    # Numbers before words where both may stand.
    parts = [part for part in _NUMBER.split(name) if part]
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]
