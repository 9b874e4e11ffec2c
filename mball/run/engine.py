"""Runs passes: knows which pass is coming, has it planned, and executes the plan step by step.

[Note: passes and segments]
A pass opens when a door is entered (the model or one of its modules is called) and closes when that call
returns. Within it come *segments*: captured graphs, whose steps are known before they run, and single
operators that read weights outside any graph. What comes after a segment is predicted from the last pass that began
with the same segment. A segment that was not predicted is the moment to change plans: no step is in use then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from mball.errors import BudgetError, WrapError
from mball.memory.ledger import Kind, Ledger
from mball.run.activations import LiveBytes
from mball.run.execution import Execution
from mball.run.homes import PAGE_BYTES, Homes
from mball.run.segments import OperatorSegment, Segment, Tape, make_tape
from mball.schema import Plan, Trace
from mball.units import format_bytes

logger = logging.getLogger(__name__)

MAX_PLANS = 32

# plan(trace, budget_bytes) -> Plan; raises BudgetError
Planner = Callable[[Trace, int], Plan]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Where a segment's steps lie in the plan: plan steps `[first, end)`, and the trace steps each of them runs."""

    first: int
    end: int
    cuts: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Planned:
    """A plan for a tape."""

    tape: Tape
    plan: Plan
    stretches: tuple[Stretch, ...]
    bound: tuple[tuple[int, ...], ...]
    positions: dict[Hashable, tuple[int, ...]]
    reserve: int
    has_operators: bool


@dataclass(slots=True)
class PassFacts:
    """What the last pass took."""

    wall_s: float = 0.0
    stall_s: float = 0.0
    bytes_read: int = 0
    unplanned_fetches: int = 0
    segments: int = 0
    steps: int = 0
    in_place_bytes: int = 0


