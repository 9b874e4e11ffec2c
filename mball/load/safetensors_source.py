"""Tensors of a safetensors checkpoint: mapped where the page cache has them, else streamed past it."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from mball.config import calibration_directory, own_cache
from mball.errors import DeviceError, StorageError
from mball.load.device_copy import load_to_device
from mball.load.file_memory import MappedMemory, OwnMemory, TensorMemory
from mball.load.source import Advance, Settings, refuse_changed
from mball.memory.facts import headroom_bytes
from mball.storage import (
    CheckpointIndex,
    DirectIO,
    FileTable,
    Read,
    Reader,
    ReadHandle,
    TensorEntry,
    Threads,
    calibrated_choice,
    choose_reader,
)
from mball.storage.cached import is_cached
from mball.storage.chunks import DEFAULT_NUM_THREADS
from mball.units import MIB, format_bytes

# What lies between two tensors is read with them, up to here.
_GAP_BYTES = MIB

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Bytes `[first, end)` of a file, and the tensors in them, in the order of the file.

    Attributes:
        is_cached: whether they are in the page cache.
    """

    file: str
    first: int
    end: int
    entries: tuple[TensorEntry, ...]
    is_cached: bool

    @property
    def size_bytes(self) -> int:
        """What it takes in memory."""
        return self.end - self.first


