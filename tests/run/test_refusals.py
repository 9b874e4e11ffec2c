"""What a wrapped model refuses, and that it goes on working afterwards."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mball
from mball.errors import AutogradError, CheckpointError, ConfigError, StorageError, WrapError
from tests.run.harness import assert_same, assert_streamed, engine_of, make, run, weight_bytes, wrap_hostile
from tests.run.zoo import noise, tied_sequential

X = noise(4, 64)


def call(model: nn.Module) -> torch.Tensor:
    return model(X)


@pytest.fixture
def wrapped(tmp_path: Path) -> nn.Module:
    model = make(tied_sequential)
    return wrap_hostile(model, int(weight_bytes(model) * 0.6), swap_dir=tmp_path)


@pytest.fixture
def expected() -> torch.Tensor:
    return run(make(tied_sequential), call)


def test_grad_mode_is_refused(wrapped: nn.Module, expected: torch.Tensor) -> None:
    with pytest.raises(AutogradError, match=r"torch\.no_grad"):
        wrapped(X)
    for parameter in wrapped.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(AutogradError, match="input requires grad"):
        wrapped(X.clone().requires_grad_())
    assert_same(wrapped(X), expected)
    assert_streamed(wrapped)


def test_inference_mode(wrapped: nn.Module, expected: torch.Tensor) -> None:
    with torch.inference_mode():
        for _ in range(2):
            assert_same(wrapped(X), expected)
    assert_streamed(wrapped)


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_autocast(capture: str, tmp_path: Path) -> None:
    plain, model = make(tied_sequential), make(tied_sequential)
    wrap_hostile(model, int(weight_bytes(model) * 0.75), swap_dir=tmp_path, capture=capture)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            assert_same(model(X), plain(X))
    assert_streamed(model)


class Forces(nn.Module):
    """Differentiates itself in forward, whatever the caller says, as models of molecules do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.layers(x).pow(2).sum(), x)[0]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("capture", ["graphs", "operators"])
@pytest.mark.parametrize("budget", [0.75, 2])
def test_autograd_inside_a_pass_is_right(budget: float, capture: str, frozen: bool, tmp_path: Path) -> None:
    """Autograd keeps homes, above the mode that exchanges them: they hold the right bytes at any time."""
    plain, model = make(Forces).requires_grad_(not frozen), make(Forces).requires_grad_(not frozen)
    wrap_hostile(model, int(weight_bytes(model) * budget), swap_dir=tmp_path, capture=capture)
    for _ in range(3):
        assert_same(run(model, call), run(plain, call))
    if budget < 1:
        assert_streamed(model)
    assert (mball.report(model).graphs > 0) == (capture == "graphs")


def test_a_slot_that_autograd_kept_is_not_read(wrapped: nn.Module) -> None:
    """None reaches it through a graph; what a custom operator does nobody knows."""
    run(wrapped, call)
    engine = engine_of(wrapped)
    moving = {weight for transfer in engine.plan.transfers for weight in engine.plan.bundles[transfer.bundle].tensors}
    slots = [
        view for (weight, _), view in engine.execution._views._views.items() if weight in moving and view.dim() == 2
    ]
    assert slots
    x = X.clone().requires_grad_()
    kept = [(x[:, :1] * slot[:1]).sum() for slot in slots]
    run(wrapped, call)
    for each in kept:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            each.backward()


def test_wrapping_twice(wrapped: nn.Module, expected: torch.Tensor) -> None:
    with pytest.raises(WrapError, match="wrapped already"):
        mball.wrap(wrapped, budget="1GiB")
    with pytest.raises(WrapError, match=r"wrapped model|wrapped already"):
        mball.wrap(wrapped[1], budget="1GiB")  # type: ignore[index]
    assert_same(run(wrapped, call), expected)


