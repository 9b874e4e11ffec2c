"""Small random passes for which the optimum is known: seeded, the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from mball.schema import Link, Machine, Step, Tensor, Trace

PAGE_BYTES = 4096
INSTANCES_PER_CLASS = 24
MOST_WEIGHTS, MOST_USES = 9, 11
SIZES = (50, 122, 244, 488, 976)  # pages: 0.2 to 4 MB
TIMES_S = (1e-4, 3e-4, 1e-3, 4e-3)
BUDGETS = {"tight": (0.0, 0.1, 0.2), "medium": (0.3, 0.4, 0.5, 0.6), "roomy": (0.7, 0.8, 0.9, 0.95)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A class of instances.

    Attributes:
        even_sizes, even_times: all weights, or all steps, are alike.
        shared: some weights are read by two steps.
        budget: how much of what lies between the largest step's weights and all of them: a key of `BUDGETS`.
    """

    even_sizes: bool
    even_times: bool
    shared: bool
    budget: str

    def title(self) -> str:
        """Returns what tells it from other classes."""
        sizes, times = ("even" if even else "uneven" for even in (self.even_sizes, self.even_times))
        return f"{sizes} sizes, {times} times, {'shared weights' if self.shared else 'none shared'}, {self.budget}"


KINDS = tuple(
    Kind(even_sizes=sizes, even_times=times, shared=shared, budget=budget)
    for sizes, times, shared, budget in product((True, False), (True, False), (False, True), BUDGETS)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A pass under a budget: every other one on a link with latency, one in four running only once."""

    name: str
    trace: Trace
    machine: Machine
    budget_bytes: int


def instances(kind: Kind) -> Iterator[Instance]:
    """Yields the instances of a class."""
    for number in range(INSTANCES_PER_CLASS):
        yield _instance(kind, number)


def _instance(kind: Kind, number: int) -> Instance:
    name = f"{kind.title()}, number {number}"
    chance = random.Random(name)
    count = chance.randint(3, MOST_WEIGHTS)
    typical_pages, typical_s = chance.choice(SIZES), chance.choice(TIMES_S)
    sizes = [PAGE_BYTES * (typical_pages if kind.even_sizes else chance.choice(SIZES)) for _ in range(count)]
    readers = list(range(count))
    for _ in range(chance.randint(1, MOST_USES - MOST_WEIGHTS) if kind.shared else 0):
        again = chance.randint(0, len(readers))
        beside = {*readers[max(again - 1, 0) : again + 1]}
        readers.insert(again, chance.choice([weight for weight in range(count) if weight not in beside]))
    tensors, offset = [], 0
    for weight, size in enumerate(sizes):
        tensors.append(
            Tensor.weight(f"w{weight}", dtype="uint8", shape=(size,), size_bytes=size, file="f", offset_bytes=offset)
        )
        offset += size + PAGE_BYTES * chance.choice([0, 25])
    steps = [
        Step(
            name=f"s{step}",
            graph="g",
            reads=(weight,),
            scratch_bytes=0,
            flops=0,
            time_s=typical_s if kind.even_times else chance.choice(TIMES_S),
        )
        for step, weight in enumerate(readers)
    ]
    share = chance.choice(BUDGETS[kind.budget])
    smallest, total = max(sizes), sum(sizes)
    return Instance(
        name=name,
        trace=Trace(name=name, tensors=tuple(tensors), steps=tuple(steps), cyclic=number % 4 != 3),
        machine=Machine(
            name="1 GB/s",
            page_bytes=PAGE_BYTES,
            alignment_bytes=512,
            link=Link(bandwidth_bytes_per_s=1e9, latency_s=1e-4 * (number % 2)),
        ),
        budget_bytes=smallest + int((total - smallest) * share),
    )
