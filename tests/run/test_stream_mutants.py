"""Takes each wait and each event out of the engine, one at a time: some order of copies and compute must show it."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import mball.run
from mball.run.engine import Engine
from mball.run.execution import Execution
from mball.run.rows import RowsAtHome
from tests.run import stream_scenarios as scenarios
from tests.run import training_scenarios as training
from tests.run.harness import DifferentError
from tests.streams import StreamError


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One line of a method with something else in its place.

    Attributes:
        line: what orders compute, copies and the host in it.
        instead: what is left.
        shown_by: the scenario that fails then, with `capture`.
    """

    method: Callable[..., Any]
    line: str
    instead: str = "pass"
    shown_by: Callable[[Path, str], None]
    capture: str = "operators"

    def __str__(self) -> str:
        return f"{self.method.__qualname__}: {self.line}"

    def apply(self, patch: pytest.MonkeyPatch) -> None:
        """Breaks the engine."""
        source = textwrap.dedent(inspect.getsource(self.method))
        assert source.count(self.line) == 1, f"{self.method.__qualname__} has no such line, or several"
        scope: dict[str, Any] = {}
        broken = "from __future__ import annotations\n" + source.replace(self.line, self.instead)
        exec(compile(broken, f"<{self}>", "exec"), self.method.__globals__, scope)
        owner = self.method.__globals__[self.method.__qualname__.partition(".")[0]]
        patch.setattr(owner, self.method.__name__, scope[self.method.__name__])


MUTANTS = (
    # A step does not wait for its bundles.
    Mutant(
        method=Execution._land,
        line="self._stall(occupant, occupant.event)",
        shown_by=scenarios.writes,
    ),
    # Nobody waits for anything.
    Mutant(method=Execution._stall, line="self.device.wait(event)", shown_by=scenarios.jumps, capture="graphs"),
    # Copies go where compute still reads: not ordered at all, or after another step than the last one.
    Mutant(
        method=Execution._bring,
        line="self.device.copy(reads, self._released)",
        instead="self.device.copy(reads, None)",
        shown_by=scenarios.writes,
    ),
    Mutant(method=Execution._release, line="self._released = self.device.record()", shown_by=scenarios.writes),
    # Copies go where the copy of what was given up is still to land.
    Mutant(method=Execution._evict, line="self._stall(occupant, occupant.event)", shown_by=scenarios.jumps),
    Mutant(method=Execution._evict, line="self._released = self.device.record()", shown_by=scenarios.jumps),
    # The optimizer wrote to homes, and slots stay as they were.
    Mutant(
        method=Engine._notice_writes,
        line="self.execution.forget(self.homes.collect_writes())",
        instead="self.homes.collect_writes()",
        shown_by=training.trains,
    ),
    # Memory goes while compute reads there, or a copy has not landed.
    Mutant(method=Execution._resize, line="self._released.wait()", shown_by=scenarios.budgets),
    Mutant(method=Execution.empty, line="self._released.wait()", shown_by=scenarios.interrupted_plans),
    Mutant(method=Execution.catch_up, line="self.device.record().wait()", shown_by=scenarios.unwraps),
    Mutant(method=Execution.close, line="self.device.close()", shown_by=scenarios.unwraps),
    # After an exception.
    Mutant(method=Execution.abort, line="self.device.synchronize()", shown_by=scenarios.interrupted_copies),
    Mutant(
        method=Execution.abort,
        line="self._released = self.device.record()",
        shown_by=scenarios.interrupted_steps,
        capture="graphs",
    ),
    # Compute goes on with what did not come.
    Mutant(method=Execution._hear, line="event.wait()", shown_by=scenarios.failed_reads),
    # The host reads what compute has not made yet.
    Mutant(
        method=RowsAtHome.expect,
        line=" and self._device.record().done()",
        instead="",
        shown_by=scenarios.hints,
    ),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_what_is_left_out_is_missed(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    with pytest.raises((DifferentError, StreamError)):
        mutant.shown_by(tmp_path, mutant.capture)


# Without these questions the host would wait for what it asks about, and all would be right, later.
QUESTIONS = {
    "if occupant is not None and (occupant.event is None or occupant.event.done()):",
    "for landed in [each for each in self._landing if each[1].done()]:",
}
ORDERS = re.compile(
    r"\.wait\(|\.record\(\)|\.synchronize\(\)|\.done\(\)|_stall\(occ|forget\(self\.|device\.copy\(|device\.close\(\)"
)


def test_every_wait_and_every_event_is_in_the_table() -> None:
    """Whoever adds one to the engine adds the mutant that shows what it is for."""
    (folder,) = mball.run.__path__
    lines = [line.strip() for path in sorted(Path(folder).glob("*.py")) for line in path.read_text().splitlines()]
    found = [line for line in lines if ORDERS.search(line) and line not in QUESTIONS]
    assert len(found) == len(MUTANTS), found
    for line in found:
        assert any(mutant.line in line for mutant in MUTANTS), f"{line!r} orders something, and no mutant leaves it out"
