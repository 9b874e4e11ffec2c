"""Models over the stand-in for the driver whose weights come from disk through a budget of host memory, as planned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import mball
from mball.errors import BudgetError, ConfigError, DeviceError
from mball.memory.host_level import HostLevel
from mball.run.execution import Execution
from tests.adaptors import PoisonedDevice
from tests.memory.driver.models import wrapped_over_the_driver
from tests.memory.driver.standin import CODES, Order, StandIn
from tests.run.harness import assert_streamed, engine_of, make, run, weight_bytes
from tests.run.there import PLACE, compare
from tests.run.zoo import ZOO, ids, llama, logits

pytestmark = pytest.mark.usefixtures("foreign")


@contextmanager
def wrapped(model: nn.Module, share: float, host_share: float, *, swap_dir: Path, **settings: Any) -> Iterator[Any]:
    """A model under parts of its weights' bytes on the device and in host memory."""
    size = weight_bytes(model)
    settings.setdefault("capture", "graphs")
    with wrapped_over_the_driver(
        model, int(size * share), PoisonedDevice, swap_dir=swap_dir, host_budget=int(size * host_share), **settings
    ):
        yield model


def below(model: Any) -> Execution:
    execution = engine_of(model).execution.below
    assert execution is not None
    return execution


def level(model: Any) -> HostLevel:
    device = below(model).device
    assert isinstance(device, HostLevel)
    return device


# A model, and what of its weights fits the device (with activations, which a few need more for) and host memory.
KINDS = [("llama-bf16-dynamic-cache", 0.9, 0.3), ("t5", 0.8, 0.4)]


@pytest.mark.parametrize(("name", "share", "host_share"), KINDS)
@pytest.mark.parametrize(("capture", "order"), [("graphs", Order.LATEST), ("operators", Order.RANDOM)])
def test_streamed_equals_resident(
    name: str, share: float, host_share: float, capture: str, order: Order, standin: StandIn, tmp_path: Path
) -> None:
    standin.run_in(order, 7)
    specimen = ZOO[name]
    plain = make(specimen.make)
    with wrapped(make(specimen.make), share, host_share, swap_dir=tmp_path, capture=capture) as model:
        for attempt in range(3):
            for number, call in enumerate(specimen.runs):
                compare(model, plain, call, f"{name}, attempt {attempt}, call {number}")
            assert_streamed(model)
        assert level(model).memory.pinned_bytes
    assert not standin.registered_bytes


def test_what_the_plan_keeps_in_host_memory_is_read_once(
    standin: StandIn, tmp_path: Path, submitted: list[Any]
) -> None:
    plain = make(llama)
    with wrapped(make(llama), 0.7, 0.45, swap_dir=tmp_path) as model:
        for _ in range(4):
            compare(model, plain, logits(1, 6))
        plan = engine_of(model).plan
        assert plan is not None
        assert plan.host is not None
        assert plan.host.transfers, "some of it comes from disk in each pass"
        expected = sum(plan.bundles[each.bundle].moved_bytes for each in plan.host.transfers)
        kept = {plan.bundles[each.bundle].extents[0].offset_bytes for each in plan.host.residents}
        fetches = below(model).counters.unplanned_fetches
        device = engine_of(model).execution.device
        device.synchronize()  # a thread asks for what comes next when there is room for it
        submitted.clear()
        for _ in range(3):
            compare(model, plain, logits(1, 6))
        device.synchronize()
        assert sum(read.size_bytes for read in submitted) == 3 * expected
        assert not kept & {read.offset_bytes for read in submitted}
        assert below(model).counters.unplanned_fetches == fetches
        report = mball.report(model)
        assert report.host is not None
        assert report.host.disk_bytes_per_pass == expected
        assert report.host.bytes_read >= 3 * expected
        assert report.roofline_s >= expected / report.host.disk_bytes_per_s
        assert "come from disk a pass" in str(report)


def test_all_that_streams_stays_where_there_is_room(standin: StandIn, tmp_path: Path, submitted: list[Any]) -> None:
    plain = make(llama)
    with wrapped(make(llama), 0.8, 3.0, swap_dir=tmp_path) as model:
        for _ in range(4):
            compare(model, plain, logits(1, 6))
        engine_of(model).execution.device.synchronize()
        submitted.clear()
        for _ in range(3):
            compare(model, plain, logits(1, 6))
            assert assert_streamed(model).bytes_read_last_pass
        assert not submitted
        plan = engine_of(model).plan
        assert plan is not None
        assert plan.host is not None
        assert not plan.host.transfers


def test_writes_budgets_and_other_shapes(standin: StandIn, tmp_path: Path) -> None:
    standin.run_in(Order.LATEST, 3)
    plain = make(llama)
    size = weight_bytes(plain)
    with wrapped(make(llama), 0.9, 0.3, swap_dir=tmp_path) as model:
        for number, share in enumerate((0.9, 1.3, 0.8, 1.0)):
            mball.set_budget(model, int(size * share))
            for rows, length in ((1, 1), (2, 12), (1, 1), (1, 3)):
                compare(model, plain, logits(rows, length), f"{share}, {rows} x {length}")
            for each in (plain, model):
                for parameter in list(each.parameters())[number :: number + 2]:
                    parameter.data.mul_(0.5)
            compare(model, plain, logits(1, 1), f"{share}, written")
            assert below(model).arena.backed_bytes <= 0.3 * size


FAILING = ["cuMemcpyHtoDAsync", "cuEventRecord", "cuStreamWaitEvent", "cuMemHostRegister"]


@pytest.mark.parametrize("call", FAILING)
def test_after_a_driver_that_fails_the_next_pass_is_right(call: str, standin: StandIn, tmp_path: Path) -> None:
    plain = make(llama)
    failures = 0
    with wrapped(make(llama), 0.8, 0.25, swap_dir=tmp_path) as model:
        for position in range(1, 24, 5):
            standin.fail(position, position, code=CODES["OUT_OF_MEMORY"], function=call)
            for attempt in range(3):  # a copy for the next pass that failed, in a thread, is said there
                try:
                    run(model, lambda m: m(ids(1, 6).to(PLACE)))
                except DeviceError as error:
                    failures += call in str(error)
                level(model).synchronize()
                if attempt == 1:
                    standin.forget()
            compare(model, plain, logits(1, 6), f"{call} {position}")
    if call != "cuMemHostRegister":  # then copies are slower, and nothing fails
        assert failures


def test_budgets_that_cannot_be(standin: StandIn, tmp_path: Path) -> None:
    size = weight_bytes(make(llama))
    with (
        pytest.raises(BudgetError, match="is too small: the smallest beside") as refused,
        wrapped(make(llama), 0.8, 1e-3, swap_dir=tmp_path),
    ):
        pass
    assert not standin.registered_bytes
    assert refused.value.budget_bytes == int(size * 1e-3) < refused.value.smallest_bytes < size
    with pytest.raises(ConfigError, match="on the CPU, where weights come from disk straight into the budget"):
        mball.wrap(make(llama), budget=size, host_budget="1MiB")
    with pytest.raises(ConfigError, match="policy 'lru' knows no host memory"):
        mball.wrap(make(llama), budget=size, device="cuda", host_budget="1MiB", policy="lru")
