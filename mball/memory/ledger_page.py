"""A ledger where other processes of the same user can read it while it is kept, for `mball top`.

It is one page of memory that only a descriptor names (a memfd): nothing lies in a file system, and nothing is left
behind however the process ends. Others find it under /proc, which lets them in as far as it would let a debugger in.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)

_NAME = "mball-ledger"
_LINK = f"/memfd:{_NAME} (deleted)"
_PAGE_BYTES = 4096
_VERSION = 1
_ATTEMPTS = 3  # a page may be read while it is written, which gives half of either


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedLedger:
    """What a ledger said of itself. `kinds` are bytes by what they are for; `peak_bytes` is of all together."""

    budget_bytes: int
    peak_bytes: int
    kinds: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Publishers:
    """The processes that publish ledgers, by number, and how many processes could not be looked into."""

    ledgers: Mapping[int, tuple[PublishedLedger, ...]]
    num_hidden: int


class LedgerPage:
    """The page. Where the system gives no memory for it nothing is published, and nothing else changes."""

    def __init__(self) -> None:
        """Makes an empty page, which is not found before the first `write`."""
        self._descriptor = -1
        try:
            self._descriptor = os.memfd_create(_NAME)  # closed in programs that this process starts
        except (OSError, AttributeError) as error:  # the system forbids it, or Python was built for an older one
            _log.info("mball top will not see the budget of this process: %s", error)

    def write(self, published: PublishedLedger) -> None:
        """Shows this from now on. About 10 µs, and never fails."""
        if self._descriptor < 0:
            return
        document = {
            "version": _VERSION,
            "pid": os.getpid(),  # a forked child has the descriptor, too, and not the engine
            "budget_bytes": published.budget_bytes,
            "peak_bytes": published.peak_bytes,
            "kinds": dict(published.kinds),
        }
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, json.dumps(document).encode().ljust(_PAGE_BYTES), 0)

    def close(self) -> None:
        """Publishes nothing any more. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def find_publishers(proc: Path = Path("/proc")) -> Publishers:
    """Looks through all processes. Takes milliseconds for hundreds of them."""
    found: dict[int, tuple[PublishedLedger, ...]] = {}
    num_hidden = 0
    for process in proc.iterdir():
        if not process.name.isdecimal():
            continue
        try:
            descriptors = list((process / "fd").iterdir())
        except PermissionError:
            num_hidden += 1
            continue
        except OSError:  # it has ended
            continue
        ledgers = [page for descriptor in descriptors if (page := _read(process, descriptor)) is not None]
        if ledgers:
            found[int(process.name)] = tuple(ledgers)
    return Publishers(ledgers=dict(sorted(found.items())), num_hidden=num_hidden)


def _read(process: Path, descriptor: Path) -> PublishedLedger | None:
    try:
        if os.readlink(descriptor) != _LINK:
            return None
        own_numbers = _own_numbers(process)
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                document = json.loads(descriptor.read_bytes())
                if document["version"] != _VERSION or document["pid"] not in own_numbers:
                    return None
                return PublishedLedger(
                    budget_bytes=int(document["budget_bytes"]),
                    peak_bytes=int(document["peak_bytes"]),
                    kinds={str(kind): int(num_bytes) for kind, num_bytes in document["kinds"].items()},
                )
    except OSError:  # it has ended, or closed its page, meanwhile
        return None
    return None


def _own_numbers(process: Path) -> set[int]:
    """The numbers of a process, as it sees itself and as we do: in a container they differ."""
    for line in (process / "status").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name == "NSpid":
            return {int(number) for number in numbers.split()}
    return {int(process.name)}
