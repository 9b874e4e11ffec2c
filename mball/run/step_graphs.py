"""Compiled steps that are recorded once and launched whole from then on, on devices that can.

[Note: why a replay computes what the step would] A recorded step reads and writes addresses, and what it needs inside
is nobody's between two steps. So it is replayed only where each of these addresses holds what this call has there:
- arguments are copied into buffers of a `Frame`; those that a step writes, and the model's own, stay where the caller
  has them, and their addresses are part of what the frame stands for;
- what a step makes is copied into buffers of the frame, each of which holds one result of one step;
- weights are where they were when it was recorded. Else the step runs plainly, and is recorded once they stay.
Callers are given copies of what they keep. Nothing here knows plans: one that goes, or a slot that moves, is another
address. Plans decide only how many bytes may be held.

[Note: when] A call of a kind that came before is measured. Then plans leave room for its frame, or do not; the next
calls run in the frame's memory, and a step is recorded when its weights are where they were the time before.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from mball.memory import Graphs, Recorded
from mball.run.frame import Frame, Like, Piece
from mball.units import format_bytes

logger = logging.getLogger(__name__)

# Of the budget, for all that is recorded: weights that do not stay for it cost more than launching saves.
LARGEST_SHARE = 1 / 16
# Calls of one kind that run before one is measured: with a growing cache each call is of another kind.
WARM_CALLS = 1
MAX_FRAMES = 64
# A frame that so many calls went by is of a cache, or of sizes, that are gone.
IDLE_CALLS = 256


class StepGraphs:
    """What is recorded of the passes of one engine. Whoever uses it holds the engine's lock.

    Args:
        graphs: records.
        catch_up: blocks until all compute is over that was issued.
        replan: says that `wanted_bytes` are others now.
        is_slot: returns whether a weight lies in the arena.
        budget_bytes: returns the budget.

    Attributes:
        granted_bytes: what the plan that is executed leaves for it; see `grant`.
        wanted_bytes: what all frames take, and steps inside: plans leave these, or nothing.
    """

    def __init__(
        self,
        graphs: Graphs,
        *,
        catch_up: Callable[[], None],
        replan: Callable[[], None],
        is_slot: Callable[[torch.Tensor], bool],
        budget_bytes: Callable[[], int],
    ) -> None:
        self._graphs = graphs
        self._is_slot = is_slot
        self.granted_bytes = 0
        self.wanted_bytes = 0
        self._catch_up = catch_up
        self._replan = replan
        self._budget_bytes = budget_bytes
        self._frames: dict[Hashable, Frame] = {}
        self._calls: OrderedDict[Hashable, int] = OrderedDict()
        self._num_calls = 0
        self._pool_bytes = 0  # the most that recording took
        self._said: set[str] = set()

    @property
    def num_recorded(self) -> int:
        """Steps that are recorded now."""
        return sum(frame.num_recorded for frame in self._frames.values())

    @property
    def pool_bytes(self) -> int:
        """What the allocator keeps for what is recorded now."""
        return self._pool_bytes if self.num_recorded else 0

    @property
    def open_bytes(self) -> int:
        """What frames and recording may still take of what is granted."""
        frames = sum(frame.size_bytes or 0 for frame in self._frames.values() if frame.holds_memory)
        return max(self.granted_bytes - frames - self.pool_bytes, 0)

    def grant(self, num_bytes: int) -> None:
        """Says how much it may hold from now on; where that is not enough all memory is given back."""
        self.granted_bytes = num_bytes
        if num_bytes < self.wanted_bytes:
            self._say(
                "no room",
                f"steps are launched kernel by kernel in passes that leave less than {format_bytes(self.wanted_bytes)} "
                f"of the budget of {format_bytes(self._budget_bytes())} for their graphs; a larger budget has them",
            )
            self._release(list(self._frames.values()))

    def has_room(self) -> bool:
        """Returns whether frames may take memory now."""
        return self.granted_bytes >= self.wanted_bytes

    def forget(self) -> None:
        """Gives all memory back, and knows no kind of call any more."""
        self._release(list(self._frames.values()))
        self._frames.clear()
        self._calls.clear()
        self.wanted_bytes = self._count()

    def frame(self, kind: Hashable, can_record: Sequence[bool]) -> Frame | None:
        """Returns the frame of calls of this kind; None while they are new, and where too many others are in use."""
        self._num_calls += 1
        frame = self._frames.get(kind)
        if frame is None:
            self._calls[kind] = calls = self._calls.pop(kind, 0) + 1
            if len(self._calls) > 4 * MAX_FRAMES:
                self._calls.popitem(last=False)
            if calls <= WARM_CALLS:
                return None
            self._forget_idle()
            if len(self._frames) >= MAX_FRAMES:
                return None
            frame = self._frames[kind] = Frame(can_record, self._record, self._is_slot, self._catch_up)
        frame.last_call = self._num_calls
        return frame

    def measured(self, frame: Frame, size_bytes: int, rise_bytes: int) -> None:
        """Says what a frame takes, and by how much memory rises within a step; it is told if that is too much."""
        wanted_bytes, budget_bytes = self._count((size_bytes, rise_bytes)), self._budget_bytes()
        largest_bytes = int(budget_bytes * LARGEST_SHARE)
        if wanted_bytes > largest_bytes:
            frame.refuse()
            self._say(
                "too large",
                f"graphs of steps would hold {format_bytes(wanted_bytes)}, and {format_bytes(largest_bytes)} of the "
                f"budget of {format_bytes(budget_bytes)} are for them: some calls are launched kernel by kernel",
            )
            return
        self.wanted_bytes = wanted_bytes
        self._replan()
        frame.rise_bytes = rise_bytes
        frame.size_bytes = size_bytes  # last: after an interrupt it is measured again

    def _record(self, work: Callable[[], None]) -> Recorded | None:
        wanted_bytes = self.wanted_bytes
        try:
            recorded = self._graphs.record(work)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            self._say("failed", f"a step cannot be recorded as a graph ({reason}): it is launched kernel by kernel")
            return None
        self._pool_bytes = max(self._pool_bytes, self._graphs.pool_bytes)
        self.wanted_bytes = self._count()
        if self.wanted_bytes > wanted_bytes:  # more than was expected: it is on top until the next pass is planned
            self._replan()
        return recorded

    def _say(self, what: str, message: str) -> None:
        """Warns, once of each thing."""
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s", message)

    def _forget_idle(self) -> None:
        idle = {kind: each for kind, each in self._frames.items() if each.last_call < self._num_calls - IDLE_CALLS}
        self._release(list(idle.values()))
        for kind in idle:
            del self._frames[kind]
        self.wanted_bytes = self._count()

    def _count(self, *more: tuple[int, int]) -> int:
        """Returns what all frames take, and others of such a size and rise."""
        found = [(frame.size_bytes, frame.rise_bytes) for frame in self._frames.values() if frame.size_bytes]
        found += more
        inside = [self._graphs.pool_bytes_for(rise_bytes) for _, rise_bytes in found]
        return sum(size_bytes for size_bytes, _ in found) + max(self._pool_bytes, *inside) if found else 0

    def _release(self, frames: Sequence[Frame]) -> None:
        if any(frame.holds_memory for frame in frames):
            self._catch_up()  # a replay may be under way
            for frame in frames:
                frame.release()


class RecordingStage:
    """Stands around the steps of one program, and has them recorded where that is possible.

    Args:
        shared: of the engine.
        name: of the program: its graph may run for other weights too.
        copied: the arguments that may be read of a copy of theirs.
        in_place: those that must be where the caller has them, or are sizes.
        can_record: for each step whether it may be recorded.
        rise_bytes: returns by how much memory rose within a step, at most.
    """

    def __init__(
        self,
        shared: StepGraphs,
        name: str,
        *,
        copied: Sequence[int],
        in_place: Sequence[int],
        can_record: Sequence[bool],
        rise_bytes: Callable[[], int],
    ) -> None:
        self._shared = shared
        self._name = name
        self._copied = copied
        self._in_place = in_place
        self._can_record = can_record
        self._rise_bytes = rise_bytes
        self._frame: Frame | None = None  # of the call that runs
        self._likes: list[Like] = []  # of what would be copied, in a call that is measured

    def arguments(self, values: Sequence[Any]) -> Sequence[Any]:
        self._frame = None  # an error may have ended the last call
        # What tensors look like follows from the graph and from the sizes among its arguments.
        kind = self._name, *[_place(values[position]) for position in self._in_place]
        frame = self._shared.frame(kind, self._can_record)
        if frame is None or frame.is_refused:
            return values
        if frame.size_bytes is None:
            self._frame, self._likes = frame, [Like.of(values[position]) for position in self._copied]
            return values
        if not self._shared.has_room():
            return values
        self._frame = frame
        return frame.begin(values, self._copied)

    def compute(self, step: int, piece: Piece, weights: Sequence[torch.Tensor], inputs: Sequence[Any]) -> Sequence[Any]:
        frame = self._frame
        if frame is not None and frame.size_bytes is not None:
            return frame.compute(step, piece, weights, inputs)
        results = piece([*weights, *inputs])
        if frame is not None:
            frame.see(step, results)
        return results

    def results(self, values: Sequence[Any]) -> Sequence[Any]:
        frame, self._frame = self._frame, None
        if frame is None:
            return values
        if frame.size_bytes is not None:
            return frame.end(values)
        self._shared.measured(frame, frame.needed_bytes(self._likes), self._rise_bytes())
        return values


def _place(value: Any) -> Hashable:
    """Returns what a graph that reads a value where it is depends on: its address, or the number."""
    return value.data_ptr() if isinstance(value, torch.Tensor) else value
