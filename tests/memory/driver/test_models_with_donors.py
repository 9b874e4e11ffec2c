"""Whole models whose operators need more than plans foresaw: they take idle memory of the arena, and the pass goes on.

Every test here watches the engine: whatever a step is handed, a copy goes to, or is discarded, is on nobody's offer, is
backed, and holds the bytes of its home.
"""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import mball
from mball.errors import BudgetError, DeviceError, MballError
from mball.memory import Device, Event, Kind, cuda_segments
from mball.memory.allocator.segment_allocator import SegmentAllocator
from mball.memory.cuda_donors import CudaDonors
from mball.memory.cuda_virtual import CudaMemory
from mball.run.engine import Engine
from mball.run.execution import Execution
from mball.run.idle import IdleExtents
from mball.run.more_room import MoreRoom
from mball.run.pass_plans import MAX_PLANS, PassPlan
from mball.run.slots import Occupant
from mball.trace.profile import TimeProfile, _Profile
from mball.units import format_bytes
from tests.adaptors import DeviceAdaptor, PoisonedDevice
from tests.foreign import device as foreign
from tests.memory.driver.models import wrapped_over_the_driver
from tests.memory.driver.segment_scenes import force_closed
from tests.memory.driver.standin import CODES, GRANULE_BYTES, StandIn
from tests.memory.driver.test_device_mutants import swept
from tests.memory.driver.test_models_in_segments import LAYER_BYTES, room_of
from tests.run.harness import assert_same, engine_of, make, run
from tests.run.there import PLACE
from tests.run.zoo import noise

NUM_LAYERS = 12
BUDGET_BYTES = 9 * LAYER_BYTES  # some layers stay, some are streamed

# What an operator does inside, by the layer behind which it is called: nobody foresees it.
surprises: dict[int, Callable[[], object]] = {}

opened: list[SegmentAllocator] = []  # of the model that is there, or that failed


@torch.library.custom_op("mball_tests::surprise", mutates_args=())
def surprise(x: torch.Tensor, layer: int) -> torch.Tensor:
    if layer in surprises:
        surprises[layer]()
    return x.clone()


@surprise.register_fake
def _(x: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty_like(x)


class Surprised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(NUM_LAYERS))
        self.joined: tuple[int, ...] = ()  # layers that one operator reads, which no plan has

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = surprise(x + layer(x), number)
            if number == 6 and self.joined:
                x = x + torch.cat([self.layers[each].weight for each in self.joined]).sum()
        return x


