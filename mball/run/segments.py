"""The parts a pass is made of: captured graphs and single operators."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from mball.schema import LiveRange, Step, Tensor, Trace


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

    def describe(self, *, workspace: bool = True) -> tuple[Sequence[Step], Sequence[Tensor]]:
        """Returns its steps and activations, numbered from 0.

        With `workspace` there is room for what operators allocate besides their results.
        """


@dataclass(frozen=True, slots=True)
class OperatorSegment:
    """One operator that runs outside any graph and reads `weights` (sorted)."""

    weights: tuple[int, ...]
    name: str
    time_s: float

    @property
    def key(self) -> Hashable:
        return self.weights

    @property
    def family(self) -> Hashable:
        return self.weights

    @property
    def is_replaceable(self) -> bool:
        return False

    def describe(self, *, workspace: bool = True) -> tuple[Sequence[Step], Sequence[Tensor]]:
        step = Step(name=self.name, graph=None, reads=self.weights, scratch_bytes=0, flops=0, time_s=self.time_s)
        return [step], []


@dataclass(frozen=True, slots=True, kw_only=True)
class Tape:
    """A pass as a sequence of segments, and where each begins among the trace steps."""

    segments: tuple[Segment, ...]
    starts: tuple[int, ...]
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
    slower: float = 1.0,
) -> Tape:
    """Joins segments to the trace of one pass.

    Args:
        name: for people.
        weights: all managed weights.
        segments: in the order they run; at least one.
        operator_activation_bytes: peak of the tensors that operators outside graphs hold, assumed throughout.
        workspace: see Segment.describe.
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
        for step in own_steps:
            graph = None if step.graph is None else step.graph + suffix
            steps.append(replace(step, graph=graph, time_s=None if step.time_s is None else step.time_s * slower))
        activations += [activation.within(activation.name + suffix, start) for activation in own_activations]
    if operator_activation_bytes:
        whole = LiveRange(first=0, end=len(steps))
        activations.append(Tensor.activation("operators", size_bytes=operator_activation_bytes, live=whole))
    trace = Trace(name=name, tensors=(*weights, *activations), steps=tuple(steps))
    return Tape(segments=tuple(segments), starts=tuple(starts), trace=trace)
