"""A home that was written to, by whatever means, is what the next pass reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import mball
from tests.run.harness import assert_same, assert_streamed, engine_of, make, run, weight_bytes, wrap_hostile
from tests.run.zoo import noise, tied_sequential


def target(model: nn.Module) -> nn.Parameter:
    """A weight that is streamed, tied to another module."""
    return model[4].weight  # type: ignore[index,return-value]


def by_copy(model: nn.Module) -> None:
    with torch.no_grad():
        target(model).copy_(noise(64, 64, seed=3))


def by_data(model: nn.Module) -> None:
    target(model).data.add_(noise(64, 64, seed=3))


def by_data_slice(model: nn.Module) -> None:
    target(model).data[5, 7] = 3.25


def by_numpy(model: nn.Module) -> None:
    target(model).detach().numpy()[3] *= 2


def by_load_state_dict(model: nn.Module) -> None:
    other = make(tied_sequential, seed=5)
    model.load_state_dict(other.state_dict())


def by_fused_optimizer(model: nn.Module) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = noise(*parameter.shape, seed=number)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


def by_sgd(model: nn.Module) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = noise(*parameter.shape, seed=number)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


WRITERS = [by_copy, by_data, by_data_slice, by_numpy, by_load_state_dict, by_fused_optimizer, by_sgd]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("fits", [False, True])
def test_every_kind_of_write_is_noticed(write: Callable[[nn.Module], None], fits: bool, tmp_path: Path) -> None:
    plain, model = make(tied_sequential), make(tied_sequential)
    wrap_hostile(model, int(weight_bytes(model) * (2 if fits else 0.6)), swap_dir=tmp_path)
    x = noise(4, 64)
    before = run(model, lambda m: m(x))
    for _ in range(3):
        write(plain)
        write(model)
        got = run(model, lambda m: m(x))
        assert_same(got, run(plain, lambda m: m(x)), write.__name__)
        assert not torch.equal(got, before)
        assert_same(model.state_dict(), plain.state_dict())
    if not fits:
        assert_streamed(model)


@pytest.mark.parametrize("write", [by_data_slice, by_fused_optimizer])
def test_written_homes_give_their_memory_back(write: Callable[[nn.Module], None], tmp_path: Path) -> None:
    model = make(tied_sequential)
    wrap_hostile(model, int(weight_bytes(model) * 0.6), swap_dir=tmp_path)
    write(model)
    files = engine_of(model).homes.files
    assert any(file.mapping.written() for file in files)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model, lambda m: m(noise(4, 64)))
    assert not any(file.mapping.written() for file in files)
    assert_same(dict(model.state_dict()), expected)


def test_a_checkpoint_is_never_written(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.LayerNorm(64))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = make(lambda: nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.LayerNorm(64)))
    wrap_hostile(model, 40 << 10, tmp_path / "model.safetensors", swap_dir=tmp_path)
    assert_same(run(model, lambda m: m(noise(4, 64))), run(source, lambda m: m(noise(4, 64))))
    original = load_file(tmp_path / "model.safetensors")
    for _ in range(3):  # pages of one file, some moved to the swap file, some not
        model[2].weight.data.mul_(2)
        source[2].weight.data.mul_(2)
        model[0].bias.data[3] = 1.5
        source[0].bias.data[3] = 1.5
        assert_same(run(model, lambda m: m(noise(4, 64))), run(source, lambda m: m(noise(4, 64))))
    assert_streamed(model)
    assert_same(load_file(tmp_path / "model.safetensors"), original)
    assert_same(dict(model.state_dict()), dict(source.state_dict()))


class Counts(nn.Module):
    """Writes to a weight and to a buffer in forward, and hands out a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.average = nn.Parameter(torch.zeros(64, 64), requires_grad=False)
        self.linear = nn.Linear(64, 64)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.add_(1)
        self.average.mul_(0.5).add_(x.T @ x)
        return self.linear(x) @ self.average, self.average


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_a_forward_that_writes_weights(capture: str, tmp_path: Path) -> None:
    plain, model = make(Counts), make(Counts)
    wrap_hostile(model, 46 << 10, swap_dir=tmp_path, capture=capture)
    for seed in range(4):
        x = noise(8, 64, seed=seed)
        got, average = run(model, lambda m, x=x: m(x))
        expected, expected_average = run(plain, lambda m, x=x: m(x))
        assert_same((got, average), (expected, expected_average))
        assert average is model.average
    assert model.calls.item() == 4


def test_what_forward_hands_out_outlives_the_slot(tmp_path: Path) -> None:
    class HandsOut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            for layer in self.layers:
                x = layer(x)
            return x, self.layers[2].weight.t()[1:3]

    plain, model = make(HandsOut), make(HandsOut)
    wrap_hostile(model, 50 << 10, swap_dir=tmp_path)
    _, view = run(model, lambda m: m(noise(2, 64)))
    expected = plain.layers[2].weight.t()[1:3]
    for _ in range(3):
        assert_same(run(model, lambda m: m(noise(2, 64)))[0], run(plain, lambda m: m(noise(2, 64)))[0])
        assert_streamed(model)
        assert torch.equal(view, expected)


def test_a_parameter_that_was_exchanged_is_refused(tmp_path: Path) -> None:
    model = make(tied_sequential)
    mball.wrap(model, budget=60 << 10, swap_dir=tmp_path)
    model[1][0].weight.data = torch.zeros(128, 64)
    with pytest.raises(mball.MballError, match=r"1\.0\.weight.*copy_"):
        run(model, lambda m: m(noise(2, 64)))
