"""Settings, parsed and checked once; the only place that reads the environment."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Self

from mball.errors import ConfigError
from mball.units import format_bytes, parse_bytes


class Capture(Enum):
    """How mball learns what the model will read.

    GRAPHS captures the model through torch.compile and knows every pass before it runs.
    OPERATORS watches operators as they run: the first pass is read in the order of the modules, later ones by what the
    last one did. AUTO begins with operators, so that nobody waits for a capture, and captures graphs of what runs so
    often that it pays; with `compile="inductor"` or `fullgraph` it is GRAPHS.
    """

    AUTO = "auto"
    GRAPHS = "graphs"
    OPERATORS = "operators"


class Compile(Enum):
    """How captured steps run.

    EAGER runs their operators as they are: the numbers of the unwrapped model. INDUCTOR compiles them, as
    `torch.compile` does: the numbers of torch.compile, with fusion ending where steps end.
    """

    EAGER = "eager"
    INDUCTOR = "inductor"


class Io(Enum):
    """How homes are read.

    AUTO reads past the page cache (O_DIRECT) on file systems of disks, and through it where the file system refuses
    (once, with a log line), over a network and in memory; by threads of C, and by Python's where there is no C
    compiler. CACHED reads what is in the page cache already from there. DIRECT goes past it wherever that works, and
    BUFFERED never does. NATIVE insists on threads of C, and THREADS on Python's; else they are AUTO.

    GDS has a checkpoint go straight to a GPU, around host memory, by NVIDIA's cuFile, and is an error that says why
    where that does not work; AUTO does so where it is faster. What else is read is read as by DIRECT.
    """

    AUTO = "auto"
    DIRECT = "direct"
    BUFFERED = "buffered"
    CACHED = "cached"
    NATIVE = "native"
    THREADS = "threads"
    GDS = "gds"


class SwapCheck(Enum):
    """When what comes back from the swap file is held against its checksum.

    FIRST does it in the first read after a write: it finds what was written wrongly, and costs nothing from then on.
    ALWAYS also finds what goes bad later, for 0.07 s of a core a GB with xxhash installed, 0.25 s without. OFF makes no
    checksums.
    """

    FIRST = "first"
    ALWAYS = "always"
    OFF = "off"


class Policy(Enum):
    """Who plans what stays and what is streamed when.

    MBALL looks for the fastest plan. The others are well-known policies, for comparison: see `mball.plan.baselines`.
    """

    MBALL = "mball"
    PREFIX = "prefix"
    PREFETCH = "prefetch"
    LRU = "lru"
    SWAPADVISOR = "swapadvisor"
    FLEXGEN = "flexgen"


class Allocator(Enum):
    """Where passes on a GPU allocate what they compute.

    TORCH is PyTorch's caching allocator, capped while a pass runs. MBALL gives it segments of the arena's own pages, so
    that weights and activations trade memory without a call of the driver; it needs virtual memory of the GPU, and a C
    compiler where mball was built without one. One model a GPU and process.
    """

    TORCH = "torch"
    MBALL = "mball"


_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of `mball.wrap`; the same names work there as keyword arguments.

    Attributes:
        budget_bytes: hard cap on weights, buffers and activations on the compute device.
        device: where steps run: "cpu", "cuda" (the current GPU) or "cuda:1".
        host_budget_bytes: `host_budget`, for a GPU: hard cap on host memory for weights on their way there. Plans then
            say what stays in it and what is read from disk in each pass; pinned tables whose rows are looked up, and
            the ring of what is read unplanned, are beside it. Without it all that is streamed is kept in host memory,
            as far as there is room.
        allocator: where passes on a GPU allocate what they compute.
        swap_dir: directory of the swap file; default the variable MBALL_SWAP_DIR, else the system's directory for
            temporary files.
        capture: how mball learns what the model will read.
        compile: how captured steps run.
        step_bytes: weights that one compiled step reads at most, unless a single one is larger; default by the budget.
            The cuts between steps decide what is fused: the same cuts give the same bits, whatever the budget. Without
            it a model that fits the budget is compiled in one piece.
        mode: see `torch.compile`; for compiled steps. Where it means CUDA graphs, each step is one.
        options: Inductor's, see `torch.compile`; for compiled steps.
        fullgraph: see `torch.compile`.
        dynamic: see `torch.compile`.
        io: how homes are read.
        io_threads: requests under way at one time; default what was calibrated for the disk, else 8.
        policy: who plans what stays and what is streamed when.
        swap_limit: the largest size of the swap file; default as much as the disk takes.
        swap_check: when what is read from the swap file is held against its checksum.
        swap_writers: threads that write to it.
        swap_depth: requests (of up to 4 MiB) that may wait to be written.
        swap_high: bytes that wait to be written when who writes has to wait, until there are no more than `swap_low`.
        swap_share: the part of the time that writes get of the disk while somebody reads, unless they are waited for.
    """

    budget_bytes: int
    swap_dir: Path
    device: str = "cpu"
    host_budget_bytes: int | None = None
    allocator: Allocator = Allocator.TORCH
    capture: Capture = Capture.AUTO
    compile: Compile = Compile.EAGER
    step_bytes: int | None = None
    mode: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    fullgraph: bool = False
    dynamic: bool | None = None
    io: Io = Io.AUTO
    io_threads: int | None = None
    policy: Policy = Policy.MBALL
    swap_limit: int | None = None
    swap_check: SwapCheck = SwapCheck.FIRST
    swap_writers: int = 8
    swap_depth: int = 256
    swap_high: int = 256 << 20
    swap_low: int = 128 << 20
    swap_share: float = 0.25

    def __post_init__(self) -> None:
        if self.budget_bytes <= 0:
            raise ConfigError(f"budget is {format_bytes(self.budget_bytes)}; it must be more than zero")
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device is {self.device!r}; give 'cpu', 'cuda' or 'cuda:' and a number")
        if self.host_budget_bytes is not None:
            self._check_host_budget(self.host_budget_bytes)
        if self.io is Io.GDS and (self.device == "cpu" or self.host_budget_bytes is not None):
            has = "steps run on the CPU" if self.device == "cpu" else "host_budget has weights come through host memory"
            raise ConfigError(f"io='gds' is for files that go straight to a GPU, and {has}: leave one of them out")
        if self.allocator is Allocator.MBALL and self.device == "cpu":
            raise ConfigError("allocator='mball' gives out memory of a GPU: add device='cuda', or leave it out")
        if self.compile is not Compile.INDUCTOR and (self.mode or self.options or self.step_bytes):
            raise ConfigError(
                "mode, options and step_bytes are for compiled steps; add compile='inductor', or drop them"
            )
        if self.capture is Capture.OPERATORS and self.compile is Compile.INDUCTOR:
            raise ConfigError("compile='inductor' needs graphs; drop capture='operators'")
        if self.mode and self.options:
            raise ConfigError("mode and options exclude each other, as they do in torch.compile; give one of them")
        if self.step_bytes is not None and self.step_bytes <= 0:
            raise ConfigError(f"step_bytes is {self.step_bytes} B; it must be more than zero")
        if self.io_threads is not None and not 1 <= self.io_threads <= 64:
            raise ConfigError(f"io_threads is {self.io_threads}; give 1 to 64 threads")
        if self.swap_limit is not None and self.swap_limit < 0:
            raise ConfigError(f"swap_limit is {self.swap_limit} B; it must not be negative")
        if not 1 <= self.swap_writers <= 64:
            raise ConfigError(f"swap_writers is {self.swap_writers}; give 1 to 64 threads")
        if self.swap_depth < 1:
            raise ConfigError(f"swap_depth is {self.swap_depth}; give at least 1 request")
        if not 0 <= self.swap_low < self.swap_high:
            raise ConfigError(
                f"swap_low is {format_bytes(self.swap_low)} and swap_high {format_bytes(self.swap_high)}; the first "
                "must be less than the second"
            )
        if not 0 < self.swap_share <= 1:
            raise ConfigError(f"swap_share is {self.swap_share}; give more than 0 and at most 1, which is no limit")

    def _check_host_budget(self, size_bytes: int) -> None:
        if self.device == "cpu":
            raise ConfigError(
                f"host_budget is {format_bytes(size_bytes)}, and steps run on the CPU, where weights come from disk "
                "straight into the budget; leave host_budget out, or give a larger budget"
            )
        if size_bytes < 0:
            raise ConfigError(f"host_budget is {size_bytes} B; it must not be negative")
        if self.policy is not Policy.MBALL:
            raise ConfigError(
                f"policy {self.policy.value!r} knows no host memory between disk and device; leave host_budget or "
                "policy out"
            )

    @classmethod
    def of(cls, *, budget: int | str, **settings: Any) -> Self:
        """Returns a Config from what a user writes: sizes as text, enums by value, paths as text.

        Raises:
            ConfigError: a setting is unknown or cannot be read.
        """
        known = {field.name for field in fields(cls)} - {"budget_bytes", "host_budget_bytes"} | {"host_budget"}
        if unknown := settings.keys() - known:
            raise ConfigError(f"unknown settings {sorted(unknown)}; known are {sorted(known)}")
        directory = settings.pop("swap_dir", None) or os.environ.get("MBALL_SWAP_DIR") or tempfile.gettempdir()
        kinds = {
            "allocator": Allocator,
            "capture": Capture,
            "compile": Compile,
            "io": Io,
            "policy": Policy,
            "swap_check": SwapCheck,
        }
        for name, kind in kinds.items():
            if name in settings:
                settings[name] = _choice(kind, settings[name], name)
        for name in ("step_bytes", "swap_limit", "swap_high", "swap_low"):
            if settings.get(name) is not None:
                settings[name] = parse_bytes(settings[name], what=name)
        if (host_budget := settings.pop("host_budget", None)) is not None:
            settings["host_budget_bytes"] = parse_bytes(host_budget, what="host_budget")
        if "device" in settings:
            settings["device"] = str(settings["device"])
        settings["options"] = dict(settings.get("options") or {})
        return cls(budget_bytes=parse_bytes(budget, what="budget"), swap_dir=Path(directory), **settings)


def _choice(kind: type[Enum], value: object, name: str) -> Enum:
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(repr(option.value) for option in kind)
        raise ConfigError(f"{name} is {value!r}; choose one of {choices}") from None


def cache_directory() -> Path:
    """Returns mball's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mball"


def own_cache() -> Path | None:
    """Returns `cache_directory()`, None for a user without a home."""
    try:
        return cache_directory()
    except RuntimeError:
        return None


def calibration_directory() -> Path | None:
    """Returns where calibrations of this user's machines are kept; None for a user without a home."""
    cache = own_cache()
    return None if cache is None else cache / "calibration"
