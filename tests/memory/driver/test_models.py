"""Whole models on the CUDA device, over the stand-in for the driver: what streams computes is what is resident.

Operators are the foreign device's, which compute when they are called; so what compute is told to wait for is waited
for there and then, and copies come as late as that lets them.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mball
from mball.api import trace_and_plan
from mball.errors import DeviceError
from mball.memory import Device, Moment
from mball.memory.cuda_device import CudaDevice
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_errors import GpuLostError
from mball.units import format_bytes
from tests.adaptors import DeviceAdaptor, PoisonedDevice
from tests.foreign import device as foreign
from tests.memory.driver.models import wrapped_over_the_driver
from tests.memory.driver.standin import CODES, GRANULE_BYTES, Order, StandIn
from tests.run.harness import assert_same, assert_streamed, engine_of, make, run, weight_bytes
from tests.run.test_gathers import Reader, tokens
from tests.run.there import PLACE, compare
from tests.run.zoo import ZOO, ids, llama, logits

pytestmark = pytest.mark.usefixtures("foreign")


@contextmanager
def wrapped(model: nn.Module, share: float, *, swap_dir: Path, **settings: Any) -> Iterator[Any]:
    """A model under a part of its weights' bytes, its slots poisoned."""
    settings.setdefault("capture", "graphs")
    budget_bytes = int(weight_bytes(model) * share)
    with wrapped_over_the_driver(model, budget_bytes, PoisonedDevice, swap_dir=swap_dir, **settings):
        yield model


def device_of(model: Any) -> CudaDevice:
    device = engine_of(model).execution.device
    while isinstance(device, DeviceAdaptor):
        device = device.device
    assert isinstance(device, CudaDevice)
    return device


KINDS = ["llama-fp32", "llama-bf16-dynamic-cache", "llama-tied-static-cache", "breaks", "convolutions", "t5"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("capture", "order"), [("graphs", Order.LATEST), ("operators", Order.RANDOM)])
def test_streamed_equals_resident(name: str, capture: str, order: Order, standin: StandIn, tmp_path: Path) -> None:
    standin.run_in(order, 5)
    specimen = ZOO[name]
    plain = make(specimen.make)
    share = max(specimen.budget, 0.7) + 0.15  # memory comes in larger pieces
    with wrapped(make(specimen.make), share, swap_dir=tmp_path, capture=capture) as model:
        for attempt in range(3):
            for number, call in enumerate(specimen.runs):
                compare(model, plain, call, f"{name}, attempt {attempt}, call {number}")
            assert_streamed(model)


class Slow(DeviceAdaptor):
    """Each second stretch between two moments takes 30 ms on the stream: what a step computes, not a wait before it."""

    def __init__(self, device: Device, standin: StandIn) -> None:
        super().__init__(device)
        self._standin = standin
        self._num_looks = 0

    def moment(self) -> Moment:
        device: Any = self.device.device  # type: ignore[attr-defined]
        self._num_looks += 1
        self._standin.spin(device._current_stream(), 5.0 if self._num_looks % 2 else 0.03)
        return device.moment()


