"""The machine a plan is made for: page size, alignment, and the speed of its link."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mball.errors import SchemaError
from mball.schema.document import Document

MACHINE_VERSION = 2


class Tier(StrEnum):
    """Where bytes are. On a machine without a GPU the device is the part of host memory that the budget caps."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction of one way between two tiers; requests are served in order.

    Attributes:
        latency_s: what a request on the idle link takes beyond its bytes at full bandwidth. A request that is made
            while others are served does not show it.
        window_bytes: bytes that are under way at one time and share the link: the end of a request waits for as much
            of those behind it.
        source, target: the tiers.
    """

    bandwidth_bytes_per_s: float
    latency_s: float
    window_bytes: int = 0
    source: Tier = Tier.DISK
    target: Tier = Tier.DEVICE

    def transfer_s(self, size_bytes: int) -> float:
        """Returns the seconds that one request of `size_bytes` takes on the idle link."""
        return self.latency_s + size_bytes / self.bandwidth_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine(Document):
    """What the planner needs to know of a machine.

    Attributes:
        page_bytes: granularity of the arena; every slot starts and ends on it.
        alignment_bytes: file offsets and lengths of reads are multiples of it; divides `page_bytes`.
        link: from the tier of the homes to the arena.
    """

    name: str
    page_bytes: int
    alignment_bytes: int
    link: Link
    version: int = MACHINE_VERSION

    def check(self) -> None:
        """Raises SchemaError when the machine cannot exist."""
        if self.version != MACHINE_VERSION:
            raise SchemaError(f"machine {self.name!r} has version {self.version}; this mball reads {MACHINE_VERSION}")
        if self.page_bytes <= 0 or self.alignment_bytes <= 0 or self.page_bytes % self.alignment_bytes:
            raise SchemaError(
                f"machine {self.name!r}: alignment {self.alignment_bytes} B must divide the page, {self.page_bytes} B"
            )
        link = self.link
        if link.target is not Tier.DEVICE or link.source is Tier.DEVICE:
            raise SchemaError(
                f"machine {self.name!r}: its link goes from {link.source.value} to {link.target.value}; it must end in "
                "the device and begin below it"
            )
        if not link.bandwidth_bytes_per_s > 0 or not link.latency_s >= 0 or link.window_bytes < 0:
            raise SchemaError(
                f"machine {self.name!r}: bandwidth {link.bandwidth_bytes_per_s} B/s must be positive, "
                f"latency {link.latency_s} s and window {link.window_bytes} B not negative"
            )
