"""A pass by layers: what policies that move whole modules stream.

The layer of a weight is read off its name. `model.layers.3.mlp.up_proj.weight` is a weight of layer `model.layers.3`;
where numbers are nested (`stages.2.blocks.7.…`) the inner number is a finer level, and so are the module that owns the
weight and the weight alone. Users of such policies choose the level by hand (`no_split_module_classes` of accelerate,
`block_level` and `leaf_level` of diffusers); here all levels are tried and the fastest plan is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np

from mball.plan.arrays import Bools, Ints
from mball.plan.bundles import weight_uses
from mball.plan.draft import Draft, draft_plan
from mball.plan.partition import Partition
from mball.plan.problem import Problem
from mball.plan.uses import Visits
from mball.schema import Trace


@dataclass(frozen=True)
class Layers:
    """A partition whose bundles are layers or parts of layers.

    Attributes:
        partition: the pass.
        layer_of: the layer of each bundle; layers count in the order of their first use, those that are not read last.
    """

    partition: Partition
    layer_of: Ints

    @classmethod
    def of(cls, problem: Problem, layers: Sequence[Sequence[Sequence[int]]]) -> Layers:
        """Returns the partition into these layers, each given as the weights of its bundles."""
        bundles = [problem.even_bundle(part) for layer in layers for part in layer]
        numbers = [number for number, layer in enumerate(layers) for _ in layer]
        return cls(Partition.of(problem.trace, problem.machine, bundles), np.array(numbers, dtype=np.int64))

    @classmethod
    def single(cls, partition: Partition) -> Layers:
        """Returns a partition whose every bundle is a layer."""
        return cls(partition, np.arange(len(partition.demand.bundles)))

    @cached_property
    def sizes(self) -> Ints:
        """The slots of each layer that is read, in the order of first use."""
        read = np.array(self.partition.demand.read_bundles(), dtype=np.int64)
        return np.bincount(self.layer_of[read], weights=self.partition.flow.sizes[read]).astype(np.int64)

    @cached_property
    def _reading(self) -> list[tuple[int, frozenset[int]]]:
        """The steps that read, and the layers they read."""
        found = []
        for number, reads in enumerate(self.partition.demand.reads):
            if reads:
                found.append((number, frozenset(self.layer_of[list(reads)].tolist())))
        return found

    @cached_property
    def within(self) -> Bools:
        """The gaps in the midst of a layer: until the next use nothing but this layer is read, in the same pass."""
        uses = self.partition.uses
        place = {number: at for at, (number, _) in enumerate(self._reading)}
        keep: Bools = np.zeros(len(uses), dtype=bool)
        for gap, (bundle, step, reaches) in enumerate(
            zip(uses.bundle.tolist(), uses.step.tolist(), uses.reaches.tolist(), strict=True)
        ):
            layer, at = int(self.layer_of[bundle]), place[step] + 1
            if reaches < uses.num_steps:
                while self._reading[at][0] < reaches and layer in self._reading[at][1]:
                    at += 1
                keep[gap] = self._reading[at][0] == reaches
        return keep & uses.may_stay

    @cached_property
    def begins(self) -> Ints:
        """The steps in which a layer begins that the step before did not run."""
        begins, running = [], frozenset[int]()
        for number, layers in self._reading:
            if not layers <= running:
                begins.append(number)
            running = layers
        return np.array(begins, dtype=np.int64)

    def of_layers(self, layers: Ints) -> Bools:
        """Returns the gaps over which these layers can stay, and those of slots without bytes."""
        uses = self.partition.uses
        free = self.partition.flow.sizes[uses.bundle] == 0
        return (np.isin(self.layer_of[uses.bundle], layers) | free) & uses.may_stay


def levels(trace: Trace) -> Iterator[list[list[int]]]:
    """Yields the weights by layer, coarse to fine; layers in the order of first use, weights that are not read last."""
    uses = weight_uses(trace)
    first_used = list(dict.fromkeys(index for needs in trace.needs() for index in needs))
    unread = [[index] for index, _ in trace.homed() if not uses[index]]
    found: list[list[list[int]]] = []
    for depth in count(1):
        layers: dict[str, list[int]] = {}
        names = [trace.tensors[index].name for index in first_used]
        for index, name in zip(first_used, names, strict=True):
            layers.setdefault(_layer(name, depth), []).append(index)
        grouped = [*layers.values(), *unread]
        if grouped not in found:
            found.append(grouped)
            yield grouped
        if all(_layer(name, depth) == _module(name) for name in names):
            return


def _module(name: str) -> str:
    """Returns the module that owns a weight; the weight's own name where that has no dot."""
    return name.rpartition(".")[0] or name


def _layer(name: str, depth: int) -> str:
    """Returns the name up to its number `depth`, or the module where there are fewer numbers."""
    module = _module(name).split(".")
    numbers = [at for at, part in enumerate(module) if part.isdecimal()]
    return ".".join(module[: numbers[depth - 1] + 1] if len(numbers) >= depth else module)


def fastest_of(problem: Problem, found: Iterable[Draft | None]) -> Draft:
    """Returns the fastest of these, the earlier of two that are equally fast.

    Where none fits, nothing is resident and each of the finest bundles comes just in time: that always fits.
    """
    best: Draft | None = None
    for draft in found:
        if draft is not None and (best is None or draft.cost() < best.cost()):
            best = draft
    return just_in_time_draft(problem) if best is None else best


def just_in_time_draft(problem: Problem) -> Draft:
    """Returns the draft with nothing resident and each of the finest bundles coming right before its step."""
    finest = problem.finest
    keep = finest.uses.placeable(finest.demand, np.empty(0, dtype=np.int64))
    draft = draft_plan(finest, keep, problem.arena_bytes, lead=just_in_time)
    assert draft is not None, "the finest bundles fit every budget that is allowed, if nothing else is there"
    return draft


def just_in_time(visits: Visits) -> Ints:
    """Nothing is read before the step that waits for it."""
    return visits.first - 1


def shorter(longest: int) -> Iterator[int]:
    """Yields `longest` and ever smaller numbers, by steps that double, down to 0."""
    less = 0
    while longest - less > 0:
        yield longest - less
        less = 2 * less or 1
    yield 0
