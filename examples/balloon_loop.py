"""A budget for one function: `mball.balloon` wraps the modules it is called with and unwraps them when it returns.

python examples/balloon_loop.py
"""

from __future__ import annotations

import torch
from torch import nn

import mball

WIDTH = 512


@mball.balloon(budget="8MiB")
@torch.no_grad()
def predict(model: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    """Returns the model's answer for all batches, `[sum of B, WIDTH]`."""
    return torch.cat([model(batch) for batch in batches])


def main() -> None:
    """Predicts under a budget and plainly, and compares."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(16)))
    size_mib = sum(weight.nbytes for weight in model.parameters()) / 2**20
    batches = [torch.randn(4, WIDTH) for _ in range(3)]

    under_budget = predict(model, batches)
    with torch.no_grad():
        plain = torch.cat([model(batch) for batch in batches])
    assert torch.equal(under_budget, plain), "streaming changes no bit"
    print(f"{size_mib:.0f} MiB of weights ran in 8 MiB; the answers are the same")

    with mball.balloon(model, budget="8MiB"), torch.no_grad():
        model(batches[0])
        print(mball.report(model))


if __name__ == "__main__":
    main()
