"""Swap against the yardsticks: writes alone, and writes beside reads as a pass makes them."""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.results import Measurement
from bench.speed import fio
from bench.speed.preadv import huge_pages
from bench.speed.pwritev import SETTINGS, WriteYardstick
from bench.speed.ratios import Target, ratio, ratio_measurements
from bench.speed.rounds import Sample, Say, interleave, smaller
from mball.config import SwapCheck, own_cache
from mball.storage import CheckedReader, FileTable, Read, SwapFile, SwapSettings, Write, choose_reader
from mball.storage.checksum import NAME as CHECKSUM
from mball.storage.checksum import checksum
from mball.storage.extents import BLOCK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapScale:
    """How much is written, and read beside it, in how many rounds; `with_fio` whether fio is asked as well."""

    size_bytes: int
    num_rounds: int
    with_fio: bool


FULL = SwapScale(size_bytes=1 << 30, num_rounds=9, with_fio=True)
SMOKE = SwapScale(size_bytes=8 << 20, num_rounds=2, with_fio=False)


# As the bias of a layer, or a row of experts; no multiple of a page.
_SMALL_BYTES = 100_032
_HANDED_BYTES = 64 << 20
_SUMMED_BYTES = 256 << 20
_NUM_SUMS = 5


class _Swap:
    """mball's side: an extent that is written again and again, and reads of another file through the same seam."""

    def __init__(self, swap: SwapFile, reader: CheckedReader, source: memoryview, file: str, destination: memoryview):
        self._swap = swap
        self._reader = reader
        self._start = swap.allocate(len(source))
        self._writes = [Write(offset_bytes=self._start, source=source)]
        self._read = Read(file=file, offset_bytes=0, size_bytes=len(destination), destination=destination)

    def write(self) -> float:
        """Writes everything; returns the seconds that took, checksums included."""
        began_s = time.perf_counter()
        self._swap.write_all(self._writes)
        return time.perf_counter() - began_s

    def write_small(self) -> float:
        """As `write`, as many tensors that lie side by side, at odd addresses."""
        (write,) = self._writes
        began_s = time.perf_counter()
        self._swap.write_all(
            [
                Write(offset_bytes=self._start + first, source=write.source[first : first + _SMALL_BYTES])
                for first in range(0, len(write.source), _SMALL_BYTES)
            ]
        )
        return time.perf_counter() - began_s

    def hand_over(self) -> float:
        """Hands over what the queue has room for; returns the seconds for which that blocks the caller."""
        (write,) = self._writes
        part = Write(offset_bytes=self._start, source=write.source[:_HANDED_BYTES])
        began_s = time.perf_counter()
        handle = self._swap.submit([part])
        took_s = time.perf_counter() - began_s
        handle.wait()
        return took_s

    def both(self) -> float:
        """Reads and writes at one time; returns the seconds until both were done. Reads go first."""
        began_s = time.perf_counter()
        handle = self._reader.submit([self._read])
        self._swap.write_all(self._writes)
        handle.wait()
        return time.perf_counter() - began_s

    def read(self) -> float:
        """Reads everything, and nobody writes; returns the seconds that took."""
        began_s = time.perf_counter()
        self._reader.submit([self._read]).wait()
        return time.perf_counter() - began_s

    def both_unhurried(self) -> float:
        """As `both`, but nobody waits for the writes before the reads are done; returns the seconds of the reads."""
        portion = 32 << 20
        (write,) = self._writes
        began_s = time.perf_counter()
        handle = self._reader.submit([self._read])
        writing = []
        for first in range(0, len(write.source), portion):
            if handle.done():
                break
            part = write.source[first : first + portion]
            writing.append(self._swap.submit([Write(offset_bytes=self._start + first, source=part)]))
        handle.wait()
        took_s = time.perf_counter() - began_s
        for each in writing:
            each.wait()
        return took_s


def swap(directory: Path, scale: SwapScale, say: Say) -> list[Measurement]:
    """Returns the seconds of each contender and their ratios. Raises OSError when the disk fails.

    The yardstick of writes is the faster of a bare loop and fio, by its median; that of both fio's mixed run where fio
    is installed, else the bare loop.
    """
    with _contenders(directory, scale, say) as sources:
        found = interleave(sources, scale.num_rounds, say, "swap")
    measurements = []
    yardsticks = {act: [name for name in found if name in (f"bare_{act}", f"fio_{act}")] for act in ("write", "both")}
    # Of reads and writes together fio's own run is the measure, where it is installed.
    yardsticks["both"] = yardsticks["both"][-1:]
    for act, bound, what in (
        ("write", Target(limit=1 / 0.9), "written to swap"),
        ("both", Target(limit=1.0), "written to swap and as much read beside"),
    ):
        yardstick = smaller(found, yardsticks[act])
        times = ratio(found[f"mball_{act}"], found[yardstick])
        size = f"{scale.size_bytes / 1e9:.2f} GB {what}"
        compared = "fio" if yardstick.startswith("fio") else "a bare loop"
        measurements += ratio_measurements(f"swap_{act}", times, f"{size}, with {CHECKSUM}", compared, bound)
        for name in sorted(found):
            if name.endswith(f"_{act}"):
                measurements.append(Measurement.of(f"swap_{name}_s", found[name], unit="s", description=size))
        say(f"{act}: {times.median:.3g}× {compared}; {bound.verdict(times.median)}")
    yardstick = smaller(found, yardsticks["write"])
    measurements += ratio_measurements(
        "swap_unchecked",
        ratio(found["mball_unchecked"], found[yardstick]),
        f"{scale.size_bytes / 1e9:.2f} GB written to swap, without checksums",
        "fio" if yardstick.startswith("fio") else "a bare loop",
        Target(limit=1 / 0.9),
    )
    beside = ratio(found["mball_unhurried"], found["mball_read"])
    measurements += ratio_measurements(
        "swap_reads_beside", beside, "reads while swap writes that nobody waits for", "the same reads alone"
    )
    measurements += [
        Measurement.of(
            f"swap_{name}_s", found[f"mball_{name}"], unit="s", description=f"{scale.size_bytes / 1e9:.2f} GB"
        )
        for name in ("unchecked", "read", "unhurried", "small")
    ]
    handed_s = [seconds * (1 << 30) / min(scale.size_bytes, _HANDED_BYTES) for seconds in found["mball_handed"]]
    measurements.append(
        Measurement.of("swap_handed_s", handed_s, unit="s/GiB", description="for which `submit` blocks the caller")
    )
    measurements += _checksums(min(scale.size_bytes, _SUMMED_BYTES))
    rates = [scale.size_bytes / seconds / 1e9 for seconds in found["mball_write"]]
    measurements.append(Measurement.of("swap_rate", rates, unit="GB/s", description="written by mball"))
    return measurements


