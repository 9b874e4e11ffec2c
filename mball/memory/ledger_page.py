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
_END_OF_BYTES = 2**63
# What reading a page raises that is half written, or another's: numbers too large or too long, brackets too deep.
_NO_PAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
_ATTEMPTS = 3  # a page may be read while it is written, which gives half of either


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedLedger:
    """What a ledger said of itself. `kinds` are bytes by what they are for; `peak_bytes` is of all together."""

    budget_bytes: int
    peak_bytes: int
    kinds: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Publishers:
    """The processes that publish ledgers, by number, and how many processes could not be looked into.

    Threads of the kernel, which publish nothing, are not among them.
    """

    ledgers: Mapping[int, tuple[PublishedLedger, ...]]
    num_hidden: int


class LedgerPage:
    """The page. Where the system gives no memory for it nothing is published, and nothing else changes."""

    def __init__(self) -> None:
        """Makes an empty page, which is not found before the first `write`."""
        self._pid = os.getpid()
        self._descriptor = _make_page()

    def write(self, published: PublishedLedger) -> None:
        """Shows this from now on. About 10 µs, and never fails. A forked child gets a page of its own."""
        if self._descriptor is None:
            return
        if self._pid != os.getpid():
            self.close()  # the child's descriptor; the page is its parent's
            self._pid, self._descriptor = os.getpid(), _make_page()
            if self._descriptor is None:
                return
        document = {
            "version": _VERSION,
            "pid": self._pid,  # a forked child has the descriptor, too, and not the engine
            "budget_bytes": published.budget_bytes,
            "peak_bytes": published.peak_bytes,
            "kinds": dict(published.kinds),
        }
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, json.dumps(document).encode().ljust(_PAGE_BYTES), 0)

    def close(self) -> None:
        """Publishes nothing any more. Idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _make_page() -> int | None:
    try:
        return os.memfd_create(_NAME)  # closed in programs that this process starts
    except (OSError, AttributeError) as error:  # the system forbids it, or Python was built for an older one
        _log.info("mball top will not see the budget of this process: %s", error)
        return None


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
            if not _is_of_the_kernel(process):
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
            with contextlib.suppress(*_NO_PAGE):
                document = json.loads(_read_page(descriptor))
                if document["version"] != _VERSION or document["pid"] not in own_numbers:
                    return None
                return PublishedLedger(
                    budget_bytes=_bytes_of(document["budget_bytes"]),
                    peak_bytes=_bytes_of(document["peak_bytes"]),
                    kinds={str(kind): _bytes_of(num_bytes) for kind, num_bytes in document["kinds"].items()},
                )
    except OSError:  # it has ended, or closed its page, meanwhile
        return None
    return None


def _read_page(descriptor: Path) -> bytes:
    """Reads no more than a page has: the memory behind a name like ours may be of any size."""
    with descriptor.open("rb", buffering=0) as file:
        return file.read(_PAGE_BYTES)


def _bytes_of(number: object) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < _END_OF_BYTES:
        raise ValueError(f"{number!r} is no number of bytes")
    return number


def _is_of_the_kernel(process: Path) -> bool:
    """Whether it is a thread of the kernel, which runs no program."""
    try:
        return not (process / "cmdline").read_bytes()
    except OSError:
        return False


def _own_numbers(process: Path) -> set[int]:
    """The numbers of a process, as it sees itself and as we do: in a container they differ."""
    for line in (process / "status").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name == "NSpid":
            return {int(number) for number in numbers.split()}
    return {int(process.name)}
