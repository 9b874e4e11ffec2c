"""What `mball top` shows: one look at the memory of a machine, its GPUs, and who holds them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mball.memory import facts
from mball.memory.facts import CgroupMemory, MachineMemory
from mball.memory.ledger_page import PublishedLedger, find_publishers
from mball.observe.gpus import GpuSnapshot
from mball.observe.nvml import NoGpuError, Nvml, needs_second_look, open_nvml
from mball.observe.told import NotTold, Told

# Between two looks, where there is only one to be shown and rates need two.
_GLANCE_S = 0.25


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MballProcess:
    """A process that runs models with mball.

    Attributes:
        command: its command line.
        anonymous_bytes: host memory of its own, in no file.
        rss_bytes: all pages that it maps; shared ones count whole.
        ledgers: one for each budget that it runs under.
    """

    pid: int
    command: str
    anonymous_bytes: int
    rss_bytes: int
    ledgers: tuple[PublishedLedger, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One look.

    Attributes:
        cgroup: the tightest limit that this terminal is under; None where no control groups are seen.
        gpus: or why there are none.
        mball: the processes that run mball, by number.
        num_hidden: processes of other users, which may run mball and cannot be looked into.
    """

    machine: MachineMemory
    cgroup: CgroupMemory | None
    gpus: Told[GpuSnapshot]
    mball: tuple[MballProcess, ...]
    num_hidden: int


class Looker:
    """Looks again and again. NVML is open as long as the `with` block lasts: rates are counted from look to look."""

    def __init__(self, *, proc: Path = Path("/proc"), sleep: Callable[[float], None] = time.sleep) -> None:
        self._proc = proc
        self._sleep = sleep
        self._opened: AbstractContextManager[Nvml] | None = None
        self._nvml: Told[Nvml] = NotTold(why="NVML is not open")

    def __enter__(self) -> Self:
        opened = open_nvml()
        try:
            self._nvml = opened.__enter__()
            self._opened = opened
        except NoGpuError as error:
            self._nvml = NotTold(why=str(error))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.__exit__(kind, error, traceback)

    def look(self) -> Look:
        """Looks once. Rates that need two looks are told from the second one on."""
        publishers = find_publishers(self._proc)
        found = [self._process(pid, ledgers) for pid, ledgers in publishers.ledgers.items()]
        return Look(
            machine=facts.machine_memory(self._proc),
            cgroup=facts.cgroup_memory(self._proc),
            gpus=self._gpus(),
            mball=tuple(process for process in found if process is not None),
            num_hidden=publishers.num_hidden,
        )

    def look_well(self) -> Look:
        """Looks once, or twice in a short time where that tells more."""
        look = self.look()
        if isinstance(look.gpus, NotTold) or not needs_second_look(look.gpus):
            return look
        self._sleep(_GLANCE_S)
        return self.look()

    def _gpus(self) -> Told[GpuSnapshot]:
        if isinstance(self._nvml, NotTold):
            return self._nvml
        try:
            return self._nvml.snapshot()
        except NoGpuError as error:
            return NotTold(why=str(error))

    def _process(self, pid: int, ledgers: tuple[PublishedLedger, ...]) -> MballProcess | None:
        try:
            command = (self._proc / str(pid) / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ")
            memory = facts.process_memory(self._proc, process=pid, shares=False)
        except OSError:  # it has ended
            return None
        return MballProcess(
            pid=pid,
            command=command.decode(errors="replace"),
            anonymous_bytes=memory.anonymous_bytes,
            rss_bytes=memory.rss_bytes,
            ledgers=ledgers,
        )


def as_document(value: Any) -> Any:
    """Returns `value` as JSON has it: what is not told is null, and its object says under "not_told" why."""
    if isinstance(value, NotTold):
        return None
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (tuple, list)):
        return [as_document(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    document: dict[str, Any] = {}
    not_told: dict[str, str] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if field.name == "not_listed":
            not_told |= {what: reason.why for what, reason in item}
            continue
        document[field.name] = as_document(item)
        if isinstance(item, NotTold):
            not_told[field.name] = item.why
    return document | ({"not_told": not_told} if not_told else {})
