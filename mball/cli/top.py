"""`mball top`: memory of the host and of GPUs, who holds it, and what goes over their links, live."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import Any

from rich.console import Console
from rich.live import Live

from mball.cli import TOP_INTERVAL_S
from mball.cli.top_look import Looker, as_document
from mball.cli.top_tables import draw
from mball.errors import ConfigError

_SIGNAL_STATUS = 128  # what a shell adds to the number of the signal that ended a command


class View(Enum):
    """How a look is shown: tables that are drawn anew until the user leaves, the same once, or JSON once."""

    LIVE = "live"
    TABLES = "tables"
    JSON = "json"


def run_top(view: View, *, interval_s: float | None) -> int:
    """Shows what there is. Where nobody looks at a terminal the live view is one look.

    `interval_s` is from look to look of the live view; None leaves it to mball. Returns 0, or 130 after Ctrl-C, as the
    shell has it. A machine without a GPU is shown, too.

    Raises:
        ConfigError: an interval was asked for, and there is one look only.
    """
    console = Console()
    if view is View.LIVE and not console.is_terminal:
        view = View.TABLES
    if view is not View.LIVE:
        if interval_s is not None:
            raise ConfigError(
                f"--interval {interval_s:g} is for the live view, and this is one look (--once, --json, or an output "
                "that is no terminal); drop it"
            )
        with Looker() as looker:
            look = looker.look_well()
        if view is View.JSON:
            print(json.dumps(as_document(look), indent=2))
        else:
            console.print(draw(look))
        return 0
    return _show_live(console, TOP_INTERVAL_S if interval_s is None else interval_s)


def _show_live(console: Console, interval_s: float) -> int:
    with _ended_by_signals() as ended, Looker() as looker:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            rest_s = 0.0
            while (number := ended.within(rest_s)) is None:
                began_s = time.monotonic()
                live.update(draw(looker.look()), refresh=True)
                rest_s = max(began_s + interval_s - time.monotonic(), 0.0)
        return _SIGNAL_STATUS + number


class _Ended:
    """Whether a signal asked for the end.

    A handler runs between any two lines of the program, so it takes no lock, which those lines may hold. A signal that
    comes just before a wait has its handler run after it; what ends the wait is the byte that the interpreter writes.
    """

    def __init__(self, wakeups: int) -> None:
        """`wakeups` is a descriptor that can be read once a signal came; it does not block."""
        self._wakeups = wakeups
        self._signal: int | None = None

    def by(self, number: int, frame: Any) -> None:
        self._signal = number

    def within(self, wait_s: float) -> int | None:
        """Waits until a signal comes, but no longer than this. Returns the signal's number, or None if none came."""
        if select.select([self._wakeups], [], [], wait_s)[0]:
            os.read(self._wakeups, 64)
        return self._signal


@contextmanager
def _ended_by_signals() -> Iterator[_Ended]:
    """Has Ctrl-C and termination end the view between two looks: at any other line they would leave half a screen."""
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    with ExitStack() as undo:
        wakeups, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        undo.callback(os.close, wakeups)
        undo.callback(os.close, wakes)
        undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(wakes, warn_on_full_buffer=False))
        ended = _Ended(wakeups)
        for number in numbers:
            undo.callback(signal.signal, number, signal.signal(number, ended.by))
        yield ended
