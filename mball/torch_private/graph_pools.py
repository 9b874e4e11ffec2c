"""The pool that CUDA graphs of torch are recorded into, after a recording that failed."""

from __future__ import annotations

from typing import Any

import torch

_NEEDED = ("_cuda_endAllocateToPool", "_cuda_releasePool")


def missing_for_recording() -> tuple[str, ...]:
    """Returns the names without which what a failed recording leaves behind cannot be put right."""
    return tuple(f"torch._C.{name}" for name in _NEEDED if not hasattr(torch._C, name))


def end_recording(ordinal: int, pool: Any) -> bool:
    """Has the allocator of a GPU take nothing of `pool` any more for a recording that failed.

    Returns whether it still did: torch ends that itself where the work failed and the capture did not.
    """
    try:
        torch._C._cuda_endAllocateToPool(ordinal, pool)
    except RuntimeError:
        return False
    torch._C._cuda_releasePool(ordinal, pool)
    return True
