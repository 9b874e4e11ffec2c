"""In a process that the tests start for it, the stand-in for NVIDIA's driver; see `test_on_the_stand_in.py`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.memory.driver.standin import LIBRARY_VARIABLE, Order, StandIn

# Before torch is imported, which may ask for a driver on a machine that has one.
LOADED = StandIn(Path(os.environ[LIBRARY_VARIABLE])) if LIBRARY_VARIABLE in os.environ else None
# Their tests are for that process only.
collect_ignore_glob = [] if LOADED else ["driver/test_*.py"]


@pytest.fixture
def standin() -> Iterator[StandIn]:
    """The stand-in as it was at first. What a test takes of it has to be given back at its end."""
    if LOADED is None:
        pytest.skip("the stand-in for the CUDA driver is loaded in a process of its own")
    LOADED.configure()
    LOADED.forget()
    LOADED.set_files()
    LOADED.run_in(Order.EARLIEST)
    yield LOADED
    LOADED.forget()
    LOADED.configure()
    is_empty, num_contexts, is_idle = LOADED.is_empty(), LOADED.num_contexts, LOADED.is_idle()
    has_no_files = LOADED.has_no_files()
    LOADED.sweep()
    LOADED.pop_contexts()
    assert is_empty, "memory or addresses of the device are still taken"
    assert is_idle, "streams, events, pinned memory or work are left"
    assert num_contexts == 0, "a context was left current"
    assert has_no_files, "cuFile is still open, or something is registered with it"
    assert LOADED.falls_back, "cuFile's settings are not what they were"


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All reads that were asked of a file."""
    from mball.storage import ThreadedReader  # which imports torch

    seen: list[Any] = []
    submit = ThreadedReader.submit

    def note(self: ThreadedReader, reads: Any) -> Any:
        seen.extend(reads)
        return submit(self, reads)

    monkeypatch.setattr(ThreadedReader, "submit", note)
    return seen


@pytest.fixture
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may have one thread that calls cuFile, and no more."""
    start = threading.Thread.start

    def limited(self: threading.Thread) -> None:
        if self.name.startswith("mball-gds") and "mball-gds_0" in {thread.name for thread in threading.enumerate()}:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
