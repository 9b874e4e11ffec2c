"""Models that differentiate themselves in forward, which is how weights are trained that lie at home."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mball.torch_private.dispatch import without_dispatch
from tests.run.harness import run
from tests.run.zoo import Run, noise


class Trainer(nn.Module):
    """Does forward and backward in one pass, and returns the loss; gradients are added to those that are there."""

    def __init__(self, model: nn.Module, num_calls: int = 1) -> None:
        super().__init__()
        self.model = model
        self.num_calls = num_calls

    def forward(self, call: Run) -> torch.Tensor:
        loss = torch.zeros(())
        for _ in range(self.num_calls):
            with torch.enable_grad():
                results = [each for each in tree_leaves(call(self.model)) if isinstance(each, torch.Tensor)]
                found = torch.stack([each.float().square().mean() for each in results if each.requires_grad]).sum()
                found.backward()
            loss = loss + found.detach()
        return loss


class Layers(nn.Module):
    """Equal layers; gradients go through those that are frozen, and some may be computed again for them."""

    def __init__(self, num_layers: int = 7, *, frozen: Sequence[int] = (), checkpoints: str = "none") -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(num_layers))
        self.checkpoints = checkpoints
        for number in frozen:
            self.layers[number].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            if number % 3 == 2 and self.checkpoints != "none":
                x = checkpoint(layer, x, use_reentrant=self.checkpoints == "reentrant").relu()
            else:
                x = layer(x).relu()
        return x


class Forces(nn.Module):
    """Differentiates by its input, as models of molecules do, whose weights may be frozen.

    Attributes:
        threads: that backward passes ran in.
    """

    def __init__(self, checkpoints: str) -> None:
        super().__init__()
        self.layers = Layers(6, checkpoints=checkpoints)
        self.threads: set[int] = set()

    @torch._dynamo.disable
    def note_thread(self, gradient: torch.Tensor) -> None:
        self.threads.add(threading.get_ident())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.layers(x).square().sum()
            energy.register_hook(self.note_thread)
            energy.backward()
        assert x.grad is not None
        return x.grad


def trained(model: Any, optimizer: torch.optim.Optimizer, calls: Sequence[Run], *, seed: int = 7) -> list[Any]:
    """Returns the losses of one optimizer step with the gradients of all `calls`, those gradients, and the weights."""
    torch.manual_seed(seed)
    optimizer.zero_grad()
    losses = [run(model, lambda m, each=each: m(each)) for each in calls]
    gradients = [None if each.grad is None else each.grad.clone() for each in model.parameters()]
    optimizer.step()
    with without_dispatch():  # nobody computes late with what is read at home
        return [losses, gradients, {name: tensor.clone() for name, tensor in model.state_dict().items()}]


def on(*shape: int, seed: int = 7) -> Callable[[Any], Any]:
    """Returns the call of a model with random numbers of this shape."""
    return lambda model: model(noise(*shape, seed=seed))