@pytest.mark.parametrize(
    "refused", [copy.deepcopy, copy.copy, pickle.dumps, lambda m: m.half(), lambda m: m.to("meta")]
)
def test_copies_and_conversions(refused: Callable[[nn.Module], object], wrapped: nn.Module, expected: object) -> None:
    with pytest.raises(WrapError, match="unwrap"):
        refused(wrapped)
    assert wrapped.to("cpu") is wrapped
    assert_same(run(wrapped, call), expected)


def test_an_exception_inside_forward(wrapped: nn.Module, expected: torch.Tensor) -> None:
    for error in (ValueError, KeyboardInterrupt):

        def fail(*_: object, error: type[BaseException] = error) -> None:
            raise error

        handle = wrapped[2].register_forward_pre_hook(fail)  # type: ignore[index]
        with pytest.raises(error):
            run(wrapped, call)
        handle.remove()
        assert_same(run(wrapped, call), expected)
    assert_streamed(wrapped)


def test_a_read_error_in_the_middle_of_a_pass(wrapped: nn.Module, expected: torch.Tensor) -> None:
    run(wrapped, call)
    device = engine_of(wrapped).execution.device
    wait, failures = device.wait, [2]

    def failing(event: object) -> None:
        wait(event)
        failures[0] -= 1
        if failures[0] == 0:
            raise StorageError("swap-0: reading 4096 B at offset 8192 failed (Input/output error)")

    device.wait = failing

    def passes() -> None:
        for _ in range(3):
            run(wrapped, call)

    with pytest.raises(StorageError, match="offset 8192"):
        passes()
    for _ in range(3):
        assert_same(run(wrapped, call), expected)
    assert_streamed(wrapped)


def test_passes_of_several_threads_come_one_after_another(wrapped: nn.Module, expected: torch.Tensor) -> None:
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.extend(run(wrapped, call) for _ in range(5))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 15
    for result in results:
        assert_same(result, expected)


@pytest.mark.parametrize("budget", ["", "six", "-1MiB", 0, -5, "0", True])
def test_budgets_that_cannot_be_read(budget: object) -> None:
    model = make(tied_sequential)
    with pytest.raises(ConfigError, match="budget"):
        mball.wrap(model, budget=budget)  # type: ignore[arg-type]
    assert type(model) is nn.Sequential


def test_the_smallest_budget_is_exact(tmp_path: Path) -> None:
    page = 4096
    settings: dict[str, Any] = {"swap_dir": tmp_path, "capture": "graphs"}
    with pytest.raises(mball.BudgetError) as caught:
        mball.wrap(make(tied_sequential), budget=page, **settings)
    smallest = caught.value.smallest_bytes
    with pytest.raises(mball.BudgetError, match=str(smallest)):
        mball.wrap(make(tied_sequential), budget=smallest - page, **settings)
    model = mball.wrap(make(tied_sequential), budget=smallest, **settings)
    # The activations of this input come on top: the forward says so before anything runs, and names the sum.
    with pytest.raises(mball.BudgetError) as caught:
        run(model, call)
    enough = caught.value.smallest_bytes
    assert enough > smallest
    mball.unwrap(model)
    with pytest.raises(mball.BudgetError, match=str(enough)):
        run(mball.wrap(model, budget=enough - page, **settings), call)
    mball.unwrap(model)
    assert_same(run(mball.wrap(model, budget=enough, **settings), call), run(make(tied_sequential), call))
    assert_streamed(model)


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    good = {name: tensor.clone() for name, tensor in make(lambda: nn.Linear(64, 32)).state_dict().items()}
    bad = {
        "missing": {"weight": good["weight"]},
        "shape": {**good, "bias": torch.zeros(31)},
        "dtype": {**good, "bias": good["bias"].half()},
    }
    for name, tensors in bad.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        model = make(lambda: nn.Linear(64, 32))
        with pytest.raises(CheckpointError, match="bias"):
            mball.wrap(model, budget="1MiB", weights=tmp_path / f"{name}.safetensors", swap_dir=tmp_path)
        assert type(model) is nn.Linear
        assert_same(dict(model.state_dict()), good)
    with pytest.raises(CheckpointError, match="nowhere"):
        mball.wrap(make(lambda: nn.Linear(64, 32)), budget="1MiB", weights=tmp_path / "nowhere")


