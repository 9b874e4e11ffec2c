"""A trace of a checkpoint whose model is not at hand: what can be said of a pass from names and sizes alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mball.schema import Gather, Step, Tensor, Trace, Treatment
from mball.storage import CheckpointIndex

_NUMBER = re.compile(r"(\d+)")
_OF_TOKENS = re.compile(r"embed_tokens|embed_in|tok(en)?_embeddings?|word_embeddings?|embeddings?|wte")
_OF_POSITIONS = re.compile(r"(embed_)?(position|token_type)s?(_embeddings?)?|wpe")


def trace_of_checkpoint(path: Path) -> Trace:
    """Returns a pass that reads each module's tensors at once, the modules in the order of their names.

    Numbers in names count as numbers, so layers come one after the other. No time was measured: each step is taken to
    read its weights from memory once. No activations are known. Of a table whose module is named as an embedding one
    row is looked up, unless it may be the head as well: no matrix but other tables has its shape.

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
    rows = _looked_up(weights)
    weights = tuple(
        replace(weight, may=(*weight.may, Treatment.GATHER)) if number in rows else weight
        for number, weight in enumerate(weights)
    )
    modules: dict[str, list[int]] = {}
    for number, weight in enumerate(weights):
        modules.setdefault(weight.name.rpartition(".")[0] or weight.name, []).append(number)
    steps = tuple(
        Step(
            name=name,
            graph="checkpoint",
            reads=tuple(number for number in modules[name] if number not in rows),
            gathers=tuple(Gather(tensor=number, size_bytes=rows[number]) for number in modules[name] if number in rows),
            scratch_bytes=0,
            flops=0,
            time_s=None,
        )
        for name in sorted(modules, key=_natural)
    )
    return Trace(name=path.name or str(path), tensors=weights, steps=steps)


def _looked_up(weights: Sequence[Tensor]) -> dict[int, int]:
    """Returns the tables of which a row is looked up, and what that reads."""
    from mball.lookups import gathered_bytes  # which needs torch; a trace is planned without

    found: dict[int, int] = {}
    modules = ["".join(weight.name.split(".")[-2:-1]) for weight in weights]
    others = Counter(
        weight.shape for weight, module in zip(weights, modules, strict=True) if not _OF_TOKENS.fullmatch(module)
    )
    for number, (weight, module) in enumerate(zip(weights, modules, strict=True)):
        if len(weight.shape) != 2 or not weight.size_bytes:
            continue
        has_head = others[weight.shape] > 0
        if _OF_POSITIONS.fullmatch(module) or (_OF_TOKENS.fullmatch(module) and has_head):
            rows_bytes = gathered_bytes(1, weight.size_bytes // weight.shape[0], weight.size_bytes)
            if rows_bytes is not None:
                found[number] = rows_bytes
    return found


def _natural(name: str) -> list[tuple[bool, int, str]]:
    # Numbers before words where both may stand.
    parts = [part for part in _NUMBER.split(name) if part]
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]
