"""One captured graph for many weights: Dynamo calls it for equal layers too, whose Parameters are other arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mball.errors import WrapError

Runner = Callable[..., Any]


class RunnersByWeights:
    """What runs one graph, by the weights that it is called with.

    Args:
        runner: runs it for the weights that it was captured with.
        renumbered: returns the same for others: given what its name has besides, and for each weight that takes the
            place of which. None where `runner` takes any weights.
        name: of a weight that the graph reads, for people.
        weights: that it was captured with.
    """

    def __init__(
        self,
        runner: Runner,
        renumbered: Callable[[str, Mapping[int, int]], Runner] | None,
        name: str,
        weights: Sequence[int],
    ) -> None:
        self._runner = runner
        self._renumbered = renumbered
        self._name = name
        self._weights = tuple(weights)
        self._numbers = itertools.count(1)
        self._known: dict[tuple[int, ...], Runner] = {self._weights: runner}

    def __len__(self) -> int:
        return len(self._known)

    def of(self, weights: tuple[int, ...], living: Callable[[], Collection[int]] | None = None) -> Runner:
        """Returns what runs the graph for these weights; what is for weights that are not among `living` is forgotten.

        Raises WrapError where others are tied than when it was captured.
        """
        found = self._known.get(weights)
        if found is None:
            if living is not None:
                self._keep(frozenset(living()))
            found = self._runner
            if self._renumbered is not None:
                found = self._renumbered(f"@{next(self._numbers)}", self.replaced(weights))
            self._known[weights] = found
        return found

    def replaced(self, weights: Sequence[int]) -> dict[int, int]:
        """Returns which of these takes the place of each weight that the graph was captured with."""
        pairs = set(zip(self._weights, weights, strict=True))
        if len(pairs) != len(set(self._weights)) or len(pairs) != len(set(weights)):
            raise WrapError(
                f"the graph that reads {self._name!r} was captured where other weights were tied than in this "
                "model: make tied weights one Parameter, or compile with other options"
            )
        return dict(pairs)

    def _keep(self, living: frozenset[int]) -> None:
        for known in [known for known in self._known if known != self._weights and not living.issuperset(known)]:
            del self._known[known]
