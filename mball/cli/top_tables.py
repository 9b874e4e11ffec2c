"""A look of `mball top` as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mball.cli.top_look import Look, MballProcess
from mball.memory.facts import CgroupMemory, MachineMemory
from mball.memory.ledger_page import PublishedLedger
from mball.observe.gpus import GpuProcess, GpuSnapshot
from mball.observe.nvml import FIRST_LOOK
from mball.observe.told import NotTold, Told
from mball.units import format_bytes

_UNKNOWN = "?"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """Cells of the table of processes."""

    pid: str = ""
    program: str
    host_memory: str = ""
    gpu: str = ""
    gpu_memory: str = ""
    budgets: str = ""


def draw(look: Look) -> RenderableType:
    """Returns the tables, and in words what could not be seen."""
    parts: list[RenderableType] = [_memory(look.machine, look.cgroup)]
    if isinstance(look.gpus, NotTold):
        parts.append(Text(f"no GPU can be seen: {look.gpus.why}"))
    else:
        parts.append(_gpus(look.gpus))
    if rows := list(_process_rows(look)):
        parts.append(_processes(rows, with_gpus=not isinstance(look.gpus, NotTold)))
    if not look.mball:
        parts.append(Text("No process runs a model with mball."))
    parts += [Text(_printable(note)) for note in _notes(look)]
    return Group(*parts)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", expand=True)


def _memory(machine: MachineMemory, cgroup: CgroupMemory | None) -> Table:
    table = _table("memory of the host")
    for name in ("where", "used", "of", "to be had"):
        table.add_column(name, justify="left" if name == "where" else "right")
    total, available = machine.total_bytes, machine.available_bytes
    table.add_row("machine", format_bytes(total - available), format_bytes(total), format_bytes(available))
    if cgroup is not None and cgroup.limit_bytes is not None:
        used = cgroup.usage_bytes - cgroup.cache_bytes
        to_be_had = min(max(cgroup.limit_bytes - used, 0), available)
        table.add_row("cgroup", format_bytes(used), format_bytes(cgroup.limit_bytes), format_bytes(to_be_had))
    return table


def _processes(rows: Sequence[_Row], *, with_gpus: bool) -> Table:
    table = _table("processes")
    table.add_column("PID", justify="right")
    table.add_column("program", ratio=2, no_wrap=True, overflow="ellipsis")
    table.add_column("own host\nmemory", justify="right")
    if with_gpus:
        table.add_column("GPU", justify="right")
        table.add_column("GPU memory", justify="right")
    table.add_column("mball's budget", ratio=3, overflow="fold")
    for row in rows:
        gpu = (row.gpu, row.gpu_memory) if with_gpus else ()
        cells = (row.pid, row.program, row.host_memory, *gpu, row.budgets)
        table.add_row(*(escape(_printable(cell)) for cell in cells))
    return table


def _gpus(snapshot: GpuSnapshot) -> Table:
    driver, cuda = (_text(value) for value in (snapshot.driver_version, snapshot.cuda_version))
    table = _table(escape(_printable(f"GPUs (driver {driver}, CUDA up to {cuda})")))
    for name in ("GPU", "name", "used", "of", "free", "busy", "PCIe GB/s\nin / out", "NVLink GB/s\nin / out"):
        table.add_column(name, overflow="fold", justify="left" if name in ("GPU", "name") else "right")
    for gpu in snapshot.units():
        cells = (
            gpu.label,
            _text(gpu.name),
            _size(gpu.used_bytes),
            _size(gpu.total_bytes),
            _size(gpu.free_bytes),
            _UNKNOWN if isinstance(gpu.busy_percent, NotTold) else f"{gpu.busy_percent} %",
            f"{_rate(gpu.pcie_received_bytes_per_s)} / {_rate(gpu.pcie_sent_bytes_per_s)}",
            f"{_rate(gpu.nvlink_received_bytes_per_s)} / {_rate(gpu.nvlink_sent_bytes_per_s)}",
        )
        table.add_row(*(escape(_printable(cell)) for cell in cells))
    return table


def _process_rows(look: Look) -> Iterator[_Row]:
    """Yields a row for each GPU that a process holds memory of, then those of processes that run mball without."""
    by_pid = {process.pid: process for process in look.mball}
    shown = set()
    for gpu in () if isinstance(look.gpus, NotTold) else look.gpus.units():
        for process in gpu.processes:
            yield replace(_row(process, by_pid.get(process.pid)), gpu=gpu.label, gpu_memory=_size(process.used_bytes))
            shown.add(process.pid)
        elsewhere = gpu.elsewhere_bytes
        if not isinstance(elsewhere, NotTold) and elsewhere:
            yield _Row(program="held by no process that is listed", gpu=gpu.label, gpu_memory=format_bytes(elsewhere))
    for own in look.mball:
        if own.pid not in shown:
            yield _row(own, own)


def _row(process: GpuProcess | MballProcess, own: MballProcess | None) -> _Row:
    """Returns the row of a process, with what it says of itself if it runs mball."""
    if own is None:
        name = _text(process.name) if isinstance(process, GpuProcess) else _UNKNOWN
        return _Row(pid=str(process.pid), program=name)
    program, _, arguments = own.command.replace("\n", " ").partition(" ")  # a newline would be a row of its own
    return _Row(
        pid=str(own.pid),
        program=f"{program.rpartition('/')[2]} {arguments}",
        host_memory=format_bytes(own.anonymous_bytes),
        budgets="\n".join(map(_budget, own.ledgers)),
    )


def _budget(ledger: PublishedLedger) -> str:
    kinds = ", ".join(f"{kind} {format_bytes(num_bytes)}" for kind, num_bytes in ledger.kinds.items() if num_bytes)
    used_bytes = sum(ledger.kinds.values())
    return f"{format_bytes(used_bytes)} of {format_bytes(ledger.budget_bytes)}" + (f": {kinds}" if kinds else "")


def _notes(look: Look) -> Iterator[str]:
    """Yields what could not be seen."""
    for gpu in () if isinstance(look.gpus, NotTold) else look.gpus.units():
        by_reason: dict[str, list[str]] = {}
        values = (
            ("name", gpu.name),
            ("memory", gpu.used_bytes),
            ("busy", gpu.busy_percent),
            ("PCIe", gpu.pcie_received_bytes_per_s),
            ("PCIe", gpu.pcie_sent_bytes_per_s),
            ("NVLink", gpu.nvlink_received_bytes_per_s),
            ("NVLink", gpu.nvlink_sent_bytes_per_s),
            *gpu.not_listed,
            *((f"memory of process {process.pid}", process.used_bytes) for process in gpu.processes),
            *((f"name of process {process.pid}", process.name) for process in gpu.processes),
        )
        for what, value in values:
            if isinstance(value, NotTold) and value != FIRST_LOOK and what not in by_reason.setdefault(value.why, []):
                by_reason[value.why].append(what)
        for why, whats in by_reason.items():
            yield f"{_UNKNOWN} GPU {gpu.label}: {', '.join(whats)} not told by this driver ({why})"
        if not isinstance(gpu.used_bytes, NotTold) and isinstance(gpu.elsewhere_bytes, NotTold) and not gpu.slices:
            yield f"{_UNKNOWN} GPU {gpu.label}: what no listed process holds ({gpu.elsewhere_bytes.why})"
    if look.num_hidden:
        yield f"{_UNKNOWN} {look.num_hidden} processes of other users cannot be looked into; they may run mball"


def _printable(text: str) -> str:
    """Returns the text without what moves the cursor: programs of others may be called anything."""
    return "".join(each if each.isprintable() or each == "\n" else _UNKNOWN for each in text)


def _text(value: Told[str]) -> str:
    return _UNKNOWN if isinstance(value, NotTold) else value


def _size(value: Told[int]) -> str:
    return _UNKNOWN if isinstance(value, NotTold) else format_bytes(value)


def _rate(value: Told[int]) -> str:
    return _UNKNOWN if isinstance(value, NotTold) else f"{value / 1e9:.2f}"
