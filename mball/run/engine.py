"""Runs passes: knows which pass is coming, has it planned, and executes the plan step by step.

[Note: passes and segments]
A pass opens when a door is entered (the model or one of its modules is called) and closes when that call
returns. Within it come *segments*: captured graphs, whose steps are known before they run, and single
operators that read weights outside any graph. What comes after a segment is predicted from the last pass that began
with the same segment. A segment that was not predicted is the moment to change plans: no step is in use then.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch

from mball.errors import BudgetError, DeviceError, WrapError
from mball.memory import GpuLostError
from mball.memory.ledger import Kind, Ledger
from mball.run.activations import LiveBytes
from mball.run.allocator_room import AllocatorRoom
from mball.run.capture_cost import CaptureCost
from mball.run.correction import Correction
from mball.run.execution import Bound, Execution
from mball.run.homes import Home, HomeFile, Homes
from mball.run.more_room import MoreRoom, full, lost, refusal
from mball.run.operator_room import OperatorRoom
from mball.run.pass_meter import PassEnd, PassMeter, Retimer
from mball.run.pass_plans import PassPlan, PassPlans, Planner, Stretch
from mball.run.segments import OperatorReads, OperatorSegment, Segment
from mball.run.step_graphs import StepGraphs
from mball.schema import Plan, Trace

# A plan that keeps less for operators takes over when this part of the budget becomes free for weights.
WORTHWHILE_SHARE = 32


class Engine:
    """Executes passes over the homes of one or more modules under one budget.

    Holds no reference to the modules. Whoever runs a pass holds `lock` and `passing`, in this order, throughout.

    Args:
        homes: of all managed weights.
        execution: executes plans.
        ledger: the budget.
        plan: makes plans.
        retime: says what a pass takes under a plan, on a machine, if compute takes so many times as long.
        correction: what plans take the machine to be.
        fixed_bytes: bytes of buffers, and of what files pass through.
        memory_bytes_per_s: about how fast operators read weights, for those that were never timed.
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
        retime: Retimer,
        correction: Correction,
        fixed_bytes: int,
        memory_bytes_per_s: float,
        expected: Sequence[OperatorReads],
        verify_files: Callable[[], None],
    ) -> None:
        self.homes = homes
        self.execution = execution
        self.ledger = ledger
        self.fixed_bytes = fixed_bytes
        self._memory_bytes_per_s = memory_bytes_per_s
        self.live = LiveBytes(execution.device.place)
        self.meter = PassMeter(execution, correction, retime)
        self.num_steps = 0  # of the plan that ran last
        self.weights_read: set[int] = set()
        self.written_now: set[int] = set()
        self.weights = homes.schema()
        self.lock = threading.RLock()  # held throughout a pass: another thread waits for its end
        self.passing = threading.Lock()  # held while a pass is open
        self._segments: dict[Hashable, Segment] = {}
        self._next: dict[Hashable, tuple[Hashable, ...]] = {}
        self._active: PassPlan | None = None
        self._position = 0  # in the active tape: the segment expected next
        self._tape: list[Hashable] = []
        self.room = OperatorRoom(ledger.budget_bytes)
        self._stretch: Stretch | None = None  # of the graph that runs
        self._step = -1  # the plan step the graph is in
        self._handed: Bound = ()
        self._stale = False  # the active plan was made with less knowledge than there is now
        self._left_bytes: int | None = None  # of the arena, once operators of the open pass took some
        self.capture = CaptureCost(execution.device.gauge(), execution.arena)
        self.step_graphs: StepGraphs | None = None
        if (graphs := execution.device.graphs()) is not None:
            self.step_graphs = StepGraphs(
                graphs,
                catch_up=execution.catch_up,
                replan=self._plan_anew,
                is_slot=execution.arena.holds,
                budget_bytes=lambda: self.budget_bytes,
            )
        self.allocator = AllocatorRoom(execution.device, self.step_graphs)
        self.plans = PassPlans(
            plan,
            self.room,
            self.capture,
            self.allocator,
            correction,
            ledger.budget_bytes,
            lambda: self.step_graph_bytes,
        )
        self._more_room = MoreRoom(self.plans, self.room, self.allocator, self._planned)
        self._unclear = False  # a pass began and did not end
        self._collecting = False  # written homes are being found
        self._closed = False
        self._operator_step: int | None = None
        self._verify_files = verify_files
        self._expected: list[OperatorSegment] = []
        for number, reads in enumerate(expected):
            self._expected.append(self._operator(reads, f"module {number}"))

    # -- passes --------------------------------------------------------------------------------------------------

    @property
    def trace(self) -> Trace | None:
        """The trace of the pass that is planned now."""
        return self._active.tape.trace if self._active else None

    @property
    def place(self) -> torch.device:
        """Where steps compute."""
        return self.execution.device.place

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def in_pass(self) -> bool:
        """Whether a pass is open."""
        return self.passing.locked()

    def begin_pass(self, kind: Hashable = None) -> None:
        """Prepares a pass; `lock` and `passing` are held. Then call `end_pass`, or `recover` if the pass fails.

        Args:
            kind: equal for passes whose operators take about the same room.

        Raises:
            StorageError: written homes could not be saved; nothing is lost and the next pass tries again.
            CheckpointError: the checkpoint changed on disk.
        """
        if self._closed:
            raise WrapError("this model was unwrapped; wrap it again")
        if self._unclear:
            self.recover()
        self._unclear = True
        self._verify_files()
        self._notice_writes()
        if self.plans.gathers and not self.execution.rows.are_possible:
            self.plans.gathers = False
            self.plans.clear()
            self._stale = True
        self.room.begin_pass(kind)
        self._tape, self._left_bytes = [], None
        self.capture.abandon()
        self.allocator.begin()
        self.meter.begin()

    def continue_pass(self) -> None:
        """Goes on with the open pass after code that nobody watched: it may have read and written homes.

        Raises:
            StorageError: as `begin_pass`.
        """
        if self._closed:
            raise WrapError("this model was unwrapped; wrap it again")
        self.meter.note_in_place(self._touched_bytes())
        self._notice_writes()

    def _notice_writes(self) -> None:
        self._collecting = True
        self.execution.forget(self.homes.collect_writes())
        self._collecting = False
        self.written_now.clear()

    def _touched_bytes(self) -> int:
        return 0 if self.written_now else self.homes.touched_bytes()

    def adopt(self, homes: Sequence[Home], file: HomeFile) -> None:
        """Manages these weights too, after those that are there; no graph runs meanwhile. `lock` is held."""
        self.homes.add(homes, [file])
        self.weights = self.homes.schema()
        # A plan is over all weights, the new ones included.
        self.plans.clear()
        self._active = None

    def set_budget(self, budget_bytes: int) -> None:
        """Changes the budget between two passes: what both plans keep stays, and the rest is given back at once.

        `lock` is held, and no pass is open.

        Raises:
            BudgetError: a pass like those that ran does not fit; nothing was changed.
            DeviceError: the device has not so much memory; the budget is what it was.
        """
        if self._closed:
            raise WrapError("this model was unwrapped; wrap it again")
        if self._unclear:
            self.recover()
        before, booked = self.plans.state(), self.ledger.state()
        try:
            self.plans.set_budget(budget_bytes)
            known = dict.fromkeys(self._next.values())
            self.plans.check(self.weights, [[self._segments[key] for key in tape] for tape in known])
            if self.step_graphs is not None:
                self.step_graphs.forget()
            self.allocator.kept_bytes = 0  # it is measured anew
            planned = None
            if self._active is not None:
                with contextlib.suppress(BudgetError):  # then it has a substitute, or is of a pass that never ended
                    planned = self._planned(self._active.tape.keys)
            self._unclear = self._stale = True
            if planned is not None:
                self._adopt(planned)
            else:
                self._active = None
                self._give_all_back()
            self._unclear = self._stale = False
        except BaseException:
            self.plans.restore(before)
            self.ledger.restore(booked)
            raise

    def _give_all_back(self) -> None:
        self.execution.empty()
        self.allocator.lift()
        for kind in (Kind.ARENA, Kind.ACTIVATIONS, Kind.CAPTURE, Kind.GRAPHS, Kind.SCRATCH):
            self.ledger.set(kind, 0)
        self.ledger.set_budget(self.budget_bytes)

    @property
    def expected(self) -> list[OperatorReads]:
        """What each operator reads that was expected before anything ran."""
        return [segment.reads for segment in self._expected]

    @property
    def budget_bytes(self) -> int:
        """The budget that plans are made for."""
        return self.plans.budget_bytes

    def note_capture(self) -> None:
        """Says that a graph was captured: what that took shares the budget from now on."""
        self.capture.end()
        self._plan_anew()

    def _plan_anew(self) -> None:
        self.plans.clear()
        self._stale = True

    def end_pass(self, ended: PassEnd | None = None) -> None:
        """Ends a pass that went well, now or when `note_end` returned `ended`."""
        self._learn(ended or self.note_end())
        self._unclear = False

    def note_end(self) -> PassEnd:
        """Returns what `end_pass` takes should the pass turn out to end here."""
        return PassEnd(time.perf_counter(), self._touched_bytes())

    def recover(self) -> None:
        """Makes everything consistent after a pass that did not end well."""
        try:
            self.execution.abort()
        finally:
            self.allocator.lift()
        if self._active is None:
            self.execution.empty()
        if self._collecting:  # nobody knows any more which homes were written
            self.execution.forget(range(len(self.homes)))
            self._collecting = False
        if self._active is not None:
            self._note_taken()
        self.live.clear()
        self._position = 0
        self._stretch = None
        self._step = -1
        self._handed = ()
        self._unclear = False

    def _learn(self, ended: PassEnd) -> None:
        self.execution.claim(None)  # nothing is on offer between passes
        self._note_taken()
        self.meter.end(ended)
        active, tape = self._active, tuple(self._tape)
        if active is not None and tape == active.tape.keys and self.meter.calls_for_another_plan(active):
            self._plan_anew()
        peak = self.live.end_pass()
        has_operators = self._has_operators(tape)
        if has_operators:
            self.room.note_peak(peak)
        knows_all = active is not None and not self._stale and active.reserve >= self._reserve_of(active)
        if self.allocator.end(is_steady=knows_all):
            self.plans.clear()
            self._stale = True
        if tape:
            known = self._next.get(tape[0])
            # Another order of operators is tolerated while it costs little: plans for each would take turns.
            if known is None or not has_operators or self.meter.last.unplanned_fetches * 4 > len(tape):
                self._next[tape[0]] = tape

    # -- graphs --------------------------------------------------------------------------------------------------

    def start_graph(self, segment: Segment) -> None:
        """Says that a captured graph runs now; then call `enter` for each of its steps, and `finish`.

        Raises:
            BudgetError: the graph's steps do not fit the budget; nothing was changed.
        """
        self._segments[segment.key] = segment
        self._heed_taken()
        position = self._seek(segment.key)
        if position is None:
            position = self._replan(segment.key)
        assert self._active is not None
        self._stretch = self._active.stretches[position]
        self._step = -1
        self._position = position + 1
        self._tape.append(segment.key)
        self.weights_read.update(*self._stretch.handed)
        self.num_steps = len(self._active.plan.steps)

    def enter(self, step: int) -> tuple[torch.Tensor, ...]:
        """Returns the weights that the running graph's step `step` reads; see Execution.enter."""
        assert self._active is not None
        assert self._stretch is not None
        planned = self._stretch.steps[step]
        if planned != self._step:
            if self._step >= 0:
                self.execution.leave(self._step)
            if not self.execution.claim(planned):
                self._heed_taken()
                self._stretch = self._active.stretches[self._position - 1]
                planned = self._stretch.steps[step]
            self._step = planned
            self._handed = self.execution.enter(planned)
        return self._handed[self._stretch.places[step]]

    def expect_rows(self, step: int, place: int, indices: torch.Tensor) -> None:
        """Says which rows of the weight at `place` the running graph's step `step`, which was entered, looks up."""
        assert self._stretch is not None
        self.execution.rows.expect(self._stretch.handed[step][place], indices)

    def finish(self) -> None:
        """Ends the running graph."""
        if self._step >= 0:
            self.execution.leave(self._step)
        self._stretch = None
        self._step = -1
        self._handed = ()

    def forget_plans(self, keys: Iterable[Hashable]) -> None:
        """Says that more is known of these segments now: passes with them are planned anew when they come again."""
        forgotten = set(keys)
        self.plans.forget(forgotten)
        if self._active is not None and forgotten.intersection(self._active.tape.keys):
            self._stale = True

    # -- operators -----------------------------------------------------------------------------------------------

    def enter_operator(self, reads: OperatorReads, name: str) -> dict[int, torch.Tensor]:
        """Returns views of the weights that an operator outside any graph reads, by weight; then call `leave_operator`.

        Raises:
            BudgetError: these weights do not fit the budget beside the live activations.
        """
        key, weights = self._operator(reads, name).key, reads.weights
        self.room.note_live(self.live.current)
        self._heed_taken()
        position = self._seek(key)
        if position is None and self._must_replan(key, reads):
            position = self._replan(key)
        elif (
            position != self._position
            and self._tape
            and (reads.rows_bytes is not None or self.execution.holds(weights))
        ):
            # Going elsewhere in the plan, and back, would bring all that is read there.
            position = None
        assert self._active is not None
        step = None if position is None else self._active.stretches[position].steps[0]
        if not self.execution.claim(step):  # it was taken in this very moment
            return self.enter_operator(reads, name)
        self._tape.append(key)
        self.weights_read.update(weights)
        self.num_steps = len(self._active.plan.steps)
        if position is None:
            self._operator_step = None
            if reads.rows_bytes is not None:
                return {weights[0]: self.execution.look_up(weights[0])}
            return dict(zip(weights, self.execution.on_demand(weights), strict=True))
        assert step is not None
        self._position = position + 1
        self._operator_step = step
        (views,) = self.execution.enter(step)
        return dict(zip(weights, views, strict=True))

    def _must_replan(self, key: Hashable, reads: OperatorReads) -> bool:
        active = self._active
        if active is None or self.execution.is_short or active.reserve < self.room.needed_bytes:
            return True
        if not self._tape and (self._stale or key in self._next):
            return True
        if reads.rows_bytes is not None:
            return False
        return self.execution.smallest_region(reads.weights) > active.plan.arena_bytes

    def note_written(self, weights: Sequence[int]) -> None:
        """Says that an operator wrote to these homes: until the next pass begins they are read in place."""
        self.written_now.update(weights)

    def leave_operator(self) -> None:
        """Ends what `enter_operator` began."""
        if self._operator_step is None:
            self.execution.release()
        else:
            self.execution.leave(self._operator_step)

    def _operator(self, reads: OperatorReads, name: str) -> OperatorSegment:
        found = self._segments.get(reads.key)
        rows_bytes = reads.rows_bytes
        # Of lookups the largest so far is planned with.
        if isinstance(found, OperatorSegment) and (rows_bytes or 0) <= (found.reads.rows_bytes or 0):
            return found
        size_bytes = sum(self.weights[weight].size_bytes for weight in reads.weights)
        time_s = (size_bytes if rows_bytes is None else rows_bytes) / self._memory_bytes_per_s
        segment = self._segments[reads.key] = OperatorSegment(reads, name, time_s)
        return segment

    # -- plans ---------------------------------------------------------------------------------------------------

    def _seek(self, key: Hashable) -> int | None:
        """Returns where the active tape has segment `key`: as expected, else at the next place, else None."""
        active = self._active
        if active is None or self.execution.is_short:
            return None
        keys = active.tape.segments
        position = self._position if self._position < len(keys) else 0
        if active.has_operators and active.reserve < self.room.needed_bytes:
            return None
        if not self._tape:
            spare = active.reserve - self.room.wished_bytes if active.has_operators else 0
            if self._stale or spare > self.budget_bytes // WORTHWHILE_SHARE:
                return None
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
        predicted = self._predict(key)
        planned = self._planned(predicted)
        if self._tape and self._left_bytes is not None and planned.plan.arena_bytes > self._left_bytes:
            # Whoever took some has it still.
            smaller = self._more_room.at_most(predicted, self._left_bytes, self._has_operators(predicted))
            if smaller is None:
                raise lost(self.budget_bytes, self._left_bytes)
            planned = smaller
        self._adopt(planned)
        here = len(self._tape)
        return here if here < len(predicted) and predicted[here] == key else planned.positions[key][0]

    def _planned(self, keys: tuple[Hashable, ...]) -> PassPlan:
        return self.plans.of(self.weights, [self._segments[key] for key in keys], self.plan)

    def _adopt(self, planned: PassPlan) -> None:
        """Makes this the active plan; memory that it leaves over is given back."""
        plan, ledger = planned.plan, self.ledger
        if self.budget_bytes > ledger.budget_bytes:
            ledger.set_budget(self.budget_bytes)
        for kind in (Kind.ACTIVATIONS, Kind.CAPTURE, Kind.GRAPHS, Kind.SCRATCH):
            ledger.set(kind, 0)
        if self.step_graphs is not None:  # what has no room is given back before the arena grows
            self.step_graphs.grant(planned.graph_bytes)
        arena_bytes = self.execution.arena.bytes_of(plan.arena_bytes)
        beside_bytes = self.budget_bytes - planned.graph_bytes - plan.budget_bytes
        scratch_bytes = min(self.allocator.share_of(self.budget_bytes), beside_bytes - planned.taken_bytes)
        capture_bytes = beside_bytes - scratch_bytes - planned.taken_bytes
        ledger.set(Kind.ARENA, arena_bytes)
        ledger.set(Kind.ACTIVATIONS, plan.activation_bytes)
        ledger.set(Kind.GRAPHS, planned.graph_bytes)
        ledger.set(Kind.SCRATCH, scratch_bytes + planned.taken_bytes)
        ledger.set(Kind.CAPTURE, capture_bytes)
        self._active = None  # until the plan is adopted whole: `recover` sees by this what an interrupt left
        gathered = [{gather.tensor for gather in step.gathers} for step in planned.tape.trace.steps]
        self.execution.adopt(plan, planned.tape.handed, gathered)
        self.execution.recorder.adopt(planned.tape.trace, plan)
        self._active = planned
        self.allocator.adopt(
            (planned.tape.keys, planned.reserve),
            left_bytes=self.budget_bytes - arena_bytes - self.fixed_bytes - planned.graph_bytes - capture_bytes,
            planned_bytes=plan.activation_bytes,
            is_affordable=scratch_bytes == self.allocator.kept_bytes,
        )
        self.meter.adopted(plan)
        self._stale = False
        if self.budget_bytes < ledger.budget_bytes:
            ledger.set_budget(self.budget_bytes)

    def make_room(self, entered: tuple[int, int] | None) -> bool:
        """Has residents yield to an operator outside graphs that found no memory, and that will run again.

        Args:
            entered: what was `here` before `enter_operator`, if the operator reads weights and has left again.

        Returns whether there is more room now.
        """
        if self._active is None:
            return False
        self._note_taken()
        planned = self._more_room.plan(self._active, self.execution.left_bytes)
        if planned is None:
            return False
        if entered is not None:
            self._position = entered[0]
            del self._tape[entered[1] :]
        self.allocator.hold()
        self._adopt(planned)
        return True

    def _note_taken(self) -> PassPlan | None:
        """Plans with more room from now on if operators took memory of the arena; returns a plan for what is left.

        None where they took none; or where there is no such plan: between passes the arena grows again.
        """
        if not (self.execution.idle.has_lost or self.execution.is_short) or self.execution.claim(None):
            return None
        assert self._active is not None
        self._left_bytes, self._stale = self.execution.left_bytes, True
        return self._more_room.at_most(self._active.tape.keys, self._left_bytes, self._active.has_operators)

    def _heed_taken(self) -> None:
        """Goes on with a plan for what operators left of the arena, if they took some; no step is in use.

        Raises DeviceError: there is none.
        """
        if not self._tape:  # what the last pass lost was noted at its end, for passes of its kind
            return
        planned = self._note_taken()
        if self.execution.is_short:
            if planned is None:
                raise lost(self.budget_bytes, self.execution.left_bytes)
            self.allocator.hold()
            self._adopt(planned)

    @property
    def here(self) -> tuple[int, int]:
        """Where the pass is: what comes next in the active tape, and how much ran."""
        return self._position, len(self._tape)

    def refused(self, error: torch.OutOfMemoryError) -> DeviceError:
        """Returns what to raise where a pass found no memory and has ended; the next one is planned with more room."""
        arena_bytes = self.execution.arena.taken_bytes
        if not self.allocator.was_capped:
            return full(error, self.budget_bytes, arena_bytes)
        self.allocator.forget()
        active = self._active
        has_more = active is not None and self._more_room.plan(active, self.execution.left_bytes) is not None
        self._stale |= has_more
        return refusal(error, self.budget_bytes, arena_bytes, self.allocator.left_bytes, has_more=has_more)

    def _reserve_of(self, planned: PassPlan) -> int:
        return self.room.needed_bytes if planned.has_operators else 0

    def _predict(self, key: Hashable) -> tuple[Hashable, ...]:
        """Returns the whole pass that segment `key` is expected to belong to."""
        if isinstance(self._segments[key], OperatorSegment) and key not in self._next:
            expected = tuple(segment.key for segment in self._expected)
            return expected if key in expected else (*expected, key)
        if not self._tape:
            return self._next.get(key, (key,))
        # What ran so far, this, and what followed last time, if it was the same graph at other sizes.
        here = len(self._tape)
        known = self._next.get(self._tape[0], ())
        alike = here < len(known) and self._segments[known[here]].family == self._segments[key].family
        return (*self._tape, key, *(known[here + 1 :] if alike else ()))

    def _has_operators(self, keys: Iterable[Hashable]) -> bool:
        return any(isinstance(self._segments[key], OperatorSegment) for key in keys)

    def fits(self, segment: Segment) -> bool:
        """Returns whether a pass of this segment alone fits the budget, with what its operators allocate inside."""
        return self.plans.fits(self.weights, segment)

    @property
    def workspace_fits(self) -> bool:
        """Whether the plan has room for what operators allocate inside."""
        return self._active is None or self._active.workspace_fits

    @property
    def step_graph_bytes(self) -> int:
        """What is held for recorded steps, or will be once a plan leaves room for it."""
        return 0 if self.step_graphs is None else self.step_graphs.wanted_bytes

    @property
    def plan(self) -> Plan | None:
        """The plan that is executed now."""
        return self._active.plan if self._active else None

    def close(self) -> None:
        """Stops transfers and frees the arena. Idempotent."""
        if not self._closed:
            self._closed = True
            try:
                with contextlib.suppress(GpuLostError):  # `execution.close` says what that means
                    if self.step_graphs is not None:
                        self.step_graphs.forget()
            finally:
                try:
                    self.execution.close()
                finally:
                    self.homes.close()
