"""A resident prefix, the rest read a few layers ahead: diffusers' group offload, vLLM's prefetch.

Source: diffusers, `apply_group_offloading` with `use_stream=True`, which loads the next group while one computes
(depth 1); vLLM's prefetch offloader, which starts the read of the layer `offload_prefetch_step` places on, counted in
the layers that are offloaded and round the end of the pass. A layer is freed after its forward.

Idealised: reads run at the full speed of the link, and the memory that is left is filled with a prefix of layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mball.errors import ConfigError
from mball.plan.arrays import Ints
from mball.plan.baselines.layers import fastest_of
from mball.plan.baselines.prefix import draft_prefix, layered
from mball.plan.draft import Draft, Lead
from mball.plan.problem import Problem
from mball.plan.uses import Visits
from mball.schema import Machine, Plan, Trace


def plan_prefetch(
    trace: Trace,
    machine: Machine,
    budget_bytes: int,
    *,
    fixed_bytes: int = 0,
    previous: Plan | None = None,
    depth: int = 1,
) -> Plan:
    """Returns the plan that keeps the first layers and reads the others `depth` layers ahead.

    Room is reserved for `depth + 1` layers that follow each other. Other arguments and errors are those of `make_plan`.

    Raises:
        ConfigError: `depth` is less than 1, or as for `make_plan`.
    """
    if depth < 1:
        raise ConfigError(f"depth is {depth}; read at least 1 layer ahead, or take the policy 'prefix'")
    problem = Problem.of_weights(trace, machine, budget_bytes, fixed_bytes=fixed_bytes, previous=previous)
    return problem.plan(draft_prefetch(problem, depth))


def draft_prefetch(problem: Problem, depth: int = 1) -> Draft:
    """Returns the draft that keeps the first layers and reads the others `depth` layers ahead."""
    return fastest_of(problem, _drafts(problem, depth))


def _drafts(problem: Problem, depth: int) -> Iterator[Draft | None]:
    lead = ahead(depth, len(problem.trace.steps), cyclic=problem.trace.cyclic)
    for layers in layered(problem):
        yield draft_prefix(problem, layers, depth + 1, lead)


def ahead(depth: int, num_steps: int, *, cyclic: bool) -> Lead:
    """Returns the lead that begins a visit with the step of the visit `depth` places before it.

    Visits with the same first step take one place.
    """

    def lead(visits: Visits) -> Ints:
        firsts, place = np.unique(visits.first, return_inverse=True)
        if not len(firsts):
            return visits.first - 1
        # No sooner than a pass ahead: a visit is not begun before the one of the pass before has begun.
        passes, earlier = np.divmod(place - (min(depth, len(firsts)) if cyclic else depth), len(firsts))
        found = firsts[earlier] + passes * num_steps - 1 if cyclic else np.where(passes < 0, 0, firsts[earlier]) - 1
        return np.asarray(found, dtype=np.int64)

    return lead
