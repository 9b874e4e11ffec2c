"""`mball top`: memory of the host and of GPUs, who holds it, and what goes over their links, live."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live

from mball.cli.top_look import Looker, as_document
from mball.cli.top_tables import draw

_SIGNAL_STATUS = 128  # what a shell adds to the number of the signal that ended a command


def run_top(*, interval_s: float, once: bool, as_json: bool) -> int:
    """Shows what there is every `interval_s` until Ctrl-C, or once: as JSON, or where nobody looks at a terminal.

    Returns 0, or 130 after Ctrl-C, as the shell has it. A machine without a GPU is shown, too.
    """
    console = Console()
    if as_json or once or not console.is_terminal:
        with Looker() as looker:
            look = looker.look_well()
        if as_json:
            print(json.dumps(as_document(look), indent=2))
        else:
            console.print(draw(look))
        return 0
    with _ended_by_signals() as ended, Looker() as looker:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while not ended.is_set():
                began_s = time.monotonic()
                live.update(draw(looker.look()), refresh=True)
                ended.wait(max(began_s + interval_s - time.monotonic(), 0.0))
        return _SIGNAL_STATUS + ended.signal


class _Ended(threading.Event):
    """Set when a signal asked for the end; `signal` is its number."""

    signal = 0

    def by(self, number: int, frame: Any) -> None:
        self.signal = number
        self.set()


@contextmanager
def _ended_by_signals() -> Iterator[_Ended]:
    """Has Ctrl-C and termination end the view between two looks: at any other line they would leave half a screen."""
    ended = _Ended()
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ended.by) for number in numbers}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
