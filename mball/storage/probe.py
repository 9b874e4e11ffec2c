"""Measures what a directory's disk can do, and how fast a reader's link is. Caches nothing."""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mball.errors import StorageError
from mball.schema import Link
from mball.storage.alignment import COARSE_ALIGNMENT_BYTES
from mball.storage.choice import ReaderChoice, choose_reader
from mball.storage.files import DirectIO, FileTable
from mball.storage.mounts import file_system_of, page_cache_reason
from mball.storage.reader import Read, Reader, ReadHandle
from mball.storage.scratch import fill, huge_page_memory
from mball.units import GIB, MIB, round_down

# For so long each start reads, where no calibration is kept.
LINK_TIME_LIMIT_S = 0.05
_SMALL_READ_BYTES = 4096
_MOST_ALIGNMENT_BYTES = COARSE_ALIGNMENT_BYTES
_BLOCK_BYTES = 8 * MIB
_NUM_IN_FLIGHT = 4
_ALIGNMENTS_BYTES = tuple(512 << power for power in range(8))


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryFacts:
    """What the disk under a directory can do; None where it cannot, or was not measured.

    Attributes:
        page_cache_reason: why files here are read through the page cache; None if they are not.
        direct: whether `O_DIRECT` works.
        offset_alignment_bytes: smallest file offset (512 to 65536) that direct reads accept; likewise
            `address_alignment_bytes` of the destination and `length_alignment_bytes`.
        direct_bandwidth_bytes_per_s: past the page cache, into pre-faulted memory, huge pages where the system
            gives them.
        buffered_bandwidth_bytes_per_s: through the page cache, dropped before.
        cached_bandwidth_bytes_per_s: out of the page cache.
        latency_s: what a read on the idle disk takes beyond its bytes at full speed, on the path that readers take.
        measured_bytes: size of the file that was read; 0 when the disk had no room for one.
    """

    directory: str
    file_system: str
    mount_point: str
    free_bytes: int
    page_cache_reason: str | None
    direct: bool
    offset_alignment_bytes: int | None
    address_alignment_bytes: int | None
    length_alignment_bytes: int | None
    direct_bandwidth_bytes_per_s: float | None
    buffered_bandwidth_bytes_per_s: float | None
    cached_bandwidth_bytes_per_s: float | None
    latency_s: float | None
    measured_bytes: int


