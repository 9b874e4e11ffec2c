"""A slot that somebody keeps is said at exit, by the name of its weight; nothing is said where nobody does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STORY = """
import sys
import torch
import mball
from tests.run.harness import engine_of

how = sys.argv[1]
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
mball.wrap(model, 600_000, capture="operators", swap_dir=sys.argv[2])
with torch.no_grad():
    for _ in range(3):
        model(torch.ones(2, 256))
engine = engine_of(model)
if how != "nobody":
    views = engine.execution._views._views
    kept = next(view for (weight, _), view in views.items() if engine.homes.homes[weight].name == "2.weight")
    kept = kept[:3]  # a view of it is enough
    del views
if how == "forgotten":
    del kept
del engine
if how != "at exit":
    mball.unwrap(model)
"""


@pytest.mark.parametrize("how", ["kept", "at exit", "forgotten", "nobody"])
def test_what_is_kept_is_said(how: str, tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", STORY, how, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = [line for line in finished.stderr.splitlines() if "still held" in line]
    if how in ("kept", "at exit"):
        assert len(lines) == 1, finished.stderr
        assert "slots of 2.weight are still held" in lines[0]
    else:
        assert not lines
