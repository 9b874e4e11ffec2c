"""Breaks the engine on purpose; the hostile device must notice every time.

Each mutant is one plausible mistake. A test that streams would pass by accident if one of them went unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mball.memory import CpuDevice
from mball.run import execution as execution_module
from mball.run.execution import Execution
from mball.run.homes import HomeFile, Homes
from tests.run.harness import assert_same, assert_streamed, make, run, weight_bytes, wrap_hostile
from tests.run.zoo import noise, tied_sequential

Patch = Callable[[pytest.MonkeyPatch], None]


def skip_a_wait(patch: pytest.MonkeyPatch) -> None:
    """The step does not wait for its bundles."""

    def land(self: Execution, bundle: int) -> Any:
        return self._occupants[bundle]

    patch.setattr(Execution, "_land", land)


def release_early(patch: pytest.MonkeyPatch) -> None:
    """A bundle is given away before the step that reads it has run."""
    bind = Execution._bind

    def early(self: Execution, step: int, occupants: Any) -> Any:
        views = bind(self, step, occupants)
        for bundle in self.plan.steps[step].reads:  # type: ignore[union-attr]
            self._evict(bundle)
        return views

    patch.setattr(Execution, "_bind", early)


def wrong_offset(patch: pytest.MonkeyPatch) -> None:
    """A read begins one page too late in the file."""
    resolve = HomeFile.resolve

    def shifted(self: HomeFile, extent: Any) -> Any:
        pieces = resolve(self, extent)
        return [type(p)(p.file, p.offset_bytes + 4096, p.size_bytes, p.shift_bytes) for p in pieces]

    patch.setattr(HomeFile, "resolve", shifted)


def stale_home(patch: pytest.MonkeyPatch) -> None:
    """Written homes are not noticed."""
    patch.setattr(Homes, "collect_writes", lambda self: set())


def stale_copy(patch: pytest.MonkeyPatch) -> None:
    """Written homes are noticed, but the copies in the arena stay."""
    patch.setattr(Execution, "forget", lambda self, weights: None)


def overrun(patch: pytest.MonkeyPatch) -> None:
    """A bundle writes one page more than its slot has, on either side."""
    bring = Execution._bring

    def longer(self: Execution, number: int, offset: int, *, planned: bool = True) -> None:
        bring(self, number, offset, planned=planned)
        end = offset + self.plan.bundles[number].size_bytes  # type: ignore[union-attr]
        for page in (offset - 4096, end):
            if 0 <= page <= self.arena.backed_bytes - 4096:
                self.arena.poison(page, 4096)

    patch.setattr(Execution, "_bring", longer)


def short_read(patch: pytest.MonkeyPatch) -> None:
    """The last page of every read is left out."""
    copy = CpuDevice.copy

    def shorter(self: CpuDevice, reads: Any, after: Any) -> Any:
        kept = []
        for read in reads:
            size = max(read.size_bytes - 4096, 0)
            kept.append(
                type(read)(
                    file=read.file, offset_bytes=read.offset_bytes, size_bytes=size, destination=read.destination[:size]
                )
            )
        return copy(self, [read for read in kept if read.size_bytes], after)

    patch.setattr(CpuDevice, "copy", shorter)


def swapped_weights(patch: pytest.MonkeyPatch) -> None:
    """A step gets its weights in the wrong order."""
    bind = Execution._bind
    patch.setattr(Execution, "_bind", lambda self, step, occupants: bind(self, step, occupants)[::-1])


MUTANTS: tuple[Patch, ...] = (
    skip_a_wait, release_early, wrong_offset, stale_home, stale_copy, overrun, short_read, swapped_weights,
)  # fmt: skip


def stream_and_compare(directory: Path, capture: str) -> None:
    """The shortest run that reads, evicts, wraps around and is written to in between."""
    plain, model = make(tied_sequential), make(tied_sequential)
    wrap_hostile(model, int(weight_bytes(model) * 0.75), swap_dir=directory, capture=capture)
    for seed in range(4):
        with torch.no_grad():
            for each in (plain, model):
                for parameter in each.parameters():
                    parameter.add_(0.01)
        for _ in range(2):
            x = noise(4, 64, seed=seed)
            assert_same(run(model, lambda m, x=x: m(x)), run(plain, lambda m, x=x: m(x)))
        assert_streamed(model)


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_the_engine_as_it_is_passes(capture: str, tmp_path: Path) -> None:
    stream_and_compare(tmp_path, capture)


@pytest.mark.parametrize("capture", ["graphs", "operators"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_every_mutant_is_noticed(mutant: Patch, capture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, KeyError, RuntimeError, execution_module.StorageError)):
        stream_and_compare(tmp_path, capture)
