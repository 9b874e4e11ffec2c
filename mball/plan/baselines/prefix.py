"""A resident prefix with just-in-time reads: accelerate.

Source: Hugging Face accelerate, `infer_auto_device_map` and `AlignDevicesHook` (big model inference). Modules are given
to the device in their order until the next does not fit; room for the largest of the others is reserved, so that each
can come. A module that is not on the device is loaded right before its forward and freed right after it; nothing is
loaded ahead.

Idealised: modules are taken in the order of first use instead of the order of their definition, reads run at the full
speed of the link, and nothing is copied twice. In a pass that runs once the prefix is read before its first step.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mball.plan.arrays import Ints
from mball.plan.baselines.layers import Layers, fastest_of, just_in_time, levels, shorter
from mball.plan.draft import Draft, Lead, draft_plan
from mball.plan.problem import Problem
from mball.plan.uses import Visits
from mball.schema import Machine, Plan, Trace


def plan_prefix(
    trace: Trace, machine: Machine, budget_bytes: int, *, fixed_bytes: int = 0, previous: Plan | None = None
) -> Plan:
    """Returns the plan that keeps the first layers and reads the others just in time.

    Arguments and errors: `make_plan`.
    """
    problem = Problem.of_weights(trace, machine, budget_bytes, fixed_bytes=fixed_bytes, previous=previous)
    return problem.plan(fastest_of(problem, _drafts(problem)))


def _drafts(problem: Problem) -> Iterator[Draft | None]:
    for layers in layered(problem):
        yield draft_prefix(problem, layers, 1, just_in_time)


def layered(problem: Problem) -> Iterator[Layers]:
    """Yields the layers of each level, and the finest bundles."""
    for level in levels(problem.trace):
        yield Layers.of(problem, [[layer] for layer in level])
    yield Layers.single(problem.finest)


def draft_prefix(problem: Problem, layers: Layers, reserved: int, lead: Lead) -> Draft | None:
    """Returns the draft with the longest prefix that leaves room for the others, None where none fits.

    Args:
        reserved: how many of the others are there at one time.
        lead: of what is not in the prefix.
    """
    partition = layers.partition
    for length in shorter(_longest(layers.sizes, reserved, problem.arena_bytes)):
        prefix = np.arange(length)
        keep = layers.of_layers(prefix) | layers.within

        def earliest(visits: Visits, prefix: Ints = prefix) -> Ints:
            found = lead(visits)
            if not partition.trace.cyclic:
                found[np.isin(layers.layer_of[visits.bundle], prefix)] = -1
            return found

        draft = draft_plan(partition, keep, problem.arena_bytes, lead=earliest)
        if draft is not None:
            return draft
    return None


def _longest(sizes: Ints, reserved: int, arena_bytes: int) -> int:
    """Returns the length of the longest prefix beside which `reserved` others fit that follow each other."""
    for length in range(len(sizes), 0, -1):
        others = sizes[length:]
        around = np.concatenate((others, others[: reserved - 1])) if len(others) > reserved else others
        sums = np.cumsum(np.concatenate(([0], around)))
        most = min(reserved, len(others))
        if int(sizes[:length].sum() + (sums[most:] - sums[: len(sums) - most]).max()) <= arena_bytes:
            return length
    return 0
