"""Who is served when on a link."""

from __future__ import annotations

from collections.abc import Sequence

from mball.schema import Link


class LinkQueue:
    """The requests on one link.

    Bytes are served in the order of the requests, a window of them at one time: a request has landed when what is
    behind it within the window, if anything is there by then, is served too.
    """

    def __init__(self, landed_s: list[float], seconds: Sequence[float], link: Link) -> None:
        self.free_s = 0.0
        self._landed_s = landed_s
        self._seconds = seconds
        self._latency_s = link.latency_s
        self._window_s = link.window_bytes / link.bandwidth_bytes_per_s
        self._recent: list[tuple[int, float]] = []  # those that others may still join, with the latest they can land

    def add(self, number: int, now_s: float) -> None:
        """Serves request `number`, made now."""
        landed_s, seconds = self._landed_s, self._seconds[number]
        if self._recent:
            self._recent = [(other, latest_s) for other, latest_s in self._recent if now_s < landed_s[other] < latest_s]
            for other, latest_s in self._recent:
                landed_s[other] = min(landed_s[other] + seconds, latest_s)
        ready_s = now_s + self._latency_s
        landed_s[number] = self.free_s = (ready_s if ready_s > self.free_s else self.free_s) + seconds
        if self._window_s:
            self._recent.append((number, self.free_s + self._window_s))
