"""The parts a pass is made of: captured graphs and single operators."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from mball.schema import Gather, LiveRange, Step, Tensor, Trace


class Segment(Protocol):
    """A part of a pass that is known as a whole before it runs."""

    @property
    def key(self) -> Hashable:
        """Equal for segments that read the same weights in the same order and take the same room."""

    @property
    def family(self) -> Hashable:
        """Equal for segments that differ in their sizes only."""

    @property
    def is_replaceable(self) -> bool:
        """Whether something else runs in its place where it does not fit."""

    @property
    def handed(self) -> Sequence[tuple[int, ...]]:
        """The weights that it takes for each of its steps, in that order: those that the step reads or gathers from."""

    def describe(self, *, workspace: bool = True) -> tuple[Sequence[Step], Sequence[Tensor]]:
        """Returns its steps and activations, numbered from 0.

        With `workspace` there is room for what operators allocate besides their results.
        """


class OperatorReads(NamedTuple):
    """What an operator outside graphs reads.

    Attributes:
        weights: which (sorted).
        rows_bytes: about how much it reads of the one weight of which it looks up rows; None if it reads all of all.
    """

    weights: tuple[int, ...]
    rows_bytes: int | None = None

    @property
    def key(self) -> Hashable:
        """Equal for operators that read the same weights in the same way, however many rows that is."""
        return self.weights if self.rows_bytes is None else ("rows", *self.weights)


@dataclass(frozen=True, slots=True)
class OperatorSegment:
    """One operator that runs outside any graph."""

    reads: OperatorReads
    name: str
    time_s: float

    @property
    def key(self) -> Hashable:
        return self.reads.key

    @property
    def family(self) -> Hashable:
        return self.reads.key

    @property
    def is_replaceable(self) -> bool:
        return False

    @property
    def handed(self) -> Sequence[tuple[int, ...]]:
        return [self.reads.weights]

    def describe(self, *, workspace: bool = True) -> tuple[Sequence[Step], Sequence[Tensor]]:
        weights, rows_bytes = self.reads
        step = Step(
            name=self.name,
            graph=None,
            reads=weights if rows_bytes is None else (),
            gathers=() if rows_bytes is None else (Gather(tensor=weights[0], size_bytes=rows_bytes),),
            scratch_bytes=0,
            flops=0,
            time_s=self.time_s,
        )
        return [step], []


@dataclass(frozen=True, slots=True, kw_only=True)
class Tape:
    """A pass as a sequence of segments, where each begins among the trace steps, and what it takes for each step."""

    segments: tuple[Segment, ...]
    starts: tuple[int, ...]
    handed: tuple[tuple[int, ...], ...]
    trace: Trace

    @property
    def keys(self) -> tuple[Hashable, ...]:
        return tuple(segment.key for segment in self.segments)


def make_tape(
    name: str,
    weights: tuple[Tensor, ...],
    segments: Sequence[Segment],
    operator_activation_bytes: int,
    *,
    workspace: bool = True,
    gathers: bool = True,
    slower: float = 1.0,
) -> Tape:
    """Joins segments to the trace of one pass.

    Args:
        name: for people.
        weights: all managed weights.
        segments: in the order they run; at least one.
        operator_activation_bytes: peak of the tensors that operators outside graphs hold, assumed throughout.
        workspace: see Segment.describe.
        gathers: whether rows are looked up at home; else steps read the tables.
        slower: times that steps take longer than they were measured to.
    """
    steps: list[Step] = []
    activations: list[Tensor] = []
    starts = []
    for position, segment in enumerate(segments):
        start = len(steps)
        starts.append(start)
        own_steps, own_activations = segment.describe(workspace=workspace)
        # The same graph twice in a pass is two stretches: a plan must not merge across them.
        suffix = f"#{position}"
        for step in own_steps if gathers else map(_with_tables, own_steps):
            graph = None if step.graph is None else step.graph + suffix
            steps.append(replace(step, graph=graph, time_s=None if step.time_s is None else step.time_s * slower))
        activations += [activation.within(activation.name + suffix, start) for activation in own_activations]
    if operator_activation_bytes:
        whole = LiveRange(first=0, end=len(steps))
        activations.append(Tensor.activation("operators", size_bytes=operator_activation_bytes, live=whole))
    trace = Trace(name=name, tensors=(*weights, *activations), steps=tuple(steps))
    handed = tuple(weights for segment in segments for weights in segment.handed)
    return Tape(segments=tuple(segments), starts=tuple(starts), handed=handed, trace=trace)


def _with_tables(step: Step) -> Step:
    """Returns a step that reads whole tables in the place of their rows."""
    tables = tuple(gather.tensor for gather in step.gathers)
    return replace(step, reads=tuple(sorted({*step.reads, *tables})), gathers=())
