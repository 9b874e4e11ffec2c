"""What a model goes through on adversarial streams: each raises if a result differs from the unwrapped model's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mball
from mball.errors import DeviceError, MballError, StorageError
from mball.memory import ArenaRead, Event
from mball.run.homes import Homes
from tests.adversarial import AdversarialDevice
from tests.deferral import deferred
from tests.run.adversary import Call, act, begin, chain
from tests.run.harness import DifferentError, assert_same, make, run, weight_bytes
from tests.run.zoo import noise, tied_sequential
from tests.streams import CORNERS, Pace

X = tuple(noise(4, 64, seed=seed) for seed in range(4))
ACTS = [act(x) for x in X]


def paces(num_random: int) -> list[Pace]:
    """Returns the corners, and so many orders between them."""
    return [*CORNERS.values(), *map(Pace.any, range(num_random))]


def jumps(directory: Path, capture: str) -> None:
    """A part of the model is called next: what comes for the whole one is given up, and its place is taken."""
    acts = [act(X[0]), lambda m: m[1](X[0]), lambda m: m[3](X[0]), act(X[0])]
    adversary, expected = begin(tied_sequential, directory, 0.6, acts, capture)
    for pace in paces(12):
        adversary.check(pace, acts, expected)


def budgets(directory: Path, capture: str) -> None:
    """A smaller budget, and a larger one again, while compute and copies of the passes before are not over."""
    adversary, expected = begin(chain, directory, 0.9, ACTS, capture)
    model, weights = adversary.model, weight_bytes(adversary.model)
    for pace in paces(0):
        adversary.device.streams.follow(pace)
        got = []
        with deferred(adversary.device):
            for share in (0.6, 2.0, 0.5, 0.9):
                got += [run(model, each) for each in ACTS[:2]]
                mball.set_budget(model, int(weights * share))
        for number, result in enumerate(got):
            assert_same(result, expected[number % 2], f"{pace}, call {number}")


def writes(directory: Path, capture: str) -> None:
    """What was written is given up, on its way or not."""
    plain = make(chain)
    adversary, _ = begin(chain, directory, 0.6, ACTS, capture)
    for pace in paces(6):
        for model in (plain, adversary.model):
            with torch.no_grad():
                for parameter in list(model.parameters())[::3]:
                    parameter.mul_(1.01)
        adversary.check(pace, ACTS[:2], [run(plain, each) for each in ACTS[:2]])


def interrupted_plans(directory: Path, capture: str) -> None:
    """Ctrl-C came while a plan was adopted: the next pass begins with an empty arena."""
    adversary, expected = begin(chain, directory, 3.0, ACTS, capture)
    for pace in paces(6):
        adversary.device.streams.follow(pace)
        got = []
        with deferred(adversary.device):
            for each in ACTS[:2]:
                got.append(run(adversary.model, each))
                adversary.engine._active, adversary.engine._unclear = None, True
        for number, result in enumerate(got):
            assert_same(result, expected[number], f"{pace}, call {number}")


@contextlib.contextmanager
def interrupted_copy(device: AdversarialDevice, number: int) -> Iterator[None]:
    """Ctrl-C comes right after the device has taken the copy of this number, before the engine knows its event."""
    copy, before = device.copy, device.num_copies

    def interrupted(reads: Sequence[ArenaRead], after: Event | None) -> Event:
        event = copy(reads, after)
        if device.num_copies == before + number:
            raise KeyboardInterrupt
        return event

    device.copy = interrupted  # type: ignore[method-assign]
    try:
        yield
    finally:
        device.copy = copy  # type: ignore[method-assign]


def interrupted_copies(directory: Path, capture: str) -> None:
    """A copy that nobody knows of may come late, but not after the next pass has begun."""

    def again(call: Call) -> Call:
        def until_it_ends(model: Any) -> Any:
            with contextlib.suppress(KeyboardInterrupt):
                return call(model)
            result = call(model)
            adversary.device.streams.finish_copies()  # at the latest now that other bundles have its place
            return result

        return until_it_ends

    adversary, expected = begin(chain, directory, 0.6, ACTS, capture)
    for pace in paces(4):
        for number in (2, 5, 9):
            with interrupted_copy(adversary.device, number):
                adversary.check(pace, [again(each) for each in ACTS], expected)


def unwraps(directory: Path, capture: str) -> None:
    """The arena goes while compute and copies are not over."""
    for name in ("compute late", "all late"):
        for budget in (0.6, 3.0):
            adversary, expected = begin(chain, directory, budget, ACTS, capture)
            adversary.device.streams.follow(CORNERS[name])
            with deferred(adversary.device):
                got = [run(adversary.model, each) for each in ACTS]
                mball.unwrap(adversary.model)
                got += [run(adversary.model, each) for each in ACTS]
                adversary.device.streams.finish_copies()
            for number, result in enumerate(got):
                assert_same(result, expected[number % len(ACTS)], f"{name}, call {number}")


@torch.library.custom_op("mball_tests::stumble", mutates_args=())
def stumble(x: torch.Tensor, stumbles: bool) -> torch.Tensor:
    """Raises on the host, as Ctrl-C does, while what was called before it is still queued."""
    if stumbles:
        raise KeyboardInterrupt
    return x.clone()


@stumble.register_fake
def _(x: torch.Tensor, stumbles: bool) -> torch.Tensor:
    return torch.empty_like(x)


class Keeps(nn.Module):
    """Writes to a tensor of the caller's, as to a cache, and may then be interrupted in the middle of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.rest = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))

    def forward(self, x: torch.Tensor, kept: torch.Tensor, stumbles: bool) -> torch.Tensor:
        y = self.first(x)
        kept.copy_(y)
        return self.rest(torch.ops.mball_tests.stumble(y, stumbles))


