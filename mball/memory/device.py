"""The device seam: all that the engine asks of a device. Nothing above it asks which device it is.

[Note: order] Copies and compute run beside each other on a real device, so order exists only where an event
makes it. A copy into memory that earlier compute still reads waits for that compute: `copy(reads, after=record())`.
Compute that reads what a copy brings waits for it: `wait(event of the copy)`. Nothing else is ordered:
two copies may land in any order.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch

from mball.errors import DeviceError
from mball.memory.arena import Arena
from mball.memory.facts import addresses_are_free, machine_memory
from mball.memory.gauge import HostGauge
from mball.memory.virtual import HostMemory, VirtualMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What an allocator holds that it did not when the pass began.

    Attributes:
        tensor_bytes: what tensors took of it at most, since the device was told to make room.
        kept_bytes: what it has beside that: rounding, and blocks that nobody uses.
    """

    tensor_bytes: int = 0
    kept_bytes: int = 0

    @classmethod
    def of(cls, held_bytes: int, tensor_bytes: int) -> Self:
        """Returns what `held_bytes` are, of which tensors took that many."""
        return cls(tensor_bytes=max(tensor_bytes, 0), kept_bytes=max(held_bytes - max(tensor_bytes, 0), 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """Host memory that a device copies from or reads, and how long pinning took, of what is given back too."""

    size_bytes: int = 0
    time_s: float = 0.0


class Event(Protocol):
    """A point in the work of a device, which is reached once.

    The event of a copy may have `began_s` and `ended_s`: when its first byte was asked of the storage and when its
    last one was there, by `time.perf_counter`, None until then. Timelines are truer with them; nothing else asks.
    """

    def done(self) -> bool:
        """Returns whether the point is reached (or the work failed). Does not block."""

    def wait(self) -> None:
        """Blocks the calling thread until it is reached. Raises the error of the work, every time."""


class Moment(Protocol):
    """A point in the compute of a device, as the device's own clock has it."""

    def since(self, earlier: Any) -> float:
        """Returns the seconds from `earlier`, which the same device gave out before. Blocks until this one is reached.

        Raises the error of the work that was issued before, where it failed.
        """


@dataclass(frozen=True, slots=True)
class HostMoment:
    """A look at the host's clock: where compute is over when its call returns, that tells how long it took."""

    time_s: float

    def since(self, earlier: HostMoment) -> float:
        return self.time_s - earlier.time_s


class ArenaRead(Protocol):
    """Bring bytes `[offset_bytes, offset_bytes + size_bytes)` of `file` to `arena_offset_bytes` of the device's arena.

    Which way they come is the device's business; `into` makes what its `CopySource` reads.
    """

    @property
    def file(self) -> str:
        """The file, by the name that the `CopySource` knows it by."""

    @property
    def offset_bytes(self) -> int:
        """Where the bytes begin in the file."""

    @property
    def size_bytes(self) -> int:
        """How many bytes to bring."""

    @property
    def arena_offset_bytes(self) -> int:
        """Where to."""

    def into(self, destination: memoryview, first: int = 0) -> Any:
        """Returns the source's own read of as many bytes as `destination` has, from byte `first` of these on."""


class CopySource(Protocol):
    """What brings bytes from storage into host memory, in the background."""

    def submit(self, reads: Sequence[Any]) -> Event:
        """Starts the reads, which are of the source's own type, without blocking."""

    def drain(self) -> None:
        """Blocks until nothing that was submitted writes to memory any more. Errors stay with their events."""

    def close(self) -> None:
        """Drains and stops. Idempotent."""


class Gauge(Protocol):
    """Measures by how much memory rose at most, by whatever means it was allocated."""

    def reset(self) -> None:
        """Begins a measurement."""

    def rise_bytes(self) -> int:
        """Returns the highest use since `reset` less the use at `reset`; 0 where it cannot be measured."""

    def used_bytes(self) -> int:
        """Returns what this process uses of the device's memory now, arena included; 0 where that is not known."""


class Recorded(Protocol):
    """Work of the device that was recorded with the memory it reads and writes."""

    def replay(self) -> None:
        """Issues the work again, in the same memory, behind all compute that was issued before. Does not block."""

    def close(self) -> None:
        """Lets go of it; no replay is under way. Idempotent."""


class Graphs(Protocol):
    """Records work that is launched whole from then on, as CUDA graphs do."""

    @property
    def pool_bytes(self) -> int:
        """What all that is recorded takes of the device's memory: for what `work` allocated itself."""

    def pool_bytes_for(self, num_bytes: int) -> int:
        """Returns what `pool_bytes` is expected to be for work that holds `num_bytes` of its own at most."""

    def record(self, work: Callable[[], None]) -> Recorded:
        """Records what `work` issues; nothing of it is computed before the first replay.

        All that is recorded shares the memory that `work` allocates, so nothing there outlasts a replay, and replays
        come one after the other. The rest of what it reads and writes is the caller's to keep.

        Raises RuntimeError, as torch does, when `work` or a part of it cannot be recorded: nothing was computed.
        """


class Extent(NamedTuple):
    """Bytes `[first, end)` of the arena, which come and go as one."""

    first: int
    end: int


class Donors(Protocol):
    """Idle memory of the arena for compute that finds none: it is taken in an allocation, on whichever thread."""

    @property
    def taken_bytes(self) -> int:
        """What `withdraw` found taken, ever."""

    @property
    def has_lost(self) -> bool:
        """Whether something on offer was taken, as far as one sees without a call; `withdraw` tells for certain."""

    def extents(self) -> Sequence[Extent]:
        """Returns what can be offered of the arena as it is now, by offsets. Ask again once it was resized."""

    def is_offered(self, extent: Extent) -> bool:
        """Returns whether it is on offer, or was taken since."""

    def offer(self, extents: Iterable[Extent], after: Event) -> None:
        """Offers some of `extents()`, those that are to be taken first first, which nothing uses that is not before
        `after`, until `withdraw`. Does not block.
        """

    def withdraw(self, first: int = 0, end: int | None = None) -> None:
        """Has back all on offer that meets `[first, end)`; all there is where some was taken.

        Then the arena ends before the first that was (`Arena.backed_bytes`), and what is backed above it is for nothing
        but to be given back, by `Arena.resize`. May wait for an allocation that is under way. Idempotent.
        """


class Device(Protocol):
    """Where steps run: memory, copies into it, and the order of copies and compute."""

    @property
    def place(self) -> torch.device:
        """Where torch has the tensors that compute works on."""

    @property
    def computes_at_once(self) -> bool:
        """Whether compute is over when its call returns, so that the host's clock tells how long it took."""

    @property
    def reads_mappings(self) -> bool:
        """Whether compute reads mapped files page by page, so that hints of what comes help."""

    @property
    def below(self) -> Device | None:
        """The memory that copies come through, where plans say what it holds; None where copies come from homes.

        Its copies are reads of what this device copies later, by the very same files, offsets and sizes.
        """

    def arena(self, reserve_bytes: int) -> Arena:
        """Makes the device's one arena, which can grow to `reserve_bytes`, or further. The caller closes it.

        Raises DeviceError when there are not so many addresses.
        """

    def copy(self, reads: Sequence[ArenaRead], after: Event | None) -> Event:
        """Starts reading into the arena once `after` has completed; the event completes when all bytes are there.

        Destinations are backed, and nothing else writes them until the event completes. A device with
        streams does not block; the CPU blocks until `after` is complete, and raises its error.
        """

    def follow(self) -> None:
        """Says that compute goes on where the calling thread computes now: behind all that was computed before.

        Called when a pass begins: until it ends its thread stays where it is.
        """

    def make_room(self) -> None:
        """Has others give back what they keep of the device's memory and nobody uses: the arena is about to grow."""

    def cap(self, left_bytes: int | None) -> Held:
        """Lets compute allocate `left_bytes` beside what was allocated when the pass began (`follow`); None: no cap.

        Operators that need more raise torch.OutOfMemoryError. Returns what the allocator holds for the pass; nothing on
        the CPU, whose allocator is the system's and has no cap.
        """

    def allocating(self) -> contextlib.AbstractContextManager[None]:
        """What the calling thread computes within is allocated where the cap binds it. Around a pass."""

    def donors(self) -> Donors:
        """Returns what takes idle memory of the arena, which was made, where compute may allocate it."""

    def record(self) -> Event:
        """Returns the event that completes when all compute issued so far has finished. Does not block."""

    def moment(self) -> Moment:
        """Returns when all compute issued so far has finished, to be read later. Does not block."""

    def wait(self, event: Event) -> None:
        """Makes compute that is issued from now on wait for `event`.

        The CPU blocks, and raises the error of the copy (a StorageError that names file and offset). A device with
        streams blocks at most for what the host alone can know, whether a read from disk went well, and raises its
        error. Where it does not block compute goes on with whatever is there, and the event says that the copy failed.
        """

    def discard(self, offset: int, size: int) -> None:
        """Says that this range of the arena is not needed once the compute issued so far has finished.

        A hint: devices do nothing, adaptors for tests destroy the content.
        """

    def expect(self, reads: Iterable[ArenaRead]) -> None:
        """Says what is copied again and again from now on, in this order: a device may keep it in a faster place.

        Takes the place of what was said before. Does not block; who does not need `reads` does not go through them.
        """

    def changed(self, file: str, offset_bytes: int, size_bytes: int) -> None:
        """Says that these bytes of a file are others now. Nobody computes any more with what copies of them bring."""

    def rows_of(self, home: torch.Tensor, reads: Sequence[ArenaRead]) -> torch.Tensor | None:
        """Returns what compute that looks up a few rows reads in the place of `home`, a mapping of a file.

        The CPU reads the home itself, page by page. Another device finds the bytes by the `reads` that bring them, one
        behind the other, to the arena. None: they cannot be brought where it reads them, so all of it has to come.

        Raises:
            StorageError: they cannot be read.
        """

    def pinned(self) -> Pinned:
        """Returns what the device has pinned of the host's memory, beside any budget."""

    def gauge(self) -> Gauge:
        """Returns what measures by how much the device's memory rises, the arena apart while it is not resized."""

    def graphs(self) -> Graphs | None:
        """Returns what records compute, anew with each call; None where launching it costs nothing."""

    def synchronize(self) -> None:
        """Blocks until no copy writes to the arena any more. Raises no error of a copy: it stays with its event."""

    def close(self) -> None:
        """Blocks until no copy writes to the arena any more, and ends copies for good; the arena stays. Idempotent."""


class _Complete:
    """An event that is in the past."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None


COMPLETE: Event = _Complete()


class _NoDonors:
    """Of an arena that nobody takes anything of."""

    taken_bytes = 0
    has_lost = False

    def extents(self) -> Sequence[Extent]:
        return ()

    def is_offered(self, extent: Extent) -> bool:
        return False

    def offer(self, extents: Iterable[Extent], after: Event) -> None:
        """Does nothing."""

    def withdraw(self, first: int = 0, end: int | None = None) -> None:
        """Does nothing."""


NO_DONORS: Donors = _NoDonors()


class CpuDevice:
    """Host memory. Compute is over when its call returns, so only copies are ever waited for."""

    def __init__(self, source: CopySource, memory: VirtualMemory | None = None) -> None:
        """`source` is the device's own from now on: `close` closes it."""
        self._source = source
        self._memory: VirtualMemory = memory if memory is not None else HostMemory()
        self._arena: Arena | None = None

    def arena(self, reserve_bytes: int) -> Arena:
        self._arena = arena = self._reserve(reserve_bytes)
        return arena

    def _reserve(self, reserve_bytes: int) -> Arena:
        # A larger budget may be set later.
        largest_bytes = machine_memory().total_bytes if addresses_are_free() else 0
        if largest_bytes > reserve_bytes:
            with contextlib.suppress(DeviceError):
                return Arena(self._memory, largest_bytes)
        return Arena(self._memory, reserve_bytes)

    def copy(self, reads: Sequence[ArenaRead], after: Event | None) -> Event:
        if after is not None:
            after.wait()
        arena = self._arena
        assert arena is not None, "the arena was not made by device.arena(), so nothing can be copied to it"
        return self._source.submit([read.into(arena.view(read.arena_offset_bytes, read.size_bytes)) for read in reads])

    def follow(self) -> None:
        """Does nothing: compute is over when its call returns."""

    def make_room(self) -> None:
        """Does nothing: the kernel takes memory from whoever does not use it."""

    def cap(self, left_bytes: int | None) -> Held:
        return Held()

    def allocating(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def donors(self) -> Donors:
        return NO_DONORS

    def record(self) -> Event:
        return COMPLETE

    def moment(self) -> Moment:
        return HostMoment(time.perf_counter())

    def wait(self, event: Event) -> None:
        event.wait()

    def discard(self, offset: int, size: int) -> None:
        """Does nothing."""

    @property
    def place(self) -> torch.device:
        return torch.device("cpu")

    @property
    def computes_at_once(self) -> bool:
        return True

    @property
    def reads_mappings(self) -> bool:
        return True

    @property
    def below(self) -> None:
        """Homes are read from disk straight into the arena."""

    def expect(self, reads: Iterable[ArenaRead]) -> None:
        """Does nothing: there is no faster place."""

    def changed(self, file: str, offset_bytes: int, size_bytes: int) -> None:
        """Does nothing."""

    def rows_of(self, home: torch.Tensor, reads: Sequence[ArenaRead]) -> torch.Tensor:
        return home

    def pinned(self) -> Pinned:
        return Pinned()

    def gauge(self) -> Gauge:
        return HostGauge()

    def graphs(self) -> Graphs | None:
        return None

    def synchronize(self) -> None:
        self._source.drain()

    def close(self) -> None:
        self._source.close()