@pytest.mark.usefixtures("new_dynamo")  # which captures a frame a few times in a process, and others came before
def test_steps_are_timed_on_the_stream(standin: StandIn, tmp_path: Path) -> None:
    """Whatever the host took meanwhile, and whatever the stream waited for between them."""
    standin.run_in(Order.LATEST)
    model = make(llama)
    budget_bytes = int(weight_bytes(model) * 0.85)
    with wrapped_over_the_driver(
        model, budget_bytes, lambda each: Slow(each, standin), swap_dir=tmp_path, capture="graphs"
    ) as model:
        for _ in range(4):
            compare(model, make(llama), logits(1, 5))
        trace, _ = trace_and_plan(model)
        assert [step.time_s for step in trace.steps] == pytest.approx([0.03] * len(trace.steps))


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_what_streams_is_read_from_disk_once(
    capture: str, standin: StandIn, tmp_path: Path, submitted: list[Any]
) -> None:
    plain = make(llama)
    with wrapped(make(llama), 0.9, swap_dir=tmp_path, capture=capture) as model:
        for _ in range(4):
            compare(model, plain, logits(1, 6))
        device_of(model)._tier.finish()
        report = mball.report(model)
        assert report.pinned_bytes == standin.registered_bytes > 0
        assert 0 < report.pinning_s < 60
        assert f"{format_bytes(report.pinned_bytes)} of host memory, pinned in" in str(report)
        assert 0 < report.slot_bytes <= report.arena_bytes - report.resident_bytes
        submitted.clear()
        for _ in range(3):
            compare(model, plain, logits(1, 6))
            assert assert_streamed(model).bytes_read_last_pass
        assert not submitted
        # What is written comes from its file again, and is pinned again.
        for each in (plain, model):
            for parameter in each.parameters():
                parameter.data.mul_(0.5)
        compare(model, plain, logits(1, 6))
        assert submitted
        compare(model, plain, logits(1, 6))
        device_of(model)._tier.finish()
        submitted.clear()
        compare(model, plain, logits(1, 6))
        assert not submitted


def test_the_budget_holds_whatever_comes(standin: StandIn, tmp_path: Path) -> None:
    """Pages of the device and tensors on it together, for prompts and tokens in turn, and for other budgets."""
    plain = make(llama)
    with wrapped(make(llama), 1.2, swap_dir=tmp_path) as model:
        size = weight_bytes(plain)
        for share in (1.2, 0.95, 1.1, 1.5):
            budget = int(size * share)
            mball.set_budget(model, budget)
            for rows, length in ((1, 1), (2, 24), (1, 1), (4, 24), (1, 3)):
                run(model, lambda m, rows=rows, length=length: m(ids(rows, length).to(PLACE)).logits.cpu())
                gc.collect()
                before = foreign.memory_allocated()
                foreign.reset_peak_memory_stats()
                with torch.no_grad():
                    model(ids(rows, length).to(PLACE))
                seen = standin.handle_bytes
                activations = foreign.max_memory_allocated() - before
                assert seen + activations <= budget, f"{share}, {rows} x {length}"
                assert seen <= mball.report(model).arena_bytes
            compare(model, plain, logits(2, 5), f"{share}")


