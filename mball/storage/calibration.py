"""Measures how a file system's link does with requests of several sizes, so many of them in flight.

[Note: a noisy disk] Disks are shared, with other programs and, under virtual machines, with other machines: one second
may bring a tenth of what the next one does. So every combination is measured shortly, all of them in each round, in
another order each time, and medians over the rounds count. What the planner takes from it does not hang on a single
combination either: see `_derive`.
"""

from __future__ import annotations

import mmap
import os
import platform
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from mball.errors import StorageError
from mball.schema import CalibratedLink, Calibration, Link, LinkSample
from mball.storage.choice import FileReader, ReaderChoice, choose_reader
from mball.storage.files import FileTable
from mball.storage.mounts import FileSystem, file_system_of
from mball.storage.reader import Read, ReadHandle
from mball.storage.request_choice import choose_requests
from mball.storage.scratch import fill, huge_page_memory
from mball.units import GIB, KIB, MIB, format_bytes, round_down

# Goes up when readers read in another way: the speeds of before are not believed then.
READER_VERSION = 2
# More in flight than this many windows of the reader only makes requests wait longer.
_MOST_WINDOWS = 4
# A link is saturated while the reader always finds another window of requests behind the one that it reads.
_SATURATING_WINDOWS = 2
# Combinations from this part of the full bandwidth on are as good as the best.
_NEARLY = 0.95
_SMALLEST_FILE_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What to measure, and for how long.

    Attributes:
        size_bytes: of the file that is written to be read; where half of what is free is less, that.
        time_limit_s: of all reading, but for the first round, which is always completed.
        sample_s: how long one combination is measured at one time; at least twice as many requests as are in flight.
        blocks_bytes: sizes of requests.
        depths: numbers of requests in flight.
        requests_s: how long settings of the reader are compared before; see `choose_requests`.
    """

    size_bytes: int = GIB
    time_limit_s: float = 10.0
    sample_s: float = 0.03
    blocks_bytes: tuple[int, ...] = (64 * KIB, 256 * KIB, MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, 32 * MIB)
    depths: tuple[int, ...] = (1, 2, 4, 8, 16)
    requests_s: float = 6.0


@dataclass(frozen=True, slots=True)
class _Cell:
    block_bytes: int
    depth: int

    @property
    def in_flight_bytes(self) -> int:
        return self.block_bytes * self.depth


@dataclass(frozen=True, slots=True)
class _Run:
    """One cell in one round."""

    bandwidth_bytes_per_s: float
    latencies_s: list[float]


def calibrate(
    where: str | os.PathLike[str],
    *,
    effort: Effort | None = None,
    choice: ReaderChoice | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Measures the link from the disk under `where` to memory, as the reader of `choice` drives it.

    First settings of that reader are compared: another number or size of requests is taken where it is clearly faster.

    Past the page cache where the file system allows it, else with the file dropped from the cache before each
    measurement. Takes 128 MiB of memory, and 16 s besides writing the file; more where a disk is slow, since the first
    round is completed.

    Args:
        where: a directory, in which a temporary file is written, read and removed; or a file to read, such as one of
            a checkpoint, where nothing can be written.
        effort: what to measure.
        choice: the reader; by default the best that is there.
        progress: is told what is going on, for people.

    Raises:
        StorageError: `where` does not exist or cannot be written to, there is no room for (or in) a file of 64 MiB,
            or its disk fails.
    """
    effort = effort or Effort()
    choice = choice or choose_reader()
    path = os.path.abspath(where)
    try:
        if not os.path.isdir(path):
            with open(path, "rb", buffering=0) as file:
                return _calibrate(file.fileno(), effort, choice, progress)
        usage = os.statvfs(path)
        size_bytes = round_down(min(effort.size_bytes, usage.f_bavail * usage.f_frsize // 2), mmap.PAGESIZE)
        _check_size(size_bytes, path)
        with tempfile.TemporaryFile(dir=path, buffering=0) as file:
            progress(f"writing {format_bytes(size_bytes)} in {path}")
            fill(file.fileno(), size_bytes)
            return _calibrate(file.fileno(), effort, choice, progress)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{path} cannot be calibrated ({error.strerror}); give a directory that can be written to, or a file of "
            f"{format_bytes(_SMALLEST_FILE_BYTES)} or more that can be read"
        ) from error


def place_of(descriptor: int) -> FileSystem:
    """Returns the file system that an open file lies on."""
    return file_system_of(f"/proc/self/fd/{descriptor}")


def reader_kind(choice: ReaderChoice, *, direct: bool) -> str:
    """Returns what is calibrated besides the disk: a reader, and how it reads."""
    way = "O_DIRECT" if direct else "page cache"
    return f"version {READER_VERSION}: {choice}, {way}"


def _check_size(size_bytes: int, path: str) -> None:
    if size_bytes < _SMALLEST_FILE_BYTES:
        raise StorageError(
            f"{path} cannot be calibrated with a file of {format_bytes(size_bytes)}, it takes "
            f"{format_bytes(_SMALLEST_FILE_BYTES)}: free twice as much, or give a larger file that lies there"
        )


def _calibrate(descriptor: int, effort: Effort, choice: ReaderChoice, progress: Callable[[str], None]) -> Calibration:
    place = place_of(descriptor)
    file_bytes = os.fstat(descriptor).st_size
    _check_size(file_bytes, place.mount_point)
    choice = choose_requests(descriptor, choice, effort.requests_s, progress)
    files = FileTable()
    try:
        name = files.add_descriptor("calibration", descriptor)
        direct = files.is_direct(name)
        reader = choice.open(files)
        try:
            cells = [
                _Cell(block_bytes, depth)
                for block_bytes in effort.blocks_bytes
                for depth in effort.depths
                if block_bytes * depth <= _MOST_WINDOWS * reader.window_bytes
            ]
            course = _Course(reader, descriptor, name, file_bytes, direct=direct)
            runs = _run_rounds(course, cells, effort, progress)
            window_bytes = reader.window_bytes
        finally:
            reader.close()
    finally:
        files.close()
    link, spread = _derive(runs, window_bytes)
    best = _choose(runs, link)
    return Calibration(
        host=platform.node(),
        place=str(place),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        links=(
            CalibratedLink(
                link=link,
                reader=reader_kind(choice, direct=direct),
                num_threads=choice.num_threads,
                chunk_bytes=choice.chunk_bytes,
                file_bytes=file_bytes,
                num_rounds=min(map(len, runs.values())),
                spread=spread,
                block_bytes=best.block_bytes,
                depth=best.depth,
                samples=tuple(_sample(cell, runs[cell]) for cell in cells),
            ),
        ),
    )


def _run_rounds(
    course: _Course, cells: Sequence[_Cell], effort: Effort, progress: Callable[[str], None]
) -> dict[_Cell, list[_Run]]:
    runs: dict[_Cell, list[_Run]] = {cell: [] for cell in cells}
    course.run(cells[0], 0.0)  # starts threads and opens descriptors
    orders = random.Random(0)
    deadline_s = time.perf_counter() + effort.time_limit_s
    is_first = True
    while is_first or time.perf_counter() < deadline_s:
        for number, cell in enumerate(orders.sample(cells, len(cells))):
            if not is_first and time.perf_counter() > deadline_s:
                break
            done = f"round {len(runs[cell]) + 1}, {number + 1} of {len(cells)}"
            progress(f"reading {format_bytes(cell.block_bytes)} with {cell.depth} in flight ({done})")
            runs[cell].append(course.run(cell, effort.sample_s))
        is_first = False
    return runs


class _Course:
    """The file that is read from end to end, over and over, and memory for what is under way.

    Requests that wait share their memory with those that are over: the reader has one window under way at a time.
    """

    def __init__(self, reader: FileReader, descriptor: int, name: str, file_bytes: int, *, direct: bool) -> None:
        self._reader = reader
        self._descriptor = descriptor
        self._name = name
        self._file_bytes = file_bytes
        self._direct = direct
        self._memory = huge_page_memory(_MOST_WINDOWS * reader.window_bytes)
        self._offset_bytes = 0
        self._memory_bytes = 0

    def run(self, cell: _Cell, time_limit_s: float) -> _Run:
        """Keeps `cell.depth` requests in flight until the time is up, and waits for all of them."""
        if not self._direct:
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        # What was read once through the page cache would be read from there.
        most = max(self._file_bytes // cell.block_bytes, 1)
        least = min(2 * cell.depth, most)
        latencies_s: list[float] = []
        in_flight: deque[tuple[float, ReadHandle]] = deque()
        begun_s = time.perf_counter()
        num_requests = 0
        while num_requests < least or (num_requests < most and time.perf_counter() < begun_s + time_limit_s):
            if len(in_flight) == cell.depth:
                latencies_s.append(_landed(*in_flight.popleft()))
            read = self._next(cell.block_bytes)
            in_flight.append((time.perf_counter(), self._reader.submit([read])))
            num_requests += 1
        latencies_s += [_landed(*each) for each in in_flight]
        elapsed_s = time.perf_counter() - begun_s
        return _Run(num_requests * cell.block_bytes / elapsed_s, latencies_s)

    def _next(self, block_bytes: int) -> Read:
        if self._offset_bytes + block_bytes > self._file_bytes:
            self._offset_bytes = 0
        if self._memory_bytes + block_bytes > len(self._memory):
            self._memory_bytes = 0
        destination = self._memory[self._memory_bytes :]
        read = Read(file=self._name, offset_bytes=self._offset_bytes, size_bytes=block_bytes, destination=destination)
        self._offset_bytes += block_bytes
        self._memory_bytes += block_bytes
        return read


def _landed(submitted_s: float, handle: ReadHandle) -> float:
    """Waits for the read, and returns the seconds from its submit to its end."""
    handle.wait()
    assert handle.ended_s is not None
    return handle.ended_s - submitted_s


def _derive(runs: Mapping[_Cell, Sequence[_Run]], window_bytes: int) -> tuple[Link, float]:
    """Returns the link that a planner should count on, and the spread of its bandwidth.

    Its bandwidth is the median of all runs in which the reader never ran out of requests: those are one and the same
    experiment, whatever the combination. Its latency is the median, over the sizes, of what a request that is made
    alone takes beyond its bytes at that bandwidth, and never less than what the smallest one takes beyond them.
    """
    saturate = _SATURATING_WINDOWS * window_bytes
    saturating = [cell for cell in runs if cell.depth > 1 and cell.in_flight_bytes >= saturate]
    saturating = saturating or [max(runs, key=lambda cell: cell.in_flight_bytes)]
    bandwidth, spread = _middle([run.bandwidth_bytes_per_s for cell in saturating for run in runs[cell]])
    alone = min(cell.depth for cell in runs)
    beyond_s = {
        cell.block_bytes: _latency_s(found) - cell.block_bytes / bandwidth
        for cell, found in runs.items()
        if cell.depth == alone
    }
    latency_s = max(statistics.median(beyond_s.values()), beyond_s[min(beyond_s)], 0.0)
    return Link(bandwidth_bytes_per_s=bandwidth, latency_s=latency_s, window_bytes=window_bytes), spread


def _choose(runs: Mapping[_Cell, Sequence[_Run]], link: Link) -> _Cell:
    """Returns the combination with the fewest bytes in flight (the largest of equals) that is nearly as fast as any."""
    speeds = {cell: statistics.median(run.bandwidth_bytes_per_s for run in found) for cell, found in runs.items()}
    enough = _NEARLY * min(link.bandwidth_bytes_per_s, max(speeds.values()))
    good = [cell for cell, speed in speeds.items() if speed >= enough]
    return min(good, key=lambda cell: (cell.in_flight_bytes, -cell.block_bytes))


def _latency_s(runs: Sequence[_Run]) -> float:
    return statistics.median(latency_s for run in runs for latency_s in run.latencies_s)


def _sample(cell: _Cell, runs: Sequence[_Run]) -> LinkSample:
    bandwidth, spread = _middle([run.bandwidth_bytes_per_s for run in runs])
    return LinkSample(
        block_bytes=cell.block_bytes,
        depth=cell.depth,
        bandwidth_bytes_per_s=bandwidth,
        latency_s=_latency_s(runs),
        spread=spread,
    )


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """Returns the median, and the width of the middle half as a part of it."""
    median = statistics.median(values)
    if len(values) < 2:
        return median, 0.0
    lower, _, upper = statistics.quantiles(values, method="inclusive")
    return median, (upper - lower) / median
