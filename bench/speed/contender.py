"""A contender as the bench sees it: a process of its own that is told what to do and answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.speed.ways import Loading
from tests.run.cgroup import PAGE_BYTES, MemoryGroup

CHECKOUT = Path(__file__).parents[2]
# Joins the group, then becomes Python: the interpreter's own pages are charged as well.
_JOIN = 'echo $$ > "$0" && exec "$@"'
NUM_THREADS = int(os.environ.get("MBALL_BENCH_THREADS", "2"))


class ContenderError(RuntimeError):
    """A contender died or could not do what it was told; the message has what it said."""


class Contender:
    """One child process, started at once; a context manager that ends it.

    Args:
        name: for messages.
        module: what it runs; it calls `bench.speed.protocol.serve`.
        num_threads: that compute.
        group: a control group to run in; the caller removes it.
        environment: variables on top of this process's own.
        checkout: of the mball that it runs.
    """

    def __init__(
        self,
        name: str,
        *,
        module: str = "bench.speed.child",
        num_threads: int = NUM_THREADS,
        group: MemoryGroup | None = None,
        environment: dict[str, str] | None = None,
        checkout: Path = CHECKOUT,
    ) -> None:
        self.name = name
        self._group = group
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        command = [sys.executable, "-m", module]
        if group is not None:
            command = ["sh", "-c", _JOIN, str(group.members), *command]
        threads = {name: str(num_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            command, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **threads, **(environment or {})},
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def tell(self, do: str, **order: Any) -> dict[str, Any]:
        """Returns the reply to an order, a method of `bench.speed.child.Child`. Raises ContenderError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the empty reply below tells
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            kills = f", {self._group.oom_kills()} kills for memory" if self._group else ""
            raise ContenderError(f"{self.name} died at {do!r} (exit code {code}{kills}):\n{self._said()}")
        reply: dict[str, Any] = json.loads(line)
        if "failed" in reply:
            raise ContenderError(f"{self.name} failed at {do!r}:\n{reply['failed']}\n{self._said()}")
        return reply

    def load(self, loading: Loading, prompt_tokens: int) -> dict[str, Any]:
        """Has it load a model; see `Child.load`."""
        return self.tell("load", prompt_tokens=prompt_tokens, **order_of(loading))

    def cap(self, limit_bytes: int) -> None:
        """Has the kernel cap its group. Raises OSError when it uses more already."""
        assert self._group is not None
        self._group.set_limit(limit_bytes // PAGE_BYTES * PAGE_BYTES)

    def close(self) -> None:
        """Ends the process. Idempotent."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-2000:]


def order_of(loading: Loading) -> dict[str, Any]:
    """Returns a loading as the values of an order."""
    return {
        "way": loading.way.value,
        "mode": loading.mode.value,
        "checkpoint": str(loading.checkpoint),
        "budget_bytes": loading.budget_bytes,
        "capture": loading.capture,
        "step_bytes": loading.step_bytes,
        "offload": str(loading.offload) if loading.offload else None,
        "resident_bytes": loading.resident_bytes,
    }
