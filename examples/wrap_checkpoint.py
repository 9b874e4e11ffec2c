"""Runs a model straight from its checkpoint: it never exists whole in memory.

python examples/wrap_checkpoint.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import mball

WIDTH = 1024
LAYERS = 8


def make_model() -> nn.Sequential:
    """Returns LAYERS blocks, 4 MiB of float32 weights each."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS)))


def main() -> None:
    """Compares the wrapped model with the plain one and prints the report."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model.safetensors"
        plain = make_model()
        save_file(plain.state_dict(), checkpoint)

        with torch.device("meta"):
            model = make_model()
        mball.wrap(model, budget="16MiB", weights=checkpoint)

        inputs = torch.randn(4, WIDTH)
        with torch.no_grad():
            assert torch.equal(model(inputs), plain(inputs)), "streaming changes no bit"
            model(inputs)
        print(mball.report(model))
        mball.unwrap(model)


if __name__ == "__main__":
    main()
