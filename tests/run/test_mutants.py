"""Breaks the engine on purpose; the hostile device must notice every time.

Each mutant is one plausible mistake, and says how it must be found: by a wrong result, by poison in a result, or by a
copy outside its slot. What the harness checks besides (that bytes were streamed, say) does not count as found.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import mball
from mball.memory import CpuDevice
from mball.run.execution import Execution
from mball.run.homes import HomeFile, Homes
from mball.units import PAGE_BYTES
from tests.adaptors import GuardError
from tests.run.harness import (
    DifferentError,
    PoisonReachedResultError,
    assert_same,
    assert_streamed,
    make,
    run,
    weight_bytes,
    wrap_hostile,
)
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
    """A read begins one page beside its place in the file."""
    resolve = HomeFile.resolve

    def shifted(self: HomeFile, extent: Any) -> Any:
        # Never past the end of the file: that, the reader notices by itself.
        return [replace(p, offset_bytes=abs(p.offset_bytes - PAGE_BYTES)) for p in resolve(self, extent)]

    patch.setattr(HomeFile, "resolve", shifted)


def stale_home(patch: pytest.MonkeyPatch) -> None:
    """Written homes are not noticed."""
    patch.setattr(Homes, "collect_writes", lambda self: set())


def stale_copy(patch: pytest.MonkeyPatch) -> None:
    """Written homes are noticed, but the copies in the arena stay."""
    patch.setattr(Execution, "forget", lambda self, weights: None)


def overrun_before(patch: pytest.MonkeyPatch) -> None:
    """A page before the slot is written."""
    _overrun(patch, lambda offset, _: offset - PAGE_BYTES)


def overrun_after(patch: pytest.MonkeyPatch) -> None:
    """A page after the slot is written."""
    _overrun(patch, lambda _, end: end)


def _overrun(patch: pytest.MonkeyPatch, where: Callable[[int, int], int]) -> None:
    bring = Execution._bring

    def stray(self: Execution, number: int, offset: int, **how: Any) -> None:
        bring(self, number, offset, **how)
        page = where(offset, offset + self.plan.bundles[number].size_bytes)  # type: ignore[union-attr]
        if 0 <= page <= self.arena.backed_bytes - PAGE_BYTES:
            self.arena.poison(page, PAGE_BYTES)

    patch.setattr(Execution, "_bring", stray)


def longer_read(patch: pytest.MonkeyPatch) -> None:
    """The last read of a bundle is one page longer than its slot, with the bytes that follow in the file."""
    bring, reads = Execution._bring, Homes.reads
    room = [False]

    def bring_if_room(self: Execution, number: int, offset: int, **how: Any) -> None:
        end = offset + self.plan.bundles[number].size_bytes  # type: ignore[union-attr]
        room[0] = end + PAGE_BYTES <= self.arena.backed_bytes
        bring(self, number, offset, **how)

    def longer(self: Homes, extents: Any) -> Any:
        *others, (extent, last) = reads(self, extents)
        return [*others, (extent, replace(last, size_bytes=last.size_bytes + PAGE_BYTES) if room[0] else last)]

    patch.setattr(Execution, "_bring", bring_if_room)
    patch.setattr(Homes, "reads", longer)


def short_read(patch: pytest.MonkeyPatch) -> None:
    """The last page of every read is left out."""
    copy = CpuDevice.copy

    def shorter(self: CpuDevice, reads: Any, after: Any) -> Any:
        kept = [replace(read, size_bytes=max(read.size_bytes - PAGE_BYTES, 0)) for read in reads]
        return copy(self, [read for read in kept if read.size_bytes], after)

    patch.setattr(CpuDevice, "copy", shorter)


def swapped_weights(patch: pytest.MonkeyPatch) -> None:
    """A step gets two weights of one shape in each other's place."""
    bind = Execution._bind

    def swapped(self: Execution, step: int, occupants: Any) -> Any:
        bound = bind(self, step, occupants)
        views = list(itertools.chain.from_iterable(bound))
        for first, second in itertools.combinations(range(len(views)), 2):
            if views[first].shape == views[second].shape:
                views[first], views[second] = views[second], views[first]
                break
        rest = iter(views)
        return tuple(tuple(itertools.islice(rest, len(part))) for part in bound)

    patch.setattr(Execution, "_bind", swapped)


MUTANTS: tuple[tuple[Patch, type[AssertionError]], ...] = (
    (skip_a_wait, PoisonReachedResultError),
    (release_early, PoisonReachedResultError),
    (short_read, PoisonReachedResultError),
    (wrong_offset, DifferentError),
    (stale_home, DifferentError),
    (stale_copy, DifferentError),
    (swapped_weights, DifferentError),
    (overrun_before, GuardError),
    (overrun_after, GuardError),
    (longer_read, GuardError),
)


MODES = ("graphs", "operators", "inductor")


def play(model: torch.nn.Module) -> Iterator[tuple[bool, torch.Tensor]]:
    """The shortest run that reads, evicts, wraps around and is written to in between; yields also if it was last."""
    for seed in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        for last in (False, True):
            yield last, run(model, lambda m, seed=seed: m(noise(4, 64, seed=seed)))


def settings(mode: str, model: torch.nn.Module) -> dict[str, Any]:
    if mode == "inductor":
        return {"compile": "inductor", "step_bytes": weight_bytes(model) // 8}
    return {"capture": mode}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[torch.Tensor]]:
    """What an engine that nobody broke computes: unwrapped, and for compiled steps with all weights resident."""

    @cache
    def results(mode: str) -> list[torch.Tensor]:
        model = make(tied_sequential)
        if mode == "inductor":
            directory = tmp_path_factory.mktemp("resident")
            mball.wrap(model, budget="64MiB", swap_dir=directory, **settings(mode, model))
        return [result for _, result in play(model)]

    return results


def stream_and_compare(directory: Path, mode: str, expected: list[torch.Tensor]) -> None:
    model = make(tied_sequential)
    wrap_hostile(model, int(weight_bytes(model) * 0.75), swap_dir=directory, **settings(mode, model))
    for (last, got), result in zip(play(model), expected, strict=True):
        assert_same(got, result)
        if last:
            assert_streamed(model)


@pytest.mark.parametrize("mode", MODES)
def test_the_engine_as_it_is_passes(mode: str, tmp_path: Path, expected: Callable[[str], list[torch.Tensor]]) -> None:
    stream_and_compare(tmp_path, mode, expected(mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("mutant", "found_by"), MUTANTS, ids=[mutant.__name__ for mutant, _ in MUTANTS])
def test_every_mutant_is_noticed(
    mutant: Patch,
    found_by: type[AssertionError],
    mode: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: Callable[[str], list[torch.Tensor]],
) -> None:
    results = expected(mode)
    mutant(monkeypatch)
    with pytest.raises(found_by) as caught:
        stream_and_compare(tmp_path, mode, results)
    assert caught.type is found_by
