"""Which writes to a weight its version counter misses: why homes are not watched by counter alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn


def fused_adamw(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.5, fused=True).step()


def fused_sgd(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5, fused=True).step()


def data_add(weight: nn.Parameter) -> None:
    weight.data.add_(1.0)


def data_copy(weight: nn.Parameter) -> None:
    weight.data.copy_(torch.full_like(weight, 3.0))


def numpy_view(weight: nn.Parameter) -> None:
    weight.detach().numpy()[...] = 3.0


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.add_(1.0)


def versions_and_change(weight: nn.Parameter, write: Callable[[nn.Parameter], None]) -> tuple[int, int, bool]:
    """Returns the counter before and after `write`, and whether every value changed."""
    old, before = weight.detach().clone(), weight._version
    write(weight)
    return before, weight._version, bool((weight.detach() != old).all())


@pytest.mark.parametrize("write", [fused_adamw, fused_sgd, data_add, data_copy])
def test_the_counter_misses_the_write(write: Callable[[nn.Parameter], None], device: torch.device) -> None:
    """Fused optimizers, and writes through `.data`, change the values and leave the version counter alone."""
    before, after, changed = versions_and_change(nn.Parameter(torch.randn(64, device=device)), write)
    assert changed
    assert after == before


def test_the_counter_misses_numpy() -> None:
    """A numpy view writes to the weight's memory without telling the version counter."""
    before, after, changed = versions_and_change(nn.Parameter(torch.randn(64)), numpy_view)
    assert changed
    assert after == before


def test_the_counter_sees_an_in_place_operator(device: torch.device) -> None:
    """An in-place operator on the weight itself is counted; so the tests above look at a counter that works."""
    before, after, changed = versions_and_change(nn.Parameter(torch.randn(64, device=device)), in_place)
    assert changed
    assert after == before + 1
