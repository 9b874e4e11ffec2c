"""Long chains with uneven sizes and times: what planning takes as passes grow."""

from __future__ import annotations

import random

from mball.schema import Link, Machine, Step, Tensor, Trace
from mball.units import MIB

NUM_BUNDLES = (100, 500, 1000, 10_000, 100_000)
PAGE_BYTES = 4096
# No two of these share a bundle: each is as large as the largest bundle of several weights.
SMALLEST_BYTES, LARGEST_BYTES = 32 * MIB, 96 * MIB
BUDGET_PERCENT, MORE_PERCENT = 25, 5
MACHINE = Machine(
    name="20 GB/s",
    page_bytes=PAGE_BYTES,
    alignment_bytes=PAGE_BYTES,
    link=Link(bandwidth_bytes_per_s=20e9, latency_s=1e-5),
)


def chain(num_bundles: int) -> Trace:
    """Returns a pass of so many steps that read a weight each; the same one for the same number."""
    chance = random.Random(num_bundles)
    sizes = [chance.randrange(SMALLEST_BYTES, LARGEST_BYTES, PAGE_BYTES) for _ in range(num_bundles)]
    tensors, steps, offset = [], [], 0
    for number, size in enumerate(sizes):
        tensors.append(
            Tensor.weight(f"w{number}", dtype="uint8", shape=(size,), size_bytes=size, file="f", offset_bytes=offset)
        )
        offset += size
        # The link takes 1.6 to 4.8 ms for a weight; three quarters of them come each pass.
        time_s = chance.uniform(5e-4, 4e-3)
        steps.append(Step(name=f"s{number}", graph="g", reads=(number,), scratch_bytes=0, flops=0, time_s=time_s))
    return Trace(name=f"chain of {num_bundles}", tensors=tuple(tensors), steps=tuple(steps))


def budgets(trace: Trace) -> tuple[int, int]:
    """Returns the first budget, and the one that it grows to."""
    first = sum(tensor.size_bytes for _, tensor in trace.homed()) * BUDGET_PERCENT // 100
    return first, first * (100 + MORE_PERCENT) // 100
