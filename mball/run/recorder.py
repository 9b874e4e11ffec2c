"""Remembers when the steps, waits and reads of a pass ran; those of the last pass that ended well are kept.

[Note: cost] A step costs two looks at the clock and one tuple. Names and numbers are found by whoever takes the
timeline, so only what they are found by is kept.

[Note: reads across the end of a pass] A read belongs to the pass that asks for it, and to the next one too if it is
still under way when that begins. When it really began and ended only the device's event can say, if it does; else it
lasted from when it was asked for until a step had waited for it. The next pass therefore starts out with all reads that
nobody has waited for yet, and those that prove to have been over are left out when the timeline is taken.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from mball.memory import Event
from mball.schema import Bundle, Plan, Trace

# The plan step, or the weights of an operator that came unannounced; from; to.
Compute = tuple[int | tuple[int, ...], float, float]
# The place among the pass's computes of the one that waited; for what; from; to.
Stall = tuple[int, Bundle, float, float]


@dataclass(slots=True, eq=False)
class ReadRecord:
    """One copy of a bundle. All times are those of `time.perf_counter`.

    Attributes:
        event: until the copy has landed or was given up.
    """

    bundle: Bundle
    size_bytes: int
    asked_s: float
    event: Event | None
    began_s: float | None = None
    ended_s: float | None = None

    def settle(self) -> None:
        """Says that the copy is over, and lets its event go."""
        if self.event is not None:
            self.began_s, self.ended_s = self.times(time.perf_counter())
            self.event = None  # last: another thread that sees none finds the times

    def times(self, over_s: float) -> tuple[float, float]:
        """Returns when it began and ended; `over_s` stands for an end that nobody knows."""
        began_s, ended_s = self.began_s, self.ended_s
        if (event := self.event) is not None:
            began_s, ended_s = getattr(event, "began_s", None), getattr(event, "ended_s", None)
        if began_s is None:
            began_s = self.asked_s
        return began_s, max(began_s, over_s) if ended_s is None else ended_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRecord:
    """What ran in one pass.

    Attributes:
        reads: those asked for in the pass, after those that no step had waited for when it began.
        plans: the plans it ran under, each with the number of computes that were over when it was adopted.
    """

    began_s: float
    ended_s: float
    computes: list[Compute]
    stalls: list[Stall]
    reads: list[ReadRecord]
    plans: list[tuple[int, Trace, Plan]]


class Recorder:
    """Records one pass at a time.

    Attributes:
        last: the last pass that ended well.
    """

    def __init__(self) -> None:
        self.last: PassRecord | None = None
        self._began_s = 0.0
        self._step: int | tuple[int, ...] = -1
        self._entered_s = 0.0
        self._computes: list[Compute] = []
        self._stalls: list[Stall] = []
        self._reads: list[ReadRecord] = []
        self._plans: list[tuple[int, Trace, Plan]] = []

    def begin(self, began_s: float) -> None:
        """Begins a pass; what was recorded since the last one ended well is dropped."""
        self._began_s = began_s
        # New lists: those of the pass before may be the ones that are kept.
        self._computes, self._stalls = [], []
        self._reads = [read for read in self._reads if read.event is not None]
        self._plans = [(0, trace, plan) for _, trace, plan in self._plans[-1:]]

    def end(self, ended_s: float) -> None:
        """Keeps the pass: it ended well."""
        self.last = PassRecord(
            began_s=self._began_s,
            ended_s=ended_s,
            computes=self._computes,
            stalls=self._stalls,
            reads=list(self._reads),
            plans=list(self._plans),
        )
        # What comes before the next pass belongs to none: a new budget waits for reads that it gives up.
        self._computes, self._stalls = [], []

    def adopt(self, trace: Trace, plan: Plan) -> None:
        """Says that steps are numbered by this plan from now on."""
        self._plans.append((len(self._computes), trace, plan))

    def entered(self, step: int | tuple[int, ...]) -> None:
        """Says that a plan step, or an operator that reads these weights, has all it reads and computes now."""
        self._step = step
        self._entered_s = time.perf_counter()

    def left(self) -> None:
        """Says that it has computed."""
        self._computes.append((self._step, self._entered_s, time.perf_counter()))

    def stalled(self, bundle: Bundle, began_s: float, ended_s: float) -> None:
        """Says that the step that is being entered has waited for `bundle`."""
        self._stalls.append((len(self._computes), bundle, began_s, ended_s))

    def reading(self, bundle: Bundle, size_bytes: int, asked_s: float, event: Event) -> ReadRecord:
        """Says that a copy was asked for; then call its `settle` when it is over."""
        record = ReadRecord(bundle, size_bytes, asked_s, event)
        self._reads.append(record)
        return record