class Engine:
    """Executes passes over the homes of one or more modules under one budget.

    Holds no reference to the modules. All methods but `begin_pass` must be called by the thread that
    began the pass; a pass that another thread runs is waited for.

    Args:
        homes: of all managed weights.
        execution: executes plans.
        ledger: the budget.
        plan: makes plans.
        fixed_bytes: bytes of buffers.
        expected: the operators that are expected before anything ran, in order.
        verify_files: raises when a checkpoint changed on disk; called before each pass.
    """

    def __init__(
        self,
        *,
        homes: Homes,
        execution: Execution,
        ledger: Ledger,
        plan: Planner,
        fixed_bytes: int,
        expected: Sequence[tuple[int, ...]],
        verify_files: Callable[[], None],
    ) -> None:
        self.homes = homes
        self.execution = execution
        self.ledger = ledger
        self.fixed_bytes = fixed_bytes
        self.live = LiveBytes()
        self.last = PassFacts()
        self.passes = 0
        self.weights_read: set[int] = set()
        self.written_now: set[int] = set()
        self.weights = homes.schema()
        self._plan = plan
        self._lock = threading.RLock()
        self._segments: dict[Hashable, Segment] = {}
        self._plans: OrderedDict[tuple[tuple[Hashable, ...], int], _Planned] = OrderedDict()
        self._next: dict[Hashable, tuple[Hashable, ...]] = {}
        self._active: _Planned | None = None
        self._position = 0  # in the active tape: the segment expected next
        self._tape: list[Hashable] = []
        self._operator_bytes: int | None = None  # None: never measured
        self._base = 0
        self._began_s = 0.0
        self._before = PassFacts()
        self._in_pass = False
        self._needs_abort = False
        self._closed = False
        self._operator_step: int | None = None
        self._verify_files = verify_files
        self._expected: list[OperatorSegment] = []
        for number, weights in enumerate(expected):
            self._expected.append(self._operator(tuple(sorted(weights)), f"module {number}"))

    # -- passes --------------------------------------------------------------------------------------------------

    @property
    def trace(self) -> Trace | None:
        """The trace of the pass that is planned now."""
        return self._active.tape.trace if self._active else None

    @property
    def in_pass(self) -> bool:
        """Whether a pass is open."""
        return self._in_pass

    def begin_pass(self) -> bool:
        """Begins a pass unless this thread is in one already; returns whether it did. Waits for other threads.

        Raises:
            StorageError: written homes could not be saved; nothing is lost and the next pass tries again.
            CheckpointError: the checkpoint changed on disk.
        """
        self._lock.acquire()
        if self._in_pass:
            self._lock.release()
            return False
        try:
            self._prepare()
        except BaseException:
            self._lock.release()
            raise
        self._in_pass = True
        return True

    def _prepare(self) -> None:
        if self._closed:
            raise WrapError("this model was unwrapped; wrap it again")
        if self._needs_abort:
            self._recover()
        self._verify_files()
        self.execution.forget(self.homes.collect_writes())
        self.written_now.clear()
        self._tape = []
        counters = self.execution.counters
        self._before = PassFacts(
            stall_s=counters.stall_s, bytes_read=counters.bytes_read, unplanned_fetches=counters.unplanned_fetches
        )
        self._began_s = time.perf_counter()

    def end_pass(self, *, failed: bool) -> None:
        """Ends the pass that `begin_pass` began."""
        try:
            self._in_pass = False
            if failed:
                self._needs_abort = True
                self._recover()
            else:
                self._learn()
        finally:
            self._lock.release()

    def _recover(self) -> None:
        self.execution.abort()
        self.live.clear()
        self._position = 0
        self._needs_abort = False

    def _learn(self) -> None:
        counters, before = self.execution.counters, self._before
        self.passes += 1
        self.last = PassFacts(
            wall_s=time.perf_counter() - self._began_s,
            stall_s=counters.stall_s - before.stall_s,
            bytes_read=counters.bytes_read - before.bytes_read,
            unplanned_fetches=counters.unplanned_fetches - before.unplanned_fetches,
            segments=len(self._tape),
            steps=self.last.steps,
            in_place_bytes=0 if self.written_now else self.homes.touched_bytes(),
        )
        if self.last.in_place_bytes:
            logger.warning(
                "%s of weights were read in place during the pass, outside the budget: an operation that mball does "
                "not see reads them; the pages are given back at the next pass",
                format_bytes(self.last.in_place_bytes),
            )
        peak = self.live.end_pass()
        if any(isinstance(self._segments[key], OperatorSegment) for key in self._tape):
            self._operator_bytes = max(self._operator_bytes or 0, _bucket(peak))
        if self._tape:
            tape = tuple(self._tape)
            known = self._next.get(tape[0])
            if known is None or (known != tape and self.last.unplanned_fetches * 4 > len(tape)):
                self._next[tape[0]] = tape

    # -- graphs --------------------------------------------------------------------------------------------------

    def start_graph(self, segment: Segment) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, ...], ...]]:
        """Says that a captured graph runs now; returns its cuts and the weights that each step binds.

        Raises:
            BudgetError: the graph's steps do not fit the budget; nothing was changed.
        """
        self._segments[segment.key] = segment
        position = self._seek(segment.key)
        if position is None:
            position = self._replan(segment.key)
        assert self._active is not None
        stretch = self._active.stretches[position]
        self._base = stretch.first
        self._position = position + 1
        self._tape.append(segment.key)
        bound = self._active.bound[stretch.first : stretch.end]
        for weights in bound:
            self.weights_read.update(weights)
        self.last.steps = len(self._active.plan.steps)
        return stretch.cuts, bound

    def enter(self, step: int) -> tuple[torch.Tensor, ...]:
        """Returns the weights of the running graph's plan step `step`; see Execution.enter."""
        return self.execution.enter(self._base + step)

    def leave(self, step: int) -> None:
        """See Execution.leave."""
        self.execution.leave(self._base + step)

    # -- operators -----------------------------------------------------------------------------------------------

    def enter_operator(self, weights: tuple[int, ...], name: str) -> dict[int, torch.Tensor]:
        """Returns views of the weights that an operator outside any graph reads, by weight; then call `leave_operator`.

        Raises:
            BudgetError: these weights do not fit the budget beside the live activations.
        """
        key = tuple(sorted(set(weights)))
        self._operator(key, name)
        if self.live.current > self._reserve():
            self._operator_bytes = _bucket(self.live.current)
        position = self._seek(key)
        if position is None and self._must_replan(key):
            position = self._replan(key)
        assert self._active is not None
        self._tape.append(key)
        self.weights_read.update(key)
        self.last.steps = len(self._active.plan.steps)
        if position is None:
            self._operator_step = None
            return dict(zip(key, self.execution.on_demand(key), strict=True))
        self._position = position + 1
        self._operator_step = self._active.stretches[position].first
        views = self.execution.enter(self._operator_step)
        return dict(zip(self._active.bound[self._operator_step], views, strict=True))

    def _must_replan(self, key: tuple[int, ...]) -> bool:
        active = self._active
        if active is None or active.reserve < self._reserve() or (not self._tape and key in self._next):
            return True
        return self.execution.smallest_region(key) > active.plan.arena_bytes

    def note_written(self, weights: Sequence[int]) -> None:
        """Says that an operator wrote to these homes: until the next pass begins they are read in place."""
        self.written_now.update(weights)

    def leave_operator(self) -> None:
        """Ends what `enter_operator` began."""
        if self._operator_step is None:
            self.execution.release()
        else:
            self.execution.leave(self._operator_step)

    def _operator(self, weights: tuple[int, ...], name: str) -> OperatorSegment:
        found = self._segments.get(weights)
        if isinstance(found, OperatorSegment):
            return found
        time_s = sum(self.weights[weight].size_bytes for weight in weights) / 8e9
        segment = self._segments[weights] = OperatorSegment(weights, name, time_s)
        return segment

    def _reserve(self) -> int:
        """Returns the bytes that are kept free for what operators outside graphs allocate."""
        if self._operator_bytes is not None:
            return self._operator_bytes
        return self.ledger.budget_bytes // 8

    # -- plans ---------------------------------------------------------------------------------------------------

    def _seek(self, key: Hashable) -> int | None:
        """Returns where the active tape has segment `key`: as expected, else at the next place, else None."""
        active = self._active
        if active is None:
            return None
        keys = active.tape.segments
        position = self._position if self._position < len(keys) else 0
        if active.has_operators and active.reserve < self._reserve():
            return None
        if not self._tape:
            # A new pass: go on with the active plan only if this pass is the one it was made for.
            predicted = self._next.get(key)
            if predicted is not None and predicted != active.tape.keys:
                return None
            if predicted is not None:
                position = 0
        if keys[position].key == key:
            return position
        places = active.positions.get(key)
        if places is None:
            return None
        return next((place for place in places if place >= position), places[0])

    def _replan(self, key: Hashable) -> int:
        """Adopts a plan for the pass that is expected to go on with segment `key`; returns the segment's position."""
        predicted = self._next.get(key, (key,))
        if isinstance(self._segments[key], OperatorSegment) and key not in self._next:
            expected = tuple(segment.key for segment in self._expected)
            predicted = expected if key in expected else (*expected, key)
        operators = any(isinstance(self._segments[other], OperatorSegment) for other in predicted)
        reserve = self._reserve() if operators else 0
        planned = self._plans.get((predicted, reserve))
        if planned is None:
            planned = self._make(predicted, reserve, operators)
            self._plans[(predicted, reserve)] = planned
            if len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)
        plan = planned.plan
        self.ledger.set(Kind.ACTIVATIONS, 0)
        self.ledger.set(Kind.ARENA, plan.arena_bytes)
        self.ledger.set(Kind.ACTIVATIONS, plan.activation_bytes)
        self.execution.adopt(plan, planned.bound)
        self._active = planned
        return planned.positions[key][0]

    def _make(self, keys: tuple[Hashable, ...], reserve: int, operators: bool) -> _Planned:
        began_s = time.perf_counter()
        segments = [self._segments[key] for key in keys]
        budget = self.ledger.budget_bytes
        tape = make_tape(f"pass of {len(segments)} segments", self.weights, segments, reserve)
        try:
            plan = self._plan(tape.trace, budget)
        except BudgetError as error:
            if self._operator_bytes is not None or not reserve:
                raise
            # Nothing is known yet of what operators allocate: keep what there is.
            spare = budget - (error.smallest_bytes - reserve)
            if spare < 0:
                raise
            tape = make_tape(f"pass of {len(segments)} segments", self.weights, segments, spare)
            plan = self._plan(tape.trace, budget)
        stretches = _stretches(tape, plan)
        bound = tuple(
            tuple(dict.fromkeys(w for step in tape.trace.steps[s.first : s.end] for w in step.reads))
            for s in plan.steps
        )
        positions: dict[Hashable, tuple[int, ...]] = {}
        for position, key in enumerate(keys):
            positions[key] = (*positions.get(key, ()), position)
        resident = sum(plan.bundles[placement.bundle].size_bytes for placement in plan.residents)
        logger.info(
            "planned %d steps in %.0f ms: %s of weights stay, %s are streamed each pass, %s are kept for activations",
            len(plan.steps),
            (time.perf_counter() - began_s) * 1e3,
            format_bytes(resident),
            format_bytes(plan.prediction.streamed_bytes),
            format_bytes(plan.activation_bytes),
        )
        return _Planned(tape, plan, stretches, bound, positions, reserve, operators)

    @property
    def plan(self) -> Plan | None:
        """The plan that is executed now."""
        return self._active.plan if self._active else None

    def close(self) -> None:
        """Stops transfers and frees the arena. Idempotent."""
        if not self._closed:
            self._closed = True
            self.execution.close()
            self.homes.close()


def _stretches(tape: Tape, plan: Plan) -> tuple[Stretch, ...]:
    found = []
    step = 0
    for number, start in enumerate(tape.starts):
        stop = tape.starts[number + 1] if number + 1 < len(tape.starts) else len(tape.trace.steps)
        first = step
        while step < len(plan.steps) and plan.steps[step].end <= stop:
            step += 1
        cuts = tuple((s.first - start, s.end - start) for s in plan.steps[first:step])
        assert (cuts[0][0], cuts[-1][1]) == (0, stop - start)
        found.append(Stretch(first, step, cuts))
    return tuple(found)


def _bucket(size_bytes: int) -> int:
    """Rounds up so that small changes do not lead to new plans: to 1/8 of the power of two below, a page at least."""
    grain = max(PAGE_BYTES, 1 << max(size_bytes.bit_length() - 4, 0))
    return -(-size_bytes // grain) * grain
