"""Every wait and every event of the device is left out, one at a time: each time something is seen to go wrong.

The sites are found in the sources, so one that is added is tried too.
"""

from __future__ import annotations

import ast
import ctypes
import gc
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mball.errors import MballError
from mball.memory import cuda_device, cuda_events, cuda_feed, gds_ring, host_level, pinned_tier, ring
from mball.memory.cuda_device import CudaDevice
from mball.memory.cuda_errors import DriverError
from mball.memory.pinned_tier import KEPT_FOR
from tests.adaptors import DelayedDevice
from tests.memory import devices
from tests.memory.device_scenes import (
    compute_is_waited_for,
    events_are_reached,
    nothing_writes_after_synchronize,
    slots_in_turn,
)
from tests.memory.devices import NUM_PAGES, PAGE, PLACES, Bench, expect
from tests.memory.driver.level_scenes import LEVEL_SCENES, levels
from tests.memory.driver.standin import CODES, Order, StandIn

MODULES = (cuda_device, cuda_events, cuda_feed, gds_ring, host_level, pinned_tier, ring)
# Calls that order work, where nothing uses what they return.
_WAITS = {"wait", "order", "synchronize", "drain", "free", "record", "_watched"}


@dataclass(frozen=True, slots=True)
class Site:
    """A wait or an event in a module; `line` is only for reading."""

    module: ModuleType
    owner: str
    function: str
    number: int
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.owner}.{self.function}:{self.text}"


def called(node: ast.AST) -> str:
    """The name of the method or function that a call is of."""
    if not isinstance(node, ast.Call):
        return ""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


class _Leaver(ast.NodeTransformer):
    """Counts the sites of a function and leaves out the one with a number."""

    def __init__(self, chosen: int | None) -> None:
        self.chosen = chosen
        self.found: list[ast.AST] = []

    def _is_chosen(self, node: ast.AST) -> bool:
        self.found.append(node)
        return len(self.found) - 1 == self.chosen

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        # A condition variable is no order of work: without that wait the thread only asks again and again.
        is_wait = called(node.value) in _WAITS and "changed" not in ast.unparse(node)
        if is_wait and self._is_chosen(node):
            return ast.copy_location(ast.Pass(), node)
        return self.generic_visit(node)

    def visit_With(self, node: ast.With) -> ast.AST:
        waits_only = isinstance(node.body[0], ast.Pass)
        if waits_only and self._is_chosen(node):
            return ast.copy_location(ast.Pass(), node)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if called(node) == "is_done" and self._is_chosen(node):
            return ast.copy_location(ast.Constant(value=True), node)
        if called(node) == "record" and "_pool" in ast.unparse(node.func) and self._is_chosen(node):
            # An event that nobody recorded.
            taken = ast.Attribute(value=node.func.value, attr="take", ctx=ast.Load())  # type: ignore[attr-defined]
            return ast.fix_missing_locations(ast.copy_location(ast.Call(func=taken, args=[], keywords=[]), node))
        return node


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield "", node
        elif isinstance(node, ast.ClassDef):
            yield from ((node.name, each) for each in node.body if isinstance(each, ast.FunctionDef))


def source_of(module: ModuleType) -> str:
    assert module.__file__
    return Path(module.__file__).read_text()


def sites() -> list[Site]:
    found = []
    for module in MODULES:
        for owner, function in functions(ast.parse(source_of(module))):
            leaver = _Leaver(None)
            leaver.visit(function)
            found += [
                Site(module, owner, function.name, number, node.lineno, ast.unparse(node).partition("\n")[0])  # type: ignore[attr-defined]
                for number, node in enumerate(leaver.found)
            ]
    return found


def leave_out(site: Site, patch: pytest.MonkeyPatch) -> None:
    tree = ast.parse(source_of(site.module))
    for owner, function in functions(tree):
        if (owner, function.name) == (site.owner, site.function):
            _Leaver(site.number).visit(function)
    space = dict(vars(site.module))
    exec(compile(ast.fix_missing_locations(tree), f"<without {site}>", "exec"), space)
    changed = space[site.owner] if site.owner else space
    mutant = vars(changed)[site.function] if site.owner else changed[site.function]
    space.update(vars(site.module))  # it is to know the classes that everybody knows
    if site.owner:
        patch.setattr(getattr(site.module, site.owner), site.function, mutant)
        return
    for module in MODULES:
        if getattr(module, site.function, None) is getattr(site.module, site.function) and module is not site.module:
            patch.setattr(module, site.function, mutant)
    patch.setattr(site.module, site.function, mutant)


# -- scenes that need the stand-in ------------------------------------------------------------------------------------