def _stumbling(model: Any) -> list[torch.Tensor]:
    results = []
    for stumbles in (False, True, True):
        kept = torch.zeros(4, 64)
        with contextlib.suppress(KeyboardInterrupt):
            results.append(model(X[0], kept, stumbles))
        results += [kept, model.rest[3](X[0])]
    return results


def interrupted_steps(directory: Path, capture: str) -> None:
    """What a step issued before it failed is queued, and the next pass begins with other weights where that reads."""
    adversary, expected = begin(Keeps, directory, 0.45, [_stumbling], capture)
    for pace in paces(4):
        adversary.check(pace, [_stumbling], expected)


class Shifted(nn.Module):
    """Looks up rows whose numbers are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4096, 64)
        self.head = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x * 7 + 5))


def hints(directory: Path, capture: str) -> None:
    """The host reads the numbers of rows only when compute has made them."""
    rows = torch.tensor([3, 500])
    adversary, expected = begin(Shifted, directory, 0.2, [act(rows)], capture)
    hinted: list[list[int]] = []
    homes: Homes = adversary.engine.homes
    prefetch = homes.prefetch_rows

    def noted(weight: int, indices: torch.Tensor) -> int:
        hinted.append(indices.reshape(-1).tolist())
        return prefetch(weight, indices)

    homes.prefetch_rows = noted  # type: ignore[method-assign]
    for pace in paces(20):
        adversary.check(pace, [act(rows)] * 2, expected * 2)
    assert hinted, "where compute is over at once they come"
    if wrong := [each for each in hinted if each != (rows * 7 + 5).tolist()]:
        raise DifferentError(f"{len(wrong)} of {len(hinted)} hints are of rows that nobody looks up: {wrong[0]}")


@contextlib.contextmanager
def failed_read(device: AdversarialDevice, number: int, error: MballError) -> Iterator[None]:
    """The read of this number fails, when it is read, which may be long after the step that waits for it was issued."""
    inner, count = device.device.copy, 0

    def failing(reads: Sequence[ArenaRead], after: Event | None) -> Event:
        nonlocal count
        count += 1
        if count == number:
            raise error
        return inner(reads, after)

    device.device.copy = failing  # type: ignore[method-assign]
    try:
        yield
    finally:
        device.device.copy = inner  # type: ignore[method-assign]


def failed_reads(directory: Path, capture: str) -> None:
    """Compute cannot say that a copy failed: a pass does, or the next one, and what did not come is read again."""
    raised = 0

    def heard(call: Call) -> Call:
        def until_it_ends(model: Any) -> Any:
            nonlocal raised
            try:
                return call(model)
            except (StorageError, DeviceError):
                raised += 1
                return None

        return until_it_ends

    acts = [heard(each) for each in ACTS]
    adversary, expected = begin(chain, directory, 0.6, ACTS, capture)
    for pace in paces(2):
        raised = 0
        for number, error in ((2, StorageError("injected")), (7, DeviceError("injected"))):
            with failed_read(adversary.device, number, error):
                adversary.play(pace, acts)
                adversary.play(pace, acts)
            adversary.play(CORNERS["all at once"], acts[:1])  # at the latest now that all copies are over
            adversary.check(pace, ACTS, expected)
        if not raised:  # of a copy that was given up nobody needs to hear, but these are not both given up
            raise DifferentError(f"{pace}: nobody heard that a read failed")
