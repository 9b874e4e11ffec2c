"""FlexGen's block schedule: every layer keeps the same share of its weights, the rest comes a layer ahead.

Source: Y. Sheng et al., "FlexGen: High-Throughput Generative Inference of Large Language Models with a Single GPU",
ICML 2023, sections 4.1 and 4.2: weights are divided at the granularity of tensors, the same percentage of each layer on
the device, and the weights of layer j + 1 are loaded while layer j computes (Algorithm 1). Layers are visited
zig-zag over a block of batches, so that a load serves the whole block. A trace is one pass over one batch, so the block
here is one batch, and the pass goes through the layers in order.

The percentage is the largest that fits beside two layers' other weights (its linear program for percentages is not
needed, where caches and activations do not move). Weights are gone through in order, and one stays while at least half
of it is still owed to its layer: equal layers keep the same weights. What rounding leaves over of a layer of a single
weight is handed on to the next one of these, so that they take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mball.plan.arrays import Bools, Ints
from mball.plan.baselines.layers import Layers, fastest_of, levels, shorter
from mball.plan.draft import Draft, Lead, draft_plan
from mball.plan.problem import Problem
from mball.plan.uses import Visits
from mball.schema import Machine, Plan, Trace

PERCENT = 100


def plan_flexgen(
    trace: Trace, machine: Machine, budget_bytes: int, *, fixed_bytes: int = 0, previous: Plan | None = None
) -> Plan:
    """Returns the plan that keeps an equal share of each layer and reads the rest a layer ahead.

    Arguments and errors: `make_plan`.
    """
    problem = Problem.of_weights(trace, machine, budget_bytes, fixed_bytes=fixed_bytes, previous=previous)
    return problem.plan(draft_flexgen(problem))


def draft_flexgen(problem: Problem) -> Draft:
    """Returns the draft that keeps an equal share of each layer and reads the rest a layer ahead."""
    return fastest_of(problem, _drafts(problem))


def _drafts(problem: Problem) -> Iterator[Draft | None]:
    *layers, modules = levels(problem.trace)
    found = [draft for level in layers if (draft := _draft(problem, level)) is not None]
    # Of a module with one weight a share is all or nothing, so modules are for where layers do not fit.
    if not found:
        yield _draft(problem, modules)
    yield from found


def _draft(problem: Problem, weights: list[list[int]]) -> Draft | None:
    low, high = 0, PERCENT
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if divide(problem, weights, middle).fits(problem.arena_bytes) else (low, middle - 1)
    for percent in shorter(low):
        divided = divide(problem, weights, percent)
        partition, within = divided.layers.partition, divided.layers.within
        keep = divided.stays[partition.uses.bundle] & partition.uses.may_stay | within
        draft = draft_plan(partition, keep, problem.arena_bytes, lead=_layer_ahead(divided.layers))
        if draft is not None:
            return draft
    return None


@dataclass(frozen=True, slots=True)
class Divided:
    """Layers of which a share stays.

    Attributes:
        layers: each of one bundle or two.
        stays: which bundles stay.
    """

    layers: Layers
    stays: Bools

    def fits(self, arena_bytes: int) -> bool:
        """Returns whether what stays fits, and beside it the rest of any two layers that follow each other.

        Layers that are not read take no memory. The first one follows the last one where the pass repeats.
        """
        partition = self.layers.partition
        demand = partition.demand
        read = np.array(demand.read_bundles(), dtype=np.int64)
        # Not those of the flow: most shares that are tried do not fit, or leave room, and are never timed.
        sizes = np.array([demand.bundles[bundle].size_bytes for bundle in read.tolist()], dtype=np.int64)
        stays = self.stays[read]
        moving = np.bincount(self.layers.layer_of[read], weights=np.where(stays, 0, sizes))
        following = np.roll(moving, -1)
        if len(moving) == 1 or not partition.trace.cyclic:
            following[-1:] = 0
        return bool(sizes[stays].sum() + (moving + following).max(initial=0) <= arena_bytes)


def divide(problem: Problem, weights: list[list[int]], percent: int) -> Divided:
    """Returns these layers (each given as its weights), what stays of each as one bundle and the rest as another."""
    trace = problem.trace
    layers: list[list[list[int]]] = []
    stays: list[bool] = []
    owed_single = 0.0
    for layer in weights:
        is_single = len(layer) == 1
        half = trace.tensors[layer[0]].size_bytes / 2
        # Bytes that should stay and do not, or the other way round.
        owed = min(max(owed_single, -half), half) if is_single else 0.0
        kept: list[int] = []
        rest: list[int] = []
        for index in layer:
            size = trace.tensors[index].size_bytes
            owed += size * percent / PERCENT
            if percent and owed >= size / 2:
                kept.append(index)
                owed -= size
            else:
                rest.append(index)
        if is_single:
            owed_single = owed
        parts = {True: kept, False: rest}
        layers.append([part for part in parts.values() if part])
        stays += [is_kept for is_kept, part in parts.items() if part]
    return Divided(Layers.of(problem, layers), np.array(stays, dtype=bool))


def _layer_ahead(layers: Layers) -> Lead:
    """Returns the lead that begins a visit with the layer before its own."""
    begins, num_steps, cyclic = layers.begins, layers.partition.flow.num_steps, layers.partition.trace.cyclic

    def lead(visits: Visits) -> Ints:
        own = np.searchsorted(begins, visits.first, side="right") - 1
        before = begins[own - 1] if len(begins) else own
        return np.where(own > 0, before, before - num_steps if cyclic else 0) - 1

    return lead