def probe_directory(
    directory: str | os.PathLike[str], *, size_bytes: int = 256 * MIB, choice: ReaderChoice | None = None
) -> DirectoryFacts:
    """Writes a temporary file of `size_bytes` (at most half of what is free), reads it, and removes it.

    Reads by the reader of `choice`; by default the best that is there.

    Raises:
        StorageError: the directory does not exist, cannot be written to, or its disk fails.
    """
    where = os.path.abspath(directory)
    try:
        usage = os.statvfs(where)
        free_bytes = usage.f_bavail * usage.f_frsize
        measured_bytes = round_down(min(size_bytes, free_bytes // 2), mmap.PAGESIZE)
        mount = file_system_of(where)
        alignments: tuple[int | None, int | None, int | None] = (None, None, None)
        direct_bandwidth = buffered_bandwidth = cached_bandwidth = latency_s = None
        choice = choice or choose_reader()
        with tempfile.TemporaryFile(dir=where, buffering=0) as file:
            if measured_bytes >= 2 * _MOST_ALIGNMENT_BYTES:
                fill(file.fileno(), measured_bytes)
                alignments = _direct_alignments(file.fileno())
                _forget(file.fileno())
                link = _measure(file.fileno(), DirectIO.OFF, choice)
                buffered_bandwidth = link.bandwidth_bytes_per_s
                # What a slow disk did not bring in time is not there: then this is its speed, too.
                cached_bandwidth = _measure(file.fileno(), DirectIO.OFF, choice).bandwidth_bytes_per_s
                if all(alignments):
                    _forget(file.fileno())
                    direct = _measure(file.fileno(), DirectIO.ALWAYS, choice)
                    direct_bandwidth = direct.bandwidth_bytes_per_s
                    link = link if page_cache_reason(mount.kind) else direct
                latency_s = link.latency_s
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{where} cannot be probed ({error.strerror}); choose a directory that exists and can be written to"
        ) from error
    return DirectoryFacts(
        directory=where,
        file_system=mount.kind,
        mount_point=mount.mount_point,
        free_bytes=free_bytes,
        page_cache_reason=page_cache_reason(mount.kind),
        direct=all(alignments),
        offset_alignment_bytes=alignments[0],
        address_alignment_bytes=alignments[1],
        length_alignment_bytes=alignments[2],
        direct_bandwidth_bytes_per_s=direct_bandwidth,
        buffered_bandwidth_bytes_per_s=buffered_bandwidth,
        cached_bandwidth_bytes_per_s=cached_bandwidth,
        latency_s=latency_s,
        measured_bytes=measured_bytes if latency_s is not None else 0,
    )


def measure_link(
    files: FileTable,
    *names: str,
    choice: ReaderChoice | None = None,
    size_limit_bytes: int = 256 * MIB,
    time_limit_s: float = LINK_TIME_LIMIT_S,
) -> Link:
    """Returns the speed at which the reader of `choice` brings files of the table, `names` or all of them, to memory.

    Reads at most about `size_limit_bytes`, and stops after `time_limit_s`. Bandwidth is that of 8 MiB blocks, four at
    a time; latency is what a block that is read alone takes longer than that. Takes 32 MiB of memory meanwhile.
    Where the page cache is used, this is the speed of files as warm or cold as they are now.

    Raises:
        StorageError: there is no file with a byte in it, or a read fails.
    """
    sizes = {name: files[name].size_bytes() for name in names or files.names}
    if not any(sizes.values()):
        raise StorageError(f"none of {len(sizes)} files has bytes to measure the link with; add a file first")
    buffer = huge_page_memory(_BLOCK_BYTES * _NUM_IN_FLIGHT)
    reader = (choice or choose_reader()).open(files)
    try:
        small_s = _alone_s(reader, sizes, buffer, _SMALL_READ_BYTES)
        bandwidth = _bandwidth_bytes_per_s(reader, sizes, buffer, size_limit_bytes, time.perf_counter() + time_limit_s)
        # The block has to be all there: the end of a small file would seem to be read in no time.
        alone_s = _alone_s(reader, sizes, buffer, _BLOCK_BYTES) if max(sizes.values()) >= 4 * _BLOCK_BYTES else 0.0
        latency_s = max(alone_s - _BLOCK_BYTES / bandwidth, small_s)
    finally:
        reader.close()
    return Link(bandwidth_bytes_per_s=bandwidth, latency_s=latency_s, window_bytes=reader.window_bytes)


def _alone_s(reader: Reader, sizes: dict[str, int], buffer: memoryview, read_bytes: int) -> float:
    """Returns the median of the seconds that reads of `read_bytes`, spread over the files, take from submit to wait."""
    samples_s = []
    # The first reads start threads and open descriptors: they do not count.
    largest = sorted(sizes.items(), key=lambda item: -item[1])
    for name, size_bytes in [item for item in largest if item[1] >= read_bytes][:4] or largest[:1]:
        for part in range(8):
            offset_bytes = round_down(max(size_bytes - read_bytes, 0) * part // 8, _SMALL_READ_BYTES)
            begun_s = time.perf_counter()
            reader.submit([_read(name, offset_bytes, read_bytes, buffer)]).wait()
            samples_s.append(time.perf_counter() - begun_s)
    return statistics.median(samples_s[1:] or samples_s)


def _bandwidth_bytes_per_s(
    reader: Reader, sizes: dict[str, int], buffer: memoryview, size_limit_bytes: int, deadline_s: float
) -> float:
    in_flight: deque[ReadHandle] = deque()
    done_bytes = 0
    begun_s = time.perf_counter()
    for number, (name, offset_bytes) in enumerate(_blocks(sizes)):
        if len(in_flight) == _NUM_IN_FLIGHT:
            in_flight.popleft().wait()
        slot = buffer[number % _NUM_IN_FLIGHT * _BLOCK_BYTES :]
        handle = reader.submit([_read(name, offset_bytes, _BLOCK_BYTES, slot)])
        in_flight.append(handle)
        done_bytes += handle.size_bytes
        if done_bytes >= size_limit_bytes or time.perf_counter() > deadline_s:
            break
    for handle in in_flight:
        handle.wait()
    return done_bytes / (time.perf_counter() - begun_s)


def _blocks(sizes: dict[str, int]) -> Iterator[tuple[str, int]]:
    for name, size_bytes in sizes.items():
        for offset_bytes in range(0, size_bytes, _BLOCK_BYTES):
            yield name, offset_bytes


def _read(name: str, offset_bytes: int, size_bytes: int, destination: memoryview) -> Read:
    return Read(file=name, offset_bytes=offset_bytes, size_bytes=size_bytes, destination=destination)


def _forget(descriptor: int) -> None:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _measure(descriptor: int, mode: DirectIO, choice: ReaderChoice) -> Link:
    """Reads the whole file, at most 10 s of it."""
    files = FileTable(direct=mode)
    try:
        files.add_descriptor("probe", descriptor)
        return measure_link(files, choice=choice, size_limit_bytes=GIB, time_limit_s=10.0)
    finally:
        files.close()


def _direct_alignments(descriptor: int) -> tuple[int | None, int | None, int | None]:
    """Returns the smallest (offset, address, length) in bytes that direct reads accept; None where none does."""
    try:
        direct = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None, None, None
    memory = huge_page_memory(2 * _MOST_ALIGNMENT_BYTES)
    try:
        return (
            _smallest(lambda n: os.preadv(direct, [memory[:_MOST_ALIGNMENT_BYTES]], n)),
            _smallest(lambda n: os.preadv(direct, [memory[n : n + _MOST_ALIGNMENT_BYTES]], 0)),
            _smallest(lambda n: os.preadv(direct, [memory[:n]], 0)),
        )
    finally:
        os.close(direct)


def _smallest(read: Callable[[int], int]) -> int | None:
    for alignment_bytes in _ALIGNMENTS_BYTES:
        try:
            read(alignment_bytes)
        except OSError:
            continue
        return alignment_bytes
    return None