class SafetensorsSource:
    """A `Source`; it holds the files open until `close`.

    Raises:
        CheckpointError: as `CheckpointIndex.open`, or a file changed meanwhile.
        StorageError: a file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Settings) -> None:
        self._settings = settings
        self._index = CheckpointIndex.open(path)
        self._readers: dict[DirectIO, Reader] = {}
        self._files = FileTable()
        self._closing = ExitStack()
        self._closing.callback(self._files.close)
        try:
            for file in self._index.files:
                self._files.add_path(file.path)
            self._check_unchanged()
        except BaseException:
            self.close()
            raise

    @property
    def metadata(self) -> Mapping[str, str] | None:
        return self._index.metadata

    def entries(self) -> Mapping[str, TensorEntry]:
        return self._index.entries

    def offset_keys(self) -> list[str]:
        return [entry.name for entry in sorted(self._index.entries.values(), key=_place)]

    def load(self, names: Iterable[str], advance: Advance) -> dict[str, torch.Tensor]:
        self._check_unchanged()
        entries = [self._index.entries[name] for name in names]
        stretches = self._stretches(entries)
        device = self._settings.device
        tensors = {entry.name: _empty(entry, device) for entry in entries if not entry.size_bytes}
        try:
            if device.type == "cpu":
                with ExitStack() as stack:
                    for memory, stretch in zip(self._memories(stretches, advance, stack), stretches, strict=True):
                        tensors |= {entry.name: memory.tensor(entry) for entry in stretch.entries}
            else:
                for stretch in stretches:
                    reader = self._reader(self._mode(stretch))
                    tensors |= load_to_device(stretch.entries, reader, self._settings, advance)
        except (DeviceError, StorageError):
            # Where the file was cut short meanwhile, that is the error to tell.
            self._check_unchanged()
            raise
        # A file that was written to meanwhile may have been read half old and half new.
        self._check_unchanged()
        return {entry.name: tensors[entry.name] for entry in entries}

    def part(self, name: str, index: Any) -> torch.Tensor:
        entry = self._index.entries[name]
        if not entry.size_bytes:
            return _empty(entry, self._settings.device)[index]
        self._check_unchanged()
        try:
            memory = MappedMemory(entry.file, self._descriptor(entry.file), entry.offset_bytes, _end(entry))
            try:
                found = memory.part(entry, index)
            finally:
                memory.close()
        except (DeviceError, StorageError):
            self._check_unchanged()
            raise
        self._check_unchanged()
        return found.to(self._settings.device)

    def close(self) -> None:
        self._closing.close()

    def _stretches(self, entries: Iterable[TensorEntry]) -> list[Stretch]:
        """Returns what has to be read for `entries`: tensors that lie near each other together."""
        near: list[list[TensorEntry]] = []
        for entry in sorted(entries, key=_place):
            if not entry.size_bytes:
                continue
            last = near[-1][-1] if near else None
            if last and last.file == entry.file and entry.offset_bytes - _end(last) <= _GAP_BYTES:
                near[-1].append(entry)
            else:
                near.append([entry])
        return [
            Stretch(
                file=found[0].file,
                first=found[0].offset_bytes,
                end=_end(found[-1]),
                entries=tuple(found),
                is_cached=is_cached(self._descriptor(found[0].file), found[0].offset_bytes, _end(found[-1])),
            )
            for found in near
        ]

    def _memories(self, stretches: Sequence[Stretch], advance: Advance, stack: ExitStack) -> list[TensorMemory]:
        """Returns memory with each stretch in it."""
        is_copied = self._which_to_copy(stretches)
        memories: list[TensorMemory] = []
        own: dict[DirectIO, list[OwnMemory]] = {mode: [] for mode in DirectIO}
        for stretch, copied in zip(stretches, is_copied, strict=True):
            if copied:
                memory = OwnMemory(stretch.file, stretch.first, stretch.end)
                stack.callback(memory.close)
                own[self._mode(stretch)].append(memory)
                memories.append(memory)
            else:
                descriptor = self._descriptor(stretch.file)
                mapped = MappedMemory(stretch.file, descriptor, stretch.first, stretch.end)
                _logger.debug("%s of %s are mapped", format_bytes(stretch.size_bytes), stretch.file)
                stack.callback(mapped.close)
                # What is not there yet is read when somebody touches it: all of it may not fit.
                for size_bytes in mapped.fill() if stretch.is_cached else (stretch.size_bytes,):
                    advance(size_bytes)
                memories.append(mapped)
        for mode, some in own.items():
            if some:
                reads = (read for memory in some for read in memory.reads(mode))
                stream(reads, self._reader(mode), self._settings.in_flight_bytes, advance)
        return memories

    def _which_to_copy(self, stretches: Sequence[Stretch]) -> list[bool]:
        """Returns which get memory of their own. Raises DeviceError where that was asked for and is not there."""
        copy = self._settings.copy
        is_copied = [not stretch.is_cached if copy is None else copy for stretch in stretches]
        wanted_bytes = sum(stretch.size_bytes for stretch, copied in zip(stretches, is_copied, strict=True) if copied)
        if not wanted_bytes or wanted_bytes <= (free_bytes := headroom_bytes()):
            return is_copied
        if copy:
            raise DeviceError(
                f"the tensors asked for of {self._index.path} take {format_bytes(wanted_bytes)} ({wanted_bytes} bytes) "
                f"of memory, and {format_bytes(free_bytes)} ({free_bytes} bytes) are free on this machine and within "
                "its cgroup limit; free memory, or map them with copy=False"
            )
        return [False] * len(stretches)

    def _descriptor(self, file: str) -> int:
        return self._files[file].buffered

    def _mode(self, stretch: Stretch) -> DirectIO:
        """Returns how a stretch is read: as asked for, else the fastest way."""
        asked = DirectIO.of(self._settings.io)
        return DirectIO.OFF if asked is DirectIO.AUTO and stretch.is_cached else asked

    def _reader(self, mode: DirectIO) -> Reader:
        """Returns a reader that is kept until `close`."""
        if mode not in self._readers:
            # Through the page cache reading is copying: more threads than cores only take turns.
            num_cores = len(os.sched_getaffinity(0))
            num_threads = min(DEFAULT_NUM_THREADS, num_cores) if mode is DirectIO.OFF else DEFAULT_NUM_THREADS
            files = FileTable(direct=mode)
            self._closing.callback(files.close)
            for file in self._index.files:
                # The same open file: by its path another one may be found by now.
                files.add_descriptor(file.path, self._descriptor(file.path))
            threads = Threads.of(self._settings.io)
            choice = choose_reader(threads=threads, num_threads=num_threads, cache=own_cache())
            if mode is not DirectIO.OFF:
                choice = calibrated_choice(calibration_directory(), files, choice)
            reader = choice.open(files)
            self._closing.callback(reader.close)
            self._readers[mode] = reader
            way = "past the page cache" if files.any_direct else "through the page cache"
            _logger.debug("%s is read %s (%s), by %s", self._index.path, way, mode.value, choice)
        return self._readers[mode]

    def _check_unchanged(self) -> None:
        # The open files: by a path another one may be found by now.
        refuse_changed(self._index.files, lambda path: os.fstat(self._descriptor(path)))


def stream(reads: Iterator[Read], reader: Reader, in_flight_bytes: int, advance: Advance) -> None:
    """Reads all of `reads`, at most `in_flight_bytes` at one time, or one.

    The next of `reads` is taken while those before it are under way, so that making it (faulting its memory in) takes
    no time of the disk's.

    Raises:
        StorageError: a read failed. Whatever is raised, nothing is under way any more.
    """
    in_flight: deque[ReadHandle] = deque()

    def finish_one() -> None:
        handle = in_flight.popleft()
        handle.wait()
        advance(handle.size_bytes)

    try:
        for read in reads:
            while in_flight and sum(handle.size_bytes for handle in in_flight) + read.size_bytes > in_flight_bytes:
                finish_one()
            in_flight.append(reader.submit([read]))
        while in_flight:
            finish_one()
    finally:
        reader.drain()


def _place(entry: TensorEntry) -> tuple[str, int]:
    return entry.file, entry.offset_bytes


def _end(entry: TensorEntry) -> int:
    return entry.offset_bytes + entry.size_bytes


def _empty(entry: TensorEntry, device: torch.device) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device=device)
