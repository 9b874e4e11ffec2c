"""Saving a wrapped model: what the weights are now, also over the checkpoint that they are read from."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from safetensors.torch import save_file as reference_save_file
from torch import nn

import mball
from mball.errors import StorageError, WrapError
from mball.memory.gauge import HostGauge
from mball.units import MIB
from tests.run.harness import assert_same, assert_streamed, engine_of, make, run, weight_bytes, wrap_hostile
from tests.run.test_writes import by_fused_optimizer
from tests.run.zoo import llama, noise, tied_sequential
from tests.storage.swaps import flip


def four_layers() -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))


def call(model: nn.Module) -> torch.Tensor:
    return model(noise(4, 64))


@pytest.mark.parametrize("trained", [False, True])
def test_over_the_checkpoint_that_it_is_read_from(trained: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    plain = make(four_layers)
    reference_save_file(plain.state_dict(), path)
    model = make(four_layers, seed=1)
    wrap_hostile(model, 40 << 10, path, swap_dir=tmp_path)
    run(model, call)
    for _ in range(2):
        if trained:
            by_fused_optimizer(plain)
            by_fused_optimizer(model)
        mball.save_file(model, path)
        found = load_file(path)
        assert_same({name: found[name] for name in plain.state_dict()}, dict(plain.state_dict()))
        assert_same(run(model, call), run(plain, call))
        assert_same(dict(model.state_dict()), dict(plain.state_dict()))
    assert_streamed(model)
    assert sorted(tmp_path.iterdir()) == [path]


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    plain, model = make(tied_sequential), make(tied_sequential)
    wrap_hostile(model, int(weight_bytes(model) * 0.6), swap_dir=tmp_path)
    by_fused_optimizer(plain)
    by_fused_optimizer(model)
    mball.save_file(model, tmp_path / "file", {"format": "pt"})
    with safe_open(tmp_path / "file", "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    tied = set(plain.state_dict()) - names
    assert tied
    assert metadata == {"format": "pt", **{name: metadata[name] for name in tied}}
    assert {metadata[name] for name in tied} <= names
    fresh = make(tied_sequential, seed=4)
    load_model(fresh, tmp_path / "file")
    assert_same(dict(fresh.state_dict()), dict(plain.state_dict()))


def test_damaged_swap_is_not_saved(tmp_path: Path) -> None:
    model = make(four_layers)
    wrap_hostile(model, 40 << 10, swap_dir=tmp_path)
    swap = engine_of(model).homes.swap
    flip(swap, 20_000)
    with pytest.raises(StorageError, match="not what was written there"):
        mball.save_file(model, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_damaged_swap_is_not_computed_with(tmp_path: Path) -> None:
    model = make(four_layers)
    expected = run(model, call)
    wrap_hostile(model, 40 << 10, swap_dir=tmp_path)
    swap = engine_of(model).homes.swap
    flip(swap, 20_000)
    for _ in range(2):
        with pytest.raises(StorageError, match=rf"of {swap.name} in .* are not what was written there"):
            run(model, call)
    flip(swap, 20_000)
    for _ in range(2):
        assert_same(run(model, call), expected)


def test_swap_that_does_not_fit_its_limit_is_refused_beforehand(tmp_path: Path) -> None:
    model = make(four_layers)
    before = dict(model.state_dict())
    with pytest.raises(StorageError, match=r"of swap would make it .* and swap_limit is 50\.00 KiB \(51200 B\)"):
        mball.wrap(model, "1MiB", swap_dir=tmp_path, swap_limit="50KiB")
    assert_same(dict(model.state_dict()), before)
    path = tmp_path / "model.safetensors"
    reference_save_file(before, path)
    # What is read in place takes swap only once it is written.
    wrap_hostile(model, 40 << 10, path, swap_dir=tmp_path, swap_limit="50KiB")
    expected = run(model, call)
    by_fused_optimizer(model)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        with pytest.raises(StorageError, match="swap_limit"):
            run(model, call)
        assert_same(dict(model.state_dict()), trained)
    model.load_state_dict(before)
    with pytest.raises(StorageError, match="swap_limit"):  # the same bytes, and still written
        run(model, call)
    mball.unwrap(model)
    assert_same(run(model, call), expected)


def test_not_in_the_middle_of_a_pass(tmp_path: Path) -> None:
    class Saves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = four_layers()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers(x)
            mball.save_file(self, tmp_path / "file")
            return x

    model = make(Saves)
    wrap_hostile(model, "1MiB", swap_dir=tmp_path, capture="operators")  # type: ignore[arg-type]
    with pytest.raises(WrapError, match="in the middle of a call"):
        run(model, call)


def test_saving_takes_no_memory(tmp_path: Path) -> None:
    def large() -> nn.Module:
        return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))

    model = make(large)
    path = tmp_path / "model.safetensors"
    reference_save_file(model.state_dict(), path)
    mball.wrap(model, 16 * MIB, path, swap_dir=tmp_path)
    gauge = HostGauge()
    gauge.reset()
    mball.save_file(model, tmp_path / "file")
    assert gauge.rise_bytes() < 8 * MIB  # of 64 MiB
    assert engine_of(model).homes.touched_bytes() < 8 * MIB


def test_save_pretrained_over_its_own_checkpoint(tmp_path: Path) -> None:
    """In shards, as transformers does it, which puts each in place of the other too."""
    transformers = pytest.importorskip("transformers")
    plain = make(llama)
    plain.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = make(llama, seed=1)
    wrap_hostile(model, int(weight_bytes(model) * 0.7), tmp_path, swap_dir=tmp_path)
    x = torch.arange(8)[None]
    with torch.no_grad():
        for each in (plain, model):
            each.lm_head.weight.mul_(1.5)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert_same(run(model, lambda m: m(x).logits), run(plain, lambda m: m(x).logits))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(dict(loaded.state_dict()), dict(plain.state_dict()))


def test_the_report_says_what_went_through_swap(tmp_path: Path) -> None:
    model = make(four_layers)
    mball.wrap(model, 40 << 10, swap_dir=tmp_path, swap_limit="1MiB", swap_check="always", capture="graphs")
    for _ in range(2):
        run(model, call)
    report = mball.report(model)
    assert report.swap_limit_bytes == MIB
    assert weight_bytes(model) <= report.swap_written_bytes <= report.swap_bytes
    assert report.swap_read_bytes >= report.bytes_read
    assert report.swap_checked_bytes >= report.bytes_read_last_pass > 0
    assert "of at most 1.00 MiB; " in str(report)
    assert f"written in {report.swap_writes} requests" in str(report)


def test_what_swap_could_not_take_is_saved_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights in memory are whole; a disk that failed for swap may take the file."""
    plain, model = make(four_layers), make(four_layers)
    wrap_hostile(model, 40 << 10, swap_dir=tmp_path)
    by_fused_optimizer(plain)
    by_fused_optimizer(model)

    def refuse(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refuse)
        with pytest.raises(StorageError, match="Input/output"):
            run(model, call)
    mball.save_file(model, tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert_same({name: found[name] for name in plain.state_dict()}, dict(plain.state_dict()))
    assert_same(run(model, call), run(plain, call))
