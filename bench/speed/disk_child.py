"""A process that reads as the yardstick does, as it is told. It loads no torch. Run by `bench.speed.contender`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bench.speed.preadv import Setting, Span, Yardstick, huge_pages
from bench.speed.protocol import serve

# Where yardsticks read to, over and over; more than any one extent.
RING_BYTES = 512 << 20


class DiskChild:
    """What the process holds between two lines; each method answers one kind of line."""

    def __init__(self) -> None:
        self._memory: memoryview | None = None
        self._yardsticks: dict[str, tuple[Yardstick, Setting]] = {}

    def prepare(self, name: str, spans: list[dict[str, Any]]) -> dict[str, Any]:
        """Prepares a yardstick over these spans and finds its best setting."""
        if self._memory is None:
            self._memory = huge_pages(RING_BYTES)
        found = [Span(**span) for span in spans]
        yardstick, some = Yardstick(found, self._memory), Yardstick(_first(found, RING_BYTES), self._memory)
        setting = some.best_setting()
        some.close()
        self._yardsticks[name] = (yardstick, setting)
        return {**asdict(setting), "size_bytes": yardstick.size_bytes}

    def read(self, name: str) -> dict[str, Any]:
        """Reads a yardstick's spans once; returns the seconds that took."""
        yardstick, setting = self._yardsticks[name]
        return {"steps_s": [yardstick.read(setting)]}


def _first(spans: list[Span], size_bytes: int) -> list[Span]:
    """Returns the first spans, of `size_bytes` together or a little more."""
    taken, total = [], 0
    for span in spans:
        if total >= size_bytes:
            break
        taken.append(span)
        total += span.size_bytes
    return taken


if __name__ == "__main__":
    serve(DiskChild())
