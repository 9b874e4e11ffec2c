"""In which order copies are asked for, where host memory is planned for that order."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from mball.schema import Transfer


class CopyOrder:
    """Copies of a plan in its order, pass after pass, each as soon as it may start and all before it were asked for."""

    def __init__(self, transfers: Sequence[Transfer], num_steps: int) -> None:
        self._transfers = transfers
        self._num_steps = num_steps
        self._next = 0
        self._allowed: set[int] = set()

    def allow(self, numbers: Iterable[int]) -> Iterator[int]:
        """Says that these may start, and yields those whose turn it is."""
        self._allowed.update(numbers)
        while self._next in self._allowed:
            self._allowed.remove(self._next)
            number, self._next = self._next, (self._next + 1) % len(self._transfers)
            yield number

    def jump(self, step: int) -> None:
        """Says that all copies that may start before `step` were asked for, or are not needed any more."""
        if self._transfers:
            afters = [transfer.after for transfer in self._transfers]
            self._next = bisect_left(afters, step) % len(afters)
            self._allowed = {number for number, after in enumerate(afters) if after + self._num_steps < step}
