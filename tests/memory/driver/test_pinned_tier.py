"""Pinned memory between files and a GPU: what is expected comes there, what is written goes, and bytes are right."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mball.errors import StorageError
from mball.memory.cuda_device import CudaDevice
from mball.memory.pinned import PinnedSlab
from mball.memory.pinned_tier import KEPT_FOR, PinnedTier
from mball.run.file_read import FileRead
from mball.storage import ThreadedReader
from tests.memory.devices import NUM_PAGES, PAGE, Bench, cuda_on_the_stand_in, expect
from tests.memory.driver.standin import CODES, Order, StandIn

ORDERS = [Order.EARLIEST, Order.LATEST, Order.RANDOM]


@pytest.fixture(params=ORDERS, ids=lambda order: order.name.lower())
def bench(request: pytest.FixtureRequest, standin: StandIn, tmp_path: Path) -> Iterator[Bench]:
    with cuda_on_the_stand_in(tmp_path, order=request.param, seed=3) as opened:
        yield opened
    assert standin.is_idle()
    assert not standin.registered_bytes


def tier_of(bench: Bench) -> PinnedTier:
    assert isinstance(bench.device, CudaDevice)
    return bench.device._tier


def bring(bench: Bench, page: int, count: int, to: int) -> bytes:
    """Returns pages as compute sees them once they were copied."""
    bench.device.wait(bench.device.copy([bench.read(page * PAGE, count * PAGE, to)], bench.device.record()))
    look = bench.look(to, to + count)
    bench.finish()
    return look()


def rewrite(bench: Bench, page: int, count: int, byte: int) -> bytes:
    """Writes other bytes to the file, says so, and returns its content."""
    content = bytearray(bench.path.read_bytes())
    content[page * PAGE : (page + count) * PAGE] = bytes([byte]) * (count * PAGE)
    with open(bench.path, "r+b") as file:
        file.write(content)
        file.flush()
    bench.device.changed(str(bench.path), page * PAGE, count * PAGE)
    return bytes(content)


def test_what_is_expected_is_read_once(bench: Bench, submitted: list[Any]) -> None:
    reads = [bench.read(2 * PAGE, 9 * PAGE, 0), bench.read(20 * PAGE + 7, 3 * PAGE, 10)]
    bench.device.expect(reads)
    tier_of(bench).finish()
    assert sum(read.destination.nbytes for read in submitted) == 12 * PAGE
    submitted.clear()
    for number in range(3):
        expect(bring(bench, 2, 9, number), bench.content[2 * PAGE : 11 * PAGE])
        expect(bring(bench, 5, 2, number), bench.content[5 * PAGE : 7 * PAGE], "a part of it")
    bench.device.wait(bench.device.copy([reads[1]], None))
    look = bench.look(10, 13)
    bench.finish()
    expect(look(), bench.content[20 * PAGE + 7 : 23 * PAGE + 7])
    assert not submitted
    expect(bring(bench, 40, 2, 0), bench.content[40 * PAGE : 42 * PAGE])
    assert submitted, "what nobody expected comes from the file"


def test_nobody_waits_for_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, pin = threading.Event(), PinnedSlab.pin

    def late(self: PinnedSlab) -> None:
        if threading.current_thread().name == "mball-pin":
            assert gate.wait(60)
        pin(self)

    monkeypatch.setattr(PinnedSlab, "pin", late)
    bench.device.expect([bench.read(0, 8 * PAGE, 0)])
    expect(bring(bench, 0, 8, 0), bench.content[: 8 * PAGE])
    assert tier_of(bench).find(str(bench.path), 0, 8 * PAGE) is None
    gate.set()
    tier_of(bench).finish()
    assert tier_of(bench).find(str(bench.path), 0, 8 * PAGE) is not None


def test_what_was_written_comes_anew(bench: Bench, standin: StandIn) -> None:
    reads = [bench.read(0, 4 * PAGE, 0), bench.read(4 * PAGE, 4 * PAGE, 4)]
    bench.device.expect(reads)
    tier_of(bench).finish()
    content = rewrite(bench, 5, 1, 77)
    expect(bring(bench, 4, 4, 0), content[4 * PAGE : 8 * PAGE])
    assert tier_of(bench).find(str(bench.path), 0, 4 * PAGE) is not None, "the other one is as it was"
    bench.device.expect(reads)
    tier_of(bench).finish()
    assert tier_of(bench).find(str(bench.path), 4 * PAGE, 4 * PAGE) is not None
    expect(bring(bench, 4, 4, 0), content[4 * PAGE : 8 * PAGE])


def test_what_is_written_while_it_comes_is_not_taken(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, gate, submit = threading.Event(), threading.Event(), ThreadedReader.submit

    def late(self: ThreadedReader, reads: Any) -> Any:
        handle = submit(self, reads)
        if threading.current_thread().name == "mball-pin":
            handle.wait()
            begun.set()
            assert gate.wait(60)
        return handle

    monkeypatch.setattr(ThreadedReader, "submit", late)
    bench.device.expect([bench.read(0, 8 * PAGE, 0)])
    assert begun.wait(60)
    content = rewrite(bench, 3, 2, 78)
    gate.set()
    tier_of(bench).finish()
    assert tier_of(bench).find(str(bench.path), 0, 8 * PAGE) is None
    expect(bring(bench, 0, 8, 0), content[: 8 * PAGE])


def test_memory_goes_when_nothing_copies_from_it_any_more(standin: StandIn, tmp_path: Path) -> None:
    with cuda_on_the_stand_in(tmp_path, order=Order.LATEST) as bench:
        bench.device.expect([bench.read(0, 8 * PAGE, 0)])
        tier_of(bench).finish()
        assert standin.registered_bytes >= 8 * PAGE
        before = standin.registered_bytes
        event = bench.device.copy([bench.read(0, 8 * PAGE, 0)], None)
        for _ in range(KEPT_FOR + 2):
            bench.device.expect([])
        assert standin.registered_bytes == before, "a copy that was asked for reads it"
        bench.device.synchronize()
        bench.finish()
        bench.device.expect([])
        assert standin.registered_bytes < before
        bench.device.wait(event)
        look = bench.look(0, 8)
        bench.finish()
        expect(look(), bench.content[: 8 * PAGE])


def test_plans_that_take_turns_keep_what_they_have(bench: Bench, standin: StandIn, submitted: list[Any]) -> None:
    plans = [[bench.read(n * PAGE, 4 * PAGE, n) for n in numbers] for numbers in ((0, 8), (0, 16), (24,))]
    for reads in plans:
        bench.device.expect(reads)
        tier_of(bench).finish()
    submitted.clear()
    for _ in range(KEPT_FOR):
        for reads in plans:
            bench.device.expect(reads)
            tier_of(bench).finish()
    assert not submitted
    before = standin.registered_bytes
    for _ in range(KEPT_FOR + 2):
        bench.device.synchronize()
        bench.finish()
        bench.device.expect(plans[0])
    assert standin.registered_bytes == before - 8 * PAGE, "what no plan streams any more is let go"


def test_what_no_plan_streams_now_makes_room(standin: StandIn, tmp_path: Path) -> None:
    with cuda_on_the_stand_in(tmp_path, order=Order.EARLIEST) as bench:
        tier = tier_of(bench)
        scratch = standin.registered_bytes
        tier._spared_bytes = 0
        tier._headroom = lambda: 20 * PAGE - (standin.registered_bytes - scratch)
        bench.device.expect([bench.read(0, 10 * PAGE, 0)])
        tier.finish()
        for _ in range(3):  # there is no room; what was there goes; now there is
            bench.device.expect([bench.read(20 * PAGE, 12 * PAGE, 0)])
            tier.finish()
        assert tier.find(str(bench.path), 0, 10 * PAGE) is None
        assert tier.find(str(bench.path), 20 * PAGE, 12 * PAGE) is not None


def test_without_host_memory_the_file_is_read(
    standin: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with cuda_on_the_stand_in(tmp_path, order=Order.EARLIEST) as bench:
        tier_of(bench)._headroom = lambda: 9 * PAGE
        bench.device.expect([bench.read(n * 10 * PAGE, 10 * PAGE, n * 10) for n in range(3)])
        tier_of(bench).finish()
        assert [line.levelname for line in caplog.records] == ["WARNING"]
        assert "stay on disk and are read from there in each pass" in caplog.text
        for page in (0, 10, 20):
            expect(bring(bench, page, 10, 0), bench.content[page * PAGE : (page + 10) * PAGE])


@pytest.mark.parametrize("call", ["cuMemHostRegister", "cuCtxPushCurrent"])
def test_a_driver_that_refuses(call: str, standin: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    for first in range(1, 4):
        with cuda_on_the_stand_in(tmp_path, order=Order.LATEST) as bench:
            tier = tier_of(bench)
            reads = [bench.read(n * 4 * PAGE, 4 * PAGE, n * 4) for n in range(3)]
            standin.fail(first, first, code=CODES["OUT_OF_MEMORY"], function=call)
            tier.expect(reads)
            tier.finish()
            standin.forget()
            for page in (0, 4, 8):
                expect(bring(bench, page, 4, 0), bench.content[page * PAGE : (page + 4) * PAGE])
        assert standin.is_idle()
        assert not standin.registered_bytes


def test_a_file_that_cannot_be_read_is_said_by_who_needs_it(bench: Bench) -> None:
    bench.path.write_bytes(bench.content[: 4 * PAGE])
    bench.device.expect([bench.read(2 * PAGE, 8 * PAGE, 0)])
    tier_of(bench).finish()
    assert tier_of(bench).find(str(bench.path), 2 * PAGE, 8 * PAGE) is None
    with pytest.raises(StorageError, match=str(bench.path)):
        bring(bench, 2, 8, 0)


def test_a_device_may_be_closed_while_it_comes(standin: StandIn, tmp_path: Path) -> None:
    for number in range(8):
        with cuda_on_the_stand_in(tmp_path, order=Order.RANDOM, seed=number) as bench:
            bench.device.expect([bench.read(n * PAGE, 3 * PAGE, 0) for n in range(0, 60, 3)])
            if number % 2:
                tier_of(bench).find(str(bench.path), 0, PAGE)
        assert not standin.registered_bytes
        assert not [thread for thread in threading.enumerate() if thread.name == "mball-pin"]


def table_reads(bench: Bench, *pages: int) -> list[FileRead]:
    return [bench.read(page * PAGE, PAGE, number) for number, page in enumerate(pages)]


def test_rows_are_read_in_pinned_memory(bench: Bench, standin: StandIn) -> None:
    home = torch.empty(64, 16)
    rows = bench.device.rows_of(home, table_reads(bench, 7))
    wanted = torch.frombuffer(bytearray(bench.content[7 * PAGE : 8 * PAGE]), dtype=torch.float32).view(64, 16)
    assert torch.equal(rows.view(torch.int32), wanted.view(torch.int32))
    assert bench.device.rows_of(home, table_reads(bench, 7)).data_ptr() == rows.data_ptr(), "it was there"
    # Parts of it lie elsewhere, since they were written.
    scattered = bench.device.rows_of(torch.empty(64, 32).t(), table_reads(bench, 30, 3))
    both = bench.content[30 * PAGE : 31 * PAGE] + bench.content[3 * PAGE : 4 * PAGE]
    wanted = torch.frombuffer(bytearray(both), dtype=torch.float32).view(64, 32).t()
    assert torch.equal(scattered.view(torch.int32), wanted.view(torch.int32))
    content = rewrite(bench, 7, 1, 79)
    rows = bench.device.rows_of(home, table_reads(bench, 7))
    assert bytes(rows.view(torch.uint8).flatten().tolist()) == content[7 * PAGE : 8 * PAGE]


def test_a_table_that_cannot_be_pinned(bench: Bench, standin: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    before = standin.registered_bytes
    standin.fail(1, 9, code=CODES["OUT_OF_MEMORY"], function="cuMemHostRegister")
    assert bench.device.rows_of(torch.empty(64, 16), table_reads(bench, 7)) is None
    assert re.search(r"copied whole.*only 0 B of .* of a table could be pinned.*ulimit -l", caplog.text)
    standin.forget()
    assert standin.registered_bytes == before
    standin.configure(host_addresses=False)
    assert bench.device.rows_of(torch.empty(64, 16), table_reads(bench, 7)) is None
    assert "GPU 0 does not read the host's memory" in caplog.text


def test_a_table_that_nobody_asks_for_goes(bench: Bench, standin: StandIn) -> None:
    rows = bench.device.rows_of(torch.empty(64, 16), table_reads(bench, 7))
    before = standin.registered_bytes
    for _ in range(KEPT_FOR):
        bench.device.expect([])
    assert bench.device.rows_of(torch.empty(64, 16), table_reads(bench, 7)).data_ptr() == rows.data_ptr()
    for _ in range(KEPT_FOR):
        bench.device.expect([])
    assert standin.registered_bytes == before, "it was asked for in between"
    bench.device.expect([])
    standin.run()
    bench.device.expect([])
    assert standin.registered_bytes == before - PAGE


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("expect"), st.lists(st.tuples(st.integers(0, 55), st.integers(1, 8)), max_size=5)),
        st.tuples(st.just("write"), st.tuples(st.integers(0, 60), st.integers(1, 3))),
        st.tuples(st.just("copy"), st.tuples(st.integers(0, 55), st.integers(1, 8))),
        st.tuples(st.just("finish"), st.none()),
    ),
    min_size=2,
    max_size=14,
)


@given(acts=ACTS, seed=st.integers(0, 99))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_happens_compute_sees_what_the_file_has(
    standin: StandIn, tmp_path_factory: pytest.TempPathFactory, acts: list[Any], seed: int
) -> None:
    with cuda_on_the_stand_in(tmp_path_factory.mktemp("acts"), order=Order.RANDOM, seed=seed) as bench:
        content, byte = bench.content, 200
        for act, value in acts:
            if act == "expect":
                bench.device.expect([bench.read(page * PAGE, count * PAGE, page % 32) for page, count in value])
            elif act == "write":
                byte += 1
                content = rewrite(bench, *value, byte)
            elif act == "finish":
                tier_of(bench).finish()
            else:
                page, count = value
                seen = bring(bench, page, count, (page + count) % (NUM_PAGES - 8))
                expect(seen, content[page * PAGE : (page + count) * PAGE], f"pages {page} to {page + count}")
    assert standin.is_idle()
    assert not standin.registered_bytes
