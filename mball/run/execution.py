"""Executes one plan: which bundle is where, what is on its way, and what a step may read.

[Note: why nothing is read too early or overwritten too late]
A bundle's place in the arena belongs to exactly one *occupant*. `enter` waits for the event of each occupant it
hands out. A copy into a range first evicts every occupant that overlaps it, which has compute wait for a copy that
may still be running there. It is ordered after the last such wait, and after the event recorded when the last step
was left. A step's own bundles are in use until it is left and are never evicted. So a wrong plan, or a step that comes
unexpectedly, costs time and no more.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mball.errors import DeviceError, StorageError
from mball.memory import Arena, Device, Event, GpuLostError
from mball.memory.device import COMPLETE
from mball.run.copy_order import CopyOrder
from mball.run.file_read import FileRead
from mball.run.homes import Homes
from mball.run.idle import IdleExtents
from mball.run.recorder import Recorder
from mball.run.rows import RowsAtHome
from mball.run.slot_leaks import watch
from mball.run.slots import Occupant, SlotViews
from mball.schema import Bundle, Plan

logger = logging.getLogger(__name__)

# The weights that a plan step hands out: a tuple of views for each of its trace steps.
Bound = tuple[tuple[torch.Tensor, ...], ...]


# Of a copy: the file was not read, or the device did not copy.
_CopyErrors = (StorageError, DeviceError)


class _NotStarted:
    """The event of a copy that was never handed to the device."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return


_NOT_STARTED = _NotStarted()


@dataclass(slots=True)
class Counters:
    """What execution has done so far."""

    bytes_read: int = 0
    reads: int = 0
    stall_s: float = 0.0
    unplanned_fetches: int = 0


