"""What the engine executes: a `Plan`. It decides everything; the engine decides nothing.

All offsets within the arena are multiples of the machine's page. Step indices are the plan's own:
a plan step runs one or more consecutive trace steps of one graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mball.errors import SchemaError
from mball.schema.document import Document

PLAN_VERSION = 3


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
        tensors: indices of trace tensors: those with a home, or one that is born in the pass.
        offsets_bytes: where in the slot each of those tensors begins.
        extents: the reads that fill the slot; none for a tensor that is born in the pass.
        size_bytes: the slot's size, a multiple of the page.
    """

    tensors: tuple[int, ...]
    offsets_bytes: tuple[int, ...]
    extents: tuple[Extent, ...]
    size_bytes: int

    @property
    def moved_bytes(self) -> int:
        """What one transfer moves: what is read, or the slot of a tensor that was offloaded."""
        if len(self.extents) == 1:
            return self.extents[0].size_bytes
        return sum(extent.size_bytes for extent in self.extents) if self.extents else self.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanStep:
    """Runs the trace steps `[first, end)`, all on one lane; all bundles in `reads` are present throughout.

    One on the host lane reads none: it uses what lies below, and waits for the last write of that before it.
    """

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

    The bundle is first read there in step `needed_by` and last read in step `last_use` (both inclusive). The transfer
    may start as soon as step `after` has been left. Steps count from the pass that `needed_by` lies in: `after` is -1
    for the last step of the pass before and `-len(steps)` for its first, and `last_use` may lie in the pass after.
    `needed_by` lies in `[0, len(steps))`, `after` before it, and a slot is held for one pass at most.

    A step on the host lane counts as left as soon as the steps on the device before it have been.

    Attributes:
        after_host: where steps on the host lane write the bundle, or bear it, the last that does before the transfer,
            counted as `after` is: it must have ended too. None if there is none.
    """

    bundle: int
    offset_bytes: int
    after: int
    needed_by: int
    last_use: int
    after_host: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """The place in the arena of a tensor that is made there: in the step that bears it, or anew in one that reads it.

    It is there from step `step` to step `last_use`, both inclusive and of one pass.
    """

    bundle: int
    offset_bytes: int
    step: int
    last_use: int
    is_anew: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Offload:
    """Writes to the tier below what is born in the pass, or what steps have changed of a bundle with a home.

    It may start once step `after` has run, and step `until` is left only when it is done. The slot is held until then,
    or until the bundle's last use there if that comes later. Steps count from the pass of `after`: `until` may lie in
    the pass after, less than a pass away. Where steps on the host lane use what lies below, it starts only after the
    last of them that comes before step `after` has ended.

    Step `until` and those before it that look up rows of a changed bundle find them in the slot: its home has them only
    when the write is done.
    """

    bundle: int
    offset_bytes: int
    after: int
    until: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTransfer:
    """Brings a bundle from disk to `offset_bytes` of the host arena, once a pass.

    What steps are to a `Transfer`, copies are to it: copy i is the i-th transfer of the plan to the device. Copy
    `needed_by` is the first that takes the bundle from there and `last_use` the last (both inclusive). The transfer may
    start as soon as copy `after` has ended. Copies count from the pass that `needed_by` lies in: `after` is -1 for the
    last copy of the pass before and `-len(transfers)` for its first, and `last_use` may lie in the pass after. A slot
    is held for one pass at most.
    """

    bundle: int
    offset_bytes: int
    after: int
    needed_by: int
    last_use: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPlan:
    """What host memory holds of bundles whose home is below it, on disk.

    Transfers of the plan copy from host memory to the device, one after another in their order, pass after pass. What
    they copy is in host memory for good, if its bundle is among `residents`, or was brought there by one of
    `transfers`, for which the copy waits. A bundle without extents needs no slot here: it is empty, or was offloaded.

    Attributes:
        budget_bytes: the cap of host memory: `arena_bytes + offloaded_bytes <= budget_bytes`.
        arena_bytes: bytes of it that slots use.
        residents: bundles that stay in host memory.
        transfers: from disk, in the order they are issued; sorted by (after, needed_by).
        offloaded_bytes: bytes of it that are set aside for offloaded tensors: the most of them at one time.
    """

    budget_bytes: int
    arena_bytes: int
    residents: tuple[Placement, ...]
    transfers: tuple[HostTransfer, ...]
    offloaded_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What `simulate` says of one steady pass, or of the only one.

    Attributes:
        compute_s: of the steps on the device, the rows that they wait for included.
        stall_s: how long the device waits.
        streamed_bytes: what comes into the device, rows included.
        roofline_s: the time of the busiest lane of work or link if it never waits.
        host_s: of the steps on the host lane.
        written_bytes: what leaves the device.
    """

    pass_s: float
    compute_s: float
    stall_s: float
    streamed_bytes: int
    roofline_s: float
    host_s: float = 0.0
    written_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Document):
    """Residency, slots and the order of transfers of one pass under one budget.

    Attributes:
        budget_bytes: the cap: `fixed_bytes + activation_bytes + arena_bytes <= budget_bytes`.
        fixed_bytes: device memory that never moves (buffers).
        activation_bytes: the largest need of any step for what is born in the pass and has no bundle.
        arena_bytes: bytes of the arena that slots use.
        bundles: a partition of the tensors with a home, used in this pass or not; then those born in the pass that the
            plan finds places for, each its own.
        transfers: in the order they are issued; sorted by (after, needed_by).
        made: where tensors born in the pass are made.
        offloads: in the order they are issued; sorted by (after, until).
        host: what host memory holds, if homes are below it; None if bundles come to the device from their homes.
        offload_budget_bytes: the cap of what offloaded tensors take below at one time; None if there is none, or if
            they share the budget of host memory.
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
    made: tuple[Made, ...] = ()
    offloads: tuple[Offload, ...] = ()
    host: HostPlan | None = None
    offload_budget_bytes: int | None = None
    version: int = PLAN_VERSION

    def below(self) -> Plan:
        """Returns what host memory does as a plan of its own, with a step for each copy; for plans with a host part."""
        host = self.host
        assert host is not None, "asked only of plans with a host part"
        return replace(
            self,
            budget_bytes=host.budget_bytes,
            fixed_bytes=0,
            activation_bytes=0,
            arena_bytes=host.arena_bytes,
            steps=tuple(
                PlanStep(
                    first=number, end=number + 1, reads=(copy.bundle,) if self.bundles[copy.bundle].extents else ()
                )
                for number, copy in enumerate(self.transfers)
            ),
            residents=host.residents,
            transfers=tuple(
                Transfer(
                    bundle=each.bundle,
                    offset_bytes=each.offset_bytes,
                    after=each.after,
                    needed_by=each.needed_by,
                    last_use=each.last_use,
                )
                for each in host.transfers
            ),
            made=(),
            offloads=(),
            host=None,
        )

    def check(self) -> None:
        """Raises SchemaError when an index points nowhere; `mball.plan.validate` proves the rest."""
        if self.version != PLAN_VERSION:
            raise SchemaError(
                f"plan for {self.trace_name!r} has version {self.version}; this mball reads {PLAN_VERSION}"
            )
        used = [read for step in self.steps for read in step.reads]
        used += [placement.bundle for placement in self.residents]
        used += [transfer.bundle for transfer in self.transfers]
        used += [made.bundle for made in self.made] + [offload.bundle for offload in self.offloads]
        if self.host is not None:
            used += [placement.bundle for placement in self.host.residents]
            used += [transfer.bundle for transfer in self.host.transfers]
        for bundle in used:
            if not 0 <= bundle < len(self.bundles):
                raise SchemaError(f"plan for {self.trace_name!r} names bundle {bundle} of {len(self.bundles)}")
