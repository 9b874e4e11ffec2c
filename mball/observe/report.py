"""What a wrapped model holds, moves and takes, as numbers and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mball.observe.reconcile import Reconciliation
from mball.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """What host memory holds of weights on their way to a GPU, where it has a budget of its own.

    Attributes:
        arena_bytes: what the plan takes of the budget.
        resident_bytes: what stays of weights that are streamed to the GPU.
        disk_bytes_per_pass: what the plan reads from disk in each pass; `bytes_read` all that was read so far.
        disk_bytes_per_s: speed of the disk, as measured.
    """

    budget_bytes: int
    arena_bytes: int
    resident_bytes: int
    disk_bytes_per_pass: int
    disk_bytes_per_s: float
    bytes_read: int

    def __str__(self) -> str:
        return (
            f"{format_bytes(self.arena_bytes)} of {format_bytes(self.budget_bytes)}: "
            f"{format_bytes(self.resident_bytes)} stay, {format_bytes(self.disk_bytes_per_pass)} come from disk a pass "
            f"at {self.disk_bytes_per_s / 1e9:.2f} GB/s, {format_bytes(self.bytes_read)} so far"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A snapshot of one engine. Sizes are bytes, times seconds; "last pass" is the last that ended well.

    Attributes:
        policy: who plans what stays and what is streamed; ``"mball"`` unless the user chose another.
        peak_bytes: the most that weights, buffers and predicted activations took together.
        slot_bytes: of the arena, what is not for residents.
        workspace_bytes: of the activations, the most that is for what operators of one step allocate inside.
        scratch_bytes: what the budget has for what the allocator keeps beside tensors, and for what was taken before.
        staging_bytes: of the budget, what files pass through on their way straight to a GPU.
        taken_bytes: what operators took of the arena so far, where they found no memory; with `allocator="mball"`.
        pinned_bytes: host memory that is pinned for the device, beside the budget.
        pinning_s: what pinning took so far.
        capture_bytes: what captured graphs hold, in the compiler too; in the budget if `capture_is_counted`.
        step_graph_bytes: of the budget, what is kept for steps that are recorded; `step_graphs` of them are.
        workspace_is_counted: whether there is room in the budget for what operators allocate inside.
        streamed_bytes_per_pass: what the plan brings in each pass, rows of tables that stay home included.
        bytes_read: all bytes read so far; `bytes_read_last_pass` those of the last pass.
        roofline_s: the largest of the compute time and the streamed bytes at the measured speed of each link.
        predicted_s: what its plan said of the last pass, if it was a steady one; None before the first.
        measured_over_roofline: the last pass over the roofline; None before the first.
        in_place_bytes: weights read in place, outside the budget, in the last pass; 0 unless something passed mball by.
        host: what host memory holds, if it has a budget of its own.
        swap_bytes: what the swap file takes on disk, of `swap_limit_bytes` at most.
        swap_written_bytes: written to it so far, in `swap_writes` requests that waited `swap_queue_s` together.
        swap_read_bytes: read from it so far; `swap_hit_bytes` of them were still in memory, waiting to be written, and
            `swap_checked_bytes` were held against their checksums.
        held: what the process holds of the device's memory in all, and what of it is mball's.
        not_counted: what the budget does not cover.
    """

    policy: str
    budget_bytes: int
    peak_bytes: int
    buffer_bytes: int
    staging_bytes: int
    activation_bytes: int
    arena_bytes: int
    slot_bytes: int
    workspace_bytes: int
    scratch_bytes: int
    taken_bytes: int
    pinned_bytes: int
    pinning_s: float
    capture_bytes: int
    capture_is_counted: bool
    step_graph_bytes: int
    step_graphs: int
    workspace_is_counted: bool
    weight_bytes: int
    resident_bytes: int
    streamed_bytes_per_pass: int
    bytes_read: int
    bytes_read_last_pass: int
    passes: int
    pass_s: float
    compute_s: float
    stall_s: float
    roofline_s: float
    predicted_s: float | None
    measured_over_roofline: float | None
    link_bytes_per_s: float
    io_path: str
    weights_managed: int
    weights_owned: int
    weights_read: int
    graphs: int
    steps: int
    unplanned_fetches: int
    in_place_bytes: int
    swap_bytes: int
    host: HostMemory | None
    swap_limit_bytes: int | None
    swap_written_bytes: int
    swap_writes: int
    swap_queue_s: float
    swap_read_bytes: int
    swap_hit_bytes: int
    swap_checked_bytes: int
    held: Reconciliation
    not_counted: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields by name."""
        return asdict(self)

    def _staging_in_words(self) -> str:
        return f", staging {format_bytes(self.staging_bytes)}" if self.staging_bytes else ""

    def _graphs_in_words(self) -> str:
        if not self.step_graph_bytes:
            return ""
        return f", graphs of {self.step_graphs} steps {format_bytes(self.step_graph_bytes)}"

    def __str__(self) -> str:
        ratio = "-" if self.measured_over_roofline is None else f"{self.measured_over_roofline:.2f}"
        rows = (
            ("budget", f"{format_bytes(self.budget_bytes)}, peak {format_bytes(self.peak_bytes)}"),
            *((("policy", self.policy),) if self.policy != "mball" else ()),
            (
                "in it",
                f"arena {format_bytes(self.arena_bytes)} (slots {format_bytes(self.slot_bytes)}), activations "
                f"{format_bytes(self.activation_bytes)} (workspace {format_bytes(self.workspace_bytes)}), scratch "
                f"{format_bytes(self.scratch_bytes)}, buffers {format_bytes(self.buffer_bytes)}"
                f"{self._staging_in_words()}{self._graphs_in_words()}",
            ),
            *((("taken", f"{format_bytes(self.taken_bytes)} of the arena by operators"),) if self.taken_bytes else ()),
            *(
                (("beside it", f"{format_bytes(self.pinned_bytes)} of host memory, pinned in {self.pinning_s:.2f} s"),)
                if self.pinned_bytes
                else ()
            ),
            (
                "weights",
                f"{format_bytes(self.weight_bytes)}: {format_bytes(self.resident_bytes)} resident, "
                f"{format_bytes(self.streamed_bytes_per_pass)} streamed a pass",
            ),
            *((("host", str(self.host)),) if self.host is not None else ()),
            (
                "managed",
                f"{self.weights_managed} of {self.weights_owned} weights, {self.weights_read} read so far, "
                f"{self.graphs} graphs, {self.steps} steps",
            ),
            (
                "read",
                f"{format_bytes(self.bytes_read_last_pass)} in the last pass, {format_bytes(self.bytes_read)} in "
                f"{self.passes} passes, through {self.io_path}",
            ),
            (
                "last pass",
                f"{self.pass_s * 1e3:.1f} ms: compute {self.compute_s * 1e3:.1f} ms, stall {self.stall_s * 1e3:.1f} ms"
                f"{'' if self.predicted_s is None else f'; predicted {self.predicted_s * 1e3:.1f} ms'}",
            ),
            (
                "roofline",
                f"{self.roofline_s * 1e3:.1f} ms at {self.link_bytes_per_s / 1e9:.2f} GB/s; "
                f"measured / roofline {ratio}",
            ),
            (
                "capture",
                f"{format_bytes(self.capture_bytes)} held by captured graphs"
                f"{'' if not self.capture_bytes else ', in the budget' if self.capture_is_counted else ', on top'}"
                f"{'' if self.workspace_is_counted else '; workspace inside operators is on top of the budget'}",
            ),
            ("swap file", self._swap()),
            ("process", str(self.held)),
            (
                "outside",
                f"{format_bytes(self.in_place_bytes)} read in place; not counted: {', '.join(self.not_counted)}",
            ),
        )
        return "\n".join(f"{name:>10}  {text}" for name, text in rows)

    def _swap(self) -> str:
        limit = "" if self.swap_limit_bytes is None else f" of at most {format_bytes(self.swap_limit_bytes)}"
        if not self.swap_writes:
            return f"{format_bytes(self.swap_bytes)}{limit}"
        hits = (
            f", {self.swap_hit_bytes / self.swap_read_bytes:.0%} of it still in memory" if self.swap_hit_bytes else ""
        )
        return (
            f"{format_bytes(self.swap_bytes)}{limit}; {format_bytes(self.swap_written_bytes)} written in "
            f"{self.swap_writes} requests that waited {self.swap_queue_s / self.swap_writes * 1e3:.1f} ms each, "
            f"{format_bytes(self.swap_read_bytes)} read{hits}, {format_bytes(self.swap_checked_bytes)} checked"
        )