class WithTable(Surprised):
    """Looks rows up in a table that is larger than the arena."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40 * 256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(8, device=x.device)
        return super().forward(x + self.table(rows))


class Turning(Surprised):
    """Two graphs, of which the second is another one by `turns`."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in range(NUM_LAYERS // 2):
            x = surprise(x + self.layers[number](x), number)
        torch._dynamo.graph_break()
        if self.turns:
            x = -x
        for number in range(NUM_LAYERS // 2, NUM_LAYERS):
            x = surprise(x + self.layers[number](x), number)
        return x


def take(num_bytes: int) -> torch.Tensor:
    """Returns memory in one piece."""
    return torch.full((num_bytes // 4,), 7.0, device=PLACE)


def gulp(num_bytes: int) -> None:
    """Takes memory in one piece, and lets it go."""
    take(num_bytes)


class WatchError(AssertionError):
    """The engine uses memory that is not its own, or that has other bytes."""


class Watch:
    """Looks at all that one model's engine does with the arena, and at the budget when a step is over or a plan new."""

    def __init__(self, standin: StandIn) -> None:
        self._standin = standin
        self._execution: Execution | None = None
        self.most_bytes = 0

    def around(self, device: Device) -> Device:
        return _Watched(PoisonedDevice(device), self)

    def attach(self, model: Any, patch: pytest.MonkeyPatch) -> None:
        engine = engine_of(model)
        execution = self._execution = engine.execution
        adopt, enter, release = engine._adopt, execution.enter, execution.release

        def adopted(planned: object) -> None:
            adopt(planned)
            self.note_bytes()

        def entered(step: int) -> Any:
            bound = enter(step)
            for bundle in execution.plan.steps[step].reads:
                self.check_read(execution._occupants[bundle])
            for each in execution._occupants.values():
                if each.event is not None:
                    self.check_own(each.offset_bytes, each.end_bytes, "a copy is under way to")
            return bound

        def released() -> None:
            release()
            for each in execution._occupants.values():
                if not each.planned:  # the plan may want it elsewhere before it hears that it was taken
                    self.check_own(each.offset_bytes, each.end_bytes, "no plan placed")

        patch.setattr(engine, "_adopt", adopted)
        patch.setattr(execution, "enter", entered)
        patch.setattr(execution, "release", released)

    def note_bytes(self) -> None:
        self.most_bytes = max(self.most_bytes, self._standin.handle_bytes)

    def check_own(self, first: int, end: int, what: str) -> None:
        if self._execution is None:
            return
        for extent in self._execution.idle._donors._donors:  # type: ignore[attr-defined]
            if first < extent.end and extent.first < end:
                raise WatchError(f"{what} [{first}, {end}), and [{extent.first}, {extent.end}) is on offer")
        if end > self._execution.arena.backed_bytes:
            raise WatchError(f"{what} [{first}, {end}), and [0, {self._execution.arena.backed_bytes}) is backed")

    def check_read(self, occupant: Occupant) -> None:
        assert self._execution
        self.check_own(occupant.offset_bytes, occupant.end_bytes, "a step is handed")
        for weight in occupant.bundle.tensors:
            home = self._execution.homes.homes[weight].tensor
            if not torch.equal(self._execution._views.of(weight, occupant).detach().cpu(), home):
                raise WatchError(f"a step is handed other bytes than those of weight {weight}")


class _Watched(DeviceAdaptor):
    def __init__(self, device: Device, watch: Watch) -> None:
        super().__init__(device)
        self._watch = watch

    def record(self) -> Event:
        self._watch.note_bytes()
        return self.device.record()

    def discard(self, offset: int, size: int) -> None:
        self._watch.check_own(offset, offset + size, "this is discarded:")
        self.device.discard(offset, size)


class Scene:
    """A model that streams under a cap, and what it computes."""

    def __init__(self, model: Any, plain: nn.Module, watch: Watch) -> None:
        self.model, self.plain, self.watch = model, plain, watch
        self.x = noise(8, 256).to(PLACE)

    @property
    def engine(self) -> Any:
        return engine_of(self.model)

    @property
    def taken_bytes(self) -> int:
        return int(mball.report(self.model).taken_bytes)

    def call(self, num_times: int = 1) -> None:
        for _ in range(num_times):
            assert_same(run(self.model, lambda m: m(self.x)), run(self.plain, lambda m: m(self.x)))

    def call_with(self, layer: int, act: Callable[[], object]) -> None:
        """The model meets a surprise once; the plain one does not."""
        expected = run(self.plain, lambda m: m(self.x))
        surprises[layer] = lambda: (surprises.pop(layer), act())
        assert_same(run(self.model, lambda m: m(self.x)), expected)


def _take_equal_times(profile: TimeProfile) -> None:
    """By other times a plan has steps that read nearly all that it keeps, and while those run nothing is on offer."""
    _Profile.finish(profile)
    for step in profile.steps:
        step.time_s = 1e-4


@contextlib.contextmanager
def scene(
    standin: StandIn,
    patch: pytest.MonkeyPatch,
    folder: Path,
    capture: str,
    kind: Callable[[], nn.Module] = Surprised,
) -> Iterator[Scene]:
    model, plain = make(kind), make(kind)
    watch = Watch(standin)
    with wrapped_over_the_driver(
        model, BUDGET_BYTES, watch.around, swap_dir=folder, capture=capture, allocator="mball"
    ):
        opened.append(room_of(model)._segments)
        watch.attach(model, patch)
        it = Scene(model, plain.to(PLACE), watch)
        patch.setattr(TimeProfile, "finish", _take_equal_times)
        # By what was timed; it would forget at times what was taken, too.
        patch.setattr(it.engine.meter, "calls_for_another_plan", lambda _: False)
        it.call(5)  # the first ones are not capped
        assert it.engine.allocator.is_capped
        watch.most_bytes = 0
        yield it
        gc.collect()  # frames of errors hold tensors of passes that failed
    opened.clear()


@pytest.fixture(autouse=True)
def rounding() -> Iterator[None]:
    foreign.load()
    foreign.round_sizes_to(GRANULE_BYTES)
    surprises.clear()
    yield
    surprises.clear()
    foreign.round_sizes_to(1)


pytestmark = pytest.mark.usefixtures("foreign")
slow = pytest.mark.slow
both = pytest.mark.parametrize("capture", ["graphs", "operators"])
at_length = pytest.mark.parametrize("capture", ["operators", pytest.param("graphs", marks=slow)])


@both
@pytest.mark.parametrize("layer", [3, NUM_LAYERS - 1, *(pytest.param(layer, marks=slow) for layer in (0, 5, 8))])
def test_the_same_pass_ends_well(
    capture: str, layer: int, standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By donors alone: no allocation fails, no operator runs again, and the budget holds all the time."""

    def never(*_: Any) -> None:
        raise AssertionError("an operator found no memory")

    monkeypatch.setattr(Engine, "make_room", never)
    with scene(standin, monkeypatch, tmp_path, capture) as it:
        segments = room_of(it.model)._segments
        before, arena_bytes = segments.statistics(), it.engine.execution.arena.backed_bytes
        assert it.taken_bytes == 0
        seen: list[int] = []
        surprises[layer + 1] = lambda: seen.append(it.engine.execution.arena.backed_bytes)
        it.call_with(layer, lambda: gulp(2 * LAYER_BYTES))
        surprises.clear()
        if layer + 1 < NUM_LAYERS:
            assert seen[-1] < arena_bytes, "the next step is not planned anew"
        now = segments.statistics()
        assert (now.num_failed, it.taken_bytes) == (before.num_failed, now.taken_bytes)
        assert now.taken_bytes >= 2 * LAYER_BYTES - now.extent_bytes
        assert f"{format_bytes(now.taken_bytes)} of the arena by operators" in str(mball.report(it.model))
        assert now.offered_bytes == 0, "something is on offer between passes"
        assert it.engine.execution.arena.backed_bytes < arena_bytes
        # The next one is planned with more room.
        it.call_with(layer, lambda: gulp(2 * LAYER_BYTES))
        assert segments.statistics().taken_bytes == now.taken_bytes
        assert it.engine.ledger.account(Kind.ARENA).current_bytes <= arena_bytes - now.taken_bytes
        it.call(2)
        assert LAYER_BYTES < it.watch.most_bytes <= BUDGET_BYTES


@pytest.mark.usefixtures("new_dynamo")  # which captures a frame a few times in a process, and others came before
@both
@pytest.mark.parametrize("ends", ["well", "in an error"])
def test_what_a_pass_lost_is_noted_once(
    capture: str, ends: str, standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind its last step no plan is adopted any more; passes of another kind that come next lost nothing."""

    def act() -> None:
        gulp(2 * LAYER_BYTES)
        if ends != "well":
            raise RuntimeError("of the user's")

    with scene(standin, monkeypatch, tmp_path, capture) as it:
        engine = it.engine
        needed_bytes = engine.room.needed_bytes
        with contextlib.suppress(RuntimeError):
            it.call_with(NUM_LAYERS - 1, act)
        if capture == "operators":
            noted_bytes = engine.room.needed_bytes - needed_bytes + engine.room.missed_bytes
        else:
            noted_bytes = engine.plans.taken_bytes(engine._active.tape.keys)
        assert noted_bytes == it.taken_bytes > 0

        def noted() -> list[tuple[object, int]]:
            return [*engine.room._missed.items(), *engine.plans._taken.items()]

        before = noted()
        if capture == "operators":
            it.x = noise(4, 256).to(PLACE)
        it.call()
        assert noted() == before
        it.x = noise(8, 256).to(PLACE)
        it.call(2)
        assert noted() == before


def test_an_operator_finds_no_memory_after_some_was_taken(
    standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Residents make what room they can, and the arena does not grow back over what operators hold."""
    with scene(standin, monkeypatch, tmp_path, "operators") as it:
        held: list[torch.Tensor] = []

        def act() -> None:
            if not held:
                held.append(take(3 * LAYER_BYTES))
            take(4 * LAYER_BYTES)

        surprises[4] = act
        with pytest.raises(DeviceError, match="an operator found no memory"):
            it.call()
        held.clear()
        surprises.clear()
        assert it.taken_bytes >= 2 * LAYER_BYTES
        assert it.watch.most_bytes <= BUDGET_BYTES + room_of(it.model)._base_bytes  # which is the caller's
        it.call(2)


def test_a_graph_that_was_not_expected_after_some_was_taken(
    standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan for it leaves what operators hold."""
    with scene(standin, monkeypatch, tmp_path, "graphs", Turning) as it:

        def turn(turns: bool) -> None:
            it.model.turns = it.plain.turns = turns

        for turns in (True, False):
            turn(turns)
            it.call(5)
        held: list[torch.Tensor] = []
        turn(True)
        it.watch.most_bytes = 0
        it.call_with(3, lambda: held.append(take(2 * LAYER_BYTES)))
        held.clear()
        assert it.taken_bytes > 0
        assert it.watch.most_bytes <= BUDGET_BYTES + room_of(it.model)._base_bytes
        it.call(2)


@both
def test_a_large_table_that_is_only_looked_up(
    capture: str, standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step reads it, so no room is kept for it."""
    with scene(standin, monkeypatch, tmp_path, capture, WithTable) as it:
        it.call_with(5, lambda: gulp(2 * LAYER_BYTES))
        assert it.taken_bytes > 0
        it.call()


def test_what_was_taken_is_booked_once(standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what the allocator keeps has no room beside it, and is on top."""
    with scene(standin, monkeypatch, tmp_path, "graphs") as it:
        engine = it.engine
        engine.allocator.kept_bytes = 2 * LAYER_BYTES
        seen = set()
        for taken_bytes in range(LAYER_BYTES, 8 * LAYER_BYTES, LAYER_BYTES):
            engine.plans.note_taken(engine._active.tape.keys, taken_bytes)
            engine._stale = True
            it.call()
            active, booked = engine._active, {kind: engine.ledger.account(kind).current_bytes for kind in Kind}
            beside_bytes = BUDGET_BYTES - active.graph_bytes - active.plan.budget_bytes
            assert booked[Kind.SCRATCH] + booked[Kind.CAPTURE] == beside_bytes >= active.taken_bytes
            assert active.taken_bytes == taken_bytes
            seen.add(booked[Kind.SCRATCH] - taken_bytes)
        assert seen == {2 * LAYER_BYTES, 0}, "not all cases were there"


def test_the_smallest_plan_is_found_for_what_is_left(
    standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, without room to grow; and where there is none nothing is changed."""
    with scene(standin, monkeypatch, tmp_path, "operators") as it:
        engine = it.engine
        keys, before = engine._active.tape.keys, engine._planned(engine._active.tape.keys)
        with pytest.raises(BudgetError) as refused:
            engine.set_budget(LAYER_BYTES)
        spare_bytes = before.plan.budget_bytes - refused.value.smallest_bytes
        spare_bytes -= engine.room.needed_bytes - engine.room.largest_bytes

        def arena_bytes_without(more_bytes: int) -> int:
            engine.room.missed_bytes = more_bytes
            planned: PassPlan = engine._planned(keys)
            return planned.plan.arena_bytes

        smallest = arena_bytes_without(spare_bytes)
        assert smallest < before.plan.arena_bytes / 3 < arena_bytes_without(spare_bytes + 1), "no more room is left"
        for arena_bytes in range(smallest, before.plan.arena_bytes, LAYER_BYTES // 2 + 1):
            assert arena_bytes_without(0) == before.plan.arena_bytes
            planned = engine._more_room.at_most(keys, arena_bytes, True)
            assert planned is not None
            assert planned.plan.arena_bytes <= arena_bytes
        assert arena_bytes_without(0) == before.plan.arena_bytes
        assert engine._more_room.at_most(keys, smallest - 1, True) is None
        assert engine.room.missed_bytes == 0
        assert engine._planned(keys) is before, "plans were forgotten"


def test_no_more_passes_are_remembered_than_plans(
    standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scene(standin, monkeypatch, tmp_path, "graphs") as it:
        plans, keys = it.engine.plans, it.engine._active.tape.keys
        known = it.engine._planned(keys)
        for number in range(2 * MAX_PLANS):
            plans.note_taken((number,), 1)
        assert [plans.taken_bytes((number,)) for number in range(2 * MAX_PLANS)] == [0] * MAX_PLANS + [1] * MAX_PLANS
        assert it.engine._planned(keys) is known, "other passes lost it"


@at_length
def test_budgets_that_are_set_meanwhile(
    capture: str, standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scene(standin, monkeypatch, tmp_path, capture) as it:
        it.call_with(4, lambda: gulp(2 * LAYER_BYTES))
        for num_layers in (7, 10, 9):
            mball.set_budget(it.model, num_layers * LAYER_BYTES)
            assert standin.handle_bytes <= num_layers * LAYER_BYTES
            it.call(5)
            taken_bytes = it.taken_bytes
            it.call_with(7, lambda: gulp(2 * LAYER_BYTES))
            assert it.taken_bytes > taken_bytes
            it.call()


@at_length
@pytest.mark.parametrize("when", ["taken", "on offer"])
def test_a_pass_that_fails(
    capture: str, when: str, standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        if when == "taken":
            gulp(2 * LAYER_BYTES)
        raise RuntimeError("of the user's")

    with scene(standin, monkeypatch, tmp_path, capture) as it:
        with pytest.raises(RuntimeError, match="of the user's"):
            it.call_with(5, fails)
        assert room_of(it.model)._segments.statistics().offered_bytes == 0
        assert (it.taken_bytes > 0) == (when == "taken")
        it.call(3)
        assert it.watch.most_bytes <= BUDGET_BYTES


@at_length
def test_what_is_written_is_forgotten_while_it_is_on_offer(
    capture: str, standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scene(standin, monkeypatch, tmp_path, capture) as it:
        execution = it.engine.execution

        def forget() -> None:
            offered = list(execution.idle._donors._donors)
            assert offered, "nothing is on offer"
            execution.forget(
                weight
                for each in execution._occupants.values()
                if any(each.offset_bytes < extent.end and extent.first < each.end_bytes for extent in offered)
                for weight in each.bundle.tensors
            )

        it.call_with(5, forget)
        it.call()


def test_operators_that_no_plan_has(standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they read lies where residents were, and is brought to its own place later."""
    with scene(standin, monkeypatch, tmp_path, "operators") as it:
        resident = {p.bundle for p in it.engine.plan.residents}
        streamed = [b.tensors[0] for n, b in enumerate(it.engine.plan.bundles) if n not in resident]
        it.model.joined = it.plain.joined = tuple(streamed[-3:])
        for layer in (6, 7, 8):
            it.call()
            it.call_with(layer, lambda: gulp(LAYER_BYTES))
        assert it.taken_bytes > 0


@at_length
def test_others_allocate_meanwhile(
    capture: str, standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads of the caller's, at any moment of a pass."""
    with scene(standin, monkeypatch, tmp_path, capture) as it:
        library, source = room_of(it.model)._segments._library, random.Random(3)
        num_right = 0
        is_open, over = threading.Event(), threading.Event()

        def allocate() -> None:
            while not over.is_set():
                is_open.wait(0.01)
                held = []
                while is_open.is_set() and len(held) < 6:
                    held.append(library.mball_malloc(source.randrange(1, LAYER_BYTES), 0, None))
                    over.wait(source.random() / 2000)
                for address in held:
                    library.mball_free(address, 0, 0, None)

        thread = threading.Thread(target=allocate)
        thread.start()
        try:
            for number in range(12):
                if number % 6 == 0:  # what was learned is forgotten
                    is_open.clear()
                    mball.set_budget(it.model, BUDGET_BYTES - LAYER_BYTES)
                    mball.set_budget(it.model, BUDGET_BYTES)
                    it.call(3)
                is_open.set()
                try:
                    it.call()
                    num_right += 1
                except DeviceError as error:  # they may leave too little
                    if "an operator found no memory" not in str(error) and "took so much" not in str(error):
                        raise
        finally:
            over.set()
            is_open.clear()
            thread.join()
        assert num_right > 3
        assert it.taken_bytes > 0, "the other thread never was dry"


@at_length
@pytest.mark.parametrize(
    "call",
    [
        "cuMemUnmap",
        "cuMemMap",
        *(pytest.param(call, marks=slow) for call in ("cuMemCreate", "cuMemSetAccess", "cuMemAddressReserve")),
    ],
)
def test_a_driver_that_fails_while_memory_is_taken(
    call: str, capture: str, standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass ends well or with an error, no page is lost, and the next pass is right."""
    with scene(standin, monkeypatch, tmp_path, capture) as it:
        for position in (1, 3):

            def fails(position: int = position) -> None:
                standin.forget()
                standin.fail(position, position, code=CODES["NOT_SUPPORTED"], function=call)
                gulp(2 * LAYER_BYTES)

            with contextlib.suppress(MballError, torch.OutOfMemoryError):
                it.call_with(5, fails)
            standin.forget()
            it.call(2)
            mball.set_budget(it.model, BUDGET_BYTES - LAYER_BYTES)  # plans are as before
            mball.set_budget(it.model, BUDGET_BYTES)
            it.call(4)
            memory, segments = room_of(it.model)._memory, room_of(it.model)._segments
            assert memory.created_bytes + segments.statistics().held_bytes == standin.handle_bytes
            assert it.watch.most_bytes <= BUDGET_BYTES + 2 * LAYER_BYTES  # passes without a cap are among them
        assert it.taken_bytes > 0


STRUCK = (
    *(IdleExtents.offer, IdleExtents.claim, IdleExtents.withdraw),
    *(CudaDonors.offer, CudaDonors.withdraw, CudaDonors._end, CudaMemory.lose),
    *(Execution.claim, Execution._have_all_back, Engine._note_taken, Engine._heed_taken, MoreRoom.at_most),
)


def strike_once(place: tuple[str, int] | None, act: Callable[[], object]) -> list[tuple[str, int]]:
    """Does `act`, with KeyboardInterrupt at a line of `STRUCK` when it is there first; returns the lines it ran."""
    codes = {function.__code__ for function in STRUCK}  # type: ignore[attr-defined]
    lines: list[tuple[str, int]] = []

    def local(frame: FrameType, event: str, _: object) -> Any:
        here = (frame.f_code.co_qualname, frame.f_lineno)
        if event == "line" and here not in lines:
            lines.append(here)
            if here == place:
                raise KeyboardInterrupt
        return local

    sys.settrace(lambda frame, _, __: local if frame.f_code in codes else None)
    try:
        act()
    finally:
        sys.settrace(None)
    return lines


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=slow)])
def test_an_interrupt_at_any_line(
    every: int, standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between an offer and its withdrawal, and behind an extent that was taken."""
    with scene(standin, monkeypatch, tmp_path, "graphs") as it:
        memory, segments = room_of(it.model)._memory, room_of(it.model)._segments

        def act() -> None:
            it.call_with(5, lambda: gulp(2 * LAYER_BYTES))

        places = strike_once(None, act)
        assert {name for name, _ in places} == {each.__qualname__ for each in STRUCK}
        for place in places[::every]:
            mball.set_budget(it.model, BUDGET_BYTES - LAYER_BYTES)
            mball.set_budget(it.model, BUDGET_BYTES)  # what was learned of surprises is forgotten
            it.call(2)
            with contextlib.suppress(KeyboardInterrupt):
                strike_once(place, act)
                raise AssertionError(f"{place} was not struck")
            surprises.clear()
            now = segments.statistics()
            assert now.offered_bytes == 0, place
            assert memory.created_bytes + now.held_bytes == standin.handle_bytes, place
            assert it.taken_bytes == now.taken_bytes, place
            it.call()


# -- what is left out is missed ---------------------------------------------------------------------------------------


def steps_do_not_claim(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(IdleExtents, "claim", lambda self, step: self._donors.has_lost and self.withdraw())


def offers_forget_what_is_in_use(patch: pytest.MonkeyPatch) -> None:
    offer = IdleExtents.offer
    patch.setattr(IdleExtents, "offer", lambda self, there, _, after: offer(self, there, (), after))


def offers_forget_copies(patch: pytest.MonkeyPatch) -> None:
    offer = IdleExtents.offer

    def blind(self: IdleExtents, occupants: Any, in_use: Any, after: Event) -> None:
        offer(self, [each for each in occupants if each.event is None], in_use, after)

    patch.setattr(IdleExtents, "offer", blind)


def offers_forget_what_no_plan_placed(patch: pytest.MonkeyPatch) -> None:
    offer = IdleExtents.offer

    def blind(self: IdleExtents, occupants: Any, in_use: Any, after: Event) -> None:
        offer(self, [each for each in occupants if each.planned], in_use, after)

    patch.setattr(IdleExtents, "offer", blind)


def what_is_discarded_stays_on_offer(patch: pytest.MonkeyPatch) -> None:
    withdraw = IdleExtents.withdraw

    def claims_only(self: IdleExtents, first: int = 0, end: int | None = None) -> None:
        if end is None or sys._getframe(1).f_code.co_name != "_evict":
            withdraw(self, first, end)

    patch.setattr(IdleExtents, "withdraw", claims_only)


def what_was_taken_is_not_forgotten(patch: pytest.MonkeyPatch) -> None:
    have_all_back = Execution._have_all_back

    def keep(self: Execution) -> None:
        there, self._occupants = self._occupants, {}
        have_all_back(self)
        self._occupants = there

    patch.setattr(Execution, "_have_all_back", keep)


def what_was_taken_is_not_heard_of(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CudaDonors, "has_lost", False)


def the_arena_is_not_told(patch: pytest.MonkeyPatch) -> None:
    from mball.memory import Arena

    patch.setattr(Arena, "lose", lambda self, num_bytes: None)


def the_pool_is_not_told(patch: pytest.MonkeyPatch) -> None:
    from mball.memory.page_pool import PagePool

    patch.setattr(PagePool, "disown", lambda self, handles: None)


MUTANTS = (
    steps_do_not_claim,
    offers_forget_what_is_in_use,
    offers_forget_copies,
    offers_forget_what_no_plan_placed,
    what_is_discarded_stays_on_offer,
    what_was_taken_is_not_forgotten,
    what_was_taken_is_not_heard_of,
    the_arena_is_not_told,
    the_pool_is_not_told,
)


def end_segments(standin: StandIn) -> None:
    """Ends those that a model left that was broken, so that the next one has some."""
    gc.collect()
    foreign.route_memory()
    foreign.empty_cache()
    for segments in opened:
        force_closed(standin, segments)
    opened.clear()
    cuda_segments._left.clear()
    cuda_segments._serving.clear()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_what_is_left_out_is_missed(
    mutant: Callable[[pytest.MonkeyPatch], None], standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenarios: tuple[Callable[..., None], ...] = (
        *(partial(test_the_same_pass_ends_well, "operators", layer) for layer in (3, NUM_LAYERS - 1)),
        partial(test_what_is_written_is_forgotten_while_it_is_on_offer, "operators"),
        test_operators_that_no_plan_has,
    )
    mutant(monkeypatch)
    found = []
    for number, scenario in enumerate(scenarios):
        folder = tmp_path / str(number)
        folder.mkdir()
        with monkeypatch.context() as patch, swept(standin):
            try:
                scenario(standin, folder, patch)
            except (AssertionError, MballError) as error:
                found.append(f"{type(error).__name__}: {error}")  # not its frames, which hold the model
                break
            finally:
                end_segments(standin)
    assert found, "nothing noticed"