def a_failed_copy_writes_nothing_late(bench: Bench) -> None:
    """Not even what was with the stream before it failed."""
    assert devices.LOADED
    standin = devices.LOADED
    for call in ("cuEventRecord", "cuMemcpyHtoDAsync"):
        bench.device.synchronize()
        # Two copies, since these lie in no one place: the first is with the stream when the second fails.
        reads = [bench.read(0, 2 * PAGE, 0), bench.read(NUM_PAGES // 3 * PAGE, 2 * PAGE, 4)]
        standin.fail(2 if call == "cuMemcpyHtoDAsync" else 1, 9, code=CODES["OUT_OF_MEMORY"], function=call)
        event = bench.device.copy(reads, None)
        with pytest.raises(DriverError, match=call):
            event.wait()
        standin.forget()
        bench.fill(0, 6, 77)
        bench.finish()
        standin.run()
        look = bench.look(0, 6)
        bench.finish()
        expect(look(), bytes([77]) * 6 * PAGE)
        slots_in_turn(bench, random.Random(5), num_copies=3)


def a_failed_read_is_told(bench: Bench) -> None:
    """Compute never goes on with bytes that did not come."""
    bench.path.write_bytes(bench.content[: 8 * PAGE])
    event = bench.device.copy([bench.read(2 * PAGE, 12 * PAGE, 0)], None)
    failure = None
    try:
        bench.device.wait(event)
    except MballError as error:
        failure = error
    look = bench.look(0, 12)
    bench.finish()
    if failure:
        assert str(bench.path) in str(failure)
    else:
        expect(look(), bench.content[2 * PAGE : 14 * PAGE])
    bench.path.write_bytes(bench.content)


def a_device_ends_what_it_began(bench: Bench) -> None:
    """Closed at once, with copies on their way."""
    assert devices.LOADED
    compute = bench.device.record()
    before = devices.LOADED.calls("cuMemcpyHtoDAsync")
    for number in range(6):
        bench.device.copy([bench.read(number * PAGE, 8 * PAGE, number * 8)], compute)
    bench.finish()
    deadline_s = time.monotonic() + 60
    while devices.LOADED.calls("cuMemcpyHtoDAsync") == before:  # until a stream has some of it
        assert time.monotonic() < deadline_s, "no stream was given a copy"
        time.sleep(0.001)
    bench.device.close()
    assert devices.LOADED.num_waiting == 0
    assert devices.LOADED.num_streams == 1  # that of compute


def copies_are_started_late(bench: Bench) -> None:
    """By a device around this one, whose events it does not know."""
    late = DelayedDevice(bench.device, 3)
    for number in range(8):
        event = late.copy([bench.read(number * PAGE, 4 * PAGE, number * 4)], late.record())
        late.wait(event)
        look = bench.look(number * 4, number * 4 + 4)
        bench.finish()
        expect(look(), bench.content[number * PAGE : (number + 4) * PAGE])


@contextmanager
def nothing_refused() -> Iterator[None]:
    """The stand-in refuses to unpin what a copy that it was given still reads, and the tier says so."""
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    logger = logging.getLogger(pinned_tier.__name__)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert not said, said[0].getMessage()


@nothing_refused()
def pinned_memory_goes_after_its_last_copy(bench: Bench) -> None:
    assert isinstance(bench.device, CudaDevice)
    bench.device.expect([bench.read(0, 8 * PAGE, 0)])
    bench.device._tier.finish()
    event = bench.device.copy([bench.read(0, 8 * PAGE, 0)], None)
    for _ in range(KEPT_FOR + 1):
        bench.device.expect([])
    bench.finish()  # compute looks up nothing
    bench.device.expect([])
    bench.device.wait(event)
    look = bench.look(0, 8)
    bench.finish()
    expect(look(), bench.content[: 8 * PAGE])


@nothing_refused()
def a_table_goes_after_its_last_lookup(bench: Bench) -> None:
    """Compute reads it where it is pinned."""
    device = bench.device
    assert isinstance(device, CudaDevice)
    rows = device.rows_of(torch.empty(64, 16), [bench.read(7 * PAGE, PAGE, 0)])
    with device._driver.current():
        device._streams.copy_in(bench.arena.address_of(0, PAGE), rows.data_ptr(), PAGE, device._current_stream())
    device.changed(str(bench.path), 7 * PAGE, PAGE)
    with device._driver.current():
        device._streams.drain(device._home_stream)  # no copy is under way
    device.expect([])
    look = bench.look(0, 1)
    bench.finish()
    expect(look(), bench.content[7 * PAGE : 8 * PAGE])


def compute_goes_on_elsewhere(bench: Bench) -> None:
    """A pass on another stream than the one before reads what that one had brought."""
    device = bench.device
    assert isinstance(device, CudaDevice)
    device.follow()
    before = device._current_stream
    with device._driver.current():
        other = device._streams.create_stream()
    try:
        device.wait(device.copy([bench.read(0, 8 * PAGE, 0)], None))
        device.record()
        device._current_stream = lambda: other
        device.follow()
        with device._driver.current():
            seen = ctypes.create_string_buffer(8 * PAGE)
            device._streams.copy_out(ctypes.addressof(seen), bench.arena.address_of(0, 8 * PAGE), 8 * PAGE, other)
        expect(seen.raw, bench.content[: 8 * PAGE])
    finally:
        device._current_stream = before
        with device._driver.current():
            device._streams.drain(other)
            device._streams.destroy_stream(other)


def a_read_around_the_host_is_waited_for(bench: Bench) -> None:
    assert devices.LOADED
    devices.LOADED.hold_reads(True)
    try:
        event = bench.device.copy([bench.read(PAGE, 4 * PAGE, 0)], None)
        deadline_s = time.monotonic() + 60
        while not devices.LOADED.num_reading:
            assert time.monotonic() < deadline_s, "nothing is read"
            time.sleep(0.001)
        for _ in range(6):  # who asks again and again is answered some time
            time.sleep(0.001)
            assert not event.done()
    finally:
        devices.LOADED.hold_reads(False)
    event.wait()
    look = bench.look(0, 4)
    bench.finish()
    expect(look(), bench.content[PAGE : 5 * PAGE])


STRAIGHT_SCENES: tuple[Callable[[Bench], None], ...] = (
    lambda bench: slots_in_turn(bench, random.Random(7)),
    a_read_around_the_host_is_waited_for,
)
SCENES: tuple[Callable[[Bench], None], ...] = (
    lambda bench: slots_in_turn(bench, random.Random(7)),
    events_are_reached,
    nothing_writes_after_synchronize,
    compute_is_waited_for,
    a_failed_copy_writes_nothing_late,
    a_failed_read_is_told,
    copies_are_started_late,
    a_device_ends_what_it_began,
    pinned_memory_goes_after_its_last_copy,
    a_table_goes_after_its_last_lookup,
    compute_goes_on_elsewhere,
)
ORDERS = [(Order.LATEST, 0), *((Order.RANDOM, seed) for seed in range(3))]


@contextmanager
def swept(standin: StandIn) -> Iterator[None]:
    """What a mutant leaves behind is no fault of the tests to come."""
    gc.freeze()  # so that a collection looks at no more than what the mutant left
    try:
        yield
    finally:
        standin.forget()
        gc.collect()
        gc.unfreeze()
        standin.sweep()
        standin.pop_contexts()


def play(folder: Path, standin: StandIn) -> None:
    """All scenes, on bytes from everywhere, in several orders. Raises when something goes wrong."""
    for order, seed in ORDERS:
        for name, pages in PLACES.items():
            for number, scene in enumerate(SCENES):
                place = folder / f"{order.name}{seed}{name}{number}"
                place.mkdir()
                with devices.cuda_on_the_stand_in(place, order=order, seed=seed, home_pages=pages) as bench:
                    scene(bench)
                assert standin.is_idle(), "streams, events, pinned memory or work are left"
        for number, scene in enumerate(STRAIGHT_SCENES):
            place = folder / f"{order.name}{seed}straight{number}"
            place.mkdir()
            with devices.cuda_on_the_stand_in(place, order=order, seed=seed, straight=True) as bench:
                scene(bench)
            assert standin.has_no_files(), "cuFile is still open"
            assert standin.is_empty(), "memory of the device is still taken"
        for number, level_scene in enumerate(LEVEL_SCENES):
            place = folder / f"{order.name}{seed}level{number}"
            place.mkdir()
            with levels(place, order, seed) as both:
                level_scene(both)
            assert standin.is_idle(), "streams, events, pinned memory or work are left"


def test_without_a_mutation_all_is_well(standin: StandIn, tmp_path: Path) -> None:
    play(tmp_path, standin)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("site", sites(), ids=str)
def test_what_is_left_out_is_missed(
    site: Site, standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out(site, monkeypatch)
    with swept(standin), pytest.raises((AssertionError, MballError)):
        play(tmp_path, standin)


def test_the_sites_are_those_that_there_are() -> None:
    """A search that finds nothing would prove nothing."""
    names = {str(site) for site in sites()}
    assert len(names) > 15
    assert {site.module for site in sites()} == set(MODULES)
