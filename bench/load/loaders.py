"""Ways to bring a safetensors file into memory. Each returns what is timed, which returns tensors by name."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import torch

import mball
from bench.speed.preadv import Setting, Span, Yardstick, huge_pages
from mball.config import own_cache
from mball.load.file_memory import OwnMemory
from mball.load.safetensors_source import stream
from mball.storage import CheckpointIndex, DirectIO, FileTable, choose_reader
from mball.storage.chunks import DEFAULT_CHUNK_BYTES, DEFAULT_NUM_THREADS
from mball.units import MIB, round_up

# Keeps alive what the tensors lie in.
Held = tuple[dict[str, torch.Tensor], Any]


class Way(Enum):
    """Who loads."""

    BARE = "bare"  # the yardstick's loop, into as much memory, taken when the others take theirs
    PREFAULTED = "prefaulted"  # mball's stream into memory that is there already, as the yardstick's is
    MBALL = "mball"
    COPY = "mball_copy"
    MMAP = "safetensors_mmap"
    PREAD = "safetensors_pread"
    FASTSAFETENSORS = "fastsafetensors"
    RUNAI = "runai"


PEERS = (Way.MMAP, Way.PREAD, Way.FASTSAFETENSORS, Way.RUNAI)
# Their pages are there before the clock runs, and nobody touches the yardstick's either.
THERE = (Way.BARE, Way.PREFAULTED)
TITLES = {
    Way.BARE: "a bare read into memory of its own",
    Way.PREFAULTED: "mball, into memory that is there",
    Way.MBALL: "mball.load_file",
    Way.COPY: "mball.load_file, copy=True",
    Way.MMAP: "safetensors load_file",
    Way.PREAD: 'safetensors load_file, backend="pread"',
    Way.FASTSAFETENSORS: "fastsafetensors, CPU",
    Way.RUNAI: "Run:ai model streamer, CPU",
}


def prepare(way: Way, path: Path) -> Callable[[], Held]:
    """Returns what loads `path` this way. Imports, and memory for those of THERE, are there then."""
    if way in (Way.MBALL, Way.COPY):
        copy = True if way is Way.COPY else None
        return lambda: (mball.load_file(path, copy=copy), None)
    if way in THERE:
        return _bare(path) if way is Way.BARE else _prefaulted(path)
    if way in (Way.MMAP, Way.PREAD):
        from safetensors.torch import load_file

        backend = "mmap" if way is Way.MMAP else "pread"
        return lambda: (load_file(path, backend=backend), None)
    return _fastsafetensors(path) if way is Way.FASTSAFETENSORS else _runai(path)


def _bare(path: Path) -> Callable[[], Held]:
    size_bytes = path.stat().st_size
    memory = huge_pages(round_up(size_bytes, MIB))
    spans = [
        Span(path=str(path), offset_bytes=offset, size_bytes=min(64 * MIB, size_bytes - offset))
        for offset in range(0, size_bytes, 64 * MIB)
    ]
    yardstick, entries = Yardstick(spans, memory), CheckpointIndex.open(path).entries.values()

    def load() -> Held:
        # As many requests of as many bytes as mball has under way.
        yardstick.read(Setting(num_threads=DEFAULT_NUM_THREADS, chunk_bytes=DEFAULT_CHUNK_BYTES))
        yardstick.close()
        # The file lies in memory as it lies on disk.
        return {
            entry.name: torch.frombuffer(memory, dtype=torch.uint8, offset=entry.offset_bytes, count=entry.size_bytes)
            for entry in entries
        }, memory

    return load


def _prefaulted(path: Path) -> Callable[[], Held]:
    index = CheckpointIndex.open(path)
    entries = sorted(index.entries.values(), key=lambda entry: entry.offset_bytes)
    memory = OwnMemory(str(path), entries[0].offset_bytes, entries[-1].offset_bytes + entries[-1].size_bytes)
    reads = list(memory.reads(DirectIO.AUTO))  # faults all of it in

    choice = choose_reader(cache=own_cache())

    def load() -> Held:
        files = FileTable()
        files.add_path(path)
        reader = choice.open(files)
        try:
            stream(iter(reads), reader, 256 * MIB, lambda _: None)
        finally:
            reader.close()
            files.close()
        return {entry.name: memory.tensor(entry) for entry in entries}, None

    return load


def _fastsafetensors(path: Path) -> Callable[[], Held]:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    def load() -> Held:
        # GPUDirect Storage is for GPUs.
        loader = SafeTensorsFileLoader(SingleGroup(), device="cpu", nogds=True)
        loader.add_filenames({0: [str(path)]})
        buffer = loader.copy_files_to_device()
        return {name: buffer.get_tensor(name) for name in buffer.key_to_rank_lidx}, (loader, buffer)

    return load


def _runai(path: Path) -> Callable[[], Held]:
    from runai_model_streamer import SafetensorsStreamer

    def load() -> Held:
        streamer = SafetensorsStreamer()
        with streamer:
            streamer.stream_file(str(path))
            return dict(streamer.get_tensors()), streamer

    return load
