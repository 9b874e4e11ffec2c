"""What the C library tells: its structures, and the same as plain data."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import Enum

HISTORY = 4096  # as many entries the library keeps


class StatisticsRecord(ctypes.Structure):
    """`Statistics` of segments.c."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("granule", "extent", "limit", "held", "pooled", "in_use", "leaving", "offered"),
            *("peak_held", "peak_in_use"),
            *("num_segments", "num_leaving", "num_pooled", "num_offered"),
            *("num_mallocs", "num_frees", "num_failed", "num_waits", "num_taken"),
            *("taken", "lent", "taken_back", "created", "released"),
        )
    )


class SegmentRecord(ctypes.Structure):
    """`Listed` of segments.c."""

    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("address", "size", "requested", "stream", "is_leaving", "time_us")
    )


class EntryRecord(ctypes.Structure):
    """`Entry` of segments.c."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("time_us", "action", "address", "size", "stream"))


class FailureRecord(ctypes.Structure):
    """`Failure` of segments.c."""

    _fields_ = (
        ("call", ctypes.c_char * 48),
        ("name", ctypes.c_char * 64),
        ("code", ctypes.c_int64),
        ("size", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
    )


class Offer(ctypes.Structure):
    """What became of an offer: the library writes it within its calls, where no interrupt comes between."""

    _fields_ = (("number", ctypes.c_uint64), ("outcome", ctypes.c_uint64))
    number: int  # 0: it was not made
    outcome: int

    @property
    def is_open(self) -> bool:
        """Whether it was made and is not withdrawn."""
        return bool(self.number) and not self.outcome

    @property
    def is_taken(self) -> bool:
        """Whether it was withdrawn too late."""
        return self.outcome == 2  # GIVEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What an allocator holds now, and what it did since it was opened.

    `held_bytes` is `in_use_bytes + leaving_bytes + pooled_bytes`, and at most `limit_bytes`.
    """

    granule_bytes: int
    extent_bytes: int
    limit_bytes: int
    held_bytes: int
    pooled_bytes: int
    in_use_bytes: int  # of segments that PyTorch has
    leaving_bytes: int  # of segments that PyTorch has freed, whose work may not be over
    offered_bytes: int  # of donors that were not taken; the arena's, not held
    peak_held_bytes: int
    peak_in_use_bytes: int
    num_segments: int
    num_leaving: int
    num_pooled: int
    num_offered: int
    num_mallocs: int
    num_frees: int
    num_failed: int  # allocations that were refused
    num_waits: int  # for the GPU, where an allocation had no other way
    num_taken: int  # donors
    taken_bytes: int  # from donors
    lent_bytes: int
    taken_back_bytes: int
    created_bytes: int
    released_bytes: int

    @classmethod
    def read(cls, record: StatisticsRecord) -> Statistics:
        """Returns what a record says."""
        values = {name: int(getattr(record, name)) for name, *_ in record._fields_}
        return cls(**{name if name.startswith("num_") else f"{name}_bytes": value for name, value in values.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """An address range with memory, as PyTorch got it."""

    address: int
    size_bytes: int
    requested_bytes: int  # what PyTorch asked for; the size is a multiple of the granularity
    stream: int
    is_leaving: bool  # freed, but what its stream was given may still run
    allocated_us: int  # since 1970

    @classmethod
    def read(cls, record: SegmentRecord) -> Segment:
        """Returns what a record says."""
        return cls(
            address=record.address,
            size_bytes=record.size,
            requested_bytes=record.requested,
            stream=record.stream,
            is_leaving=bool(record.is_leaving),
            allocated_us=record.time_us,
        )


class Action(Enum):
    """What happened: `actions of entries` in segments.c, in their order."""

    MADE = 0  # a segment
    FREED = 1  # by PyTorch; its memory is still there
    GONE = 2  # its work was over, and its memory is pooled
    FAILED = 3  # an allocation
    DONATED = 4  # an extent of the arena was taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that happened."""

    time_us: int  # since 1970
    action: Action
    address: int  # 0 for an allocation that failed
    size_bytes: int
    stream: int

    @classmethod
    def read(cls, record: EntryRecord) -> Entry:
        """Returns what a record says."""
        return cls(
            time_us=record.time_us,
            action=Action(record.action),
            address=record.address,
            size_bytes=record.size,
            stream=record.stream,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The last thing that went wrong, even where there was a way around it.

    `code` is the driver's, or negative; `name` is the driver's name of it, such as "CUDA_ERROR_OUT_OF_MEMORY", or one
    of our own, such as "MBALL_OVER_LIMIT".
    """

    call: str
    name: str
    code: int
    size_bytes: int  # what the call was about; 0 if there is none
    count: int  # of all failures of this GPU so far

    @classmethod
    def read(cls, record: FailureRecord) -> Failure:
        """Returns what a record says."""
        return cls(
            call=record.call.decode(),
            name=record.name.decode(),
            code=record.code,
            size_bytes=record.size,
            count=record.count,
        )
