"""A pass that ends by Ctrl-C or by an exception of the user's: the next passes are right, from any thread."""

from __future__ import annotations

import contextlib
import errno
import linecache
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import mball
from mball.api import _wrap
from mball.config import Config
from mball.errors import StorageError
from tests.adaptors import DelayedDevice, PoisonedDevice, adapted
from tests.preads import preadv_is
from tests.run.harness import assert_same, assert_streamed, engine_of, make, run, weight_bytes
from tests.run.zoo import generate, llama, noise, tied_sequential

pytestmark = pytest.mark.alone

X = noise(4, 64)
MBALL = os.path.dirname(mball.__file__)


begun = threading.Semaphore(0)
"""Released whenever something begins that is to be interrupted."""


@torch.library.custom_op("mball_tests::linger", mutates_args=())
def linger(x: torch.Tensor) -> torch.Tensor:
    """Computes for a while."""
    begun.release()
    time.sleep(0.01)
    return x.clone()


@linger.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Lingers(nn.Module):
    """Six layers with some computing behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.ops.mball_tests.linger(layer(x).relu())
        return x


def wrap(model: nn.Module, budget: float, directory: Path, capture: str) -> None:
    """Slots are poisoned and reads come late; `budget` is of the weights' bytes."""
    config = Config.of(budget=int(weight_bytes(model) * budget), swap_dir=directory, capture=capture)
    _wrap((model,), config, None, {}, adapted(lambda device: PoisonedDevice(DelayedDevice(device, seed=0))))


def call(model: nn.Module) -> torch.Tensor:
    return model(X)


def interrupted_after(delay_s: float, act: Callable[[], object]) -> list[traceback.FrameSummary]:
    """Does `act` again and again until a real Ctrl-C ends it; returns where it was then."""
    return _interrupted(lambda: time.sleep(delay_s), act)


def interrupted_at(count: int, act: Callable[[], object]) -> list[traceback.FrameSummary]:
    """Like `interrupted_after`, when something has `begun` so many times, however slow the machine is."""
    while begun.acquire(blocking=False):
        pass
    return _interrupted(lambda: [begun.acquire() for _ in range(count)], act)


def _interrupted(wait: Callable[[], object], act: Callable[[], object]) -> list[traceback.FrameSummary]:
    over = threading.Event()

    def strike() -> None:
        wait()
        while not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            # Python drops what is raised in a finalizer, a Ctrl-C too: then another one is needed.
            over.wait(5)

    striker = threading.Thread(target=strike, daemon=True)
    striker.start()

    def again_and_again() -> None:
        try:
            while True:
                act()
        finally:
            over.set()

    with pytest.raises(KeyboardInterrupt) as caught:
        again_and_again()
    striker.join()
    return list(traceback.extract_tb(caught.tb))


def assert_consistent(model: nn.Module, expected: torch.Tensor, patience_s: float = 20) -> None:
    """Passes are right and streamed in a thread of their own first (none is left open), then in this one."""
    results: list[torch.Tensor] = []
    assert not engine_of(model).in_pass, "the interrupted pass is still open"
    thread = threading.Thread(target=lambda: results.append(run(model, call)), daemon=True)
    thread.start()
    thread.join(timeout=patience_s)
    assert not thread.is_alive(), "the interrupted pass was never closed: other threads wait for its end"
    results.append(run(model, call))
    assert len(results) == 2, "the pass of the other thread failed"
    for result in results:
        assert_same(result, expected)
    assert_streamed(model)


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_ctrl_c_while_a_pass_waits_for_a_slow_read(capture: str, tmp_path: Path) -> None:
    model = make(tied_sequential)
    expected = run(model, call)
    wrap(model, 0.6, tmp_path, capture)
    run(model, call)
    delays = random.Random(1)
    preadv = os.preadv

    def slow(descriptor: int, buffers: Any, offset: int) -> int:
        begun.release()
        time.sleep(delays.uniform(0.01, 0.03))
        return preadv(descriptor, buffers, offset)

    waited = 0
    for count in (1, *(delays.randint(1, 15) for _ in range(7))):
        with preadv_is(slow):
            where = interrupted_at(count, lambda: run(model, call))
        waited += any(frame.name == "wait" and "storage" in frame.filename for frame in where)
        assert_consistent(model, expected)
    assert waited >= 4, "hardly any of the interrupts came during a read"


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_ctrl_c_while_a_pass_computes(capture: str, tmp_path: Path) -> None:
    model = make(Lingers)
    expected = run(model, call)
    wrap(model, 0.6, tmp_path, capture)
    run(model, call)
    counts = random.Random(2)
    computed = 0
    for count in (1, *(counts.randint(1, 12) for _ in range(5))):
        where = interrupted_at(count, lambda: run(model, call))
        computed += any(frame.name == "linger" for frame in where)
        assert_consistent(model, expected)
    assert computed >= 3, "hardly any of the interrupts came while something was computed"


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_ctrl_c_during_generate(capture: str, tmp_path: Path) -> None:
    plain, model = make(lambda: llama(layers=2)), make(lambda: llama(layers=2))
    wrap(model, 0.7, tmp_path, capture)
    expected = run(plain, generate("dynamic"))
    assert_same(run(model, generate("dynamic")), expected)
    delays = random.Random(3)
    for _ in range(4):
        interrupted_after(delays.uniform(0.01, 0.2), lambda: run(model, generate("dynamic")))
        assert not engine_of(model).in_pass
        assert_same(run(model, generate("dynamic")), expected)
    assert_streamed(model)


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_a_disk_error_in_the_middle_of_a_pass(capture: str, tmp_path: Path) -> None:
    """Of the operating system itself: the error names file, offset and cause, and the next pass reads anew."""
    model = make(tied_sequential)
    expected = run(model, call)
    wrap(model, 0.6, tmp_path, capture)
    run(model, call)
    preadv = os.preadv
    for fatal in (1, 3):
        left = [fatal]

        def broken(descriptor: int, buffers: Any, offset: int, left: list[int] = left) -> int:
            left[0] -= 1
            if left[0] <= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(descriptor, buffers, offset)

        refused = pytest.raises(StorageError, match=r"\d+ B at offset \d+ B of swap-.* failed: Input/output error")
        with preadv_is(broken), refused:
            _ = [run(model, call) for _ in range(3)]
        assert_consistent(model, expected)


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_a_users_hook_that_raises_after_some_layers(capture: str, tmp_path: Path) -> None:
    model: Any = make(tied_sequential)
    expected = run(model, call)
    wrap(model, 0.6, tmp_path, capture)
    armed: list[object] = []

    def fail(module: object, *_: object) -> None:
        if module in armed:
            raise LookupError("of the user's")

    places = (model[0], model[1][2], model[4])
    for place in places:
        place.register_forward_hook(fail)
    assert_consistent(model, expected)
    for place in places:
        armed.append(place)
        with pytest.raises(LookupError, match="of the user's"):
            run(model, call)
        armed.clear()
        assert_consistent(model, expected)


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_a_hook_that_came_after_the_first_pass_runs(capture: str, tmp_path: Path) -> None:
    model: Any = make(tied_sequential)
    wrap(model, 0.6, tmp_path, capture)
    expected = run(model, call)
    seen = []
    handle = model[1][2].register_forward_hook(lambda *_: seen.append(1))
    assert_same(run(model, call), expected)
    assert len(seen) == 2, "the block is called twice in a pass"
    handle.remove()
    assert_consistent(model, expected)


