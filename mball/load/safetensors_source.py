"""Tensors of a safetensors checkpoint: mapped where the page cache has them, else streamed past it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from mball.errors import CheckpointError, DeviceError
from mball.load.device_copy import load_to_device
from mball.load.file_memory import MappedMemory, OwnMemory, TensorMemory
from mball.load.source import Advance, Settings
from mball.memory.facts import headroom_bytes
from mball.storage import (
    CheckpointIndex,
    DirectIO,
    FileTable,
    Read,
    Reader,
    ReadHandle,
    TensorEntry,
    choose_reader,
)
from mball.storage.cached import is_cached
from mball.storage.chunks import DEFAULT_NUM_THREADS
from mball.units import format_bytes


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
        with ExitStack() as stack:
            self._tables = {mode: FileTable(direct=mode) for mode in (DirectIO.AUTO, DirectIO.OFF)}
            for table in self._tables.values():
                stack.callback(table.close)
                for file in self._index.files:
                    table.add_path(file.path)
            self._check_unchanged()
            self._closing = stack.pop_all()

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
        stretches = _stretches(entries)
        tensors: dict[str, torch.Tensor] = {}
        if self._settings.device.type != "cpu":
            reader = self._reader(DirectIO.OFF if self._are_cached(stretches) else DirectIO.AUTO)
            for part in stretches.values():
                tensors |= load_to_device(part, reader, self._settings, advance)
        else:
            with ExitStack() as stack:
                memories = self._memories(stretches, advance, stack)
                for file, part in stretches.items():
                    tensors |= {entry.name: memories[file].tensor(entry) for entry in part}
        # A file that was written to meanwhile may have been read half old and half new.
        self._check_unchanged()
        tensors |= {entry.name: _empty(entry, self._settings.device) for entry in entries if not entry.size_bytes}
        return {entry.name: tensors[entry.name] for entry in entries}

    def part(self, name: str, index: Any) -> torch.Tensor:
        entry = self._index.entries[name]
        if not entry.size_bytes:
            return _empty(entry, self._settings.device)[index]
        self._check_unchanged()
        memory = MappedMemory(self._descriptor(entry.file), *_range([entry]))
        try:
            # Nothing is read yet. A copy, so that the slice keeps neither the file mapped nor the rest in memory.
            found = memory.tensor(entry)[index].clone()
        finally:
            memory.close()
        self._check_unchanged()
        return found.to(self._settings.device)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._closing.close()

    def _memories(
        self, stretches: Mapping[str, Sequence[TensorEntry]], advance: Advance, stack: ExitStack
    ) -> dict[str, TensorMemory]:
        """Returns memory with each file's stretch in it."""
        cached = {file: is_cached(self._descriptor(file), *_range(part)) for file, part in stretches.items()}
        copied = self._copied(stretches, cached)
        memories: dict[str, TensorMemory] = {}
        own: dict[DirectIO, list[OwnMemory]] = {mode: [] for mode in DirectIO}
        for file, part in stretches.items():
            if file not in copied:
                mapped = MappedMemory(self._descriptor(file), *_range(part))
                stack.callback(mapped.close)
                try:
                    for size_bytes in mapped.fill():
                        advance(size_bytes)
                except DeviceError:
                    self._check_unchanged()
                    raise
                memories[file] = mapped
            else:
                memory = OwnMemory(file, *_range(part))
                stack.callback(memory.close)
                own[DirectIO.OFF if cached[file] else DirectIO.AUTO].append(memory)
                memories[file] = memory
        for mode, some in own.items():
            if some:
                reads = (read for memory in some for read in memory.reads())
                stream(reads, self._reader(mode), self._settings.in_flight_bytes, advance)
        return memories

    def _copied(self, stretches: Mapping[str, Sequence[TensorEntry]], cached: Mapping[str, bool]) -> set[str]:
        """Returns the files whose tensors get memory of their own. Raises DeviceError where that was asked in vain."""
        copy = self._settings.copy
        copied = {file for file in stretches if copy or (copy is None and not cached[file])}
        wanted_bytes, free_bytes = sum(_size_bytes(stretches[file]) for file in copied), headroom_bytes()
        if wanted_bytes <= free_bytes:
            return copied
        if copy:
            raise DeviceError(
                f"the tensors asked for of {self._index.path} take {format_bytes(wanted_bytes)} ({wanted_bytes} bytes) "
                f"of memory, and {format_bytes(free_bytes)} ({free_bytes} bytes) are free on this machine and within "
                "its cgroup limit; free memory, or map them with copy=False"
            )
        return set()

    def _are_cached(self, stretches: Mapping[str, Sequence[TensorEntry]]) -> bool:
        return all(is_cached(self._descriptor(file), *_range(part)) for file, part in stretches.items())

    def _descriptor(self, file: str) -> int:
        return self._tables[DirectIO.AUTO][file].buffered

    def _reader(self, mode: DirectIO) -> Reader:
        if mode not in self._readers:
            # Through the page cache reading is copying: more threads than cores only take turns.
            num_cores = len(os.sched_getaffinity(0))
            num_threads = DEFAULT_NUM_THREADS if mode is DirectIO.AUTO else min(DEFAULT_NUM_THREADS, num_cores)
            self._readers[mode] = choose_reader(num_threads=num_threads).open(self._tables[mode])
        return self._readers[mode]

    def _check_unchanged(self) -> None:
        """Raises CheckpointError when an open file is no longer what its header was read from."""
        for table in self._tables.values():
            for file in self._index.files:
                if changes := file.changes(os.fstat(table[file.path].buffered)):
                    raise CheckpointError(
                        f"checkpoint file {file.path} changed while it was read: {'; '.join(changes)}. What was read "
                        "may be of both versions and is not given out: load it again when it is whole"
                    )


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


def _stretches(entries: Iterable[TensorEntry]) -> dict[str, list[TensorEntry]]:
    """Returns the entries that have bytes, by file, in the order of the file."""
    by_file: dict[str, list[TensorEntry]] = {}
    for entry in sorted(entries, key=_place):
        if entry.size_bytes:
            by_file.setdefault(entry.file, []).append(entry)
    return by_file


def _place(entry: TensorEntry) -> tuple[str, int]:
    return entry.file, entry.offset_bytes


def _range(entries: Sequence[TensorEntry]) -> tuple[int, int]:
    return entries[0].offset_bytes, entries[-1].offset_bytes + entries[-1].size_bytes


def _size_bytes(entries: Sequence[TensorEntry]) -> int:
    first, end = _range(entries)
    return end - first


def _empty(entry: TensorEntry, device: torch.device) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device=device)
