"""Wrapped models whose steps compute on another device than the one their weights lie on, bit for bit."""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mball
from mball.api import _wrap, trace_and_plan
from mball.backend_door import mball_backend
from mball.config import Config
from mball.errors import CheckpointError, ConfigError, DeviceError, WrapError
from mball.memory import Device
from mball.memory.device import HostMoment
from mball.torch_private.faked import fake_homes_on
from tests.adaptors import DelayedDevice, DeviceAdaptor, PoisonedDevice, adapted
from tests.foreign.compute import open_foreign
from tests.run.harness import assert_same, assert_streamed, engine_of, make, run, weight_bytes
from tests.run.there import PLACE, There, compare
from tests.run.zoo import ZOO, generate, ids, llama, logits, noise

pytestmark = pytest.mark.usefixtures("foreign")


def wrap_there(model: nn.Module, budget: int, *, seed: int = 0, weights: Any = None, **settings: Any) -> Any:
    """Wraps a model for the foreign device, around which early reads find poison."""
    opened = adapted(lambda device: PoisonedDevice(DelayedDevice(device, seed=seed)), open_foreign)
    settings.setdefault("capture", "graphs")
    _wrap((model,), Config.of(budget=budget, **settings), weights, {}, opened)
    return model


KINDS = ["llama-fp32", "llama-bf16-dynamic-cache", "llama-tied-static-cache", "sequential", "breaks", "convolutions"]
KINDS += ["t5", "bert-bf16", "experts"]


@pytest.mark.parametrize(
    ("name", "capture"), [(name, "graphs") for name in KINDS] + [(name, "operators") for name in KINDS[1:6]]
)
def test_the_same_numbers_as_on_the_cpu(name: str, capture: str, tmp_path: Path) -> None:
    specimen = ZOO[name]
    plain, model = make(specimen.make), make(specimen.make)
    budget = int(weight_bytes(model) * max(specimen.budget, 0.7))
    wrap_there(model, budget, swap_dir=tmp_path, capture=capture)
    for attempt in range(3):
        for number, call in enumerate(specimen.runs):
            compare(model, plain, call, f"{name}, attempt {attempt}, call {number}")
        report = assert_streamed(model)
    assert (report.graphs > 0) == (specimen.graphs and capture == "graphs")
    mball.unwrap(model)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert_same(run(model, specimen.runs[0]), run(plain.cpu(), specimen.runs[0]), f"{name}, unwrapped")


def test_a_captured_model_begins_with_operators(tmp_path: Path) -> None:
    plain, model = make(llama), make(llama)
    wrap_there(model, int(weight_bytes(model) * 0.7), swap_dir=tmp_path, capture="auto")
    for number in range(12):
        call = generate("dynamic", 8)
        compare(model, plain, call, f"call {number}")


def test_a_model_says_where_its_inputs_belong(tmp_path: Path) -> None:
    model: Any = make(llama)
    before = type(model), type(model.model)
    wrap_there(model, int(weight_bytes(model) * 0.7), swap_dir=tmp_path)
    assert model.device == model.model.device == torch.device(PLACE)
    assert {buffer.device for buffer in model.buffers()} == {torch.device(PLACE)}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}, "homes"
    # What callers do with what it says.
    with torch.no_grad():
        tokens = model.generate(ids(1, 5).to(model.device), max_new_tokens=4, do_sample=False)
        wanted = make(llama).generate(ids(1, 5), max_new_tokens=4, do_sample=False)
    assert tokens.device == model.device
    assert torch.equal(tokens.cpu(), wanted)
    assert model.to(model.device) is model
    with pytest.raises(WrapError, match="cannot be moved"):
        model.to("cpu")
    mball.unwrap(model)
    assert (type(model), type(model.model)) == before
    assert model.device.type == "cpu"
    assert "_mball_place" not in model.__dict__


def test_inputs_elsewhere_are_refused_and_the_next_call_works(tmp_path: Path) -> None:
    model = wrap_there(make(llama), int(weight_bytes(make(llama)) * 0.7), swap_dir=tmp_path, capture="operators")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="same device"):
            run(model, lambda m: m(ids(1, 5)))
        compare(model, make(llama), logits(1, 5))


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_what_users_write_is_what_is_computed(capture: str, tmp_path: Path) -> None:
    plain, model = make(llama), make(llama)
    wrap_there(model, int(weight_bytes(model) * 0.7), swap_dir=tmp_path, capture=capture)

    for step in range(3):
        for each in (plain, model):
            for name, parameter in each.named_parameters():
                if step == 1 or "layers.1" in name or "embed" in name:
                    parameter.data.mul_(1.0 + step / 8)
        compare(model, plain, logits(1, 6), f"step {step}")
        state = model.state_dict()
        assert all(torch.equal(state[name], value.cpu()) for name, value in plain.state_dict().items())