def test_a_checkpoint_that_changes_while_in_use(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    source = make(lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    save_file(source.state_dict(), path)
    model = make(lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), seed=1)
    wrap_hostile(model, 28 << 10, path, swap_dir=tmp_path)
    assert_same(run(model, call), run(source, call))
    assert_streamed(model)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed while in use"):
        run(model, call)


def test_a_meta_model_never_exists_whole(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = make(lambda: nn.LSTM(64, 64, num_layers=2))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = make(lambda: nn.LSTM(64, 64, num_layers=2))
    with pytest.raises(WrapError, match="meta device"):
        mball.wrap(model, budget="1MiB")
    budget = int(weight_bytes(source) * 0.8)
    wrap_hostile(model, budget, tmp_path / "model.safetensors", swap_dir=tmp_path)
    for _ in range(2):
        assert_same(run(model, call), run(source, call))
    assert_streamed(model)


def test_unwrapped_parameters_are_ordinary_memory(wrapped: Any, expected: torch.Tensor) -> None:
    run(wrapped, call)
    homes = {parameter.data_ptr() for parameter in wrapped.parameters()}
    mball.unwrap(wrapped)
    assert homes.isdisjoint(parameter.data_ptr() for parameter in wrapped.parameters())
    assert wrapped[0].weight.data_ptr() == wrapped[4].weight.data_ptr(), "tied before, tied after"
    assert_same(run(wrapped, call), expected)


def test_buffers_of_a_meta_model_are_counted_once(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = make(lambda: nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64)))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = make(lambda: nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64)))
    wrap_hostile(model, 28 << 10, tmp_path / "model.safetensors", swap_dir=tmp_path)
    assert mball.report(model).buffer_bytes == 2 * 64 * 4 + 8
    assert_same(run(model, call), run(source, call))
    assert_streamed(model)