Place = tuple[str, int]  # a file of mball and a line


@contextmanager
def tracing(at_line: Callable[[Place], None], *, outside: Collection[str] = ()) -> Iterator[None]:
    """Calls `at_line` before each line of mball that this thread runs, but for those of folders `outside`.

    Not for finalizers: Python itself drops whatever is raised in one, a Ctrl-C too.
    """

    def local(frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            at_line((frame.f_code.co_filename, frame.f_lineno))
        return local

    def enter(frame: FrameType, _: str, __: object) -> Any:
        code = frame.f_code
        is_ours = code.co_filename.startswith(MBALL) and Path(code.co_filename).parent.name not in outside
        return local if is_ours and code.co_name != "_died" else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupt_at(place: Place, model: nn.Module) -> bool:
    """Runs a pass in which KeyboardInterrupt is raised when a line is reached for the first time.

    Returns whether it was: what follows a new plan runs now and then only.
    """
    left = [1]

    def strike(here: Place) -> None:
        if here == place and left:
            left.clear()
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt), tracing(strike):
        run(model, call)
    return not left


def interrupt_at_every_line(directory: str, capture: str) -> None:
    """Prints the lines of mball at which an interrupt leaves something broken.

    In a process of its own: torch's stack of modes may be what is broken, and then nothing works any more.
    """
    torch.set_num_threads(1)
    expected = run(make(tied_sequential), call)

    def fresh() -> nn.Module:
        torch._dynamo.reset()
        model = make(tied_sequential)
        wrap(model, 0.6, Path(directory), capture)
        for _ in range(3):
            run(model, call)
        return model

    model = fresh()
    places: dict[Place, None] = {}
    with tracing(lambda place: places.setdefault(place)):
        run(model, call)
    assert len(places) > 100
    missed = 0
    for file, line in places:
        if linecache.getline(file, line).strip() == "pass":
            continue  # Python looks for signals at calls and jumps, never there
        try:
            missed += not interrupt_at((file, line), model)
            assert_consistent(model, expected, patience_s=2)
        except (Exception, pytest.fail.Exception) as error:
            place = f"{os.path.relpath(file, MBALL)}:{line}"
            print(f"{place}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            model = fresh()
    if missed > len(places) // 20:
        print(f"{missed} of {len(places)} lines were not reached again", flush=True)


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_ctrl_c_at_every_line(capture: str, tmp_path: Path) -> None:
    """A signal strikes between any two lines, and those that open and close a pass are too quick to hit by chance."""
    code = f"from {__name__} import interrupt_at_every_line as act; act({str(tmp_path)!r}, {capture!r})"
    root = Path(mball.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=250)
    assert done.stdout == "", f"Ctrl-C at these lines is not survived:\n{done.stdout}"
    assert done.returncode == 0, done.stderr
