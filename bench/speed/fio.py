"""The other yardstick: fio reading or writing as many bytes of the same file past the page cache, as fast as it can."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mball.units import PAGE_BYTES, round_down


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """How fio reads: with `psync` `num_jobs` processes of one request each, with `libaio` one of `depth` requests."""

    engine: str
    block: str
    depth: int
    num_jobs: int


JOBS = [Job(engine="libaio", block=block, depth=depth, num_jobs=1) for block in ("1M", "4M") for depth in (4, 16)]
JOBS += [Job(engine="psync", block="4M", depth=1, num_jobs=4)]


def is_there() -> bool:
    """Whether fio is installed."""
    return shutil.which("fio") is not None


def read(path: Path, size_bytes: int, job: Job) -> float:
    """Reads `size_bytes` of `path` once; returns the seconds that took, without those in which fio started.

    Raises subprocess.CalledProcessError when fio fails.
    """
    return float(size_bytes / _run(path, size_bytes, job, "read", "--readonly")["read"]["bw_bytes"])


def write(path: Path, size_bytes: int, job: Job) -> float:
    """Writes `size_bytes` of `path` once; returns and raises as `read`."""
    return float(size_bytes / _run(path, size_bytes, job, "write")["write"]["bw_bytes"])


def mixed(path: Path, size_bytes: int, job: Job) -> float:
    """Reads and writes `size_bytes` each, in turns by chance, of twice as large a job; returns and raises as `read`."""
    done = _run(path, size_bytes, job, "readwrite", "--rwmixread=50", "--loops=2")
    return float(2 * size_bytes / (done["read"]["bw_bytes"] + done["write"]["bw_bytes"]))


def _run(path: Path, size_bytes: int, job: Job, rw: str, *more: str) -> dict[str, Any]:
    # Past the page cache only whole pages are read: of a file that ends inside one the end is left out.
    share = round_down(size_bytes // job.num_jobs, PAGE_BYTES)
    command = [
        "fio", "--name=yardstick", f"--filename={path}", f"--rw={rw}", "--direct=1", "--thread",
        f"--ioengine={job.engine}", f"--bs={job.block}", f"--iodepth={job.depth}", f"--numjobs={job.num_jobs}",
        f"--size={share}", f"--offset_increment={share if job.num_jobs > 1 else 0}", "--group_reporting",
        "--invalidate=0", "--output-format=json", *more,
    ]  # fmt: skip
    # Buffers on huge pages, as the other yardstick has: scattered pages read at a fraction of the speed.
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=300)
    # A version that has a note to make makes it before the JSON begins.
    report: dict[str, Any] = json.loads(ended.stdout[ended.stdout.index("{") :])
    done: dict[str, Any] = report["jobs"][0]
    return done


def best_job(
    path: Path, size_bytes: int, jobs: Sequence[Job] = JOBS, act: Callable[[Path, int, Job], float] = read
) -> Job:
    """Returns the job with which `act`, one of the above, is fastest, by the median of three tries each.

    Some jobs are fast now and then: by the best of their tries the yardstick would be one of those.
    """
    return min(jobs, key=lambda job: median(act(path, size_bytes, job) for _ in range(3)))
