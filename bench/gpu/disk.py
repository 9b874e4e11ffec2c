"""From a cold file to a GPU: mball's loader and safetensors', and the bytes alone, by each way that streaming knows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors.torch import load_file

import mball
from bench.gpu.limit import Limit
from bench.gpu.streaming import WrongError, take_turns
from bench.results import Measurement
from bench.speed.peers import forget_pages
from bench.speed.ratios import ratio, ratio_measurements
from bench.speed.rounds import Say
from mball.compute import Compute, OpenCompute, open_compute
from mball.config import Config, Io
from mball.errors import DeviceError
from mball.gds import choose_way
from mball.run.file_read import FileRead
from mball.storage import DirectIO, FileTable
from mball.units import GIB, MIB

# As large as the bundles of a large model.
PIECE_BYTES = 64 * MIB
NUM_ROUNDS = 7
TITLES = {
    "mball": "mball.load_file",
    "safetensors": "safetensors load_file",
    "ring": "the bytes alone, through pinned memory",
    "straight": "the bytes alone, by GPUDirect Storage",
}


class BareCopies(AbstractContextManager["BareCopies"]):
    """A device of mball's that copies a file into its arena, whole, with as many pieces under way as there are."""

    def __init__(self, path: Path, io: Io, *, open_device: OpenCompute = open_compute) -> None:
        """Raises DeviceError where `io` cannot be had."""
        self._name = str(path)
        with ExitStack() as undo:
            # Nothing is written there.
            config = Config(budget_bytes=GIB, swap_dir=Path(tempfile.gettempdir()), device="cuda", io=io)
            files = FileTable(direct=DirectIO.ALWAYS)
            undo.callback(files.close)
            self._size_bytes = files[files.add_path(path)].size_bytes()
            compute = open_device(config, files)
            undo.callback(compute.closer)
            undo.callback(compute.device.close)
            self.compute: Compute = choose_way(compute, config, files, self._name) if io is Io.GDS else compute
            self._device = self.compute.device
            self._arena = self._device.arena(self._size_bytes)
            undo.callback(self._arena.close)
            undo.callback(self._device.close)
            self._arena.resize(self._size_bytes)
            self._undo = undo.pop_all()

    def run(self) -> None:
        """Copies the file; returns when it is there. Raises StorageError or DeviceError."""
        self._device.follow()
        after = self._device.record()
        events = [
            self._device.copy(
                [
                    FileRead(
                        file=self._name,
                        offset_bytes=first,
                        size_bytes=min(PIECE_BYTES, self._size_bytes - first),
                        arena_offset_bytes=first,
                    )
                ],
                after,
            )
            for first in range(0, self._size_bytes, PIECE_BYTES)
        ]
        for event in events:
            event.wait()

    def check_way(self) -> None:
        """Raises DeviceError where a read came another way than `io` says."""
        if self.compute.gds_ring is not None and (refused := self.compute.gds_ring.refused):
            raise DeviceError(f"it did not come straight after all: {refused[self._name]}")

    def check(self) -> None:
        """Raises WrongError where what is there is not the file."""
        there = self._arena.tensor(0, torch.uint8, (self._size_bytes,))
        whole = torch.from_file(self._name, shared=False, size=self._size_bytes, dtype=torch.uint8)
        if not torch.equal(there, whole.to(there.device)):
            raise WrongError(f"what was copied is not {self._name}, by {self.compute.io_path}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo.close()


def cold_loads(
    path: Path,
    device: str,
    limit: Limit,
    say: Say,
    *,
    open_device: OpenCompute | None = open_compute,
    num_rounds: int = NUM_ROUNDS,
) -> list[Measurement]:
    """Returns GB/s of each way from the file to the device, out of the page cache before each, and mball's time over
    that of safetensors.

    Args:
        path: a safetensors file, alone in its folder.
        device: where to.
        limit: of all rounds.
        say: is told what is left out, and why.
        open_device: opens what copies bare bytes; None leaves these ways out.
        num_rounds: samples of each.

    Raises:
        WrongError: two ways bring different bytes; there are no figures then.
    """
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        def sample() -> float:
            forget_pages(path.parent)
            began_s = time.perf_counter()
            found = work()
            synchronize()
            seconds = time.perf_counter() - began_s
            del found
            return seconds

        return sample

    with ExitStack() as stack:
        ways: dict[str, Callable[[], object]] = {
            "mball": lambda: mball.load_file(path, device),
            "safetensors": lambda: load_file(path, device=device),
        }
        bare: dict[str, BareCopies] = {}
        for name, io in (("ring", Io.DIRECT), ("straight", Io.GDS)) if open_device is not None else ():
            try:
                copies = stack.enter_context(BareCopies(path, io, open_device=open_device))
                copies.run()
                copies.check_way()
            except DeviceError as error:
                say(f"{TITLES[name]}: left out, {error}")
                continue
            copies.check()
            bare[name], ways[name] = copies, copies.run
        _check_equal(mball.load_file(path, device), load_file(path, device=device))
        samples = take_turns({name: timed(work) for name, work in ways.items()}, num_rounds, limit, say, "from disk")
        for name, copies in bare.items():
            try:
                copies.check_way()
            except DeviceError as error:
                say(f"{TITLES[name]}: left out, {error}")
                del samples[name]
    size_bytes = path.stat().st_size
    found = [
        Measurement.of(
            f"disk_{name}", [size_bytes / seconds / 1e9 for seconds in times], unit="GB/s",
            description=f"{TITLES[name]}, from a cold file to the GPU",
        )
        for name, times in samples.items()
    ]  # fmt: skip
    over = ratio(samples["mball"], samples["safetensors"])
    return found + ratio_measurements(
        "disk_over_safetensors", over, f"time of {TITLES['mball']}", TITLES["safetensors"]
    )


def _check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if found.keys() != expected.keys():
        raise WrongError(f"mball found {len(found)} tensors, safetensors {len(expected)}")
    for name, value in expected.items():
        if not torch.equal(found[name], value):
            raise WrongError(f"mball and safetensors brought different bytes of {name}")
