"""How many requests of how many bytes a disk reads fastest with, each setting tried in turn with the default."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from mball.storage.choice import ReaderChoice
from mball.storage.files import FileTable
from mball.storage.reader import Read
from mball.storage.scratch import huge_page_memory
from mball.units import MIB

# Numbers of requests under way, and bytes of each.
SETTINGS = ((4, 2 * MIB), (16, 2 * MIB), (32, 2 * MIB), (8, MIB), (8, 4 * MIB), (8, 8 * MIB), (16, 4 * MIB))
# Fewer rounds say nothing about chance, and less is not worth another window of requests.
_FEWEST_ROUNDS = 5
_WORTH = 1.03
# Long enough for several windows of the largest setting, so that beginning and end count for little.
_SAMPLE_BYTES = 128 * MIB


def choose_requests(
    descriptor: int, choice: ReaderChoice, time_limit_s: float, progress: Callable[[str], None]
) -> ReaderChoice:
    """Returns `choice` with the setting that reads an open file fastest: its own, unless another is clearly faster.

    Takes 128 MiB of memory, or the size of the file if that is less. Within the time that is given, a disk that is too
    slow for five rounds keeps the default. Raises StorageError when a read fails.
    """
    choices = [choice, *(replace(choice, num_threads=number, chunk_bytes=size) for number, size in SETTINGS)]
    deadline_s = time.perf_counter() + time_limit_s
    file_bytes = os.fstat(descriptor).st_size
    memory = huge_page_memory(min(_SAMPLE_BYTES, file_bytes)) if time_limit_s else memoryview(b"")
    rounds: list[list[float]] = []
    orders, offset_bytes = random.Random(0), 0
    while time.perf_counter() < deadline_s:
        seconds = [0.0] * len(choices)
        for number in orders.sample(range(len(choices)), len(choices)):
            if time.perf_counter() > deadline_s:
                break
            progress(f"reading by {choices[number]} (round {len(rounds) + 1})")
            if offset_bytes + len(memory) > file_bytes:
                offset_bytes = 0
            seconds[number] = _read_s(descriptor, choices[number], offset_bytes, memory)
            offset_bytes += len(memory)
        else:
            rounds.append(seconds)
    return fastest(choices, rounds)


def fastest(choices: Sequence[ReaderChoice], rounds: Sequence[Sequence[float]]) -> ReaderChoice:
    """Returns the choice that takes the least time, or the first one where none gains more than chance may have given.

    Choices are held against the first one in each round, since disks change from one to the next: the median of these
    ratios has to exceed one by more than the middle half of them spans.

    Args:
        choices: the default first.
        rounds: the seconds of each choice.
    """
    best, best_gain = choices[0], _WORTH
    if len(rounds) < _FEWEST_ROUNDS:
        return best
    for number, choice in enumerate(choices):
        gains = [seconds[0] / seconds[number] for seconds in rounds]
        lower, gain, upper = statistics.quantiles(gains, method="inclusive")
        if gain > best_gain and gain - 1 > upper - lower:
            best, best_gain = choice, gain
    return best


def _read_s(descriptor: int, choice: ReaderChoice, offset_bytes: int, memory: memoryview) -> float:
    """Returns the seconds in which a reader fills `memory`, without those in which its threads start."""
    files = FileTable()
    try:
        name = files.add_descriptor("requests", descriptor)
        if not files.is_direct(name):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        reader = choice.open(files)
        try:
            first = Read(file=name, offset_bytes=offset_bytes, size_bytes=4096, destination=memory)
            reader.submit([first]).wait()
            whole = Read(file=name, offset_bytes=offset_bytes, size_bytes=len(memory), destination=memory)
            began_s = time.perf_counter()
            reader.submit([whole]).wait()
            return time.perf_counter() - began_s
        finally:
            reader.close()
    finally:
        files.close()
