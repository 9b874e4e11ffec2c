"""What ran when in a pass, for https://ui.perfetto.dev: compute, stalls and reads.

python examples/timeline.py
"""

from __future__ import annotations

import torch
from torch import nn

import mball

WIDTH = 512


def main() -> None:
    """Runs a few passes under a budget, and writes the last one."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(16)))
    mball.wrap(model, budget="8MiB")
    with torch.no_grad():
        for _ in range(4):  # the order is learnt in the first, and planned with in the others
            model(torch.randn(64, WIDTH))
    print(mball.report(model))
    print("open it at https://ui.perfetto.dev:", mball.timeline(model, "timeline.json"))


if __name__ == "__main__":
    main()
