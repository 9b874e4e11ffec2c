"""The zoo's kinds of models, large enough that a GPU streams them: its memory comes in pages of some MiB."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.run.zoo import (
    Breaks,
    Experts,
    Net,
    Specimen,
    generate,
    llama,
    logits,
    noise,
    t5,
    t5_generate,
    tied_sequential,
)


class DeepBreaks(Breaks):
    """Graph breaks at first, then enough weights to stream, of which no operator needs more than two at a time."""

    def __init__(self) -> None:
        super().__init__(256)
        self.more = nn.Sequential(
            *(nn.Sequential(nn.Linear(256, 4096), nn.ReLU(), nn.Linear(4096, 256)) for _ in range(8))
        )

    def forward(self, x: torch.Tensor) -> Any:
        found, scale = super().forward(x)
        return self.more(found), scale


class DeepNet(Net):
    """Convolutions of 9 MiB behind the zoo's."""

    def __init__(self) -> None:
        super().__init__(64)
        self.layers.append(nn.Conv2d(64, 512, 1))
        self.layers.extend(nn.Conv2d(512, 512, 3, padding=1) for _ in range(7))
        self.layers.append(nn.Conv2d(512, 64, 1))


def wide_llama(dtype: torch.dtype, *, tied: bool = False) -> nn.Module:
    """Six layers of 24 MiB of float32, half of that in 16 bits."""
    return llama(layers=6, hidden=896, vocabulary=4096, tied=tied, dtype=dtype)


WIDE: dict[str, Specimen] = {
    "llama-fp32": Specimen(
        make=lambda: wide_llama(torch.float32), runs=(logits(1, 9), logits(2, 5), logits(1, 1), logits(3, 17))
    ),
    "llama-bf16-dynamic-cache": Specimen(make=lambda: wide_llama(torch.bfloat16), runs=(generate("dynamic"),)),
    "llama-tied-static-cache": Specimen(
        make=lambda: wide_llama(torch.float16, tied=True), runs=(generate("static"), generate("static", 7))
    ),
    # The whole model comes last: only that is more than the budget.
    "sequential": Specimen(
        make=lambda: tied_sequential(2048),
        runs=(lambda m: m[1](noise(3, 2048)), lambda m: m(noise(4, 2048))),
        budget=0.7,
    ),
    "breaks": Specimen(make=DeepBreaks, runs=(lambda m: m(noise(2, 3, 256)), lambda m: m.forward(noise(2, 3, 256)))),
    "convolutions": Specimen(
        make=DeepNet, runs=(lambda m: m(noise(2, 3, 16, 16)), lambda m: m(noise(2, 3, 16, 14))), budget=0.8
    ),
    "experts": Specimen(
        make=lambda: Experts(1536), runs=tuple((lambda m, s=s: m(noise(8, 1536, seed=s))) for s in range(3)), budget=0.4
    ),
    # The encoder runs once, and all passes after it are the decoder's.
    "t5": Specimen(make=lambda: t5(1024), runs=(t5_generate,), budget=0.4),
}
