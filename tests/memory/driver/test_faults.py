"""Every call of the driver fails at every position, and Ctrl-C comes before and after each of them.

What has to hold: an error that names the driver's, pages that are all accounted for, bytes that are as they were, and
an operation that works when it is asked for again.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import linecache
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest

from mball.errors import DeviceError
from mball.memory import cuda_virtual, page_pool
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_plain import PlainCudaMemory
from mball.memory.cuda_virtual import CudaMemory
from mball.memory.page_pool import PagePool
from mball.memory.virtual import Reservation
from mball.units import KIB
from tests.memory.driver.standin import CODES, StandIn

NAMES = {code: f"CUDA_ERROR_{name}" for name, code in CODES.items()}
# Small, since thousands of scenes are played.
GRANULE_BYTES = 4 * KIB
EXTENT_BYTES = 4 * GRANULE_BYTES
# Some pages are pooled, and some go to the driver.
POOL_BYTES = 6 * GRANULE_BYTES


@pytest.fixture(autouse=True)
def small_pages(standin: StandIn) -> None:
    standin.configure(granule_bytes=GRANULE_BYTES)


class Scene:
    """Two reservations that grow and shrink in turn, by steps that can each be done again, and what they hold."""

    def __init__(self, standin: StandIn, driver: CudaDriver | None = None) -> None:
        self.standin = standin
        self.driver = driver if driver is not None else CudaDriver()
        pool = PagePool(self.driver, limit_bytes=POOL_BYTES)
        self.memory = CudaMemory(self.driver, pool=pool, extent_bytes=EXTENT_BYTES)
        self.reservations: dict[str, Reservation] = {}
        self.backed: dict[str, int] = {}  # granules
        self.reach: dict[str, int] = {}  # granules that may be there, as an arena remembers it
        self.content: dict[str, bytes] = {}

    def steps(self) -> Iterator[Callable[[], None]]:
        yield lambda: self.reserve("one")
        yield lambda: self.resize("one", 9)
        yield lambda: self.reserve("two")
        yield lambda: self.resize("two", 6)
        yield lambda: self.resize("one", 2)
        yield lambda: self.resize("two", 14)
        yield lambda: self.resize("one", 3)
        yield lambda: self.resize("one", 17)
        yield lambda: self.resize("two", 0)
        yield lambda: self.release("one")
        yield lambda: self.resize("two", 5)
        yield lambda: self.memory.trim_pool() and None
        yield lambda: self.release("two")

    def reserve(self, name: str) -> None:
        self.reservations[name] = self.memory.reserve(20 * GRANULE_BYTES)
        self.backed[name], self.reach[name], self.content[name] = 0, 0, b""

    def release(self, name: str) -> None:
        self.backed[name] = 0  # nobody reads any more
        self.memory.release(self.reservations[name])
        del self.reservations[name]

    def resize(self, name: str, size: int) -> None:
        """As `Arena.resize` does it."""
        reservation, before = self.reservations[name], self.backed[name]
        if size < before or self.reach[name] > before:
            self.reach[name] = max(self.reach[name], before)
            self.backed[name] = min(before, size)
            try:
                self.memory.trim(reservation, self.backed[name] * GRANULE_BYTES, self.reach[name] * GRANULE_BYTES)
            except DeviceError:
                self.backed[name] = before
                raise
            self.reach[name] = self.backed[name]
        self.content[name] = self.content[name][: self.backed[name] * GRANULE_BYTES]
        if size > self.backed[name]:
            self.reach[name] = size
            first = self.backed[name] * GRANULE_BYTES
            self.memory.back(reservation, first, size * GRANULE_BYTES)
            self.backed[name] = self.reach[name] = size
            self.content[name] += random.Random(f"{name}{size}").randbytes(size * GRANULE_BYTES - first)
            ctypes.memmove(reservation.address + first, self.content[name][first:], size * GRANULE_BYTES - first)

    def check(self) -> None:
        memory, standin = self.memory, self.standin
        assert memory.created_bytes == memory.mapped_bytes + memory.pooled_bytes
        assert standin.handle_bytes == standin.taken_bytes == memory.created_bytes
        assert standin.mapped_bytes == memory.mapped_bytes
        for name, reservation in self.reservations.items():
            content = self.content[name][: self.backed[name] * GRANULE_BYTES]
            assert ctypes.string_at(reservation.address, len(content)) == content, name

    def close(self) -> None:
        """Gives all back, with nothing failing."""
        self.standin.forget()
        for name in list(self.reservations):
            self.release(name)
        self.memory.close()
        self.standin.pop_contexts()  # where the call that does it failed
        assert self.standin.is_empty()
        assert self.standin.num_retained == 0


def num_calls(standin: StandIn, work: Callable[[], Any]) -> int:
    standin.forget()
    work()
    return standin.calls()


def play(scene: Scene) -> None:
    for step in scene.steps():
        step()
        scene.check()


@pytest.mark.parametrize("code", NAMES, ids=NAMES.get)
def test_any_call_may_fail(standin: StandIn, code: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    scene = Scene(standin)
    total = num_calls(standin, lambda: play(scene))
    num_created = standin.calls("cuMemCreate")
    scene.close()
    assert total > 60
    num_errors = 0
    for position in range(1, total + 1):
        scene = Scene(standin)
        caplog.clear()
        standin.forget()
        standin.fail(position, code=code)
        said = ""
        for step in scene.steps():
            try:
                step()
            except DeviceError as error:
                said = str(error)
                scene.check()
                step()
            scene.check()
        num_creations = standin.calls("cuMemCreate")
        scene.close()
        num_errors += bool(said)
        told = said or caplog.text
        if not told:  # pooled pages of other sizes went to the driver, and then there was enough
            assert code == CODES["OUT_OF_MEMORY"]
            assert num_creations > num_created
            continue
        assert f"{NAMES[code]} ({code})" in told, f"call {position} failed in silence"
        assert " bytes)" in told, told
    assert num_errors > total // 2


@pytest.mark.parametrize("length", [2, 3, 6])
@pytest.mark.parametrize("code", [CODES["OUT_OF_MEMORY"], CODES["INVALID_VALUE"]], ids=NAMES.get)
def test_calls_that_undo_may_fail_too(standin: StandIn, code: int, length: int) -> None:
    """Several in a row: what undoes a step fails as well. Then the next operation finds what it needs to go on."""
    scene = Scene(standin)
    total = num_calls(standin, lambda: play(scene))
    scene.close()
    for position in range(1, total + 1):
        scene = Scene(standin)
        standin.forget()
        standin.fail(position, position + length - 1, code=code)
        for step in scene.steps():
            for _ in range(length + 1):
                try:
                    step()
                except DeviceError:
                    assert scene.memory.created_bytes == standin.taken_bytes == standin.handle_bytes
                else:
                    break
            scene.check()
        scene.close()


def test_a_device_that_is_lost_says_so_until_the_end(standin: StandIn) -> None:
    scene = Scene(standin)
    total = num_calls(standin, lambda: play(scene))
    scene.close()
    for position in range(1, total + 1, 3):
        scene = Scene(standin)
        standin.forget()
        standin.fail(position, 10**6, code=CODES["ILLEGAL_ADDRESS"])
        said = []
        for step in scene.steps():
            try:
                step()
            except DeviceError as error:
                said.append(str(error))
            except KeyError:  # a reservation that could not be made
                pass
        assert said
        assert all("save what is in host memory, and start anew" in message for message in said)
        scene.close()


def test_opening_a_device_may_fail_anywhere(standin: StandIn) -> None:
    standin.forget()
    CudaDriver(shareable=True).close()
    total = standin.calls()
    assert total >= 7
    for position in range(1, total):
        standin.forget()
        standin.fail(position, code=CODES["NOT_SUPPORTED"])
        with pytest.raises(DeviceError, match=r"CUDA_ERROR_NOT_SUPPORTED \(801\)"):
            CudaDriver(shareable=True)
        assert standin.num_retained == 0


def test_plain_allocations_may_fail_anywhere(standin: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    standin.configure(virtual_memory=False)
    driver = CudaDriver()
    memory = PlainCudaMemory(driver)

    def work() -> None:
        memory.release(memory.reserve(GRANULE_BYTES))

    total = num_calls(standin, work)
    for position in range(1, total + 1):
        standin.forget()
        standin.fail(position, code=CODES["OUT_OF_MEMORY"])
        reservations: list[Reservation] = []
        said = ""
        try:
            reservations.append(memory.reserve(GRANULE_BYTES))
            memory.release(reservations[0])
        except DeviceError as error:
            said = str(error)
            for reservation in reservations:
                memory.release(reservation)
        assert "CUDA_ERROR_OUT_OF_MEMORY (2)" in said or "CUDA_ERROR_OUT_OF_MEMORY (2)" in caplog.messages[-1]
        assert standin.is_empty()
        work()
    memory.close()
    standin.pop_contexts()


@dataclass
class Interrupt:
    """Ctrl-C at the `position`th call: before it is made, or once the driver has done it."""

    position: int
    after: bool
    function: str = ""  # or at the first call of this one
    seen: int = 0
    struck: str = ""

    def strike(self, function: str) -> None:
        self.struck = function
        raise KeyboardInterrupt


class InterruptedDriver(CudaDriver):
    """Raises KeyboardInterrupt where Python may: around the calls of the driver."""

    interrupt: Interrupt | None = None

    def _answer(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        interrupt = self.interrupt
        if interrupt is None:
            return super()._answer(function, *arguments)
        interrupt.seen += 1
        mine = interrupt.seen == interrupt.position or (interrupt.function == function and not interrupt.struck)
        if mine and not interrupt.after:
            interrupt.strike(function)
        answer = super()._answer(function, *arguments)
        if mine:
            interrupt.strike(function)
        return answer


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_ctrl_c_at_any_call(standin: StandIn, after: bool) -> None:
    driver = InterruptedDriver()
    driver.interrupt = Interrupt(10**6, after)
    scene = Scene(standin, driver)
    play(scene)
    total = driver.interrupt.seen
    driver.interrupt = None
    scene.close()
    struck = set()
    for position in range(1, total + 1):
        driver = InterruptedDriver()
        driver.interrupt = interrupt = Interrupt(position, after)
        scene = Scene(standin, driver)
        before_bytes, before_ranges = standin.handle_bytes, standin.num_ranges
        lost_bytes = 0
        for step in scene.steps():
            try:
                step()
            except KeyboardInterrupt:
                # At most one handle, which the driver had just given or was about to be given back.
                lost_bytes = standin.handle_bytes - scene.memory.created_bytes - before_bytes
                assert lost_bytes == 0 or interrupt.struck == ("cuMemCreate" if after else "cuMemRelease")
                try:
                    step()
                except KeyError:  # the reservation was released before Ctrl-C came
                    assert after
            memory = scene.memory
            assert memory.created_bytes == memory.mapped_bytes + memory.pooled_bytes
            assert standin.handle_bytes - before_bytes == memory.created_bytes + lost_bytes
            assert standin.mapped_bytes == memory.mapped_bytes
        struck.add(interrupt.struck)
        assert lost_bytes in (0, GRANULE_BYTES, EXTENT_BYTES)
        lost_range = interrupt.struck == ("cuMemAddressReserve" if after else "cuMemAddressFree")
        assert standin.num_ranges - before_ranges == lost_range
        assert standin.handle_bytes - before_bytes == lost_bytes
        driver.interrupt = None
        scene.memory.close()
        standin.pop_contexts()
    assert {"cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemUnmap", "cuMemRelease", "cuMemAddressFree"} <= struck
    standin.sweep()


class Interrupter:
    """Raises KeyboardInterrupt before the `position`th line that runs in the modules under test.

    Python looks for Ctrl-C after calls and at the ends of loops. So not before a `with`, whose line runs once more
    where its lock is released, and not before a `try`, which does nothing.
    """

    FILES = tuple(module.__file__ for module in (cuda_virtual, page_pool))

    def __init__(self, position: int) -> None:
        self.position, self.seen, self.line = position, 0, ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in self.FILES:
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and not line.startswith(("with ", "try:")):
            self.seen += 1
            if self.seen == self.position:
                self.line = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    def __enter__(self) -> Interrupter:
        sys.settrace(self)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)


def test_ctrl_c_at_any_line(standin: StandIn) -> None:
    """At every third of them; at each one when this was written."""
    scene, counter = Scene(standin), Interrupter(10**9)
    for step in scene.steps():
        with counter:
            step()
    scene.close()
    assert counter.seen > 500
    for position in range(1, counter.seen + 1, 3):
        scene = Scene(standin)
        interrupter = Interrupter(position)
        lost_bytes = 0
        for step in scene.steps():
            try:
                with interrupter:
                    step()
            except KeyboardInterrupt:
                with contextlib.suppress(KeyError):  # the reservation was released before Ctrl-C came
                    step()
                scene.memory.trim_pool(10**9)  # any call takes back what was changing hands
                lost_bytes = standin.handle_bytes - scene.memory.created_bytes
            memory = scene.memory
            at = f"Ctrl-C in {interrupter.line}"
            assert lost_bytes in (0, GRANULE_BYTES, EXTENT_BYTES), at
            assert memory.created_bytes == memory.mapped_bytes + memory.pooled_bytes, at
            assert standin.handle_bytes == memory.created_bytes + lost_bytes, at
            assert standin.mapped_bytes == memory.mapped_bytes, at
        assert interrupter.line
        assert standin.num_ranges <= 1, interrupter.line
        standin.sweep()
        standin.pop_contexts()


def test_undoing_fails_when_nobody_knows_what_was_done(standin: StandIn) -> None:
    """Ctrl-C came while a piece was mapped, and the driver cannot unmap it now: it is not taken for unmapped."""
    driver = InterruptedDriver()
    scene = Scene(standin, driver)
    scene.reserve("one")
    standin.fail(1, code=CODES["NOT_SUPPORTED"], function="cuMemUnmap")
    driver.interrupt = Interrupt(10**6, after=True, function="cuMemMap")
    with pytest.raises(DeviceError, match=r"cannot back .*cuMemUnmap.*NOT_SUPPORTED"):
        scene.resize("one", 5)
    driver.interrupt = None
    assert scene.memory.mapped_bytes == standin.mapped_bytes > 0
    scene.resize("one", 5)
    scene.check()
    scene.close()


class InterruptedPool(PagePool):
    """Ctrl-C comes when pages are unmapped already and not pooled yet."""

    armed = False

    def give(self, handles: Sequence[int]) -> None:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt
        super().give(handles)


def test_a_release_that_was_interrupted_ends_with_nothing_taken(standin: StandIn) -> None:
    driver = CudaDriver()
    pool = InterruptedPool(driver)
    memory = CudaMemory(driver, pool=pool, extent_bytes=EXTENT_BYTES)
    reservation = memory.reserve(9 * GRANULE_BYTES)
    memory.back(reservation, 0, 9 * GRANULE_BYTES)
    pool.armed = True
    with pytest.raises(KeyboardInterrupt):
        memory.release(reservation)
    assert standin.handle_bytes == 9 * GRANULE_BYTES
    memory.release(reservation)
    assert standin.is_empty()
    memory.close()


def test_the_scene_covers_what_memory_does(standin: StandIn) -> None:
    scene = Scene(standin)
    standin.forget()
    play(scene)
    names = ("cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemUnmap", "cuMemRelease", "cuMemAddressReserve")
    assert all(standin.calls(name) > 1 for name in itertools.chain(names, ("cuMemAddressFree",)))
    scene.close()
