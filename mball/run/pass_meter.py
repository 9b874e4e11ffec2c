"""What passes took, held against what was predicted of them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from mball.run.correction import Correction, Measured, Verdict, busy_s
from mball.run.execution import Execution
from mball.run.pass_plans import PassPlan
from mball.schema import Machine, Plan, Trace
from mball.units import format_bytes

logger = logging.getLogger(__name__)

# retime(trace, plan, machine, how many times longer compute takes) -> what a pass takes, in seconds
Retimer = Callable[[Trace, Plan, Machine, float], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassFacts:
    """What a pass took.

    Attributes:
        wall_s: from its begin to its end.
        stall_s: of that, how long steps waited for reads.
        bytes_read: what its reads brought.
        unplanned_fetches: bundles that a step read and the plan had not brought.
        in_place_bytes: of homes that something read which mball does not see.
        predicted_s: what it was expected to take; None if no plan was executed.
    """

    wall_s: float = 0.0
    stall_s: float = 0.0
    bytes_read: int = 0
    unplanned_fetches: int = 0
    in_place_bytes: int = 0
    predicted_s: float | None = None


class PassEnd(NamedTuple):
    """When a pass ended, in seconds of `time.perf_counter`, and the bytes of homes that were in memory then."""

    time_s: float
    touched_bytes: int


class PassMeter:
    """Measures one pass at a time, and says when what passes take calls for another plan.

    Args:
        execution: executes the passes.
        correction: what plans take the machine to be.
        retime: says what a pass takes under a plan, on a machine, if compute takes so many times as long.

    Attributes:
        passes: how many ended well.
        last: what the last of them took.
    """

    def __init__(self, execution: Execution, correction: Correction, retime: Retimer) -> None:
        self.passes = 0
        self.last = PassFacts()
        self._execution = execution
        self._correction = correction
        self._retime = retime
        self._began_s = 0.0
        self._before = replace(execution.counters)
        self._in_place_bytes = 0
        self._expected_s: float | None = None  # what a pass is predicted to take, as the last ones went

    def adopted(self, plan: Plan) -> None:
        """Says that passes run under this plan from now on."""
        self._expected_s = plan.prediction.pass_s
        self._correction.adopted()

    def begin(self) -> None:
        """Says that a pass begins now."""
        self._in_place_bytes = 0
        self._before = replace(self._execution.counters)
        self._began_s = time.perf_counter()
        self._execution.begin_pass(self._began_s)

    def note_in_place(self, touched_bytes: int) -> None:
        """Says that the open pass had so much of homes in memory; it was given back."""
        self._in_place_bytes += touched_bytes

    def end(self, ended: PassEnd) -> None:
        """Says that the open pass ended well, and when: `last` is what it took."""
        counters, before = self._execution.counters, self._before
        self.passes += 1
        self.last = PassFacts(
            wall_s=ended.time_s - self._began_s,
            stall_s=counters.stall_s - before.stall_s,
            bytes_read=counters.bytes_read - before.bytes_read,
            unplanned_fetches=counters.unplanned_fetches - before.unplanned_fetches,
            in_place_bytes=self._in_place_bytes + ended.touched_bytes,
            predicted_s=self._expected_s,
        )
        self._execution.recorder.end(ended.time_s)
        if self.last.in_place_bytes:
            logger.warning(
                "%s of weights were read in place during the pass, outside the budget: an operation that mball does "
                "not see reads them; the pages are given back at the next pass",
                format_bytes(self.last.in_place_bytes),
            )

    def calls_for_another_plan(self, planned: PassPlan) -> bool:
        """Compares the pass that has just ended, whose segments were those of `planned`, with what was predicted.

        Returns whether the plan should be made anew: the last passes took much more or less. Where they were off by
        less, only the prediction follows them.
        """
        record = self._execution.recorder.last
        if not self._execution.device.computes_at_once:  # the host is ahead of it, and its clock tells nothing
            return False
        if record is None or len(record.plans) > 1 or self.last.unplanned_fetches:
            return False
        # Each read counts in the pass in which it really ended.
        ended = [(read.times(math.inf), read.size_bytes) for read in record.reads]
        ended = [each for each in ended if record.began_s < each[0][1] <= record.ended_s]
        measured = Measured(
            wall_s=self.last.wall_s,
            compute_s=self.last.wall_s - self.last.stall_s,
            read_bytes=sum(size for _, size in ended),
            busy_s=busy_s(times for times, _ in ended),
        )
        assert self._expected_s is not None, "a plan is executed"
        tape, plan = planned.tape, planned.plan
        verdict = self._correction.note(tape.keys, plan.prediction, self._expected_s, measured)
        if verdict is Verdict.ANOTHER_TIME:
            self._expected_s = self._retime(tape.trace, plan, *self._correction.lately())
        return verdict is Verdict.ANOTHER_PLAN
