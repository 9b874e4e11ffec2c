"""Every test of the engine starts without graphs of the tests before it."""

from __future__ import annotations

import functools

import pytest
import torch

from mball import assembly


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that change budgets hundreds of times: the same pass under the same budget is planned once.

    Plans are the same then, byte for byte: planning is pure.
    """
    monkeypatch.setattr(assembly, "make_plan", functools.cache(assembly.make_plan))
