"""What the engine executes: a `Plan`. It decides everything; the engine decides nothing.

All offsets within the arena are multiples of the machine's page. Step indices are the plan's own:
a plan step runs one or more consecutive trace steps of one graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from mball.errors import SchemaError
from mball.schema.document import Document
from mball.schema.machine import Tier

PLAN_VERSION = 2


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
    """Tensors that are used together and move together.

    Attributes:
        tensors: indices of trace tensors: some that have a home, or a single one that has none.
        offsets_bytes: where in the slot each of those tensors begins.
        extents: the reads that fill the slot; none without a home.
        size_bytes: the slot's size, a multiple of the page.
    """

    tensors: tuple[int, ...]
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
    """A resident bundle and the offset it keeps: in the arena, or in host memory as a copy to stream from."""

    bundle: int
    offset_bytes: int
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Copies a bundle to `offset_bytes` of another tier, once a pass.

    Into the device, the bundle is first read there in step `needed_by` and last read in step `last_use` (both
    inclusive). Into a tier below, it has arrived before step `needed_by` is entered, and its place there is held until
    step `last_use` has been left: by then it is back, or was read where it is.

    The transfer may start as soon as step `after` has been left. Steps count from the pass that `needed_by` lies in:
    `after` is -1 for the last step of the pass before and `-len(steps)` for its first, and `last_use` may lie in the
    pass after. `needed_by` lies in `[0, len(steps))`, `after` before it, and a place is held for one pass at most.
    """

    bundle: int
    offset_bytes: int
    after: int
    needed_by: int
    last_use: int
    source: Tier = Tier.DISK
    target: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompute:
    """A tensor is dropped once step `after` has been left, and computed again right before step `needed_by`."""

    tensor: int
    after: int
    needed_by: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepForecast:
    """What is expected of a plan step in a steady pass.

    Attributes:
        start_s, end_s: from the start of the pass.
        stall_s: how long it has waited before it starts.
        device_bytes: fixed memory, residents, slots in use or being filled, what is born in the pass, and scratch.
        host_bytes: the copies in host memory.
        disk_bytes: what was written to disk and is still needed.
    """

    start_s: float
    end_s: float
    stall_s: float
    device_bytes: int
    host_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What `simulate` says of one steady pass, or of the only one.

    Attributes:
        streamed_bytes: what comes into the device.
        roofline_s: the time of the busiest lane of work or link if it never waits.
    """

    pass_s: float
    compute_s: float
    stall_s: float
    streamed_bytes: int
    roofline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """The caps, in bytes. None: there is no such tier for the plan to use."""

    device_bytes: int
    host_bytes: int | None = None
    disk_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Document):
    """Residency, slots and the order of transfers of one pass under a budget for each tier.

    Attributes:
        budget_bytes: the device's cap: `fixed_bytes + activation_bytes + arena_bytes <= budget_bytes`.
        fixed_bytes: device memory that never moves (buffers).
        activation_bytes: the largest need of any step for what is born in the pass and is on the device outside slots.
        arena_bytes: bytes of the arena that slots use.
        bundles: a partition of the tensors with a home, used in this pass or not, and a bundle for each tensor without
            one that moves.
        transfers: in the order they are issued; sorted by (after, needed_by).
        gathered: tensors whose rows are read from their home wherever a step gathers.
        recomputes: what is dropped and computed again.
        host_budget_bytes, host_bytes: the cap of host memory, and the bytes of its pool that copies use.
        disk_budget_bytes, disk_bytes: the same of what is written to disk.
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
    gathered: tuple[int, ...] = ()
    recomputes: tuple[Recompute, ...] = ()
    host_budget_bytes: int | None = None
    host_bytes: int = 0
    disk_budget_bytes: int | None = None
    disk_bytes: int = 0
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
