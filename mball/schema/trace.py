"""What a model does in one pass, as data: a `Trace`.

A trace is independent of any budget: it is recorded once and planned many times, also where torch
is not installed. Steps are numbered 0, 1, …; every range is half-open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import accumulate
from math import inf
from typing import Self

from mball.errors import SchemaError
from mball.schema.document import Document
from mball.schema.machine import Tier

TRACE_VERSION = 2


class Kind(StrEnum):
    """What a tensor is for. The planner treats all alike; people and executors tell them apart."""

    WEIGHT = "weight"
    ACTIVATION = "activation"
    GRADIENT = "gradient"
    OPTIMIZER = "optimizer"
    CACHE = "cache"


class Treatment(StrEnum):
    """What may be done to a tensor so that it takes no device memory while nobody reads it."""

    STAY = "stay"  # nothing: it is there
    STREAM = "stream"  # brought from its home when it is needed
    GATHER = "gather"  # its rows are read from its home where a step asks for rows only
    OFFLOAD = "offload"  # written to a lower tier, and brought back when it is needed
    RECOMPUTE = "recompute"  # dropped, and computed again when it is needed


class Lane(StrEnum):
    """Where a step runs."""

    COMPUTE = "compute"  # on the device; what it reads must be there
    HOST = "host"  # on the processor beside it, beside the compute; what it reads must be in host memory


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRange:
    """Half-open step interval `[first, end)` in which a tensor exists."""

    first: int
    end: int

    def __contains__(self, step: int) -> bool:
        return self.first <= step < self.end


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where the authoritative bytes of a tensor are between passes.

    `file` and `offset_bytes` say where they begin. They need no alignment: readers over-read to the alignment of the
    link and slice.
    """

    tier: Tier
    file: str
    offset_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """Bytes that steps read or write.

    Attributes:
        size_bytes: of its data.
        home: None if it is born in the pass and dies in it.
        live: of a tensor without a home: the steps from the one that makes it to the last one that reads it; an input
            of the pass is born in step 0. None for a tensor with a home.
        may: what may be done to it. One without a home that may only stay is no part of a plan but for its bytes.
        recompute_s: if it may be recomputed, the seconds of compute that make it again, in a step that reads it, from
            what that step reads besides.
        dtype, shape: for people and executors.
    """

    name: str
    kind: Kind
    size_bytes: int
    home: Home | None = None
    live: LiveRange | None = None
    may: tuple[Treatment, ...] = (Treatment.STAY,)
    recompute_s: float | None = None
    dtype: str = ""
    shape: tuple[int, ...] = ()

    @classmethod
    def weight(
        cls, name: str, *, dtype: str, shape: tuple[int, ...], size_bytes: int, file: str, offset_bytes: int
    ) -> Self:
        """Returns a weight whose home is a file (tied names count once); it may stay or be streamed."""
        return cls(
            name=name,
            kind=Kind.WEIGHT,
            size_bytes=size_bytes,
            home=Home(tier=Tier.DISK, file=file, offset_bytes=offset_bytes),
            may=(Treatment.STAY, Treatment.STREAM),
            dtype=dtype,
            shape=shape,
        )

    @classmethod
    def activation(cls, name: str, *, size_bytes: int, live: LiveRange) -> Self:
        """Returns a tensor that outlives the step it is born in, and only stays."""
        return cls(name=name, kind=Kind.ACTIVATION, size_bytes=size_bytes, live=live)

    def within(self, name: str, first: int) -> Self:
        """Returns the tensor under another name in a longer pass, in which its own pass begins with step `first`."""
        live = self.live and LiveRange(first=self.live.first + first, end=self.live.end + first)
        return replace(self, name=name, live=live)

    def check(self) -> None:
        """Raises SchemaError when the tensor contradicts itself."""
        if self.size_bytes < 0 or (self.shape and min(self.shape) < 0) or (self.home and self.home.offset_bytes < 0):
            offset = self.home.offset_bytes if self.home else 0
            raise SchemaError(
                f"tensor {self.name!r}: size {self.size_bytes} B, offset {offset} B and shape {self.shape} "
                "must not be negative"
            )
        if (self.home is None) == (self.live is None):
            raise SchemaError(f"tensor {self.name!r} must have either a home or a live range")
        if self.home is not None and self.home.tier is Tier.DEVICE:
            raise SchemaError(f"tensor {self.name!r} has its home in device memory; homes are below it")
        # Sets of enumerations take as long as all the rest, and nearly all tensors may the same.
        if self.may != (_USUAL_WITH_HOME if self.home else _USUAL_WITHOUT_HOME):
            self._check_may()
        is_priced = self.recompute_s is not None and 0 <= self.recompute_s < inf
        if is_priced != (Treatment.RECOMPUTE in self.may) or (self.recompute_s is not None and not is_priced):
            raise SchemaError(
                f"tensor {self.name!r} takes {self.recompute_s} s to recompute and may {list(self.may)}: a time of "
                "zero or more belongs to each tensor that may be recomputed, and to no other"
            )

    def _check_may(self) -> None:
        if len(set(self.may)) != len(self.may) or not self.may:
            raise SchemaError(f"tensor {self.name!r} may {list(self.may)}; each treatment once, and at least one")
        with_home = {Treatment.STREAM, Treatment.GATHER}
        without_home = {Treatment.OFFLOAD, Treatment.RECOMPUTE}
        if wrong := (without_home if self.home else with_home).intersection(self.may):
            has = "a home" if self.home else "no home"
            raise SchemaError(f"tensor {self.name!r} has {has}, so it cannot {min(wrong).value}")