class Execution:
    """Runs plans over one arena; at most one step is in use at a time.

    Args:
        device: copies, events.
        arena: where slots lie; resized to each plan.
        homes: where bundles come from.
        below: executes what plans say of host memory, for which a copy to this device is a step.
    """

    def __init__(self, device: Device, arena: Arena, homes: Homes, below: Execution | None = None) -> None:
        self.device = device
        self.arena = arena
        self.homes = homes
        self.below = below
        self.counters = Counters()
        self.recorder = Recorder()
        self.rows = RowsAtHome(device, homes)
        self.idle = IdleExtents(device.donors())
        self.plan: Plan | None = None
        self._occupants: dict[int, Occupant] = {}
        self._in_use: tuple[int, ...] = ()
        self._cursor = -1  # the step expected next; -1: none was left in this plan yet
        self._due: list[list[int]] = []
        self._copy_order = CopyOrder((), 0)
        self._ends: list[list[int]] = []
        self._bundle_of_weight: dict[int, int] = {}
        self._resident: dict[int, int] = {}
        self._released: Event = COMPLETE  # nothing was computed in the arena yet
        # Copies that steps wait for. Where compute is late nobody knows yet how they end, and compute cannot say.
        self._landing: list[tuple[Occupant, Event]] = []
        self._views = SlotViews(arena, homes)
        self._bound: list[tuple[tuple[Occupant, ...], Bound] | None] = []
        self._step_weights: list[tuple[tuple[int, ...], ...]] = []
        self._taken_before_bytes = 0  # of the arena, before the plan was adopted
        self._tables: list[frozenset[int]] = []  # of each step what it looks up rows of and the plan does not bring

    # -- plans ---------------------------------------------------------------------------------------------------

    def adopt(self, plan: Plan, handed: Sequence[Sequence[int]], gathered: Sequence[Collection[int]]) -> None:
        """Makes `plan` the one that is executed; what it keeps in place stays.

        Args:
            plan: a validated plan over the homes' weights.
            handed: for each trace step the weights it reads, in the order in which `enter` returns them.
            gathered: those of which it only looks up rows.
        """
        assert not self._in_use
        self._have_all_back()
        known = {bundle: index for index, bundle in enumerate(plan.bundles)}
        resident = {placement.bundle: placement.offset_bytes for placement in plan.residents}
        for number, occupant in list(self._occupants.items()):
            index = known.get(occupant.bundle)
            if index is None or resident.get(index) != occupant.offset_bytes:
                self._evict(number)
        kept = {known[occupant.bundle]: occupant for occupant in self._occupants.values()}
        self._occupants = kept
        self._resize(plan.arena_bytes)
        self.plan = plan
        self._resident = resident
        self._cursor = -1
        count = len(plan.steps)
        self._due = [[] for _ in range(count)]
        self._ends = [[] for _ in range(count)]
        for number, transfer in enumerate(plan.transfers):
            self._due[transfer.after % count].append(number)
            self._ends[transfer.last_use % count].append(number)
        for due in self._due:  # what this pass needs goes before what the next one needs
            due.sort(key=lambda number: plan.transfers[number].after < 0)
        self._bundle_of_weight = {w: i for i, bundle in enumerate(plan.bundles) for w in bundle.tensors}
        self._step_weights = [tuple(map(tuple, handed[step.first : step.end])) for step in plan.steps]
        self._tables = [
            frozenset(weight for weights in gathered[step.first : step.end] for weight in weights)
            - {weight for bundle in step.reads for weight in plan.bundles[bundle].tensors}
            for step in plan.steps
        ]
        self._bound = [None] * count
        uses = [
            {*step.reads, *(self._bundle_of_weight[weight] for weight in tables)}
            for step, tables in zip(plan.steps, self._tables, strict=True)
        ]
        self.idle.adopt(plan, uses)
        self._taken_before_bytes = self.idle.taken_bytes
        if self.below is not None:
            nothing: list[tuple[int, ...]] = [()] * len(plan.transfers)
            self.below.adopt(plan.below(), nothing, nothing)
            self._copy_order = CopyOrder(plan.transfers, count)
        self._expect()
        self._views.trim()

    def _resize(self, num_bytes: int) -> None:
        """Resizes the arena, so that it takes no more than that."""
        if num_bytes < self.arena.reach_bytes:
            cut = self.arena.cut_at(num_bytes)
            if cut < num_bytes:  # memory comes in pieces, and what lies in one that is cut comes anew
                for bundle in [n for n, occupant in self._occupants.items() if occupant.end_bytes > cut]:
                    self._evict(bundle)
            self._released.wait()  # memory is given back after its last use
            self.arena.resize(cut)
        if num_bytes > self.arena.backed_bytes:
            self.device.make_room()
        self.arena.resize(num_bytes)

    def begin_pass(self, began_s: float) -> None:
        """Says that a pass begins."""
        self.recorder.begin(began_s)
        if self.below is not None:
            self.below.begin_pass(began_s)

    def set_requires_grad(self, flags: Sequence[bool]) -> None:
        """Says for each weight whether what is bound for it requires grad, as the user's Parameter does."""
        self.homes.requires_grad[:] = flags
        self._views.clear()
        self._bound = [None] * len(self._bound)
        for occupant in self._occupants.values():
            occupant.views.clear()

    @property
    def is_short(self) -> bool:
        """Whether operators took so much of the arena that the plan cannot be executed: adopt one that is smaller."""
        return self.plan is not None and self.arena.backed_bytes < self.arena.bytes_of(self.plan.arena_bytes)

    @property
    def left_bytes(self) -> int:
        """What a plan may take of the arena, once operators have taken some."""
        assert self.plan is not None
        return self.plan.arena_bytes - (self.idle.taken_bytes - self._taken_before_bytes)

    def claim(self, step: int | None) -> bool:
        """Has back what is on offer of what entering `step` uses, None: anything; nothing is in use.

        Returns whether the plan can be executed. If not, operators took some of the arena, and what lay there and above
        is forgotten.
        """
        assert not self._in_use
        if self.idle.is_possible:
            if step is not None and step == self._cursor and self._is_there(step):
                self.idle.claim(step)
            else:  # what is brought evicts others
                self.idle.withdraw()
        if not self.is_short:
            return True
        self._have_all_back()
        return False

    def _is_there(self, step: int) -> bool:
        """Returns whether the step's bundles are where the plan has them, or on their way."""
        assert self.plan is not None
        found = map(self._occupants.get, self.plan.steps[step].reads)
        return all(occupant is not None and occupant.planned for occupant in found)

    def _have_all_back(self) -> None:
        """Has all back that is on offer, and forgets what lay in memory that was taken, and above it."""
        self.idle.withdraw()
        lost = [bundle for bundle, each in self._occupants.items() if each.end_bytes > self.arena.backed_bytes]
        for bundle in lost:
            self._evict(bundle)
        if self.arena.backed_bytes < self.arena.reach_bytes:
            self._resize(self.arena.backed_bytes)

    def holds(self, weights: Iterable[int]) -> bool:
        """Returns whether the bundles of `weights` are all in the arena, or on their way."""
        return all(self._bundle_of_weight.get(weight) in self._occupants for weight in weights)

    def smallest_region(self, weights: Iterable[int]) -> int:
        """Returns the arena bytes that the bundles of `weights` take together."""
        assert self.plan is not None
        bundles = {self._bundle_of_weight[weight] for weight in weights}
        return sum(self.plan.bundles[bundle].size_bytes for bundle in bundles)

    # -- steps ---------------------------------------------------------------------------------------------------

    def enter(self, step: int) -> Bound:
        """Returns the weights that plan step `step` binds, a tuple for each trace step in it; blocks until they landed.

        Raises:
            StorageError, DeviceError: a read or copy failed, of this step or of one before; the bundle is read again by
                the next step that needs it.
        """
        assert self.plan is not None
        assert not self._in_use
        self._hear()
        reads = self.plan.steps[step].reads
        if step != self._cursor:
            self._jump(step)
        self._in_use = reads
        for bundle in reads:
            occupant = self._occupants.get(bundle)
            if occupant is None or (occupant.event is None and not occupant.planned):
                self._fetch_now(bundle, step)
        occupants = [self._land(bundle) for bundle in reads]
        if tables := self._tables[step]:
            occupants += self._present(tables)
        bound = self._bind(step, tuple(occupants))
        self._offer(occupants)
        self.recorder.entered(step)
        return bound

    def leave(self, step: int) -> None:
        """Releases the step's bundles and starts the transfers that may start now."""
        assert self.plan is not None
        self._release()
        for number in self._ends[step]:
            transfer = self.plan.transfers[number]
            occupant = self._occupants.get(transfer.bundle)
            if occupant is not None and occupant.offset_bytes == transfer.offset_bytes:
                self._evict(transfer.bundle)
        self._cursor = step + 1 if step + 1 < len(self.plan.steps) else 0
        due = self._due[step]
        for number in due if self.below is None else self._copy_order.allow(due):
            self._start(number)

    def on_demand(self, weights: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Returns `weights` outside any planned step; call `release` when they have been read.

        The arena must be at least `smallest_region(weights)` large; whatever is in the way is evicted.
        """
        assert self.plan is not None
        assert not self._in_use
        self._hear()
        bundles = tuple(dict.fromkeys(self._bundle_of_weight[weight] for weight in weights))
        self._in_use = bundles
        absent = [bundle for bundle in bundles if bundle not in self._occupants]
        for bundle in absent:
            offset = self._room(self.plan.bundles[bundle].size_bytes, bundles)
            if offset is None:  # bundles in use lie scattered: start again from an empty arena
                for number in list(self._occupants):
                    self._evict(number)
                offset = 0
                for again in bundles:
                    self._bring(again, offset, planned=False)
                    offset += self.plan.bundles[again].size_bytes
                break
            self._bring(bundle, offset, planned=False)
            self.counters.unplanned_fetches += 1
        occupants = {bundle: self._land(bundle) for bundle in bundles}
        views = tuple(self._views.of(weight, occupants[self._bundle_of_weight[weight]]) for weight in weights)
        self._offer(occupants.values())
        self.recorder.entered(tuple(weights))
        return views

    def release(self) -> None:
        """Ends what `on_demand` or `look_up` began."""
        self._release()

    def look_up(self, weight: int) -> torch.Tensor:
        """Returns a weight of which rows are looked up outside any planned step; call `release` when that is over."""
        assert self.plan is not None
        assert not self._in_use
        there = self._present((weight,))
        view = self._views.of(weight, there[0]) if there else self.rows.view(weight)
        self._offer(there)
        self.recorder.entered((weight,))
        return view

    def _present(self, tables: Collection[int]) -> list[Occupant]:
        """Returns the bundles of these weights that are in the arena, and keeps them there for the step.

        Nobody waits for one that is still on its way: its rows are at home too.
        """
        found = []
        for bundle in dict.fromkeys(self._bundle_of_weight[weight] for weight in tables):
            occupant = self._occupants.get(bundle)
            if occupant is not None and (occupant.event is None or occupant.event.done()):
                found.append(self._land(bundle))
                self._in_use = (*self._in_use, bundle)
        return found

    def _release(self) -> None:
        """Ends the use of what a step was handed."""
        self.recorder.left()
        self._in_use = ()
        self._released = self.device.record()
        self.counters.bytes_read += self.rows.leave()
        self._offer(())

    def _offer(self, in_use: Iterable[Occupant]) -> None:
        """Offers what is idle to operators that find no memory."""
        self.idle.offer(self._occupants.values(), in_use, self._released)

    def catch_up(self) -> None:
        """Blocks until all compute that was issued is over."""
        self.device.record().wait()

    def forget(self, weights: Iterable[int]) -> None:
        """Drops the copies of weights whose homes were written; they are read again when needed."""
        written = list(weights)
        for bundle in {self._bundle_of_weight[weight] for weight in written if weight in self._bundle_of_weight}:
            if bundle in self._occupants:
                self._evict(bundle)
        for weight in written:
            for piece in self.homes.pieces(weight):
                self.device.changed(piece.file, piece.offset_bytes, piece.size_bytes)
        if self.below is not None:
            self.below.forget(written)
        if written:
            self._bound = [None] * len(self._bound)  # tables that rows are looked up of lie elsewhere now
        if written and self.plan is not None:
            self._expect()  # and so does what is copied

    def abort(self) -> None:
        """Makes the state consistent after an exception: nothing in use, no copy running, no copy half known."""
        self._in_use = ()
        self._cursor = -1
        self.counters.bytes_read += self.rows.leave()
        self.device.synchronize()
        with contextlib.suppress(*_CopyErrors):  # the pass failed anyway
            self._hear()
        self._have_all_back()
        for bundle, occupant in list(self._occupants.items()):
            if occupant.event is not None:
                self._evict(bundle)
        self._released = self.device.record()  # what the step issued before it failed still reads its bundles
        if self.below is not None:
            self.below.abort()

    def empty(self) -> None:
        """Drops every bundle, the plan and the arena's memory: an interrupt may have left half of another plan.

        Then call `adopt`.
        """
        self._have_all_back()
        for bundle in list(self._occupants):
            self._evict(bundle)
        self.plan = None
        self._bundle_of_weight = {}
        if not self.arena.closed:
            self._released.wait()
            self.arena.resize(0)
        if self.below is not None:
            self.below.empty()

    def _fetch_now(self, bundle: int, step: int) -> None:
        """Brings a bundle that no transfer brought, or that `on_demand` put where other bundles of the step belong."""
        offset = self._planned_offset(bundle, step)
        occupant = self._occupants.get(bundle)
        if occupant is not None:
            occupant.planned = occupant.offset_bytes == offset
            if occupant.planned:
                return
            self._evict(bundle)
        self._bring(bundle, offset)
        self.counters.unplanned_fetches += 1

    def close(self) -> None:
        """Waits for all that uses the arena and frees it, also where the device fails. Idempotent."""
        if self.arena.closed:
            return
        self._in_use = ()
        try:
            self.idle.withdraw()
            self.catch_up()
        except GpuLostError as error:
            logger.warning("nothing of a lost GPU is waited for: %s", error)
        finally:
            try:
                self.device.close()
            finally:
                views = self._views.handed_out()
                self._occupants.clear()
                self._landing.clear()
                self._views.clear()
                self._bound.clear()
                self.recorder = Recorder()  # events of copies may hold memory of the arena
                self.arena.close()
                watch(views)
                if self.below is not None:
                    self.below.close()

    # -- transfers -----------------------------------------------------------------------------------------------

    def _jump(self, step: int) -> None:
        """Starts what the plan would have in flight when `step` is entered, in order of first use."""
        assert self.plan is not None
        count = len(self.plan.steps)
        wanted: list[tuple[int, int, int, int | None]] = []
        uses = self._first_uses(step)
        if self._cursor == -1:
            wanted += [(uses.get(bundle, 2 * count), bundle, offset, None) for bundle, offset in self._resident.items()]
        for number, transfer in enumerate(self.plan.transfers):
            if transfer.after < step <= transfer.last_use:
                wanted.append((max(transfer.needed_by - step, 0), transfer.bundle, transfer.offset_bytes, number))
            elif step + count <= transfer.last_use:  # it stays over the end of the pass before
                wanted.append((uses[transfer.bundle], transfer.bundle, transfer.offset_bytes, number))
            elif transfer.after + count < step:
                wanted.append((transfer.needed_by + count - step, transfer.bundle, transfer.offset_bytes, number))
        for bundle in {bundle for _, bundle, _, _ in wanted} & self._occupants.keys():
            planned = [offset for _, other, offset, _ in wanted if other == bundle]
            if self._occupants[bundle].offset_bytes not in planned:
                self._evict(bundle)
        for _, bundle, offset, copy in sorted(wanted, key=lambda each: each[:3]):
            if bundle not in self._occupants:
                self._bring(bundle, offset, copy=copy)
        self._copy_order.jump(step)
        self._cursor = step

    def _first_uses(self, step: int) -> dict[int, int]:
        assert self.plan is not None
        uses: dict[int, int] = {}
        count = len(self.plan.steps)
        for distance in range(count):
            for bundle in self.plan.steps[(step + distance) % count].reads:
                uses.setdefault(bundle, distance)
        return uses

    def _planned_offset(self, bundle: int, step: int) -> int:
        assert self.plan is not None
        if bundle in self._resident:
            return self._resident[bundle]
        count = len(self.plan.steps)
        return next(
            transfer.offset_bytes
            for transfer in self.plan.transfers
            if transfer.bundle == bundle
            and (transfer.needed_by <= step <= transfer.last_use or step + count <= transfer.last_use)
        )

    def _room(self, size_bytes: int, keep: Sequence[int]) -> int | None:
        """Returns the highest offset where `size_bytes` fit beside the occupants in `keep`, or None."""
        end = self.arena.backed_bytes
        for occupant in sorted(
            (self._occupants[bundle] for bundle in keep if bundle in self._occupants),
            key=lambda occupant: -occupant.offset_bytes,
        ):
            if end - occupant.end_bytes >= size_bytes:
                break
            end = occupant.offset_bytes
        return end - size_bytes if end >= size_bytes else None

    def _start(self, number: int) -> None:
        assert self.plan is not None
        transfer = self.plan.transfers[number]
        occupant = self._occupants.get(transfer.bundle)
        if occupant is not None:
            if occupant.offset_bytes == transfer.offset_bytes:
                if self.below is not None:
                    self.below.leave(number)
                return
            self._evict(transfer.bundle)
        self._bring(transfer.bundle, transfer.offset_bytes, copy=number)

    def _bring(self, number: int, offset: int, *, planned: bool = True, copy: int | None = None) -> None:
        """Starts copying a bundle to `offset`, once nothing else is there; as copy number `copy` if the plan does."""
        assert self.plan is not None
        bundle = self.plan.bundles[number]
        end = offset + bundle.size_bytes
        for other, occupant in list(self._occupants.items()):
            if occupant.offset_bytes < end and offset < occupant.end_bytes:
                self._evict(other)
        reads = list(self._reads(bundle, offset))
        below = None if copy is None else self.below
        if below is not None and copy is not None:
            below.enter(copy)
        # Known before it starts: an interrupt in between leaves an occupant that `abort` removes.
        occupant = self._occupants[number] = Occupant(bundle, offset, _NOT_STARTED, planned)
        asked_s = time.perf_counter()
        occupant.event = event = self.device.copy(reads, self._released)
        if below is not None and copy is not None:
            below.leave(copy)
        size_bytes = sum(read.size_bytes for read in reads)
        self.counters.bytes_read += size_bytes
        self.counters.reads += len(reads)
        occupant.record = self.recorder.reading(bundle, size_bytes, asked_s, event)

    def _reads(self, bundle: Bundle, offset: int) -> Iterator[FileRead]:
        """Yields what brings a bundle to `offset`."""
        for extent, piece in self.homes.reads(bundle.extents):
            yield FileRead.of(piece, offset + extent.slot_offset_bytes)

    def _expect(self) -> None:
        """Tells the device what the plan copies in each pass."""
        assert self.plan is not None
        bundles = self.plan.bundles
        places = {transfer.bundle: transfer.offset_bytes for transfer in self.plan.transfers}
        # One by one: most devices do not look at them.
        self.device.expect(read for bundle, offset in places.items() for read in self._reads(bundles[bundle], offset))

    def _land(self, bundle: int) -> Occupant:
        occupant = self._occupants[bundle]
        if occupant.event is not None:
            try:
                self._stall(occupant, occupant.event)
            except _CopyErrors:
                occupant.settle()
                self._evict(bundle)
                raise
            self._landing.append((occupant, occupant.event))
            occupant.event = None
            self._hear()
        return occupant

    def _hear(self) -> None:
        """Settles the copies that compute waits for and that are over.

        Raises:
            StorageError, DeviceError: one failed, perhaps of a step that was left long ago; its bundle is read again
                when needed.
        """
        failed: StorageError | DeviceError | None = None
        for landed in [each for each in self._landing if each[1].done()]:
            occupant, event = landed
            try:
                event.wait()
            except _CopyErrors as error:
                failed = failed or error
                for bundle in [number for number, other in self._occupants.items() if other is occupant]:
                    self._evict(bundle)
            occupant.settle()
            self._landing.remove(landed)  # last: after an interrupt it is heard again
        if failed is not None:
            raise failed

    def _stall(self, occupant: Occupant, event: Event) -> None:
        began_s = time.perf_counter()
        try:
            self.device.wait(event)
        finally:
            ended_s = time.perf_counter()
            self.counters.stall_s += ended_s - began_s
            self.recorder.stalled(occupant.bundle, began_s, ended_s)

    def _evict(self, bundle: int) -> None:
        occupant = self._occupants[bundle]
        self.idle.withdraw(occupant.offset_bytes, occupant.end_bytes)
        if occupant.event is not None:
            # Nobody reads these bytes; who needs them reads them again and sees the error.
            with contextlib.suppress(*_CopyErrors):
                self._stall(occupant, occupant.event)
            occupant.settle()
            # What takes its place comes after its copy: compute waits for that from here on.
            self._released = self.device.record()
        del self._occupants[bundle]
        for view in occupant.views.values():
            torch.autograd.graph.increment_version(view)
        if occupant.end_bytes <= self.arena.backed_bytes:  # else nobody may touch it
            self.device.discard(occupant.offset_bytes, occupant.bundle.size_bytes)

    # -- views ---------------------------------------------------------------------------------------------------

    def _bind(self, step: int, occupants: tuple[Occupant, ...]) -> Bound:
        at_home: dict[int, torch.Tensor] = {}
        if tables := self._tables[step]:
            there = {weight for occupant in occupants for weight in occupant.bundle.tensors}
            at_home = {weight: self.rows.view(weight) for weight in tables - there}
        cached = self._bound[step]
        if cached is not None and cached[0] == occupants:
            return cached[1]
        by_weight = {weight: occupant for occupant in occupants for weight in occupant.bundle.tensors}
        views = tuple(
            tuple(
                at_home[weight] if weight in at_home else self._views.of(weight, by_weight[weight])
                for weight in weights
            )
            for weights in self._step_weights[step]
        )
        self._bound[step] = (occupants, views)
        return views