@pytest.mark.parametrize("capture", ["graphs", "operators"])
@pytest.mark.parametrize("why", ["not pinned", "not read"])
def test_tables_that_cannot_be_read_over_the_link_are_brought(
    why: str, capture: str, standin: StandIn, tmp_path: Path
) -> None:
    plain = make(Reader)
    if why == "not read":
        standin.configure(host_addresses=False)
    with wrapped(make(Reader), 1.2, swap_dir=tmp_path, capture=capture) as model:
        if why == "not pinned":
            standin.fail(1, 10_000, code=CODES["OUT_OF_MEMORY"], function="cuMemHostRegister")
        compare(model, plain, lambda m: m(tokens(2, 6)))
        assert not engine_of(model).execution.rows.are_possible
        for _ in range(3):
            compare(model, plain, lambda m: m(tokens(2, 6)))
        trace, plan = trace_and_plan(model)
        assert not any(step.gathers for step in trace.steps)
        table = next(number for number, tensor in enumerate(trace.tensors) if tensor.name == "table.weight")
        assert any(table in bundle.tensors for bundle in plan.bundles), "nobody plans for it"
        size = weight_bytes(plain)
        mball.set_budget(model, int(size * 0.8))
        for _ in range(3):
            compare(model, plain, lambda m: m(tokens(2, 6)))
        assert assert_streamed(model).bytes_read_last_pass


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_others_take_memory_between_planning_and_mapping(capture: str, standin: StandIn, tmp_path: Path) -> None:
    """One clear error, and once they have given it back all is as before."""
    plain = make(llama)
    with wrapped(make(llama), 0.8, swap_dir=tmp_path, capture=capture) as model:
        for _ in range(4):  # the first plans know less
            compare(model, plain, logits(1, 6))
        others = CudaDriver()
        with others.current():
            free_bytes, _ = others.free_and_total_bytes()
            handle = others.create(free_bytes // GRANULE_BYTES * GRANULE_BYTES)
            taken_bytes = standin.handle_bytes
            with pytest.raises(
                DeviceError, match=r"cuMemCreate .*OUT_OF_MEMORY.* are free; lower the budget, or free memory"
            ):
                mball.set_budget(model, int(weight_bytes(plain) * 1.2))
            assert standin.handle_bytes == taken_bytes, "pages were lost, or are kept for nothing"
            compare(model, plain, logits(1, 6), "under the budget of before")
            others.destroy(handle)
        others.close()
        mball.set_budget(model, int(weight_bytes(plain) * 1.2))
        compare(model, plain, logits(1, 6), "with more")
        # The same in the middle of a pass, whose plan was made before.
        before = engine_of(model).execution.arena.backed_bytes
        engine_of(model)._give_all_back()
        engine_of(model)._active = None
        others = CudaDriver()
        with others.current():
            free_bytes, _ = others.free_and_total_bytes()
            handle = others.create(free_bytes // GRANULE_BYTES * GRANULE_BYTES)
            with pytest.raises(DeviceError, match=r"cuMemCreate .*OUT_OF_MEMORY"):
                run(model, lambda m: m(ids(1, 6).to(PLACE)))
            others.destroy(handle)
        others.close()
        compare(model, plain, logits(1, 6), "they have given it back")
        assert engine_of(model).execution.arena.backed_bytes == before


FAILING = ["cuMemcpyHtoDAsync", "cuEventRecord", "cuStreamWaitEvent", "cuMemCreate", "cuMemMap", "cuMemHostRegister"]


@pytest.mark.parametrize("call", FAILING)
def test_after_a_driver_that_fails_the_next_pass_is_right(call: str, standin: StandIn, tmp_path: Path) -> None:
    plain = make(llama)
    failures = 0
    with wrapped(make(llama), 0.9, swap_dir=tmp_path) as model:
        size = weight_bytes(plain)
        for position in range(1, 12, 2):
            for act in (lambda: run(model, lambda m: m(ids(1, 6).to(PLACE))), lambda: mball.set_budget(model, size)):
                standin.fail(position, position, code=CODES["OUT_OF_MEMORY"], function=call)
                for _ in range(2):  # a copy for the next pass that failed is raised there
                    try:
                        act()
                    except DeviceError as error:
                        failures += call in str(error)
                    standin.forget()
                compare(model, plain, logits(1, 6), f"{call} {position}")
                mball.set_budget(model, int(size * 0.9))
                compare(model, plain, logits(1, 6), f"{call} {position}, with the budget of before")
    if call != "cuMemHostRegister":  # then copies are slower, and nothing fails
        assert failures


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_a_lost_gpu_is_said_and_weights_are_not(capture: str, standin: StandIn, tmp_path: Path) -> None:
    plain = make(llama)
    with wrapped(make(llama), 0.9, swap_dir=tmp_path, capture=capture) as model:
        compare(model, plain, logits(1, 6))
        standin.lose(CODES["ILLEGAL_ADDRESS"])
        for _ in range(2):
            with pytest.raises(GpuLostError, match=r"ILLEGAL_ADDRESS.*save what is in host memory"):
                run(model, lambda m: m(ids(1, 6).to(PLACE)))
        # What to save is in host memory.
        for name, value in plain.cpu().named_parameters():
            assert torch.equal(model.state_dict()[name], value)
    standin.sweep()  # a lost GPU's is left to the end of the process
    standin.pop_contexts()
    assert_same(run(model, logits(1, 6)), run(plain, logits(1, 6)), "unwrapped")


def test_a_forked_child_is_refused(standin: StandIn, tmp_path: Path) -> None:
    plain = make(llama)
    with wrapped(make(llama), 0.9, swap_dir=tmp_path) as model:
        compare(model, plain, logits(1, 6))
        child = os.fork()
        if not child:
            code = 1
            try:
                run(model, lambda m: m(ids(1, 6).to(PLACE)))
            except DeviceError as error:
                code = 0 if "CUDA does not survive a fork" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        compare(model, plain, logits(1, 6), "the parent goes on")
