"""The seam between the engine and the disk: what a reader promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Fill `destination[:size_bytes]` with bytes `[offset, offset + size)` of a file.

    The range may end past the end of the file: the reader stops there and leaves the rest of the destination
    as it is, or overwrites it with anything. `destination` is writable and C-contiguous, of bytes.

    Reads are fastest where `offset_bytes`, `size_bytes` and the destination's address are multiples of 4096.
    """

    file: str
    offset_bytes: int
    size_bytes: int
    destination: memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadStatistics:
    """Totals since the reader was made.

    Attributes:
        size_bytes: bytes read, `direct_bytes` of them past the page cache.
        num_requests: requests to the operating system.
        busy_s: seconds in which at least one request was under way.
    """

    size_bytes: int
    direct_bytes: int
    num_requests: int
    busy_s: float


class ReadHandle(Protocol):
    """Reads under way. It does not own the destinations: their memory must stay until the handle is done."""

    @property
    def size_bytes(self) -> int:
        """Bytes that the reads bring, up to the ends of their files."""

    @property
    def began_s(self) -> float | None:
        """When the first request was made, by `time.perf_counter`; None before, and if none is needed."""

    @property
    def ended_s(self) -> float | None:
        """When the last request was over; None before, and if none is needed."""

    def done(self) -> bool:
        """Returns whether nothing is under way any more, be it read or failed. Does not block."""

    def wait(self) -> None:
        """Blocks until nothing is under way any more; may be called again, also after an interrupt.

        Raises:
            StorageError: a read failed; names file, offset, length and cause. Every call raises.
            DeviceError: the process was forked since the submit.
        """


class Reader(Protocol):
    """Reads in the background, begun in the order of submission, completed in any order."""

    @property
    def path(self) -> str:
        """Which I/O path runs, for people: ``O_DIRECT`` or ``buffered (why)``."""

    @property
    def statistics(self) -> ReadStatistics:
        """What has been read so far."""

    def submit(self, reads: Sequence[Read]) -> ReadHandle:
        """Starts all of `reads`, without blocking. None is started when an error is raised.

        Raises:
            StorageError: a read does not fit its file or destination, or the reader is closed.
            DeviceError: called in a forked child.
        """

    def drain(self) -> None:
        """Blocks until nothing submitted writes to memory any more; failures stay with their handles.

        This is what to call when an interrupt inside `submit` may have swallowed a handle.

        Raises:
            DeviceError: called in a forked child.
        """

    def close(self) -> None:
        """Waits for requests under way, fails those not begun, and gives threads back. May be called again."""
