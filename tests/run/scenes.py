"""What a wrapped model does on a device that is not the CPU, told once for every such device.

A GPU plays these (`test_on_a_gpu.py`), and so does the foreign device over the stand-in for the driver, on machines
without one (`tests/memory/driver/test_scenes.py`). Each compares with the same model moved to the device whole, which
runs first: then what libraries keep for themselves on a stream is there before anything is measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import nn

import mball
from mball.errors import DeviceError
from mball.observe.report import Report
from tests.run.harness import DifferentError, assert_same, assert_streamed, engine_of, make, run, weight_bytes
from tests.run.there import There, tensors_in
from tests.run.zoo import Specimen, ids, llama, noise

NUM_LAYERS = 7  # no number of slots from 2 to 6 divides it


class Hostility(Enum):
    """What a device does to show mistakes: NaN in slots that hold nothing yet, copies that come late, late compute."""

    NONE = "none"
    POISONED = "poisoned"
    LATE_COPIES = "late-copies"
    LATE_COMPUTE = "late-compute"


class UnsteadyError(Exception):
    """The resident model itself does not give the same bits twice, so there is nothing to compare with."""


class Wrap(Protocol):
    """Wraps a model in place for the length of a block, then unwraps it."""

    def __call__(
        self,
        model: nn.Module,
        budget_bytes: int,
        *,
        swap_dir: Path,
        hostility: Hostility = Hostility.POISONED,
        weights: Path | None = None,
        **settings: Any,
    ) -> AbstractContextManager[Any]:
        """Returns what gives the wrapped model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A device that scenes are played on.

    Attributes:
        name: torch's, with its number.
        page_bytes: what its memory comes in.
        width: of a square layer of float32 that is a whole number of pages.
        specimens: models that are large enough to be streamed there, by kind.
        llama: such a Llama.
        wrapped: wraps models for it.
        other_stream: makes another stream the current one; with True each of both waits for what the other one had
            to do before.
        finish: blocks until all compute is over.
        activation_bytes: room for what the small models of these scenes compute, beside the weights.
    """

    name: str
    page_bytes: int
    width: int
    specimens: dict[str, Specimen]
    llama: Callable[[], nn.Module]
    wrapped: Wrap
    other_stream: Callable[[bool], AbstractContextManager[None]]
    finish: Callable[[], None]
    activation_bytes: int

    @property
    def layer_bytes(self) -> int:
        """Of one layer of a `Row`."""
        return 4 * self.width**2


class Row(nn.Module):
    """Equal layers, one after the other; it fails in the middle when it is told to."""

    def __init__(self, width: int, num_layers: int = NUM_LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num_layers))
        self.is_broken = False
        self.hungry_bytes = 0  # what an operator takes at the end, in one piece

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            if self.is_broken and number == len(self.layers) // 2:
                x = x @ x.new_ones(3, 3)
            x = x + layer(x)
        if self.hungry_bytes:
            x = x + x.repeat(self.hungry_bytes // x.nbytes, 1).sum() * 0
        return x


# -- the plays --------------------------------------------------------------------------------------------------------


def streams_as_resident(
    place: Place,
    kind: str,
    *,
    capture: str,
    swap_dir: Path,
    hostility: Hostility = Hostility.POISONED,
    **settings: Any,
) -> Report:
    """All calls of a kind of model, three times over."""
    specimen = place.specimens[kind]
    expected = resident(place, make(specimen.make), specimen.runs)
    model = make(specimen.make)
    budget_bytes = int(weight_bytes(model) * specimen.budget) + place.activation_bytes
    with place.wrapped(model, budget_bytes, swap_dir=swap_dir, hostility=hostility, capture=capture, **settings):
        for attempt in range(3):
            for number, call in enumerate(specimen.runs):
                compare(place, model, call, expected[number], f"{kind}, attempt {attempt}, call {number}")
            report = assert_streamed(model)
    assert (report.graphs > 0) == (specimen.graphs and capture == "graphs"), report
    return report


def casts_as_resident(place: Place, kind: str, *, capture: str, swap_dir: Path) -> None:
    """Under autocast, which casts what lies on the device: weights do not."""
    specimen = place.specimens[kind]

    def under_autocast(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def casting(model: Any) -> Any:
            with torch.autocast(torch.device(place.name).type, dtype=torch.bfloat16):
                return call(model)

        return casting

    calls = list(map(under_autocast, specimen.runs))
    expected = resident(place, make(specimen.make), calls)
    model = make(specimen.make)
    budget_bytes = int(weight_bytes(model) * specimen.budget) + place.activation_bytes
    with place.wrapped(model, budget_bytes, swap_dir=swap_dir, capture=capture):
        for attempt in range(2):
            for number, call in enumerate(calls):
                compare(
                    place, model, call, expected[number], f"{kind} under autocast, attempt {attempt}, call {number}"
                )
        report = mball.report(model)
    assert report.in_place_bytes == 0, report
    assert report.peak_bytes <= report.budget_bytes, report


def passes_follow_each_other(
    place: Place, num_slots: int, *, capture: str, swap_dir: Path, hostility: Hostility, num_passes: int = 12
) -> None:
    """Nobody looks at a result before all passes were issued, so copies for one pass run beside the pass before."""
    plain, model = (make(lambda: Row(place.width)) for _ in range(2))
    inputs = [noise(3, place.width, seed=seed).to(place.name) for seed in range(num_passes)]
    expected = resident(place, plain, [lambda m, x=x: m(x) for x in inputs])
    budget_bytes = num_slots * place.layer_bytes + place.page_bytes + place.activation_bytes
    with place.wrapped(model, budget_bytes, swap_dir=swap_dir, hostility=hostility, capture=capture):
        found = []
        for _ in range(2):  # the first time plans are made anew in between
            found = [run(model, lambda m, x=x: m(x)) for x in inputs]
        place.finish()
        for number, (got, wanted) in enumerate(zip(found, expected, strict=True)):
            assert_same(got.cpu(), wanted, f"{num_slots} slots, {hostility.value}, pass {number}")
        report = assert_streamed(model)
        there = report.arena_bytes // place.layer_bytes
        assert 0 < there < NUM_LAYERS, f"{there} of {NUM_LAYERS} layers are there, and {num_slots} were meant"


def streams_take_turns(place: Place, *, ordered: bool, swap_dir: Path, hostility: Hostility) -> None:
    """Passes on two streams. `ordered`: the caller has each stream wait for the one before; else nobody does."""
    plain, model = (make(lambda: Row(place.width)) for _ in range(2))
    inputs = [noise(3, place.width, seed=seed).to(place.name) for seed in range(8)]
    calls = [lambda m, x=x: m(x) for x in inputs]
    expected = resident(place, plain, calls)
    with place.other_stream(True):  # and what libraries keep for that stream
        resident(place, plain, calls[:1])
    place.finish()
    budget_bytes = 4 * place.layer_bytes + place.page_bytes + place.activation_bytes
    with place.wrapped(model, budget_bytes, swap_dir=swap_dir, hostility=hostility, capture="graphs"):
        for _ in range(2):
            found = []
            for number, call in enumerate(calls):
                if number % 2:
                    with place.other_stream(ordered):
                        found.append(run(model, call))
                else:
                    found.append(run(model, call))
        place.finish()
        for number, (got, wanted) in enumerate(zip(found, expected, strict=True)):
            assert_same(got.cpu(), wanted, f"pass {number}, on stream {number % 2}")
        assert_streamed(model)


def writes_are_noticed(place: Place, *, capture: str, swap_dir: Path) -> None:
    """Writes to homes, of a few weights and of all, by `data` and in place."""
    plain, model = make(place.llama), make(place.llama)
    budget_bytes = int(weight_bytes(model) * 0.7) + place.activation_bytes
    call = _tokens(1, 6)
    # Each model gets the same numbers on the CPU, before one of them moves.
    written: list[Any] = []
    for step in range(3):
        _write(plain, step)
        written.append(resident(place, plain, [call])[0])
        plain.cpu()
    with place.wrapped(model, budget_bytes, swap_dir=swap_dir, capture=capture):
        run(There(model, engine_of(model).homes, place.name), call)
        for step in range(3):
            _write(model, step)
            for again in range(2):
                compare(place, model, call, written[step], f"write {step}, call {again}")
        state = model.state_dict()
        for name, value in plain.state_dict().items():
            assert torch.equal(state[name].cpu(), value), f"{name} is not what was written"


def budgets_follow_each_other(place: Place, *, swap_dir: Path) -> None:
    """Larger and smaller budgets between calls."""
    call = _tokens(2, 5)
    expected = resident(place, make(place.llama), [call])[0]
    model = make(place.llama)
    size = weight_bytes(model)
    with place.wrapped(model, int(size * 1.6) + place.activation_bytes, swap_dir=swap_dir, capture="graphs"):
        for share in (1.6, 0.7, 1.0, 0.8, 1.6, 0.7):
            budget_bytes = int(size * share) + place.activation_bytes
            mball.set_budget(model, budget_bytes)
            for _ in range(2):
                compare(place, model, call, expected, f"budget {share} of the weights")
            report = mball.report(model)
            assert report.peak_bytes <= budget_bytes, report
            arena_bytes = engine_of(model).execution.arena.taken_bytes
            assert arena_bytes <= budget_bytes, f"the arena takes {arena_bytes} bytes of a budget of {budget_bytes}"


def after_an_error(place: Place, *, capture: str, swap_dir: Path) -> None:
    """An operator fails in the middle of a pass, and a call has an input that does not fit; the next pass is right."""
    plain, model = (make(lambda: Row(place.width)) for _ in range(2))

    def call(m: Any) -> Any:
        return m(noise(3, place.width))

    expected = resident(place, plain, [call])[0]
    budget_bytes = 3 * place.layer_bytes + place.page_bytes + place.activation_bytes
    with place.wrapped(model, budget_bytes, swap_dir=swap_dir, capture=capture):
        there = There(model, engine_of(model).homes, place.name)
        for attempt in range(2):
            compare(place, model, call, expected, f"before error {attempt}")
            model.is_broken = True
            _must_fail(lambda: run(there, call), "an operator with shapes that do not fit")
            model.is_broken = False
            compare(place, model, call, expected, f"after error {attempt}")
            _must_fail(lambda: run(there, lambda m: m(noise(3, 5))), "an input that does not fit")
            compare(place, model, call, expected, f"after input {attempt}")
        assert_streamed(model)


def generates(place: Place, *, capture: str, swap_dir: Path, num_calls: int = 3) -> None:
    """`generate()`, with inputs where the model says that they belong."""

    def generate(model: Any) -> Any:
        prompt = ids(1, 8).to(place.name)
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
            output_scores=True, return_dict_in_generate=True, disable_compile=True,
        )[:2]  # fmt: skip

    plain: Any = make(place.llama).to(place.name)
    expected = [run(plain, generate) for _ in range(2)]
    _check_steady(expected[1], expected[0])
    del plain
    model: Any = make(place.llama)
    budget_bytes = int(weight_bytes(model) * 0.7) + place.activation_bytes
    with place.wrapped(model, budget_bytes, swap_dir=swap_dir, capture=capture):
        assert model.device == torch.device(place.name)
        for number in range(num_calls):
            found = run(model, generate)
            assert {tensor.device for tensor in tensors_in(found)} == {torch.device(place.name)}
            assert_same(found, expected[0], f"generate, call {number}")
        assert_streamed(model)


def a_checkpoint_is_read_in_place(place: Place, shift_bytes: int, *, swap_dir: Path) -> None:
    """Weights begin `shift_bytes` behind a multiple of 64 in their file, as safetensors lets them, so in slots too."""
    call = _tokens(1, 6)
    plain = make(place.llama)
    path = swap_dir / f"shifted-{shift_bytes}.safetensors"
    write_shifted(plain, path, shift_bytes)
    expected = resident(place, plain, [call])[0]
    model = make(place.llama)
    budget_bytes = int(weight_bytes(model) * 0.7) + place.activation_bytes
    with place.wrapped(model, budget_bytes, swap_dir=swap_dir, weights=path, capture="graphs"):
        for number in range(3):
            compare(place, model, call, expected, f"weights {shift_bytes} bytes off, call {number}")
        assert_streamed(model)


def unwrapped_it_is_as_before(place: Place, *, swap_dir: Path, used_bytes: Callable[[], int]) -> dict[str, int]:
    """Returns what of the device's memory was used before it was wrapped, while it was, and after it was unwrapped."""
    call = _tokens(1, 6)
    model = make(place.llama)
    expected = run(model, call)
    resident(place, make(place.llama), [call])
    before = used_bytes()
    budget_bytes = int(weight_bytes(model) * 0.7) + place.activation_bytes
    with place.wrapped(model, budget_bytes, swap_dir=swap_dir, hostility=Hostility.NONE, capture="graphs"):
        for _ in range(3):
            run(There(model, engine_of(model).homes, place.name), call)
        assert_streamed(model)
        wrapped = used_bytes()
    places = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    assert places == {"cpu"}, f"unwrapped, the model is on {places}"
    assert_same(run(model, call), expected, "unwrapped, on the CPU")
    del model, expected
    torch._dynamo.reset()
    return {"before": before, "wrapped": wrapped, "after": used_bytes()}


