"""Puts together what runs a model, and takes it apart again: the same for every door."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from mball.compute import Compute
from mball.config import Allocator, Compile, Config, Policy
from mball.errors import ConfigError, DeviceError
from mball.memory import Arena, Device, Kind, Ledger, LedgerPage
from mball.plan import make_plan, simulate
from mball.plan.baselines import BASELINES
from mball.plan.simulate import trace_times
from mball.run.correction import Correction
from mball.run.engine import Engine
from mball.run.execution import Execution
from mball.run.homes import Homes
from mball.run.segments import OperatorReads
from mball.schema import Machine, Plan, Trace
from mball.storage import DirectIO, FileTable, QueueLimits, SwapFile, SwapSettings
from mball.torch_private.inductor import inductor_settings
from mball.units import PAGE_BYTES, format_bytes, round_up


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """Where homes lie: open files, and the swap file among them. `Machinery.start` takes it over."""

    files: FileTable
    swap: SwapFile

    @classmethod
    def open(cls, config: Config) -> Self:
        """Makes an empty swap file. Raises StorageError when that cannot be done."""
        files = FileTable(direct=DirectIO.of(config.io))
        swap = SwapFile.create(config.swap_dir, _swap_settings(config, files.mode))
        files.add_swap(swap)
        return cls(files=files, swap=swap)

    def close(self) -> None:
        """Closes all files. Idempotent."""
        self.files.close()
        self.swap.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Machinery:
    """An engine and what it stands on."""

    engine: Engine
    machine: Callable[[], Machine]
    compute: Compute
    files: FileTable
    policy: Policy
    host_budget_bytes: int | None
    page: LedgerPage

    @classmethod
    def start(
        cls,
        config: Config,
        storage: Storage,
        homes: Homes,
        compute: Compute,
        machine: Callable[[], Machine],
        *,
        buffer_bytes: int = 0,
        expected: Sequence[OperatorReads] = (),
        verify_files: Callable[[], None] = lambda: None,
    ) -> Self:
        """Starts an engine over these homes; see there. If that fails nothing of it is left but what was given.

        From then on `storage` and `compute` are closed with it.
        """
        with contextlib.ExitStack() as undo:
            arena = compute.device.arena(config.budget_bytes)
            undo.callback(arena.close)
            page = LedgerPage()
            undo.callback(page.close)
            ledger = Ledger(config.budget_bytes, publish=page.write)
            ledger.set(Kind.BUFFERS, buffer_bytes)
            ledger.set(Kind.STAGING, compute.staging_bytes)
            fixed_bytes = buffer_bytes + compute.staging_bytes
            correction = Correction(machine)
            below = compute.device.below
            host = None
            if below is not None and config.host_budget_bytes is not None:
                room = _host_arena(below, config.host_budget_bytes, homes)
                undo.callback(room.close)
                host = Execution(below, room, homes)
            engine = Engine(
                homes=homes,
                execution=Execution(compute.device, arena, homes, host),
                ledger=ledger,
                plan=functools.partial(
                    _plan,
                    policy=config.policy,
                    machine=correction,
                    fixed_bytes=fixed_bytes + compute.rounded_bytes,
                    host_budget_bytes=config.host_budget_bytes,
                ),
                retime=_retime,
                correction=correction,
                fixed_bytes=fixed_bytes,
                memory_bytes_per_s=compute.memory_bytes_per_s,
                expected=expected,
                verify_files=verify_files,
            )
            undo.pop_all()
        return cls(
            engine=engine,
            machine=machine,
            compute=compute,
            files=storage.files,
            policy=config.policy,
            host_budget_bytes=config.host_budget_bytes,
            page=page,
        )

    def close(self) -> None:
        """Ends everything and gives it back, whatever of it fails. Idempotent."""
        with contextlib.ExitStack() as parts:
            parts.callback(self.compute.closer)
            parts.callback(self.files.close)
            parts.callback(self.compute.reader.close)
            parts.callback(self.engine.close)
            parts.callback(self.page.close)

    def close_dropped(self) -> None:
        """`close`, for the collector: it runs in any thread, also in one of mball's own, which `close` waits for."""
        if threading.current_thread().name.startswith("mball-"):
            threading.Thread(target=self.close, name="mball-close").start()
        else:
            self.close()


def _swap_settings(config: Config, direct: DirectIO) -> SwapSettings:
    queue = QueueLimits(
        num_threads=config.swap_writers,
        depth=config.swap_depth,
        high_bytes=config.swap_high,
        low_bytes=config.swap_low,
        share=config.swap_share,
    )
    return SwapSettings(limit_bytes=config.swap_limit, check=config.swap_check, queue=queue, direct=direct)


def inductor_options(config: Config) -> dict[str, Any]:
    """Returns Inductor's options, those of the mode if one is given. Raises ConfigError if it does not know them."""
    if config.compile is not Compile.INDUCTOR:
        return {}  # and nothing of Inductor is imported
    try:
        settings = inductor_settings(config.mode, config.options, config.dynamic)
    except RuntimeError as error:
        # Without the list of all the hundreds that there are.
        why = str(error).partition(", known options are")[0]
        given = f"mode is {config.mode!r}" if config.mode else f"options are {dict(config.options)!r}"
        raise ConfigError(f"{given}: {why}; give what torch.compile takes (torch._inductor.list_options())") from error
    if settings.get("triton.cudagraphs") and config.allocator is Allocator.MBALL:
        given = f"mode {config.mode!r} has" if config.mode else "options have"
        raise ConfigError(
            f"{given} steps recorded as CUDA graphs, whose memory is of PyTorch's own allocator, and allocator is "
            "'mball': leave one of them out"
        )
    if settings.get("freezing"):
        raise ConfigError("options say freezing, which makes weights constants that cannot be streamed: leave it out")
    return settings


def _plan(
    trace: Trace,
    budget_bytes: int,
    previous: Plan | None,
    *,
    policy: Policy,
    machine: Callable[[], Machine],
    fixed_bytes: int,
    host_budget_bytes: int | None,
) -> Plan:
    if policy is not Policy.MBALL:
        return BASELINES[policy.value](trace, machine(), budget_bytes, fixed_bytes=fixed_bytes, previous=previous)
    return make_plan(
        trace,
        machine(),
        budget_bytes,
        host_budget_bytes=host_budget_bytes,
        fixed_bytes=fixed_bytes,
        previous=previous,
    )


def _host_arena(below: Device, budget_bytes: int, homes: Homes) -> Arena:
    """Returns an arena in host memory, no larger than all weights, each in pages of its own."""
    most_bytes = sum(round_up(home.span_bytes, PAGE_BYTES) + PAGE_BYTES for home in homes.homes)
    try:
        return below.arena(max(min(budget_bytes, most_bytes), 1))
    except DeviceError as error:
        raise DeviceError(
            f"a host budget of {format_bytes(budget_bytes)} ({budget_bytes} B) cannot be had: {error}; or give a "
            "smaller host_budget"
        ) from error


def _retime(trace: Trace, plan: Plan, machine: Machine, longer: float) -> float:
    times = zip(trace.steps, trace_times(trace), strict=True)
    steps = tuple(replace(step, time_s=seconds * longer) for step, seconds in times)
    return simulate(replace(trace, steps=steps), plan, machine).pass_s
