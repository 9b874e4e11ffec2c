"""What a model does in one pass, as data: a `Trace`.

A trace is independent of any budget: it is recorded once and planned many times, also where torch
is not installed. Steps are numbered 0, 1, …; every range is half-open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mball.errors import SchemaError
from mball.schema.document import Document

TRACE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRange:
    """Half-open step interval `[first, end)` in which a tensor exists."""

    first: int
    end: int

    def __contains__(self, step: int) -> bool:
        return self.first <= step < self.end


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One managed weight (tied names count once) and where its home lies.

    `file` and `offset_bytes` say where the authoritative bytes begin on disk. They need no alignment:
    readers over-read to the alignment of the link and slice.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    file: str
    offset_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """A tensor that outlives the step it is born in; an input of the pass is born in step 0."""

    name: str
    size_bytes: int
    live: LiveRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The smallest stretch of work that runs without mball in between.

    Attributes:
        name: for people, such as ``graph0/12 linear``.
        graph: the captured graph it belongs to; consecutive steps of one graph may be merged by a
            plan. None for an operator that ran outside any graph.
        reads: indices of the weights it reads, in order of first use.
        scratch_bytes: peak of the tensors born and dying within the step.
        flops: floating point operations.
        time_s: measured seconds of compute, None when it never ran.
    """

    name: str
    graph: str | None
    reads: tuple[int, ...]
    scratch_bytes: int
    flops: int
    time_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace(Document):
    """One pass: the weights, the steps that read them, and the activations.

    A pass repeats (a decode loop), so the step after the last is step 0 of the next pass.
    """

    name: str
    weights: tuple[Weight, ...]
    steps: tuple[Step, ...]
    activations: tuple[Activation, ...] = ()
    version: int = TRACE_VERSION

    def activation_bytes(self) -> list[int]:
        """Returns for each step the bytes of live activations plus the step's own scratch."""
        deltas = [0] * (len(self.steps) + 1)
        for activation in self.activations:
            deltas[activation.live.first] += activation.size_bytes
            deltas[activation.live.end] -= activation.size_bytes
        live, totals = 0, []
        for delta, step in zip(deltas, self.steps, strict=False):
            live += delta
            totals.append(live + step.scratch_bytes)
        return totals

    def check(self) -> None:
        """Raises SchemaError when the trace contradicts itself."""
        if self.version != TRACE_VERSION:
            raise SchemaError(
                f"trace {self.name!r} has version {self.version}; this mball reads version {TRACE_VERSION}: "
                "record it again, or use the mball that wrote it"
            )
        _check_unique([weight.name for weight in self.weights], f"trace {self.name!r}: weight")
        for weight in self.weights:
            if weight.size_bytes < 0 or weight.offset_bytes < 0 or min(weight.shape, default=0) < 0:
                raise SchemaError(
                    f"weight {weight.name!r}: size {weight.size_bytes} B, offset {weight.offset_bytes} B and "
                    f"shape {weight.shape} must not be negative"
                )
        for step in self.steps:
            if step.scratch_bytes < 0 or step.flops < 0 or (step.time_s is not None and step.time_s < 0):
                raise SchemaError(
                    f"step {step.name!r}: scratch {step.scratch_bytes} B, {step.flops} FLOPs and time {step.time_s} s "
                    "must not be negative"
                )
            _check_unique([str(index) for index in step.reads], f"step {step.name!r}: read of weight")
            for index in step.reads:
                if not 0 <= index < len(self.weights):
                    raise SchemaError(f"step {step.name!r} reads weight {index}; there are {len(self.weights)} weights")
        for activation in self.activations:
            live = activation.live
            if not 0 <= live.first < live.end <= len(self.steps):
                raise SchemaError(
                    f"activation {activation.name!r} lives in steps [{live.first}, {live.end}); "
                    f"the pass has steps [0, {len(self.steps)})"
                )
            if activation.size_bytes < 0:
                raise SchemaError(f"activation {activation.name!r} has {activation.size_bytes} B")


def _check_unique(names: Sequence[str], what: str) -> None:
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SchemaError(f"{what} {twice!r} appears twice")