def steps_are_recorded(place: Place, *, swap_dir: Path, hostility: Hostility) -> None:
    """Steps as graphs, under budgets that move their slots: the bits of steps that are launched as they are."""
    width = 2 * place.width
    layer_bytes = 4 * width**2
    plain, model = (make(lambda: Row(width)) for _ in range(2))
    inputs = [noise(3, width, seed=seed).to(place.name) for seed in range(5)]
    calls = [lambda m, x=x: m(x) for x in inputs]
    settings: dict[str, Any] = {"compile": "inductor", "step_bytes": layer_bytes, "capture": "graphs"}

    def budget_bytes(num_slots: int) -> int:
        return num_slots * layer_bytes + place.page_bytes + 3 * place.activation_bytes

    with place.wrapped(plain, budget_bytes(16), swap_dir=swap_dir, hostility=Hostility.NONE, **settings):
        expected = [run(plain, call).cpu() for call in calls]
    settings["mode"] = "reduce-overhead"
    with place.wrapped(model, budget_bytes(3), swap_dir=swap_dir, hostility=hostility, **settings):
        for num_slots in (3, 5, 2, 16):
            mball.set_budget(model, budget_bytes(num_slots))
            # Nobody looks at a result before all were issued.
            found = [run(model, call) for call in (*calls, *calls)]
            place.finish()
            for number, got in enumerate(found):
                assert_same(got.cpu(), expected[number % len(calls)], f"{num_slots} slots, call {number}")
            report = mball.report(model)
            assert report.step_graphs == NUM_LAYERS, report
            assert report.peak_bytes <= report.budget_bytes, report
            assert (report.bytes_read_last_pass == 0) == (num_slots > NUM_LAYERS), report


