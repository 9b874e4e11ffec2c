"""The machine a plan is made for: page size, alignment, and the speed of its link."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import inf

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
        link: to the arena, from the tier of the homes or, with `disk_link`, from host memory.
        write_link: from the arena to where tensors are offloaded; None where they go the way of `link`, so that reads
            and writes take turns.
        disk_link: from disk to host memory, where homes on disk come through host memory.
        host_bandwidth_bytes_per_s: of host memory, under steps on the host lane: none of them is faster than the bytes
            that it reads and writes. None: they take the time that was measured.
    """

    name: str
    page_bytes: int
    alignment_bytes: int
    link: Link
    write_link: Link | None = None
    disk_link: Link | None = None
    host_bandwidth_bytes_per_s: float | None = None
    version: int = MACHINE_VERSION

    def check(self) -> None:
        """Raises SchemaError when the machine cannot exist."""
        if self.version != MACHINE_VERSION:
            raise SchemaError(f"machine {self.name!r} has version {self.version}; this mball reads {MACHINE_VERSION}")
        if self.page_bytes <= 0 or self.alignment_bytes <= 0 or self.page_bytes % self.alignment_bytes:
            raise SchemaError(
                f"machine {self.name!r}: alignment {self.alignment_bytes} B must divide the page, {self.page_bytes} B"
            )
        self._check_link("link", self.link, Tier.DEVICE)
        if self.link.source is Tier.DEVICE:
            raise SchemaError(f"machine {self.name!r}: its link begins in the device; it must begin below it")
        if self.write_link is not None:
            self._check_link("write_link", self.write_link, self.link.source)
            if self.write_link.source is not Tier.DEVICE:
                raise SchemaError(
                    f"machine {self.name!r}: its write_link begins at {self.write_link.source.value}; it must begin in "
                    "the device"
                )
        if self.disk_link is not None:
            self._check_link("disk_link", self.disk_link, Tier.HOST)
            if self.disk_link.source is not Tier.DISK or self.link.source is not Tier.HOST:
                raise SchemaError(
                    f"machine {self.name!r}: its disk_link begins at {self.disk_link.source.value} and its link at "
                    f"{self.link.source.value}; they must begin at disk and at host"
                )

        if self.host_bandwidth_bytes_per_s is not None and not self.host_bandwidth_bytes_per_s > 0:
            raise SchemaError(
                f"machine {self.name!r}: its host memory has {self.host_bandwidth_bytes_per_s} B/s of bandwidth, which "
                "must be positive"
            )

    def _check_link(self, name: str, link: Link, target: Tier) -> None:
        if link.target is not target:
            raise SchemaError(
                f"machine {self.name!r}: its {name} goes from {link.source.value} to {link.target.value}; it must end "
                f"in {target.value}"
            )
        if not 0 < link.bandwidth_bytes_per_s < inf or not 0 <= link.latency_s < inf or link.window_bytes < 0:
            raise SchemaError(
                f"machine {self.name!r}, {name}: bandwidth {link.bandwidth_bytes_per_s} B/s must be positive, "
                f"latency {link.latency_s} s and window {link.window_bytes} B not negative, and all finite"
            )
