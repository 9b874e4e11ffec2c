"""What a wrapped model holds, moves and takes, as numbers and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mball.observe.reconcile import Reconciliation
from mball.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A snapshot of one engine. Sizes are bytes, times seconds; "last pass" is the last that ended well.

    Attributes:
        policy: who plans what stays and what is streamed; ``"mball"`` unless the user chose another.
        peak_bytes: the most that weights, buffers and predicted activations took together.
        slot_bytes: of the arena, what is not for residents.
        workspace_bytes: of the activations, the most that is for what operators of one step allocate inside.
        scratch_bytes: what the budget has for what the allocator keeps beside tensors.
        pinned_bytes: host memory that is pinned for the device, beside the budget.
        pinning_s: what pinning took so far.
        capture_bytes: what captured graphs hold, in the compiler too; in the budget if `capture_is_counted`.
        workspace_is_counted: whether there is room in the budget for what operators allocate inside.
        streamed_bytes_per_pass: what the plan brings in each pass, rows of tables that stay home included.
        bytes_read: all bytes read so far; `bytes_read_last_pass` those of the last pass.
        roofline_s: the larger of the compute time and the streamed bytes at the measured speed of the link.
        predicted_s: what its plan said of the last pass, if it was a steady one; None before the first.
        measured_over_roofline: the last pass over the roofline; None before the first.
        in_place_bytes: weights read in place, outside the budget, in the last pass; 0 unless something passed mball by.
        held: what the process holds of the device's memory in all, and what of it is mball's.
        not_counted: what the budget does not cover.
    """

    policy: str
    budget_bytes: int
    peak_bytes: int
    buffer_bytes: int
    activation_bytes: int
    arena_bytes: int
    slot_bytes: int
    workspace_bytes: int
    scratch_bytes: int
    pinned_bytes: int
    pinning_s: float
    capture_bytes: int
    capture_is_counted: bool
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
    held: Reconciliation
    not_counted: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        ratio = "-" if self.measured_over_roofline is None else f"{self.measured_over_roofline:.2f}"
        rows = (
            ("budget", f"{format_bytes(self.budget_bytes)}, peak {format_bytes(self.peak_bytes)}"),
            *((("policy", self.policy),) if self.policy != "mball" else ()),
            (
                "in it",
                f"arena {format_bytes(self.arena_bytes)} (slots {format_bytes(self.slot_bytes)}), activations "
                f"{format_bytes(self.activation_bytes)} (workspace {format_bytes(self.workspace_bytes)}), scratch "
                f"{format_bytes(self.scratch_bytes)}, buffers {format_bytes(self.buffer_bytes)}",
            ),
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
            ("swap file", format_bytes(self.swap_bytes)),
            ("process", str(self.held)),
            (
                "outside",
                f"{format_bytes(self.in_place_bytes)} read in place; not counted: {', '.join(self.not_counted)}",
            ),
        )
        return "\n".join(f"{name:>10}  {text}" for name, text in rows)
