"""The calibration of links: what they did with requests of several sizes, so many at a time, and what follows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime

from mball.errors import SchemaError
from mball.schema.document import Document
from mball.schema.machine import Link, Tier

CALIBRATION_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSample:
    """What requests of `block_bytes` each brought while `depth` of them were in flight; medians over all rounds.

    Attributes:
        bandwidth_bytes_per_s: bytes of all requests over the time they took.
        latency_s: from the submit of one request to its end, waiting behind the others included.
        spread: the middle half of the rounds' bandwidths, from its lowest to its highest, as a part of the median.
    """

    block_bytes: int
    depth: int
    bandwidth_bytes_per_s: float
    latency_s: float
    spread: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedLink:
    """One link, as it was measured.

    Attributes:
        link: what a planner needs to know.
        reader: what moved the bytes, and how: another reader has another link.
        num_threads: requests that this reader has under way at one time, of `chunk_bytes` each.
        file_bytes: size of the file that was read.
        num_rounds: how often each combination was measured, at least.
        spread: of the link's bandwidth; see `LinkSample`. Disks that others use too have a large one.
        block_bytes: of the combinations that brought (nearly) the full bandwidth, the one with the fewest bytes in
            flight has requests of this size; `depth` of them at a time.
        samples: the measured combinations, by size and depth.
    """

    link: Link
    reader: str
    num_threads: int
    chunk_bytes: int
    file_bytes: int
    num_rounds: int
    spread: float
    block_bytes: int
    depth: int
    samples: tuple[LinkSample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration(Document):
    """The links between one place and the memory of one machine.

    Attributes:
        host: name of the machine.
        place: what its links lead to or come from; a file system as `mount` prints it.
        measured_at: when, as ISO 8601 with its offset to UTC.
        links: no two between the same tiers.
    """

    host: str
    place: str
    measured_at: str
    links: tuple[CalibratedLink, ...]
    version: int = CALIBRATION_VERSION

    @property
    def time(self) -> datetime:
        """When it was measured."""
        return datetime.fromisoformat(self.measured_at).astimezone(UTC)

    @property
    def day(self) -> str:
        """The day it was measured, for people: ``2026-11-21``."""
        return self.measured_at[:10]

    def find_link(self, source: Tier, target: Tier) -> CalibratedLink | None:
        """Returns the link from one tier to another, None if it was not measured."""
        for each in self.links:
            if (each.link.source, each.link.target) == (source, target):
                return each
        return None

    def check(self) -> None:
        """Raises SchemaError when this cannot have been measured."""
        what = f"calibration of {self.place!r}"
        if self.version != CALIBRATION_VERSION:
            raise SchemaError(f"{what} has version {self.version}; this mball reads {CALIBRATION_VERSION}")
        try:
            has_zone = datetime.fromisoformat(self.measured_at).tzinfo is not None
        except ValueError:
            has_zone = False
        if not has_zone:
            raise SchemaError(f"{what}: {self.measured_at!r} is no ISO 8601 time with its offset to UTC")
        ways = [(each.link.source, each.link.target) for each in self.links]
        if not ways or len(set(ways)) != len(ways) or any(source is target for source, target in ways):
            raise SchemaError(f"{what}: each of its links joins two tiers, and no two links the same two")
        for each in self.links:
            _check_link(each, what)


def _check_link(calibrated: CalibratedLink, what: str) -> None:
    link = calibrated.link
    speeds = [link.bandwidth_bytes_per_s, *(sample.bandwidth_bytes_per_s for sample in calibrated.samples)]
    times = [link.latency_s, *(sample.latency_s for sample in calibrated.samples)]
    spreads = [calibrated.spread, *(sample.spread for sample in calibrated.samples)]
    if not all(math.isfinite(value) and value > 0 for value in speeds):
        raise SchemaError(f"{what}: a bandwidth is not a positive number of bytes a second")
    if not all(math.isfinite(value) and value >= 0 for value in (*times, *spreads)):
        raise SchemaError(f"{what}: a latency or spread is negative, or no number")
    combinations = [(sample.block_bytes, sample.depth) for sample in calibrated.samples]
    if len(set(combinations)) != len(combinations) or any(block < 1 or depth < 1 for block, depth in combinations):
        raise SchemaError(f"{what}: block sizes and depths must be at least 1, and no two samples have the same")
    if (calibrated.block_bytes, calibrated.depth) not in combinations:
        raise SchemaError(
            f"{what}: its choice, {calibrated.block_bytes} B with {calibrated.depth} in flight, was not measured"
        )
    if not 1 <= calibrated.num_threads <= 64 or calibrated.chunk_bytes < 4096 or calibrated.chunk_bytes % 4096:
        raise SchemaError(
            f"{what}: no reader makes {calibrated.num_threads} requests of {calibrated.chunk_bytes} B at one time"
        )
    if link.window_bytes < 0 or calibrated.file_bytes < 1 or calibrated.num_rounds < 1:
        raise SchemaError(f"{what}: its window, its file and its rounds cannot be {link.window_bytes} B, "
                          f"{calibrated.file_bytes} B and {calibrated.num_rounds}")  # fmt: skip