# -- what they share --------------------------------------------------------------------------------------------------


def resident(place: Place, plain: nn.Module, calls: Any) -> list[Any]:
    """Returns what the model computes when it is on the device whole, brought to the CPU.

    Raises UnsteadyError if that differs from run to run.
    """
    there = There(plain.to(place.name), place=place.name)
    expected = [run(there, call) for call in calls]
    for call, first in zip(calls, expected, strict=True):
        _check_steady(run(there, call), first)
    return expected


def _check_steady(again: Any, first: Any) -> None:
    try:
        assert_same(again, first, "the resident model, a second time,")
    except DifferentError as error:
        raise UnsteadyError(str(error)) from error


def compare(place: Place, model: Any, call: Callable[[Any], Any], expected: Any, where: str) -> None:
    """Runs a call of the wrapped model. Raises DifferentError, which says how far off the numbers are."""
    got = run(There(model, engine_of(model).homes, place.name), call)
    try:
        assert_same(got, expected, where)
    except DifferentError as error:
        raise type(error)(f"{error}; {_distance(got, expected)}; {_alignment(model)}") from None


def _distance(got: Any, expected: Any) -> str:
    """A few bits (another kernel) or other numbers (another weight)?"""
    far = []
    for a, b in zip(tensors_in(got), tensors_in(expected), strict=False):
        if a.shape == b.shape and a.is_floating_point() and a.numel():
            far.append(f"{float((a.double() - b.double()).abs().max()):.3g} of {float(b.double().abs().max()):.3g}")
    return f"largest differences: {', '.join(far[:4]) or 'not of numbers'}"


