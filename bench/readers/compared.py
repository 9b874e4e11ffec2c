"""Both kinds of threads in every round, cell by cell, so that whatever disturbs the machine disturbs both."""

from __future__ import annotations

import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.readers.course import Beside, Cell, Course, Medium, Sample, Whose, multiply
from bench.results import Measurement
from bench.speed.ratios import Target, ratio, ratio_measurements
from mball.storage import ReadPoolLibrary
from mball.storage.scratch import fill, huge_page_memory
from mball.units import KIB, MIB

USUAL = Cell(num_threads=8, block_bytes=2 * MIB)
CELLS = (
    *(Cell(num_threads=threads, block_bytes=USUAL.block_bytes) for threads in (1, 4, 8, 16, 32)),
    *(Cell(num_threads=USUAL.num_threads, block_bytes=block) for block in (256 * KIB, MIB, 4 * MIB, 8 * MIB)),
)
# Threads of C are the default: so they may not be slower. What chance alone does is left to them.
NOT_SLOWER = Target(limit=0.97, at_least=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much, and for how long.

    Attributes:
        file_bytes: of the file on the disk and of the one in memory.
        disk_bytes: that one sample reads from the disk.
        memory_bytes: that one sample reads from memory.
        time_limit_s: no round begins after it; at least two are run.
    """

    file_bytes: int = 512 * MIB
    disk_bytes: int = 192 * MIB
    memory_bytes: int = 512 * MIB
    cells: tuple[Cell, ...] = CELLS
    time_limit_s: float = 180.0


@dataclass(frozen=True, slots=True)
class _Case:
    course: Course
    beside: Beside
    cell: Cell
    size_bytes: int

    @property
    def name(self) -> str:
        return f"{self.course.medium.value}_{self.beside.value}_{self.cell.name}"


@dataclass(slots=True)
class _Found:
    samples: dict[Whose, list[Sample]] = field(default_factory=lambda: {whose: [] for whose in Whose})
    alone_per_s: list[float] = field(default_factory=list)


def compare(scale: Scale, library: ReadPoolLibrary, directory: Path, say: Callable[[str], None]) -> list[Measurement]:
    """Returns the speeds of all cells and the ratios of both kinds of threads.

    The file on the disk lies in `directory`; where that has no disk below, or /dev/shm no room, its part is left out.
    """
    with ExitStack() as stack:
        courses = stack.enter_context(_courses(scale, library, directory))
        cases = [
            _Case(course, beside, cell, scale.disk_bytes if course.medium is Medium.DISK else scale.memory_bytes)
            for course in courses
            for beside, cell in [
                *itertools.product((Beside.IDLE, Beside.PYTHON), scale.cells),
                (Beside.COMPUTE, USUAL),
            ]
        ]
        for course in courses:
            for whose in Whose:
                course.check(whose, USUAL)
        found = {case.name: _Found() for case in cases}
        deadline_s = time.perf_counter() + scale.time_limit_s
        order = random.Random(0)
        round_s = 0.0
        for number in itertools.count(1):
            if number > 2 and time.perf_counter() + round_s > deadline_s:
                break
            began_s = time.perf_counter()
            for course in courses:
                course.prepare()
                own = [case for case in cases if case.course is course]
                for case in order.sample(own, len(own)):
                    _run(case, found[case.name], order)
            round_s = time.perf_counter() - began_s
            say(f"round {number}: {round_s:.0f} s")
    return [measurement for case in cases for measurement in _measurements(case, found[case.name])]


def _run(case: _Case, found: _Found, order: random.Random) -> None:
    if case.beside is Beside.COMPUTE:
        multiply(_after(0.02))  # its threads start
        began_s = time.perf_counter()
        count = multiply(_after(0.2))
        found.alone_per_s.append(count / (time.perf_counter() - began_s))
    for whose in order.sample(list(Whose), len(Whose)):
        found.samples[whose].append(case.course.run(whose, case.cell, case.beside, case.size_bytes))


def _after(duration_s: float) -> Callable[[], bool]:
    deadline_s = time.perf_counter() + duration_s
    return lambda: time.perf_counter() > deadline_s


@contextmanager
def _courses(scale: Scale, library: ReadPoolLibrary, directory: Path) -> Iterator[list[Course]]:
    memory = huge_page_memory(64 * MIB)

    def course(path: str, medium: Medium) -> Course:
        return Course(path=path, medium=medium, memory=memory, library=library)

    with tempfile.NamedTemporaryFile(dir=directory) as on_disk, ExitStack() as stack:
        fill(on_disk.fileno(), scale.file_bytes)
        found = [course(on_disk.name, Medium.DISK), course(on_disk.name, Medium.CACHE)]
        files, reader = found[0].open(Whose.PYTHON, USUAL)
        is_direct = files.is_direct(on_disk.name)
        reader.close()
        files.close()
        usage = os.statvfs("/dev/shm")
        if usage.f_bavail * usage.f_frsize > 2 * scale.file_bytes:
            in_memory = stack.enter_context(tempfile.NamedTemporaryFile(dir="/dev/shm"))
            fill(in_memory.fileno(), scale.file_bytes)
            found.append(course(in_memory.name, Medium.TMPFS))
        yield found if is_direct else found[1:]


def _measurements(case: _Case, found: _Found) -> list[Measurement]:
    what = f"{case.course.medium.value}, {case.cell.name} B at a time, main thread {case.beside.value}"
    made = [
        Measurement.of(
            f"{case.name}_{whose.value}",
            [case.size_bytes / sample.time_s / 1e9 for sample in samples],
            unit="GB/s",
            description=f"{what}: threads of {whose.value}",
        )
        for whose, samples in found.samples.items()
    ]
    times = {whose: [sample.time_s for sample in samples] for whose, samples in found.samples.items()}
    made += ratio_measurements(
        f"{case.name}_ratio",
        ratio(times[Whose.PYTHON], times[Whose.C]),
        f"{what}: speed of C's threads over that of Python's",
        "threads of Python",
        NOT_SLOWER if case.cell == USUAL else None,
    )
    for whose, samples in found.samples.items():
        if case.beside is Beside.IDLE and case.cell == USUAL:
            made.append(
                Measurement.of(
                    f"{case.name}_{whose.value}_cpu",
                    [sample.cpu_s / (case.size_bytes / 1e9) for sample in samples],
                    unit="s",
                    description=f"{what}: CPU time of 1 GB, threads of {whose.value}",
                )
            )
        if case.beside is Beside.COMPUTE:
            made.append(
                Measurement.of(
                    f"{case.name}_{whose.value}_kept",
                    _kept(samples, found.alone_per_s),
                    unit="x",
                    description=f"{what}: what is computed meanwhile, threads of {whose.value}",
                    compared_with="the same without reads",
                )
            )
    return made


def _kept(samples: Sequence[Sample], alone_per_s: Sequence[float]) -> list[float]:
    usual = statistics.median(alone_per_s)
    return [sample.work_per_s / usual for sample in samples]
