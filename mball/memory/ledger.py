"""The ledger: every byte of the budget, by what it is for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from mball.errors import DeviceError
from mball.memory.ledger_page import PublishedLedger
from mball.units import format_bytes


class Kind(Enum):
    """What bytes are for.

    STAGING is what files pass through on their way to the arena; SCRATCH what an allocator of activations keeps beside
    them: rounding, free blocks.
    """

    BUFFERS = "buffers"
    STAGING = "staging"
    ARENA = "arena"
    ACTIVATIONS = "activations"
    CAPTURE = "capture"
    GRAPHS = "graphs"
    SCRATCH = "scratch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Bytes now, and the most there ever were."""

    current_bytes: int
    peak_bytes: int


_Books = tuple[int, dict[Kind, int], dict[Kind, int], int]  # the budget, by kind now and at most, and the most of all


class Ledger:
    """Counts bytes by `Kind` and never lets the total pass the budget. Thread-safe.

    `publish` is called with what there is after each change.
    """

    def __init__(self, budget_bytes: int, *, publish: Callable[[PublishedLedger], None] = lambda _: None) -> None:
        self._publish = publish
        self._budget_bytes = budget_bytes
        self._current = dict.fromkeys(Kind, 0)
        self._peak = dict.fromkeys(Kind, 0)
        self._total_peak = 0
        self._lock = threading.Lock()

    @property
    def budget_bytes(self) -> int:
        """The cap on the total."""
        return self._budget_bytes

    def state(self) -> _Books:
        """Returns what `restore` takes."""
        with self._lock:
            return self._budget_bytes, dict(self._current), dict(self._peak), self._total_peak

    def restore(self, state: _Books) -> None:
        """Goes back to the cap and the accounts that there were."""
        with self._lock:
            budget_bytes, current, peak, total_peak = state
            self._budget_bytes, self._total_peak = budget_bytes, total_peak
            self._current, self._peak = dict(current), dict(peak)
            self._tell()

    def set_budget(self, budget_bytes: int) -> None:
        """Sets another cap; peaks begin anew.

        Raises:
            DeviceError: more than that is taken now; nothing is changed then. Give back first.
        """
        with self._lock:
            total = sum(self._current.values())
            if total > budget_bytes:
                raise DeviceError(
                    f"{format_bytes(total)} ({total} bytes) are taken, so the budget cannot be {budget_bytes} bytes; "
                    "give memory back first"
                )
            self._budget_bytes = budget_bytes
            self._peak = dict(self._current)
            self._total_peak = total
            self._tell()

    def set(self, kind: Kind, num_bytes: int) -> None:
        """Enters that `kind` now takes `num_bytes` (not negative). Call it before the memory is taken.

        Raises:
            DeviceError: the total would exceed the budget; nothing is entered then. Giving back is never refused.
        """
        assert num_bytes >= 0, num_bytes
        with self._lock:
            total = sum(self._current.values()) - self._current[kind] + num_bytes
            if total > self._budget_bytes and num_bytes > self._current[kind]:
                others = ", ".join(f"{other.value} {self._current[other]} bytes" for other in Kind if other is not kind)
                raise DeviceError(
                    f"{kind.value} need {format_bytes(num_bytes)} ({num_bytes} bytes), which makes {total} bytes of a "
                    f"budget of {self._budget_bytes} bytes ({others}); raise the budget by "
                    f"{total - self._budget_bytes} bytes"
                )
            self._current[kind] = num_bytes
            self._peak[kind] = max(self._peak[kind], num_bytes)
            self._total_peak = max(self._total_peak, total)
            self._tell()

    def account(self, kind: Kind) -> Account:
        """Returns the account of one kind."""
        with self._lock:
            return Account(current_bytes=self._current[kind], peak_bytes=self._peak[kind])

    @property
    def current_bytes(self) -> int:
        """All kinds together, now."""
        with self._lock:
            return sum(self._current.values())

    @property
    def peak_bytes(self) -> int:
        """The largest total there ever was, which is not the sum of the kinds' peaks."""
        with self._lock:
            return self._total_peak

    def snapshot(self) -> Mapping[str, Account]:
        """Returns every account by name, and ``"total"``, all of the same moment."""
        with self._lock:
            accounts = {
                kind.value: Account(current_bytes=self._current[kind], peak_bytes=self._peak[kind]) for kind in Kind
            }
            accounts["total"] = Account(current_bytes=sum(self._current.values()), peak_bytes=self._total_peak)
            return accounts

    def _tell(self) -> None:
        kinds = {kind.value: num_bytes for kind, num_bytes in self._current.items()}
        self._publish(PublishedLedger(budget_bytes=self._budget_bytes, peak_bytes=self._total_peak, kinds=kinds))
