"""The memory that calls of one kind run in, and what is recorded of their steps there; see `step_graphs`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch

from mball.memory import Recorded
from mball.torch_private.tensors import storage_key

# What allocators round up to.
_ROUNDING_BYTES = 512

# A compiled part of a graph: takes a list, which it empties, of the weights it reads and of the rest.
Piece = Callable[[list[Any]], Sequence[Any]]
# Returns the recorded work, or None where it cannot be recorded.
Record = Callable[[Callable[[], None]], Recorded | None]


class Like(NamedTuple):
    """What a tensor looks like, wherever it is."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    @property
    def size_bytes(self) -> int:
        """Of memory that holds such a tensor, gaps included."""
        if 0 in self.shape:
            return 0
        last = sum((length - 1) * stride for length, stride in zip(self.shape, self.stride, strict=True))
        return -(-(last + 1) * self.dtype.itemsize // _ROUNDING_BYTES) * _ROUNDING_BYTES

    def make(self) -> torch.Tensor:
        """Returns such a tensor, with any content, which can be written in all modes."""
        with torch.inference_mode(False):
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def put(buffer: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a value into a tensor that looks like it; autograd records nothing here, or the call is refused."""
    _once(buffer).copy_(_once(value))


def _once(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor without what repeats in it."""
    if 0 not in tensor.stride():
        return tensor
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    lengths = [length if stride else min(length, 1) for length, stride in sides]
    return tensor.as_strided(lengths, tensor.stride(), tensor.storage_offset())


@dataclass(slots=True, eq=False)
class _Step:
    """One step in a frame.

    Attributes:
        can_record: False too once it was tried in vain.
        likes: of what it makes, once that was seen.
        results: buffers for it, or nothing yet.
        weights: where the step ran last, in this frame.
        recorded: the step with these weights.
    """

    can_record: bool
    likes: list[Like] = field(default_factory=list)
    results: list[torch.Tensor] = field(default_factory=list)
    weights: Sequence[torch.Tensor] = ()
    recorded: Recorded | None = None

    def stop(self) -> None:
        recorded, self.recorded = self.recorded, None
        if recorded is not None:
            recorded.close()


class Frame:
    """Buffers for the arguments and for the results of all steps of calls of one kind.

    Args:
        can_record: for each step whether it may be recorded.
        record: records work.
        is_slot: returns whether a weight lies in the arena: elsewhere it is read at home.
        catch_up: blocks until all compute is over that was issued.

    Attributes:
        size_bytes: of its buffers, None before a call was measured.
        rise_bytes: by how much memory rose within a step, at most.
        is_refused: whether it takes too much, and no memory.
        last_call: the number of the last call of this kind.
    """

    def __init__(
        self,
        can_record: Iterable[bool],
        record: Record,
        is_slot: Callable[[torch.Tensor], bool],
        catch_up: Callable[[], None],
    ) -> None:
        self.size_bytes: int | None = None
        self.rise_bytes = 0
        self.is_refused = False
        self.last_call = 0
        self._steps = [_Step(each) for each in can_record]
        self._record = record
        self._is_slot = is_slot
        self._catch_up = catch_up
        self._buffers: list[torch.Tensor] = []  # of arguments
        self._own: set[int] = set()  # the storages of all buffers

    @property
    def num_recorded(self) -> int:
        """Steps that are recorded now."""
        return sum(step.recorded is not None for step in self._steps)

    @property
    def holds_memory(self) -> bool:
        """Whether anything was taken that `release` gives back."""
        return bool(self._buffers) or any(step.results for step in self._steps)

    # -- before there is room ------------------------------------------------------------------------------------

    def see(self, number: int, results: Sequence[Any]) -> None:
        """Says what a step makes, in a call that runs outside of the frame."""
        self._steps[number].likes = [Like.of(result) for result in results]

    def needed_bytes(self, copied: Iterable[Like]) -> int:
        """Returns what buffers take for arguments that are copied and for what the steps were seen to make."""
        likes = [*copied, *(like for step in self._steps for like in step.likes)]
        return sum(like.size_bytes for like in likes)

    def refuse(self) -> None:
        """Says that calls of this kind run outside for good."""
        self.is_refused = True
        self.size_bytes = self.rise_bytes = 0

    # -- calls ---------------------------------------------------------------------------------------------------

    def begin(self, values: Sequence[Any], copied: Sequence[int]) -> list[Any]:
        """Returns the arguments of a call with those at `copied` in the frame's buffers."""
        if not self._buffers:
            self._buffers = self._made(Like.of(values[position]) for position in copied)
        inside = list(values)
        for position, buffer in zip(copied, self._buffers, strict=True):
            put(buffer, values[position])
            inside[position] = buffer
        return inside

    def compute(
        self, number: int, piece: Piece, weights: Sequence[torch.Tensor], inputs: Sequence[Any]
    ) -> list[torch.Tensor]:
        """Returns the buffers with what `piece` makes of the weights and of inputs that are in the frame."""
        step = self._steps[number]
        stayed = _are_there(weights, step.weights)
        if not stayed:
            if step.recorded is not None:
                self._catch_up()  # its last replay may be under way
                step.stop()
            step.weights = weights
        if step.recorded is not None:
            step.recorded.replay()
            return step.results
        if not step.results:
            step.results = self._made(step.likes)

        def run() -> None:
            for buffer, result in zip(step.results, piece([*weights, *inputs]), strict=True):
                put(buffer, result)

        if stayed and step.can_record and all(map(self._is_slot, weights)):
            step.recorded = self._record(run)
            step.can_record = step.recorded is not None
        if step.recorded is not None:
            step.recorded.replay()
        else:
            run()
        return step.results

    def end(self, values: Sequence[Any]) -> list[Any]:
        """Returns the call's results: none of them is memory that the next call writes."""
        return [_outside(value, self._own) for value in values]

    def release(self) -> None:
        """Gives all memory back; no replay is under way."""
        for step in self._steps:
            step.stop()
        # Now that no graph is left, after an interrupt either, which would go on with memory that is another's.
        for step in self._steps:
            step.results, step.weights = [], ()
        self._buffers = []
        self._own.clear()

    def _made(self, likes: Iterable[Like]) -> list[torch.Tensor]:
        buffers = [like.make() for like in likes]
        self._own.update(map(storage_key, buffers))  # before anybody may be handed one
        return buffers


def _are_there(weights: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> bool:
    """Whether the weights of a step, which are always the same, are where they were."""
    if weights is before:
        return True
    if len(before) != len(weights):
        return False
    return all(map(operator.is_, weights, before)) or all(
        one.data_ptr() == other.data_ptr() for one, other in zip(weights, before, strict=True)
    )


def _outside(value: Any, own: set[int]) -> Any:
    if not isinstance(value, torch.Tensor) or storage_key(value) not in own:
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    put(copy, value)
    return copy
