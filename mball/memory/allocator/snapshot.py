"""Segments in the form of `torch.cuda.memory._snapshot()`, which PyTorch's memory visualiser opens when pickled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mball.memory.allocator.records import Action, Entry, Segment

# Those of PyTorch: a segment is one block to us, so each of ours is one of a segment and one of its block.
_ACTIONS = {
    Action.MADE: ("segment_alloc", "alloc"),
    Action.FREED: ("free_requested",),
    Action.GONE: ("free_completed", "segment_free"),
    Action.FAILED: ("oom",),
}


def torch_snapshot(
    ordinal: int, segments: Iterable[Segment], history: Sequence[Entry], *, available_bytes: int
) -> dict[str, Any]:
    """Returns the snapshot of GPU `ordinal`: a list of segments, each one block, and what happened, without stacks.

    A segment that leaves is "active_awaiting_free". What PyTorch does within its segments its own snapshot tells.
    `available_bytes` is said to be free where an allocation failed. Pages that are pooled have no address, and are not
    in it; of donors that were taken there is no word in PyTorch's form either.
    """
    return {
        "segments": [_segment(ordinal, segment) for segment in segments],
        "device_traces": [[] for _ in range(ordinal)] + [list(_trace(history, available_bytes))],
        "allocator_settings": {},
        "external_annotations": [],
    }


def _segment(ordinal: int, segment: Segment) -> dict[str, Any]:
    return {
        "device": ordinal,
        "address": segment.address,
        "total_size": segment.size_bytes,
        "allocated_size": 0 if segment.is_leaving else segment.size_bytes,
        "active_size": segment.size_bytes,
        "requested_size": segment.requested_bytes,
        "stream": segment.stream,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": [
            {
                "address": segment.address,
                "size": segment.size_bytes,
                "requested_size": segment.requested_bytes,
                "state": "active_awaiting_free" if segment.is_leaving else "active_allocated",
                "frames": [],
            }
        ],
    }


def _trace(history: Iterable[Entry], available_bytes: int) -> Iterable[dict[str, Any]]:
    for entry in history:
        for action in _ACTIONS.get(entry.action, ()):
            said: dict[str, Any] = {
                "action": action,
                "addr": entry.address,
                "size": entry.size_bytes,
                "stream": entry.stream,
                "time_us": entry.time_us,
                "pool_id": (0, 0),
                "frames": [],
            }
            if entry.action is Action.FAILED:
                said["device_free"] = available_bytes
            yield said