def test_other_budgets_between_calls(tmp_path: Path) -> None:
    plain, model = make(llama), make(llama)
    size = weight_bytes(model)
    wrap_there(model, int(size * 1.6), swap_dir=tmp_path)
    for share in (1.6, 0.7, 1.0, 0.8, 1.6):
        mball.set_budget(model, int(size * share))
        for _ in range(2):
            compare(model, plain, logits(2, 5), f"{share}")
    mball.unwrap(model)


def test_a_checkpoint_is_read_in_place(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    plain = make(llama)
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = llama()
    for name, buffer in plain.named_buffers():
        module, _, attribute = name.rpartition(".")
        empty.get_submodule(module)._buffers[attribute] = buffer.clone()
    wrap_there(empty.eval(), int(weight_bytes(plain) * 0.7), weights=tmp_path / "model.safetensors", swap_dir=tmp_path)
    for _ in range(2):
        compare(empty, plain, logits(1, 6))
    assert_streamed(empty)


def test_memory_there_is_counted(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).repeat(1, 1).relu())

    model = wrap_there(make(Wide), "4MiB", swap_dir=tmp_path, capture="operators")
    x = noise(4096, 64)
    host = torch.zeros(1 << 20)  # of no concern to the device's budget
    run(There(model), lambda m: m(x))
    run(There(model), lambda m: m(x))
    assert engine_of(model).room.needed_bytes >= 2 * x.nbytes
    assert mball.report(model).activation_bytes < 2 * x.nbytes + host.nbytes


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cuda", "built without CUDA"), ("cuda:3", "built without CUDA"), ("tpu", "give 'cpu'"), ("cuda:", "give 'cpu'")],
)
def test_a_device_that_is_not_there(device: str, reason: str, tmp_path: Path) -> None:
    kind: type[Exception] = ConfigError
    if device.startswith("cuda") and device != "cuda:" and torch.backends.cuda.is_built():
        if torch.cuda.is_available():
            pytest.skip("there is one")
        kind, reason = DeviceError, "sees no GPU.*nvidia-smi"
    model = make(llama)
    before = type(model)
    with pytest.raises(kind, match=reason):
        mball.wrap(model, "1GiB", device=device, swap_dir=tmp_path)
    assert type(model) is before
    assert not list(tmp_path.iterdir())
    compiled = torch.compile(model, backend=mball_backend, options={"budget": "1GiB", "device": device})
    with pytest.raises(ConfigError, match=r"Wrap the model first|give 'cpu'"), torch.no_grad():
        compiled(ids(1, 5))


class _LateDevice(DeviceAdaptor):
    """Compute goes on after its call has returned, and has a clock of its own: 20 ms pass between two looks."""

    LATE_S = 0.02

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._num_looks = 0

    @property
    def computes_at_once(self) -> bool:
        return False

    def moment(self) -> HostMoment:
        self._num_looks += 1
        return HostMoment(self._num_looks * self.LATE_S)


def test_steps_are_timed_by_the_clock_of_compute(tmp_path: Path) -> None:
    model = make(llama)
    budget = int(weight_bytes(model) * 0.7)
    _wrap((model,), Config.of(budget=budget, swap_dir=tmp_path, capture="graphs"), None, {}, adapted(_LateDevice))
    for _ in range(12):
        run(model, logits(1, 5))
    trace, plan = trace_and_plan(model)
    assert all(step.time_s == pytest.approx(_LateDevice.LATE_S) for step in trace.steps)
    # The host's clock saw passes that took less, and plans are not made for it.
    assert plan.prediction.compute_s == pytest.approx(_LateDevice.LATE_S * len(trace.steps))
    assert engine_of(model).meter.calls_for_another_plan(engine_of(model)._active) is False


class _CountingDevice(DeviceAdaptor):
    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.calls: list[str] = []

    def follow(self) -> None:
        self.calls.append("follow")

    def make_room(self) -> None:
        self.calls.append("make room")


def test_a_device_is_told_of_passes_and_of_an_arena_that_grows(tmp_path: Path) -> None:
    made: list[_CountingDevice] = []

    def counting(device: Device) -> Device:
        made.append(_CountingDevice(device))
        return made[-1]

    model = make(llama)
    size = weight_bytes(model)
    _wrap((model,), Config.of(budget=size * 2, swap_dir=tmp_path, capture="graphs"), None, {}, adapted(counting))
    for _ in range(3):
        run(model, logits(1, 5))
    (device,) = made
    assert device.calls.count("follow") == 3
    device.calls.clear()
    mball.set_budget(model, int(size * 0.8))
    assert device.calls == ["make room"], "what nobody uses is no part of a smaller budget"
    device.calls.clear()
    mball.set_budget(model, int(size * 1.5))
    assert device.calls[0] == "make room"
    device.calls.clear()
    run(model, logits(1, 5))
    assert device.calls[-1] == "follow"


