"""Says when somebody waits long for a disk: nothing times out, but nothing hangs silently either."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

from mball.units import format_bytes

# A healthy disk answers in milliseconds, one that spins up or a network that comes back in seconds.
SLOW_S = 10.0
_TICK_S = 0.5

_logger = logging.getLogger(__name__)


class Waited(Protocol):
    """Something under way; see `ReadHandle`."""

    @property
    def size_bytes(self) -> int:
        """Bytes that it moves."""

    def done(self) -> bool:
        """Whether it is over."""


class _Wait:
    __slots__ = ("doing", "handle", "since_s")

    def __init__(self, handle: Waited, doing: Callable[[], str]) -> None:
        self.handle = handle
        self.doing = doing
        self.since_s = time.monotonic()


class _Watch:
    """Everybody who waits now, and the thread that looks at the clock."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.waits: dict[int, _Wait] = {}
        self.somebody = threading.Event()
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.pid = os.getpid()

    def start(self) -> None:
        with self.lock:
            if self.thread is None:
                thread = threading.Thread(target=self.run, name="mball-slow-disk", daemon=True)
                thread.start()
                self.thread = thread

    def run(self) -> None:
        while True:
            self.somebody.wait()
            self.somebody.clear()
            while self.waits:
                time.sleep(_TICK_S)
                for number, wait in list(self.waits.items()):
                    waited_s = time.monotonic() - wait.since_s
                    # An interrupt may have kept somebody from saying that the wait is over.
                    if wait.handle.done():
                        self.waits.pop(number, None)
                    elif waited_s >= SLOW_S:
                        self.waits.pop(number, None)  # said once
                        _logger.warning(
                            "%s: %s, asked for and not done after %.0f s. It is waited for further; the disk is slow, "
                            "busy or failing (dmesg may say why)",
                            wait.doing(),
                            format_bytes(wait.handle.size_bytes),
                            waited_s,
                        )


_watch = _Watch()


def watched(handle: Waited, wait: Callable[[], object], doing: Callable[[], str]) -> None:
    """Calls `wait`, and warns once if that takes longer than `SLOW_S`.

    Args:
        handle: what is waited for.
        wait: waits for it; its error is raised.
        doing: says what is done to which file, such as ``reading model.safetensors``.
    """
    global _watch
    if handle.done():
        wait()
        return
    if _watch.pid != os.getpid():
        _watch = _Watch()  # a forked child has no such thread
    watch = _watch
    if watch.thread is None:
        watch.start()
    number = next(watch.numbers)
    watch.waits[number] = _Wait(handle, doing)
    try:
        if not watch.somebody.is_set():
            watch.somebody.set()
        wait()
    finally:
        watch.waits.pop(number, None)
