"""Plans of whole passes under the budget: each is made once, and what yields when there is too little room."""

from __future__ import annotations

import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mball.errors import BudgetError
from mball.run.allocator_room import AllocatorRoom
from mball.run.capture_cost import CaptureCost
from mball.run.correction import Correction
from mball.run.operator_room import OperatorRoom, RoomState
from mball.run.segments import OperatorSegment, Segment, Tape, make_tape
from mball.schema import Plan, Tensor, Trace
from mball.units import format_bytes

logger = logging.getLogger(__name__)

MAX_PLANS = 32

# plan(trace, budget_bytes, previous plan) -> Plan; raises BudgetError
Planner = Callable[[Trace, int, Plan | None], Plan]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Where a segment lies in the plan.

    Attributes:
        steps: for each of its trace steps the plan step that runs it.
        places: for each of its trace steps where among the trace steps of that plan step it comes.
        handed: for each of its trace steps the weights that it takes.
    """

    steps: tuple[int, ...]
    places: tuple[int, ...]
    handed: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class PassPlan:
    """A plan for a tape.

    Attributes:
        tape: the pass.
        plan: for its trace.
        stretches: of each of its segments.
        positions: where in the tape each segment comes, by its key.
        reserve: the bytes that are kept for operators outside graphs.
        has_operators: whether there are such operators.
        workspace_fits: whether there is room for what operators allocate inside.
        graph_bytes: the bytes that are kept for steps that are recorded.
        taken_bytes: the bytes that are kept for what captured graphs were seen to take that nobody foresaw.
    """

    tape: Tape
    plan: Plan
    stretches: tuple[Stretch, ...]
    positions: dict[Hashable, tuple[int, ...]]
    reserve: int
    has_operators: bool
    workspace_fits: bool
    graph_bytes: int
    taken_bytes: int


class _Fit(NamedTuple):
    """What a plan is to leave: bytes for operators, of the limit for recorded steps, and whether for workspace.

    And beside the limit what was taken, that nobody foresaw.
    """

    reserve: int
    limit: int
    workspace: bool
    graph_bytes: int
    taken_bytes: int = 0


# By the keys of the tape, what was wished to be kept for operators, what they missed of that, and what was taken.
_Known = OrderedDict[tuple[tuple[Hashable, ...], int, int, int], PassPlan]
_Taken = OrderedDict[tuple[Hashable, ...], int]  # by the keys of the tape
# The budget, the plans, what was taken by passes, and the room for operators.
PlansState = tuple[int, _Known, _Taken, RoomState]


class PassPlans:
    """Makes plans, and keeps those that were made lately.

    Args:
        plan: makes plans.
        room: what operators outside graphs need.
        capture: what captured graphs hold.
        allocator: what the allocator keeps beside tensors.
        correction: what is known of the time that passes take.
        budget_bytes: the budget; see `set_budget`.
        graph_bytes: returns what steps that are recorded would take.

    Attributes:
        gathers: whether rows of tables are looked up at home; else plans have a place for the tables.
    """

    def __init__(
        self,
        plan: Planner,
        room: OperatorRoom,
        capture: CaptureCost,
        allocator: AllocatorRoom,
        correction: Correction,
        budget_bytes: int,
        graph_bytes: Callable[[], int],
    ) -> None:
        self._plan = plan
        self._room = room
        self._capture = capture
        self._allocator = allocator
        self._correction = correction
        self._budget_bytes = budget_bytes
        self._graph_bytes = graph_bytes
        self._known: _Known = OrderedDict()
        self._taken: _Taken = OrderedDict()
        self.gathers = True

    @property
    def budget_bytes(self) -> int:
        """The budget."""
        return self._budget_bytes

    def state(self) -> PlansState:
        """Returns what `restore` takes."""
        return self._budget_bytes, self._known, self._taken, self._room.state()

    def set_budget(self, budget_bytes: int) -> None:
        """Plans for another budget from now on."""
        self._budget_bytes, self._known, self._taken = budget_bytes, OrderedDict(), OrderedDict()
        self._room.set_budget(budget_bytes)

    def restore(self, state: PlansState) -> None:
        """Goes back to the budget, the plans and the room for operators that there were."""
        self._budget_bytes, self._known, self._taken, room = state
        self._room.restore(room)

    def check(self, weights: tuple[Tensor, ...], passes: Iterable[Sequence[Segment]]) -> None:
        """Checks that each of these passes fits, whatever kind of call it is, but for those with a substitute.

        Raises:
            BudgetError: one does not; of several the one that takes most.
        """
        refused: list[BudgetError] = []
        for segments in passes:
            if any(segment.is_replaceable for segment in segments):
                continue
            operators = any(isinstance(segment, OperatorSegment) for segment in segments)
            reserve = self._room.largest_bytes if operators else 0
            name = f"pass of {len(segments)} segments"
            tape = make_tape(name, weights, segments, reserve, workspace=False, gathers=self.gathers)
            try:
                self._plan(tape.trace, self._budget_bytes, None)
            except BudgetError as error:
                refused.append(error)
        if refused:
            raise max(refused, key=lambda error: error.smallest_bytes)

    def of(self, weights: tuple[Tensor, ...], segments: Sequence[Segment], previous: Plan | None) -> PassPlan:
        """Returns the plan of a pass of these segments: the one that was made before, if there still is room for it.

        Args:
            weights: all managed weights.
            segments: in the order they run.
            previous: the plan that is executed now.

        Raises:
            BudgetError: the pass does not fit.
        """
        operators = any(isinstance(segment, OperatorSegment) for segment in segments)
        needed, wished = (self._room.needed_bytes, self._room.wished_bytes) if operators else (0, 0)
        keys = tuple(segment.key for segment in segments)
        key = keys, wished, self._room.missed_bytes if operators else 0, self.taken_bytes(keys)
        found = self._known.get(key)
        if found is None or found.reserve < needed:
            found = self._known[key] = self._make(weights, segments, previous, operators)
        self._known.move_to_end(key)
        while len(self._known) > MAX_PLANS:
            self._known.popitem(last=False)
        return found

    def fits(self, weights: tuple[Tensor, ...], segment: Segment) -> bool:
        """Returns whether a pass of this segment alone fits, with what its operators allocate inside."""
        tape = make_tape("a segment alone", weights, [segment], 0, workspace=True, gathers=self.gathers)
        try:
            self._plan(tape.trace, self._budget_bytes, None)
        except BudgetError:
            return False
        return True

    def forget(self, keys: Collection[Hashable]) -> None:
        """Forgets the plans of passes with these segments, of which more is known now."""
        self._correction.forget(keys)
        for known in [known for known in self._known if not set(known[0]).isdisjoint(keys)]:
            del self._known[known]
        for tape in [tape for tape in self._taken if not set(tape).isdisjoint(keys)]:
            del self._taken[tape]

    def clear(self) -> None:
        """Forgets all plans."""
        self._known.clear()

    def taken_bytes(self, keys: tuple[Hashable, ...]) -> int:
        """Returns what graphs of a pass of these segments took that nobody foresaw."""
        return self._taken.get(keys, 0)

    def note_taken(self, keys: tuple[Hashable, ...], num_bytes: int) -> None:
        """Says how much that is: plans leave it from now on. Of passes that took some the last ones are remembered."""
        self._taken.pop(keys, None)
        if num_bytes:
            self._taken[keys] = num_bytes
        while len(self._taken) > MAX_PLANS:
            self._taken.popitem(last=False)

    def _make(
        self, weights: tuple[Tensor, ...], segments: Sequence[Segment], previous: Plan | None, operators: bool
    ) -> PassPlan:
        began_s = time.perf_counter()
        tape, plan, fit = self._fit(weights, segments, previous, operators)
        positions: dict[Hashable, tuple[int, ...]] = {}
        for position, segment in enumerate(segments):
            positions[segment.key] = (*positions.get(segment.key, ()), position)
        resident = sum(plan.bundles[placement.bundle].size_bytes for placement in plan.residents)
        logger.info(
            "planned %d steps in %.0f ms: %s of weights stay, %s are streamed each pass, %s are kept for activations",
            len(plan.steps),
            (time.perf_counter() - began_s) * 1e3,
            format_bytes(resident),
            format_bytes(plan.prediction.streamed_bytes),
            format_bytes(plan.activation_bytes),
        )
        return PassPlan(
            tape,
            plan,
            _stretches(tape, plan),
            positions,
            fit.reserve,
            operators,
            fit.workspace,
            fit.graph_bytes,
            fit.taken_bytes,
        )

    def _fit(
        self, weights: tuple[Tensor, ...], segments: Sequence[Segment], previous: Plan | None, operators: bool
    ) -> tuple[Tape, Plan, _Fit]:
        """Returns a tape of these segments, its plan, and what that leaves for others.

        What is only wished for, measured or guessed yields: room to grow first, then what operators missed, then
        recorded steps, then capture and what the allocator keeps, then workspace. What was taken, and may not be again,
        goes before all of them.
        """
        name, budget = f"pass of {len(segments)} segments", self._budget_bytes
        without_capture = budget - self._capture.share_of(budget) - self._allocator.share_of(budget)
        needed, wished = (self._room.needed_bytes, self._room.wished_bytes) if operators else (0, 0)
        keys = tuple(segment.key for segment in segments)
        slower = self._correction.slower(keys)
        missed = needed + self._room.missed_bytes if operators else 0
        attempts = [
            _Fit(reserve, without_capture, True, graph_bytes)
            for graph_bytes in (self._graph_bytes(), 0)
            for reserve in (wished, missed, needed)
        ]
        attempts += [_Fit(needed, budget, True, 0), _Fit(needed, budget, False, 0)]
        if taken := self.taken_bytes(keys):
            attempts = [fit._replace(limit=fit.limit - taken, taken_bytes=taken) for fit in attempts] + attempts
        refused: list[BudgetError] = []
        for fit in dict.fromkeys(attempts):
            tape = make_tape(
                name,
                weights,
                segments,
                fit.reserve,
                workspace=fit.workspace,
                gathers=self.gathers,
                slower=slower,
            )
            try:
                plan = self._plan(tape.trace, fit.limit - fit.graph_bytes, previous)
            except BudgetError as error:
                refused.append(error)
                continue
            if not fit.workspace:
                logger.warning(
                    "operators take workspace that does not fit the budget of %s: %s would hold it too; it is on top",
                    format_bytes(budget),
                    format_bytes(refused[-1].smallest_bytes),
                )
            return tape, plan, fit
        # Nothing is known yet of what operators allocate: keep what there is, and refuse once they hold more.
        spare = budget - (refused[-1].smallest_bytes - needed)
        if self._room.is_measured or not needed or spare < 0:
            raise refused[-1]
        self._room.settle_for(spare)
        tape = make_tape(name, weights, segments, spare, workspace=False, gathers=self.gathers, slower=slower)
        return tape, self._plan(tape.trace, budget, previous), _Fit(spare, budget, False, 0)


def _stretches(tape: Tape, plan: Plan) -> tuple[Stretch, ...]:
    step_of = [number for number, step in enumerate(plan.steps) for _ in range(step.first, step.end)]
    found = []
    for start, stop in itertools.pairwise((*tape.starts, len(tape.trace.steps))):
        steps = tuple(step_of[start:stop])
        assert plan.steps[steps[0]].first == start, "a plan step spans two segments"
        places = tuple(start + number - plan.steps[step].first for number, step in enumerate(steps))
        found.append(Stretch(steps, places, tape.handed[start:stop]))
    return tuple(found)