def test_weights_that_begin_within_an_element_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    plain = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    path = tmp_path / "model.safetensors"
    save_file({**plain.state_dict(), "a": torch.zeros(3, dtype=torch.uint8)}, path)
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + header_bytes])
    begins = {name: facts["data_offsets"][0] + 8 + header_bytes for name, facts in header.items() if name != "a"}
    odd = [name for name, begin in begins.items() if begin % 4]
    if not odd:  # safetensors puts wide tensors first: shift them all by a longer header
        content = path.read_bytes()
        text = json.dumps(header).encode()
        text += b" " * (4 - (8 + len(text)) % 4 + 1)
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + header_bytes :])
    with pytest.raises(CheckpointError, match="no multiple of its 4 bytes an element"):
        wrap_there(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), 1 << 20, weights=path, swap_dir=tmp_path)


def test_buffers_come_back_from_where_they_were_put(tmp_path: Path) -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(64, 64), nn.BatchNorm1d(64)
            self.register_buffer("wide", torch.ones(1).expand(1 << 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(x)) + self.wide[:64]

    plain, model = make(Buffers), make(Buffers)
    model.register_buffer("there", torch.ones(4, device=PLACE))
    with pytest.raises(mball.BudgetError):
        wrap_there(model, (1 << 16) * 4, swap_dir=tmp_path)
    wrap_there(model, "1MiB", swap_dir=tmp_path)
    assert mball.report(model).buffer_bytes >= (1 << 16) * 4, "dense, as it is there"
    compare(model, plain, lambda m: m(noise(4, 64)))
    mball.unwrap(model)
    assert model.there.device.type == "foreign"
    assert {name: buffer.device.type for name, buffer in model.named_buffers() if name != "there"} == dict.fromkeys(
        [name for name, _ in plain.named_buffers()], "cpu"
    )


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_torch_compile_of_a_wrapped_model(capture: str, tmp_path: Path, new_dynamo: None) -> None:
    """Dynamo captures by itself then, and is shown the homes on the device all the same."""
    plain, model = make(llama), make(llama)
    wrap_there(model, int(weight_bytes(model) * 0.8), swap_dir=tmp_path, capture=capture)
    there = There(torch.compile(model, backend=mball_backend), engine_of(model).homes)
    whole = There(plain.to(PLACE))
    for _ in range(3):
        assert_same(run(there, lambda m: m(ids(1, 5)).logits), run(whole, lambda m: m(ids(1, 5)).logits))
    assert_streamed(model)
    mball.unwrap(model)


def test_homes_are_host_memory_to_what_is_captured_outside_of_passes(tmp_path: Path, new_dynamo: None) -> None:
    """And in other threads; within the pass, and in what mball captures, they are where steps read them."""
    plain, model = make(llama), make(llama)
    wrap_there(model, int(weight_bytes(model) * 0.8), swap_dir=tmp_path, capture="operators")
    weight, x = model.lm_head.weight, noise(3, model.lm_head.weight.shape[1])
    seen = {}

    def place() -> str:
        return str(FakeTensorMode().from_tensor(weight).device)

    def within(*_: Any) -> None:
        with ThreadPoolExecutor(1) as another:
            seen.update(within=place(), another=another.submit(place).result())

    def function(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight) + 1

    hook = model.lm_head.register_forward_hook(within)
    run(There(model), lambda m: m(ids(1, 5)).logits)
    hook.remove()
    assert seen == {"within": PLACE, "another": "cpu"}
    assert place() == "cpu"
    with torch.no_grad():
        expected = function(plain.lm_head.weight, x)
        assert torch.equal(torch.compile(function, backend="eager")(weight, x), expected)
        # A graph of mball's opens a pass, wherever it is called.
        assert torch.equal(torch.compile(function, backend=mball_backend)(weight, x.to(PLACE)).cpu(), expected)
    mball.unwrap(model)


def test_a_fake_is_made_while_other_threads_wrap(tmp_path: Path) -> None:
    model = wrap_there(make(llama), 1 << 30, swap_dir=tmp_path)
    weight, kept = model.lm_head.weight, [_Elsewhere() for _ in range(200)]
    for homes in kept:
        fake_homes_on(torch.device(PLACE), homes)
    done = threading.Event()

    def wrap_others() -> None:
        while not done.is_set():
            kept.append(_Elsewhere())
            fake_homes_on(torch.device(PLACE), kept[-1])
            time.sleep(0)  # lets the other go on

    between = sys.getswitchinterval()
    with ThreadPoolExecutor(1) as another:
        wrapping = another.submit(wrap_others)
        try:
            sys.setswitchinterval(1e-6)
            for _ in range(100):
                assert FakeTensorMode().from_tensor(weight).device.type == "cpu"
        finally:
            done.set()
            sys.setswitchinterval(between)
        wrapping.result()
    mball.unwrap(model)


class _Elsewhere:
    """Homes of a model whose weights are no tensors of ours."""

    def has(self, tensor: torch.Tensor) -> bool:
        return False