def _checksums(size_bytes: int) -> list[Measurement]:
    """Returns what a core takes for the checksums of a GB, by each way that is there, in blocks as swap has them."""
    content = memoryview(os.urandom(size_bytes))
    blocks = [content[first : first + BLOCK_BYTES] for first in range(0, size_bytes, BLOCK_BYTES)]
    found = []
    for name, checksum_of in {"CRC-32": zlib.crc32, CHECKSUM: checksum}.items():
        samples_s = []
        for _ in range(_NUM_SUMS):
            began_s = time.thread_time()
            for block in blocks:
                checksum_of(block)
            samples_s.append((time.thread_time() - began_s) * 1e9 / size_bytes)
        key = f"swap_{name.lower().replace('-', '')}_s"
        found.append(Measurement.of(key, samples_s, unit="s", description=f"of a core for a GB, {name}"))
    return found


@contextlib.contextmanager
def _contenders(directory: Path, scale: SwapScale, say: Say) -> Iterator[dict[str, Sample]]:
    with contextlib.ExitStack() as stack:
        source, destination = huge_pages(scale.size_bytes), huge_pages(scale.size_bytes)
        for first in range(0, scale.size_bytes, 1 << 20):
            source[first : first + (1 << 20)] = os.urandom(1 << 20)
        read_path, write_path = directory / "read", directory / "written"
        for path in (read_path, write_path):
            with path.open("wb") as file:
                for first in range(0, scale.size_bytes, 1 << 20):
                    file.write(source[first : first + (1 << 20)])
                os.fsync(file.fileno())
            stack.callback(path.unlink)
        flags = {read_path: os.O_RDONLY | os.O_DIRECT, write_path: os.O_WRONLY | os.O_DIRECT}
        opened = {path: os.open(path, flag) for path, flag in flags.items()}
        for descriptor in opened.values():
            stack.callback(os.close, descriptor)
        bare = WriteYardstick(opened[write_path], source, opened[read_path], destination)
        best = {"write": bare.best(bare.write), "both": bare.best(bare.both, SETTINGS[3:])}
        say(f"bare loop: writes by {best['write']}, both by {best['both']}")

        files = FileTable()
        stack.callback(files.close)
        file_swap = stack.enter_context(SwapFile.create(directory))
        files.add_swap(file_swap)
        reader = CheckedReader(choose_reader(cache=own_cache()).open(files), files)
        stack.callback(reader.close)
        mball = _Swap(file_swap, reader, source, files.add_path(read_path), destination)
        unchecked_swap = stack.enter_context(SwapFile.create(directory, SwapSettings(check=SwapCheck.OFF)))
        unchecked = _Swap(unchecked_swap, reader, source, files.add_path(read_path), destination)
        for each in (mball, unchecked):
            each.write()  # blocks of a file that were never written take longer
        sources: dict[str, Sample] = {
            "mball_write": mball.write,
            "mball_unchecked": unchecked.write,
            "bare_write": lambda: bare.write(best["write"]),
            "mball_both": mball.both,
            "bare_both": lambda: bare.both(best["both"]),
            "mball_read": mball.read,
            "mball_unhurried": mball.both_unhurried,
            "mball_small": mball.write_small,
            "mball_handed": mball.hand_over,
        }
        if scale.with_fio and not fio.is_there():
            say("fio is not installed: the bare loop alone is the yardstick")
        elif scale.with_fio:
            jobs = {act: fio.best_job(write_path, scale.size_bytes, act=act) for act in (fio.write, fio.mixed)}
            say(f"fio writes by {jobs[fio.write]}, both by {jobs[fio.mixed]}")
            sources["fio_write"] = lambda: fio.write(write_path, scale.size_bytes, jobs[fio.write])
            sources["fio_both"] = lambda: fio.mixed(write_path, scale.size_bytes, jobs[fio.mixed])
        yield sources