def test_deleting_the_model_gives_everything_back(tmp_path: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    threads, files = threading.active_count(), open_files()
    model = make(tied_sequential)
    mball.wrap(model, budget=int(weight_bytes(model) * 0.6), swap_dir=tmp_path)
    run(model, call)
    assert threading.active_count() > threads
    gone = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None
    assert threading.active_count() == threads
    assert open_files() <= files


class Registry(nn.Sequential):
    def __init_subclass__(cls, *, key: str) -> None:
        super().__init_subclass__()


class Entry(Registry, key="entry"):
    pass


def test_a_class_that_cannot_be_derived_from(tmp_path: Path) -> None:
    model = make(lambda: Entry(nn.Linear(64, 64)))
    with pytest.raises(WrapError, match="Entry cannot be derived from"):
        mball.wrap(model, budget="1MiB", swap_dir=tmp_path)
    assert type(model) is Entry
    assert not list(tmp_path.iterdir())
    mball.wrap(nn.Sequential(model), budget="1MiB", swap_dir=tmp_path)


def test_children_of_a_dropped_model_go_with_it(tmp_path: Path) -> None:
    """Also where a child knows its parent, and while Dynamo still keeps what it captured."""
    model: Any = make(tied_sequential)
    mball.wrap(model, budget=int(weight_bytes(model) * 0.6), swap_dir=tmp_path)
    run(model, call)
    model[1].register_forward_hook(model.zero_grad)  # a bound method of the root
    gone = [weakref.ref(model), weakref.ref(model[2])]
    del model
    for _ in range(2):
        gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_balloon_as_context_manager_and_decorator(tmp_path: Path, expected: torch.Tensor) -> None:
    model = make(tied_sequential)
    budget = int(weight_bytes(model) * 0.6)
    with mball.balloon(model, budget=budget, swap_dir=tmp_path):
        assert_same(run(model, call), expected)
        assert_streamed(model)
    assert type(model) is nn.Sequential

    @mball.balloon(budget=budget, swap_dir=tmp_path)
    def loop(module: nn.Module) -> torch.Tensor:
        assert_same(run(module, call), expected)
        assert_streamed(module)
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - raised by the test itself
        loop(model)
    assert type(model) is nn.Sequential
    assert_same(run(model, call), expected)


def new_module(model: Any) -> None:
    model[1][0] = nn.Linear(64, 128)


def new_parameter(model: Any) -> None:
    model.register_parameter("extra", nn.Parameter(torch.zeros(3)))


def new_submodule(model: Any) -> None:
    model[1][2].lora = nn.Sequential(nn.Linear(128, 2, bias=False), nn.Linear(2, 64, bias=False)).requires_grad_(False)


def other_parameter(model: Any) -> None:
    model[2].weight = nn.Parameter(torch.ones(64))


def untied(model: Any) -> None:
    model[4].weight = nn.Parameter(model[4].weight.detach().clone())


@pytest.mark.parametrize("capture", ["graphs", "operators"])
@pytest.mark.parametrize(
    ("change", "names"),
    [
        (new_module, ("1.0.weight", "1.0.bias")),
        (new_parameter, ("extra",)),
        (new_submodule, ("1.2.lora.0.weight", "1.2.lora.1.weight")),
        (other_parameter, ("2.weight",)),
        (untied, ("4.weight",)),
    ],
)
@pytest.mark.parametrize("before_the_first_pass", [False, True])
def test_a_parameter_that_came_after_wrap_is_refused(
    before_the_first_pass: bool,
    change: Callable[[Any], None],
    names: tuple[str, ...],
    capture: str,
    tmp_path: Path,
    expected: torch.Tensor,
) -> None:
    """It would be outside the budget, and nothing would say so."""
    model = make(tied_sequential)
    wrap_hostile(model, int(weight_bytes(model) * 0.75), swap_dir=tmp_path, capture=capture)
    if not before_the_first_pass:
        assert_same(run(model, call), expected)
    change(model)
    for _ in range(2):
        with pytest.raises(WrapError, match="unwrap") as caught:
            run(model, call)
        assert any(f"{name!r}" in str(caught.value) for name in names), caught.value
    # What the message says to do works.
    mball.unwrap(model)
    torch._dynamo.reset()
    plain = copy.deepcopy(model)
    wrap_hostile(model, int(weight_bytes(model) * 0.85), swap_dir=tmp_path, capture=capture)
    for _ in range(2):
        assert_same(run(model, call), run(plain, call))
        assert_streamed(model)


def test_a_submodule_that_came_after_wrap_is_refused_at_its_own_door(wrapped: Any) -> None:
    """`generate()` and the like call parts of a model directly."""
    new_module(wrapped)
    with pytest.raises(WrapError, match=r"'1\.0\.(weight|bias)'(.|\n)*unwrap"):
        run(wrapped, lambda m: m[1](X))


def test_a_parameter_that_went_and_came_back(wrapped: Any, expected: torch.Tensor) -> None:
    run(wrapped, call)
    weight = wrapped[2].weight
    other_parameter(wrapped)
    with pytest.raises(WrapError, match=r"'2\.weight'(.|\n)*unwrap"):
        run(wrapped, call)
    wrapped[2].weight = weight
    for _ in range(2):
        assert_same(run(wrapped, call), expected)
        assert_streamed(wrapped)


def test_a_forked_child_is_told_so(wrapped: nn.Module, expected: torch.Tensor) -> None:
    run(wrapped, call)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(wrapped, call)
        except mball.MballError as error:
            code = 0 if "fork" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_same(run(wrapped, call), expected)
    assert_streamed(wrapped)


def test_a_full_disk_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    model = make(tied_sequential)
    before = dict(model.state_dict())
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(StorageError, match="No space left"):
        mball.wrap(model, budget="1MiB", swap_dir=tmp_path)
    assert type(model) is nn.Sequential
    assert all(model.state_dict()[name].data_ptr() == tensor.data_ptr() for name, tensor in before.items())