def _alignment(model: Any) -> str:
    """Libraries choose kernels by it."""
    views = list(engine_of(model).execution._views.values())
    steps = sorted({min(address & -address, 256) for view in views if (address := view.data_ptr())})
    return f"weights in slots begin on multiples of {steps} bytes"


def _must_fail(act: Callable[[], Any], what: str) -> None:
    try:
        act()
    except (RuntimeError, TypeError):  # as torch says it, while it captures too
        return
    raise AssertionError(f"{what}: nothing was raised")


def _tokens(*shape: int) -> Callable[[Any], Any]:
    return lambda model: model(ids(*shape), use_cache=False).logits


def _write(model: nn.Module, step: int) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if step == 1:
                parameter.mul_(1.0 + 1 / 8)
            elif "layers.1" in name or "embed" in name:
                parameter.data.mul_(1.0 + step / 8)


def write_shifted(model: nn.Module, path: Path, shift_bytes: int) -> None:
    """Writes a safetensors file whose weights begin `shift_bytes` behind a multiple of 64; a multiple of 8."""
    assert shift_bytes % 8 == 0, "safetensors has no others"
    entries: dict[str, Any] = {}
    end = 0
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    for name, value in state.items():
        start, end = end, end + value.nbytes
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[value.dtype]
        entries[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * ((shift_bytes - 8 - len(header)) % 64)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for value in state.values():
            file.write(value.flatten().view(torch.uint8).numpy().data)


def residents_yield(place: Place, *, swap_dir: Path, allocator: str = "torch") -> None:
    """An operator finds no memory under the cap that the budget is to the allocator: it gets the arena's."""
    plain, model = (make(lambda: Row(place.width)) for _ in range(2))
    x = noise(3, place.width).to(place.name)
    (expected,) = resident(place, plain, [lambda m: m(x)])
    budget_bytes = 6 * place.layer_bytes + place.page_bytes + place.activation_bytes
    with place.wrapped(model, budget_bytes, swap_dir=swap_dir, capture="operators", allocator=allocator):
        for attempt in range(5):  # the first ones are not capped
            compare(place, model, lambda m: m(x), expected, f"attempt {attempt}")
        arena = engine_of(model).execution.arena
        before = arena.backed_bytes
        model.hungry_bytes = 3 * place.layer_bytes
        compare(place, model, lambda m: m(x), expected, "hungry")
        assert arena.backed_bytes < before, "nothing yielded"
        for attempt in range(3):
            compare(place, model, lambda m: m(x), expected, f"hungry, attempt {attempt}")
        if allocator == "torch":  # segments are large beside this budget: what they keep may be on top of it
            model.hungry_bytes = budget_bytes
            with pytest.raises(DeviceError, match=f"no memory under a budget of .*{budget_bytes} bytes"):
                run(model, lambda m: m(x))
        model.hungry_bytes = 0
        compare(place, model, lambda m: m(x), expected, "after an error")


@contextmanager
def same_stream(ordered: bool) -> Iterator[None]:
    """For devices that compute at once: there is no other stream."""
    yield


def small_llama() -> nn.Module:
    """The zoo's, for devices with small pages."""
    return llama()
