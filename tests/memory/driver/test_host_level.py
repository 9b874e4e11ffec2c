"""Host memory below a GPU: nothing is copied before it was read, and nothing read into what is still copied."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mball.errors import DeviceError, StorageError
from mball.memory import host_level
from mball.memory.pinned_tier import KEPT_FOR
from tests.memory.devices import CHUNK_BYTES, NUM_PAGES, PAGE, Look, expect
from tests.memory.driver.level_scenes import LEVEL_SCENES, Levels, levels
from tests.memory.driver.standin import CODES, Order, StandIn

ORDERS = [Order.EARLIEST, Order.LATEST, Order.RANDOM]


@pytest.fixture(params=ORDERS, ids=lambda order: order.name.lower())
def both(request: pytest.FixtureRequest, standin: StandIn, tmp_path: Path) -> Iterator[Levels]:
    with levels(tmp_path, request.param, 3) as opened:
        yield opened
    assert not standin.registered_bytes


@pytest.mark.parametrize("scene", LEVEL_SCENES, ids=lambda scene: scene.__name__)
def test_what_must_be_waited_for(scene: Callable[[Levels], None], both: Levels) -> None:
    scene(both)


def test_what_is_staged_is_read_once(both: Levels, submitted: list[Any]) -> None:
    both.stage(5, 3, 2).wait()
    for to in (0, 7, 0):
        look = both.see(both.copy(5, 3, to), to, 3)
        both.bench.finish()
        expect(look(), both.pages(5, 3))
    assert len(submitted) == 1
    submitted.clear()


def test_what_is_not_there_comes_from_the_file(both: Levels, submitted: list[Any]) -> None:
    both.stage(5, 3, 2).wait()
    both.level.discard(3 * PAGE, PAGE)
    submitted.clear()
    look = both.see(both.copy(5, 3, 0), 0, 3)
    both.bench.finish()
    expect(look(), both.pages(5, 3))
    assert submitted
    submitted.clear()


def test_copies_go_across_chunks(both: Levels) -> None:
    count = CHUNK_BYTES // PAGE + 3
    both.stage(1, count, 2).wait()
    look = both.see(both.copy(1, count, 0), 0, count)
    both.bench.finish()
    expect(look(), both.pages(1, count))


def test_a_read_that_fails_is_said_by_who_copies_it(both: Levels) -> None:
    both.bench.path.write_bytes(both.bench.content[: 6 * PAGE])
    both.stage(5, 3, 2)
    both.stage(1, 3, 6)
    with pytest.raises(StorageError, match=str(both.bench.path)):
        both.see(both.copy(5, 3, 0), 0, 3)
    look = both.see(both.copy(1, 3, 0), 0, 3)
    both.bench.path.write_bytes(both.bench.content)
    both.stage(5, 3, 2)
    again = both.see(both.copy(5, 3, 3), 3, 3)
    both.bench.finish()
    expect(look(), both.pages(1, 3))
    expect(again(), both.pages(5, 3))


@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync", "cuEventRecord", "cuCtxPushCurrent", "cuMemHostRegister"])
def test_a_driver_that_refuses(call: str, standin: StandIn, tmp_path: Path) -> None:
    for first in range(1, 6):
        with levels(tmp_path, Order.LATEST) as both:
            standin.fail(first, first, code=CODES["OUT_OF_MEMORY"], function=call)
            for number in range(3):
                both.stage(5 + number, 3, 2)
                with contextlib.suppress(DeviceError):
                    both.see(both.copy(5 + number, 3, 0), 0, 3)
            standin.forget()
            both.bench.device.synchronize()
            both.stage(20, 3, 2)
            look = both.see(both.copy(20, 3, 0), 0, 3)
            both.bench.finish()
            expect(look(), both.pages(20, 3))
        assert standin.is_idle()
        assert not standin.registered_bytes


def test_it_may_be_closed_while_it_reads(standin: StandIn, tmp_path: Path) -> None:
    for number in range(6):
        with levels(tmp_path, Order.RANDOM, number) as both:
            for place in range(0, 12, 3):
                both.stage(place, 3, place)
                both.copy(place, 3, place)
                if number % 2:
                    both.stage(place + 20, 3, place)
        assert not standin.registered_bytes
        assert not [thread for thread in threading.enumerate() if thread.name.startswith(("mball-stage", "mball-copy"))]
        with pytest.raises(DeviceError, match="closed"):
            both.stage(0, 1, 0)


ASKED = st.tuples(st.sampled_from(["stage", "copy"]), st.integers(0, 7), st.integers(0, 5))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(ASKED, min_size=1, max_size=24), seed=st.integers(0, 9))
def test_whatever_is_asked_bytes_are_right(
    asked: list[tuple[str, int, int]], seed: int, standin: StandIn, tmp_path: Path
) -> None:
    """Each piece has eight pages of its own in the file; places in host memory and on the GPU take turns."""
    with levels(tmp_path, Order.RANDOM if seed % 2 else Order.LATEST, seed) as both:
        looks: list[tuple[Look, bytes]] = []
        for what, piece, place in asked:
            page, count = 8 * piece, 1 + piece % 3
            if what == "stage":
                both.stage(page, count, 2 * place)
            else:
                to = 4 * place
                looks.append((both.see(both.copy(page, count, to), to, count), both.pages(page, count)))
        both.bench.finish()
        for number, (look, wanted) in enumerate(looks):
            expect(look(), wanted, f"look {number}")
    assert NUM_PAGES >= 8 * 8


def test_an_interrupt_before_a_copy_is_handed_over_holds_up_nothing(
    both: Levels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody will ever say that this copy is over, so nobody may wait for it once all was waited for."""

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    both.stage(5, 3, 2).wait()
    with monkeypatch.context() as patch:
        patch.setattr(host_level, "partial", interrupt)
        with pytest.raises(KeyboardInterrupt):
            both.copy(5, 3, 0)
    both.bench.device.synchronize()
    both.stage(20, 3, 2)
    look = both.see(both.copy(20, 3, 0), 0, 3)
    both.bench.finish()
    expect(look(), both.pages(20, 3))


def test_tables_that_nobody_asks_for_go_here_too(both: Levels, standin: StandIn) -> None:
    device = both.bench.device
    both.host.populate()  # it is pinned in the background
    before = standin.registered_bytes
    device.rows_of(torch.empty(64, 16), [both.bench.read(7 * PAGE, PAGE, 0)])
    assert standin.registered_bytes > before
    for _ in range(KEPT_FOR + 4):
        device.expect([])
        device.synchronize()
        both.bench.finish()
    assert standin.registered_bytes == before