_USUAL_WITH_HOME = (Treatment.STAY, Treatment.STREAM)
_USUAL_WITHOUT_HOME = (Treatment.STAY,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather:
    """A step reads only some rows of a tensor: `size_bytes` of it, unless the whole is on the device."""

    tensor: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The smallest stretch of work that runs without mball in between.

    Attributes:
        name: for people, such as ``graph0/12 linear``.
        graph: the captured graph it belongs to; consecutive steps of one graph may be merged by a
            plan. None for an operator that ran outside any graph.
        reads: indices of the tensors it reads as a whole, in order of first use; those that only stay may be left out.
        gathers: those of which it reads rows. One that may gather need not be on the device for it.
        writes: indices of tensors with a home that it changes. On the compute lane it changes the copy on the device,
            which must be there as if it were read, and is written back to its home after that. On the host lane it
            changes the home in place, and copies that were brought before are void.
        scratch_bytes: peak of the tensors born and dying within the step.
        flops: floating point operations.
        time_s: measured seconds of compute, None when it never ran.
        lane: where it runs. Each lane runs its steps in the order of the trace. A step on the host lane begins once the
            compute steps before it have been left and what it reads is in host memory: it uses homes in place, and what
            is born on the device once that has been offloaded. Compute steps wait for it only where they need what it
            writes or bears.
    """

    name: str
    graph: str | None
    reads: tuple[int, ...]
    scratch_bytes: int
    flops: int
    time_s: float | None
    gathers: tuple[Gather, ...] = ()
    writes: tuple[int, ...] = ()
    lane: Lane = Lane.COMPUTE


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace(Document):
    """One pass: the tensors, and the steps that read them.

    Attributes:
        tensors: what steps read or write; those that only stay count with their bytes.
        steps: in the order they begin.
        cyclic: the pass repeats (a decode loop), so the step after the last is step 0 of the next pass. Otherwise it
            runs once, and nothing is there before it.
    """

    name: str
    tensors: tuple[Tensor, ...]
    steps: tuple[Step, ...]
    cyclic: bool = True
    version: int = TRACE_VERSION

    def homed(self) -> Iterator[tuple[int, Tensor]]:
        """Yields index and tensor of those that have a home."""
        return ((index, tensor) for index, tensor in enumerate(self.tensors) if tensor.home is not None)

    def movable(self) -> Iterator[tuple[int, Tensor]]:
        """Yields index and tensor of those born in the pass that may be offloaded or recomputed."""
        leaves = {Treatment.OFFLOAD, Treatment.RECOMPUTE}
        return (
            (index, tensor)
            for index, tensor in enumerate(self.tensors)
            if tensor.live is not None and not leaves.isdisjoint(tensor.may)
        )

    def needs(self) -> list[tuple[int, ...]]:
        """Returns for each step the tensors with a home that must be on the device, in order of first use.

        What it reads rows of at home, or may (see `gathered`), is not among them; what it writes is. A step on the host
        lane needs nothing there.
        """
        homeless = {index for index, tensor in enumerate(self.tensors) if tensor.home is None}
        # Most steps of most traces read weights, and nothing else.
        return [
            self._needs_of(step, homeless)
            if step.gathers or step.writes or step.lane is Lane.HOST or not homeless.isdisjoint(step.reads)
            else step.reads
            for step in self.steps
        ]

    def _needs_of(self, step: Step, homeless: Collection[int]) -> tuple[int, ...]:
        if step.lane is Lane.HOST:
            return ()
        whole = (each.tensor for each in step.gathers if Treatment.GATHER not in self.tensors[each.tensor].may)
        uses = dict.fromkeys((*step.reads, *whole, *step.writes))
        return tuple(index for index in uses if index not in homeless)

    def gathered(self) -> list[tuple[Gather, ...]]:
        """Returns for each step on the device what it reads rows of, at home unless the tensor is on the device."""
        return [
            tuple(gather for gather in step.gathers if Treatment.GATHER in self.tensors[gather.tensor].may)
            if step.gathers and step.lane is Lane.COMPUTE
            else ()
            for step in self.steps
        ]

    def is_born_below(self, tensor: Tensor) -> bool:
        """Returns whether a step on the host lane bears the tensor: it lives in host memory then."""
        return tensor.live is not None and self.steps[tensor.live.first].lane is Lane.HOST

    def activation_bytes(self, apart: Collection[int] = ()) -> list[int]:
        """Returns for each step the bytes on the device of what is born in the pass if it all stays, plus its scratch.

        The tensors `apart`, by index, are left out: they have places of their own. What a step on the host lane bears,
        and its scratch, are in host memory.
        """
        deltas = [0] * (len(self.steps) + 1)
        for index, tensor in enumerate(self.tensors):
            if tensor.live is not None and index not in apart and not self.is_born_below(tensor):
                deltas[tensor.live.first] += tensor.size_bytes
                deltas[tensor.live.end] -= tensor.size_bytes
        return [
            live + (step.scratch_bytes if step.lane is Lane.COMPUTE else 0)
            for live, step in zip(accumulate(deltas), self.steps, strict=False)
        ]

    def check(self) -> None:
        """Raises SchemaError when the trace contradicts itself."""
        if self.version != TRACE_VERSION:
            raise SchemaError(
                f"trace {self.name!r} has version {self.version}; this mball reads version {TRACE_VERSION}: "
                "record it again, or use the mball that wrote it"
            )
        _check_unique([tensor.name for tensor in self.tensors], f"trace {self.name!r}: tensor")
        for tensor in self.tensors:
            tensor.check()
            live = tensor.live
            if live is not None and not 0 <= live.first < live.end <= len(self.steps):
                raise SchemaError(
                    f"tensor {tensor.name!r} lives in steps [{live.first}, {live.end}); "
                    f"the pass has steps [0, {len(self.steps)})"
                )
        for number, step in enumerate(self.steps):
            self._check_step(number, step)
        for index, tensor in self.movable():
            live = tensor.live
            if live is not None and live.end - 1 > live.first and index not in self.steps[live.end - 1].reads:
                raise SchemaError(
                    f"tensor {tensor.name!r} lives in steps [{live.first}, {live.end}) and may leave the device; its "
                    f"last step, {self.steps[live.end - 1].name!r}, does not read it, so nobody would bring it back"
                )

    def _check_step(self, number: int, step: Step) -> None:
        if step.scratch_bytes < 0 or step.flops < 0 or (step.time_s is not None and not 0 <= step.time_s < inf):
            raise SchemaError(
                f"step {step.name!r}: scratch {step.scratch_bytes} B, {step.flops} FLOPs and time {step.time_s} s "
                "must not be negative, nor infinite"
            )
        uses = (*step.reads, *(gather.tensor for gather in step.gathers)) if step.gathers else step.reads
        if len(set(uses)) < len(uses) or len(set(step.writes)) < len(step.writes):
            _check_unique([str(index) for index in uses], f"step {step.name!r}: read of tensor")
            _check_unique([str(index) for index in step.writes], f"step {step.name!r}: write of tensor")
        for index in (*uses, *step.writes):
            if not 0 <= index < len(self.tensors):
                raise SchemaError(f"step {step.name!r} uses tensor {index}; there are {len(self.tensors)} tensors")
            live = self.tensors[index].live
            if live is not None and number not in live:
                raise SchemaError(
                    f"step {step.name!r}, number {number}, uses tensor {self.tensors[index].name!r}, "
                    f"which lives in steps [{live.first}, {live.end})"
                )
        for index in step.writes:
            if self.tensors[index].home is None:
                raise SchemaError(f"step {step.name!r} writes tensor {self.tensors[index].name!r}, which has no home")
        for gather in step.gathers:
            tensor = self.tensors[gather.tensor]
            if tensor.home is None or not 0 <= gather.size_bytes <= tensor.size_bytes:
                raise SchemaError(
                    f"step {step.name!r} gathers {gather.size_bytes} B of tensor {tensor.name!r}, which has "
                    f"{tensor.size_bytes} B and {'a' if tensor.home else 'no'} home"
                )


def _check_unique(names: Sequence[str], what: str) -> None:
    if len(set(names)) != len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise SchemaError(f"{what} {twice!r} appears twice")
