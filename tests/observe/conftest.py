"""In a process that the tests start for it, the stand-in for NVML; see `test_on_the_stand_in.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.observe.nvml.standin import LIBRARY_VARIABLE, StandIn

# Before anybody asks for NVML, on a machine that has one.
LOADED = StandIn(Path(os.environ[LIBRARY_VARIABLE])) if LIBRARY_VARIABLE in os.environ else None
# Their tests are for that process only.
collect_ignore_glob = [] if LOADED else ["nvml/test_*.py"]


@pytest.fixture
def driver() -> Iterator[StandIn]:
    """The stand-in with one GPU at rest. A test leaves NVML closed."""
    if LOADED is None:
        pytest.skip("the stand-in for NVML is loaded in a process of its own")
    LOADED.forget()
    yield LOADED
    LOADED.forget()
    assert LOADED.num_open == 0, "NVML was left open"
