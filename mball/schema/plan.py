"""What the engine executes: a `Plan`. It decides everything; the engine decides nothing.

All offsets within the arena are multiples of the machine's page. Step indices are the plan's own:
a plan step runs one or more consecutive trace steps of one graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from mball.errors import SchemaError
from mball.schema.document import Document

PLAN_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """One contiguous, aligned read: `[offset, offset + size)` of `file` to `slot_offset_bytes` of the slot.

    The last extent of a file may end past the end of that file; the reader stops there.
    """

    file: str
    offset_bytes: int
    size_bytes: int
    slot_offset_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Weights that are used together and move together.

    Attributes:
        weights: indices of trace weights.
        offsets_bytes: where in the slot each of those weights begins.
        extents: the reads that fill the slot.
        size_bytes: the slot's size, a multiple of the page.
    """

    weights: tuple[int, ...]
    offsets_bytes: tuple[int, ...]
    extents: tuple[Extent, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanStep:
    """Runs the trace steps `[first, end)`; all bundles in `reads` are present throughout."""

    first: int
    end: int
    reads: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A resident bundle and the arena offset it keeps."""

    bundle: int
    offset_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Brings a streamed bundle to `offset_bytes` of the arena, once a pass.

    The bundle is first read there in step `needed_by`, last read in step `last_use` (both inclusive, of the
    same pass). The transfer may start as soon as step `after` has been left. `after` counts relative to
    the pass that reads: -1 is the last step of the pass before, -len(steps) its first; it lies in
    `[-len(steps), needed_by)`.
    """

    bundle: int
    offset_bytes: int
    after: int
    needed_by: int
    last_use: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What `simulate` says of one steady pass."""

    pass_s: float
    compute_s: float
    stall_s: float
    streamed_bytes: int
    roofline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Document):
    """Residency, slots and the order of transfers of one cyclic pass under one budget.

    Attributes:
        budget_bytes: the cap: `fixed_bytes + activation_bytes + arena_bytes <= budget_bytes`.
        fixed_bytes: device memory that never moves (buffers).
        activation_bytes: the largest activation need of any step.
        arena_bytes: bytes of the arena that slots use.
        bundles: a partition of all weights of the trace, read in this pass or not.
        transfers: in the order they are issued; sorted by (after, needed_by).
    """

    trace_name: str
    budget_bytes: int
    fixed_bytes: int
    activation_bytes: int
    arena_bytes: int
    bundles: tuple[Bundle, ...]
    steps: tuple[PlanStep, ...]
    residents: tuple[Placement, ...]
    transfers: tuple[Transfer, ...]
    prediction: Prediction
    version: int = PLAN_VERSION

    def check(self) -> None:
        """Raises SchemaError when an index points nowhere; `mball.plan.validate` proves the rest."""
        if self.version != PLAN_VERSION:
            raise SchemaError(
                f"plan for {self.trace_name!r} has version {self.version}; this mball reads {PLAN_VERSION}"
            )
        used = [read for step in self.steps for read in step.reads]
        used += [placement.bundle for placement in self.residents]
        used += [transfer.bundle for transfer in self.transfers]
        for bundle in used:
            if not 0 <= bundle < len(self.bundles):
                raise SchemaError(f"plan for {self.trace_name!r} names bundle {bundle} of {len(self.bundles)}")
