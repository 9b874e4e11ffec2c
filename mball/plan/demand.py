"""What a trace asks for once its weights are in bundles: who reads which bundle when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from mball.plan.at_home import AtHome
from mball.schema import Bundle, Lane, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The reads of a trace in terms of bundles.

    Attributes:
        bundles: a partition of all weights, and a bundle for each tensor born in the pass that is given places.
        pooled: bundles of tiny weights, which are resident where a pass repeats and nothing writes them.
        born: for each bundle whether it is of a tensor that is born in the pass.
        reads: for each trace step the bundles that it must find on the device, in order of first use, and those that
            it bears there; none for one on the host lane.
        gathers: for each trace step the bundles of which it reads rows, with the bytes of those, and that it does not
            read: they need not be there.
        uses: for each bundle the trace steps that read or bear it, ascending.
        moved_bytes: for each bundle the bytes that one transfer moves.
        at_home: what uses the bytes of bundles below the device.
        read_bytes_before: element i is the sum of slot sizes over all reads of steps [0, i).
    """

    bundles: tuple[Bundle, ...]
    pooled: frozenset[int]
    born: tuple[bool, ...]
    reads: tuple[tuple[int, ...], ...]
    gathers: tuple[tuple[tuple[int, int], ...], ...]
    uses: tuple[tuple[int, ...], ...]
    moved_bytes: tuple[int, ...]
    at_home: AtHome
    read_bytes_before: tuple[int, ...]

    @classmethod
    def of(cls, trace: Trace, bundles: Sequence[Bundle], pooled: frozenset[int] = frozenset()) -> Self:
        """Returns the demand of `trace` under this partition of its weights."""
        reads = bundle_reads(trace, bundles)
        uses: list[list[int]] = [[] for _ in bundles]
        sizes = [bundle.size_bytes for bundle in bundles]
        before = [0]
        for number, step_reads in enumerate(reads):
            for bundle in step_reads:
                uses[bundle].append(number)
            before.append(before[-1] + sum(map(sizes.__getitem__, step_reads)))
        homeless = {index for index, tensor in enumerate(trace.tensors) if tensor.home is None}
        return cls(
            bundles=tuple(bundles),
            pooled=pooled,
            born=tuple([not homeless.isdisjoint(bundle.tensors) for bundle in bundles]),
            reads=tuple(reads),
            gathers=tuple(bundle_gathers(trace, bundles)),
            uses=tuple(map(tuple, uses)),
            moved_bytes=tuple([bundle.moved_bytes for bundle in bundles]),
            at_home=AtHome.of(trace, bundles),
            read_bytes_before=tuple(before),
        )

    def read_bundles(self) -> list[int]:
        """Returns the bundles that any step reads."""
        return [bundle for bundle, steps in enumerate(self.uses) if steps]

    def tables(self) -> list[int]:
        """Returns the bundles that steps read rows of, and no step as a whole."""
        gathered = {bundle for gathers in self.gathers for bundle, _ in gathers}
        return [bundle for bundle in sorted(gathered) if not self.uses[bundle]]

    def slot_bytes(self, bundles: Sequence[int]) -> int:
        """Returns the bytes of the slots of these bundles."""
        return sum(self.bundles[bundle].size_bytes for bundle in bundles)


def bundle_reads(trace: Trace, bundles: Sequence[Bundle]) -> list[tuple[int, ...]]:
    """Returns for each trace step the bundles it must find on the device, by first use, and those it bears there."""
    home = {index: number for number, bundle in enumerate(bundles) for index in bundle.tensors}
    found = [
        (home[needs[0]],) if len(needs) == 1 else tuple(dict.fromkeys(map(home.__getitem__, needs)))
        for needs in trace.needs()
    ]
    born = {index: tensor for index, tensor in trace.movable() if index in home}
    if not born:
        return found
    reads = [dict.fromkeys(step) for step in found]
    for number, step in enumerate(trace.steps):
        if step.lane is Lane.COMPUTE:
            reads[number].update((home[index], None) for index in step.reads if index in born)
    for index, tensor in born.items():
        assert tensor.live is not None
        if not trace.is_born_below(tensor):
            reads[tensor.live.first][home[index]] = None
    return list(map(tuple, reads))


def bundle_gathers(trace: Trace, bundles: Sequence[Bundle]) -> list[tuple[tuple[int, int], ...]]:
    """Returns for each trace step the bundles of which it only reads rows, with the bytes of those rows."""
    rows = trace.gathered()
    if not any(rows):
        return [() for _ in rows]
    home = {index: number for number, bundle in enumerate(bundles) for index in bundle.tensors}
    found = []
    for needs, gathers in zip(trace.needs(), rows, strict=True):
        read = {home[index] for index in needs}
        sizes: dict[int, int] = {}
        for gather in gathers:
            bundle = home[gather.tensor]
            if bundle not in read:
                sizes[bundle] = sizes.get(bundle, 0) + gather.size_bytes
        found.append(tuple(sizes.items()))
    return found
