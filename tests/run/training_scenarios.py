"""Passes that differentiate on adversarial streams: each raises if a loss, a gradient or a weight differs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from tests.deferral import DeferringMode, deferred
from tests.foreign.compute import open_foreign
from tests.run.adversary import Adversary, act
from tests.run.harness import DifferentError, assert_same, assert_streamed, make, run, weight_bytes
from tests.run.stream_scenarios import paces
from tests.run.there import PLACE
from tests.run.trainer import Forces, Layers, Trainer, on, trained
from tests.run.zoo import noise
from tests.streams import CORNERS, Pace

CALLS = [on(4, 64, seed=seed) for seed in range(2)]


def train(directory: Path, capture: str, orders: Sequence[Pace], *, frozen: Sequence[int] = (0, 2, 3)) -> DeferringMode:
    """Adds up the gradients of two passes, has an optimizer write the homes, and does so again, in each order.

    Some layers are frozen, and some are computed again in the backward pass. Returns the mode of the last order.
    """
    factory = partial(Layers, frozen=frozen, checkpoints="again")
    plain, model = (Trainer(make(factory)) for _ in range(2))
    gradients_bytes = sum(each.nbytes for each in model.parameters() if each.requires_grad)
    adversary = Adversary(model, gradients_bytes + int(weight_bytes(model) * 0.65), directory, capture=capture)
    ours, theirs = (torch.optim.SGD(each.parameters(), lr=1.0, momentum=0.9) for each in (model, plain))
    for pace in (CORNERS["all at once"], *orders):
        adversary.device.streams.follow(pace)
        with deferred(adversary.device) as mode:
            got = [trained(model, ours, CALLS) for _ in range(2)]
        assert_same(got, [trained(plain, theirs, CALLS) for _ in range(2)], str(pace))
        assert_streamed(model)
    return mode


def differentiate(directory: Path, capture: str, checkpoints: str, orders: Sequence[Pace]) -> DeferringMode:
    """Has the backward passes run in autograd's thread of a device, which copies and compute of the next one follow.

    Returns the mode of the last order.
    """
    plain, model = (make(partial(Forces, checkpoints)).requires_grad_(False) for _ in range(2))
    plain.to(PLACE)
    budget = int(weight_bytes(model) * 0.9)
    adversary = Adversary(model, budget, directory, open_compute=open_foreign, capture=capture)
    acts = [act(noise(4, 64, seed=seed).to(PLACE)) for seed in range(3)]
    expected = [run(plain, each) for each in acts]
    for pace in (CORNERS["all at once"], CORNERS["all at once"], *orders):
        adversary.check(pace, acts, expected)
        assert_streamed(model)
    if not model.threads or threading.get_ident() in model.threads:
        raise DifferentError("backward passes had no thread of their own")
    return adversary.mode


def trains(directory: Path, capture: str) -> None:
    """Whatever stays in a slot over the optimizer's step is written by it."""
    train(directory, capture, paces(2), frozen=())
