"""Whole models whose passes allocate in segments: `allocator="mball"`, with foreign tensors in the library's memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mball
from mball.c_library import CLibrary
from mball.errors import ConfigError, DeviceError
from mball.memory import Device, Event, Kind, cuda_segments
from mball.memory.cuda_segments import SegmentRoom
from mball.units import KIB
from tests.adaptors import DeviceAdaptor, PoisonedDevice
from tests.foreign import device as foreign
from tests.memory.driver.models import wrapped_over_the_driver
from tests.memory.driver.standin import EXTENT_BYTES, GRANULE_BYTES, Order, StandIn
from tests.memory.driver.test_models import device_of, wrapped
from tests.run.harness import assert_same, engine_of, make, run, weight_bytes
from tests.run.scenes import Row
from tests.run.there import PLACE, compare
from tests.run.zoo import ZOO, ids, llama, logits, noise

LAYER_BYTES = 4 * 256**2  # of a `Row`


@pytest.fixture(autouse=True)
def rounding() -> Iterator[None]:
    """What tensors are said to take is what segments take."""
    foreign.load()
    foreign.round_sizes_to(GRANULE_BYTES)
    yield
    foreign.round_sizes_to(1)


pytestmark = pytest.mark.usefixtures("foreign")


def room_of(model: Any) -> SegmentRoom:
    room = device_of(model)._room
    assert isinstance(room, SegmentRoom)
    return room


@pytest.mark.parametrize("name", ["llama-bf16-dynamic-cache", "llama-tied-static-cache"])
@pytest.mark.parametrize(("capture", "order"), [("graphs", Order.LATEST), ("operators", Order.RANDOM)])
def test_streamed_equals_resident(name: str, capture: str, order: Order, standin: StandIn, tmp_path: Path) -> None:
    standin.configure(granule_bytes=4 * KIB)  # each tensor is a segment here
    foreign.round_sizes_to(4 * KIB)
    standin.run_in(order, 5)
    specimen = ZOO[name]
    plain = make(specimen.make)
    with wrapped(
        make(specimen.make), 2.0, swap_dir=tmp_path, capture=capture, allocator="mball", extent_bytes=64 * KIB
    ) as model:
        mball.set_budget(model, int(weight_bytes(plain) * 1.2))
        for attempt in range(3):
            for number, call in enumerate(specimen.runs):
                compare(model, plain, call, f"{name}, attempt {attempt}, call {number}")
        now = room_of(model)._segments.statistics()
        assert now.num_mallocs > 10, "nothing was allocated in segments"


class _Looking(DeviceAdaptor):
    """Looks at all pages of the GPU whenever a step is over."""

    def __init__(self, device: Device, standin: StandIn) -> None:
        super().__init__(device)
        self._standin = standin
        self.most_bytes = 0

    def record(self) -> Event:
        self.most_bytes = max(self.most_bytes, self._standin.handle_bytes)
        return self.device.record()


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_the_budget_holds_to_the_page(capture: str, standin: StandIn, tmp_path: Path) -> None:
    """All pages of the GPU, of the arena and of segments, are within the budget, once passes are known."""
    model, plain = make(lambda: Row(256)), make(lambda: Row(256))
    x = noise(8, 256).to(PLACE)
    expected = run(plain.to(PLACE), lambda m: m(x))
    looking: list[_Looking] = []

    def around(device: Device) -> Device:
        looking.append(_Looking(PoisonedDevice(device), standin))
        return looking[-1]

    budget_bytes = 6 * LAYER_BYTES
    with wrapped_over_the_driver(model, budget_bytes, around, swap_dir=tmp_path, capture=capture, allocator="mball"):
        for _ in range(5):
            assert_same(run(model, lambda m: m(x)), expected)
        assert engine_of(model).allocator.is_capped
        looking[0].most_bytes = 0
        for _ in range(3):
            assert_same(run(model, lambda m: m(x)), expected)
        assert LAYER_BYTES < looking[0].most_bytes <= budget_bytes
        assert engine_of(model).ledger.account(Kind.SCRATCH).current_bytes > 0, "granules are larger than tensors"


def test_residents_yield_and_pages_change_owners(standin: StandIn, tmp_path: Path) -> None:
    model, plain = make(lambda: Row(256)), make(lambda: Row(256))
    x = noise(8, 256).to(PLACE)
    expected = run(plain.to(PLACE), lambda m: m(x))
    with wrapped_over_the_driver(
        model, 8 * LAYER_BYTES, PoisonedDevice, swap_dir=tmp_path, capture="operators", allocator="mball"
    ):
        for _ in range(5):
            assert_same(run(model, lambda m: m(x)), expected)
        arena, segments = engine_of(model).execution.arena, room_of(model)._segments
        before, lent = arena.backed_bytes, segments.statistics().lent_bytes
        model.hungry_bytes = 3 * LAYER_BYTES
        assert_same(run(model, lambda m: m(x)), expected)
        assert arena.backed_bytes < before, "nothing yielded"
        assert segments.statistics().lent_bytes > lent, "pages went to the driver, and came anew"
        assert standin.handle_bytes <= engine_of(model).budget_bytes
        model.hungry_bytes = 0
        for _ in range(3):
            assert_same(run(model, lambda m: m(x)), expected)
        mball.set_budget(model, 5 * LAYER_BYTES)
        assert standin.handle_bytes <= 5 * LAYER_BYTES, "pages are kept that no budget has"
        assert_same(run(model, lambda m: m(x)), expected)


def test_results_outlive_the_model(standin: StandIn, tmp_path: Path) -> None:
    plain = make(llama)
    expected = run(plain.to(PLACE), lambda m: m(ids(1, 6).to(PLACE)).logits)
    for _ in range(2):  # the second model goes on with the first one's segments
        with wrapped(make(llama), 2.0, swap_dir=tmp_path, allocator="mball") as model:
            found = run(model, lambda m: m(ids(1, 6).to(PLACE)).logits)
            segments = room_of(model)._segments
        assert cuda_segments._left == {0: segments}
        assert_same(found.cpu(), expected.cpu())
    del found, model
    gc.collect()
    foreign.empty_cache()
    cuda_segments._left.pop(0).close()


def test_one_model_a_gpu(standin: StandIn, tmp_path: Path) -> None:
    with wrapped(make(llama), 2.0, swap_dir=tmp_path, allocator="mball") as model:
        library = room_of(model)._segments._library
        with pytest.raises(DeviceError, match="serves one model a GPU and process, and another has it on GPU 0"):
            cuda_segments.open_segments(library, 0, EXTENT_BYTES)
        compare(model, make(llama), logits(1, 6))


def test_it_is_refused_where_it_cannot_be(standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one clear line, before anything is changed."""
    model = make(llama)

    def refused(match: str) -> None:
        with pytest.raises(DeviceError, match=match), wrapped(model, 2.0, swap_dir=tmp_path, allocator="mball"):
            pass
        assert standin.num_retained == 0

    standin.configure(virtual_memory=False)
    refused("needs virtual memory, which GPU 0 does not have: leave it out")
    standin.configure()
    monkeypatch.setattr(CLibrary, "built", lambda _: [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    refused("the allocator's C library is not there, and no C compiler to build it .* install one, and try again")
    with pytest.raises(ConfigError, match="gives out memory of a GPU: add device='cuda', or leave it out"):
        mball.wrap(model, "1GiB", allocator="mball")
