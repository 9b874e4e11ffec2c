"""The proof that a budget holds: a model several times the budget runs in a process that the kernel caps.

By hand, from the root of the checkout, with the figures as JSON: `python -m tests.run.memory_proof --budget 640MiB`.

The process joins a control group before it execs Python, so that every page it ever touches is charged there. It
wraps and runs a two-layer model of the same kind and drops it: what is left is Python, torch and the loaded capture
machinery, the *base*. The group is then capped at base + budget + 5 % of the budget, and the model is wrapped and
generates. What it reads of the checkpoint is charged too, but the kernel can take page cache back; anonymous memory it
cannot, so where that passes the cap it kills the process. That it does, controls show.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mball.units import parse_bytes
from tests.run.cgroup import MemoryGroup

CHECKOUT = Path(__file__).parents[2]
SPARE_PERCENT = 5
NUM_NEW_TOKENS = 12
LIMIT_S = 400
# Joins the group, then becomes Python: the interpreter's own pages are charged as well.
JOIN = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The model: a Llama of bfloat16 with heads of 64, four of them key-value heads."""

    layers: int
    hidden: int
    vocabulary: int


LARGE = Shape(layers=16, hidden=2048, vocabulary=32000)  # 1.56 GiB
SMALL = Shape(layers=4, hidden=768, vocabulary=8192)  # 73 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a process ended.

    Attributes:
        code: its exit code; -9 when the kernel killed it.
        events: the facts it printed, by event: `limited`, `done`, `failed`, as far as it came.
        oom_kills: kills for memory in its group.
        stderr: the end of it.
    """

    code: int
    events: dict[str, dict[str, Any]]
    oom_kills: int
    stderr: str

    @property
    def completed(self) -> bool:
        return self.code == 0 and "done" in self.events

    @property
    def killed_at_limit(self) -> bool:
        """Whether the kernel killed it for memory after its limit was in force."""
        return self.code == -9 and "limited" in self.events and "done" not in self.events and self.oom_kills > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """Directories of the model and of its two-layer kin, and the bytes of the model's weights."""

    model: Path
    kin: Path
    weight_bytes: int


def write_checkpoints(directory: Path, shape: Shape) -> Checkpoints:
    """Writes both, each from a process of its own."""
    sizes = {}
    for name, layers in (("kin", 2), ("model", shape.layers)):
        size = ("--hidden", str(shape.hidden), "--layers", str(layers), "--vocabulary", str(shape.vocabulary))
        outcome = spawn(["write", str(directory / name), *size])
        assert "written" in outcome.events, outcome.stderr
        sizes[name] = outcome.events["written"]["weight_bytes"]
    return Checkpoints(model=directory / "model", kin=directory / "kin", weight_bytes=sizes["model"])


def unwrapped(checkpoints: Checkpoints) -> Outcome:
    """Generates with transformers alone and no limit."""
    return spawn(_generate(checkpoints, "transformers"))


def wrapped(checkpoints: Checkpoints, budget_bytes: int) -> Outcome:
    """Generates under a budget, without a limit."""
    return spawn(_generate(checkpoints, "mball", "--budget", str(budget_bytes)))


def capped(
    checkpoints: Checkpoints, budget_bytes: int, allow_bytes: int | None = None, *, blind: bool = False
) -> Outcome:
    """Generates under a budget, with the kernel's limit at base + `allow_bytes` (None: budget + 5 %).

    A blind mball does not ask how much memory is free.
    """
    if allow_bytes is None:
        allow_bytes = budget_bytes + budget_bytes * SPARE_PERCENT // 100
    options = ["--budget", str(budget_bytes), "--allow", str(allow_bytes), *(["--blind"] if blind else [])]
    return _spawn_in_group(checkpoints, _generate(checkpoints, "mball", *options))


def unwrapped_capped(checkpoints: Checkpoints, limit_bytes: int) -> Outcome:
    """Generates with transformers alone, weights in anonymous memory, and the kernel's limit at `limit_bytes`."""
    return _spawn_in_group(checkpoints, _generate(checkpoints, "transformers-no-mmap", "--limit", str(limit_bytes)))


def _generate(checkpoints: Checkpoints, way: str, *options: str) -> list[str]:
    kin = ("--warm-up", str(checkpoints.kin), "--new-tokens", str(NUM_NEW_TOKENS))
    return ["generate", str(checkpoints.model), "--way", way, *kin, *options]


def _spawn_in_group(checkpoints: Checkpoints, arguments: Sequence[str]) -> Outcome:
    group = MemoryGroup.create(f"mball-proof-{os.getpid()}")
    try:
        _forget_pages(checkpoints.model)
        return spawn([*arguments, "--group", str(group.path)], group)
    finally:
        group.remove()


def _forget_pages(directory: Path) -> None:
    """Drops a checkpoint from the page cache, so that reading it is charged to whoever reads it next."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def spawn(arguments: Sequence[str], group: MemoryGroup | None = None) -> Outcome:
    """Runs `memory_child`, in the group if there is one, to its end. Raises subprocess.TimeoutExpired."""
    command = [sys.executable, "-m", "tests.run.memory_child", *arguments]
    if group is not None:
        command = ["sh", "-c", JOIN, str(group.members), *command]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # run() kills the process when it takes too long, and on Ctrl-C.
    ended = subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    return Outcome(
        code=ended.returncode,
        events={line.pop("event"): line for line in lines},
        oom_kills=group.oom_kills() if group else 0,
        stderr=ended.stderr[-2000:],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="640MiB")
    parser.add_argument("--layers", type=int, default=LARGE.layers)
    parser.add_argument("--directory", type=Path, help="where to write checkpoints; default a temporary directory")
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument("--no-limit", action="store_true", help="measure only")
    arguments = parser.parse_args()
    budget_bytes = parse_bytes(arguments.budget, what="budget")
    shape = Shape(layers=arguments.layers, hidden=LARGE.hidden, vocabulary=LARGE.vocabulary)
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="mball-proof-", dir=arguments.directory) as directory:
        checkpoints = write_checkpoints(Path(directory), shape)
        outcomes["unwrapped"] = unwrapped(checkpoints)
        if arguments.no_limit:
            outcomes["wrapped"] = wrapped(checkpoints, budget_bytes)
        else:
            outcomes["capped"] = capped(checkpoints, budget_bytes)
            limit_bytes = outcomes["capped"].events["limited"]["limit_bytes"]
        if not arguments.no_controls and not arguments.no_limit:
            outcomes["unwrapped_capped"] = unwrapped_capped(checkpoints, limit_bytes)
            outcomes["half_blind"] = capped(checkpoints, budget_bytes, budget_bytes // 2, blind=True)
            outcomes["half"] = capped(checkpoints, budget_bytes, budget_bytes // 2)
    print(json.dumps({name: asdict(outcome) for name, outcome in outcomes.items()}, indent=2))


if __name__ == "__main__":
    main()
