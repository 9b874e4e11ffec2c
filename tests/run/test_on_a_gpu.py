"""Wrapped models on a real GPU: the numbers of the resident model, bit for bit, within the budget that NVML sees.

What is played is in `scenes.py`, and machines without a GPU play it over the stand-in for the driver. What breaks a
context, or looks at all that is used of the GPU, runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mball.errors import DeviceError
from mball.memory import facts
from mball.memory.allocator.library import load_library
from mball.memory.cuda_driver import CudaDriver
from mball.memory.cuda_region import CudaRegion
from mball.memory.cuda_streams import CudaStreams
from mball.memory.pinned import PinnedSlab
from mball.units import MIB, format_bytes
from tests.run import scenes
from tests.run.gpu_place import gpu_place
from tests.run.scenes import Hostility, Place, UnsteadyError
from tests.run.wide import WIDE

ROOT = Path(__file__).parents[2]
# Beside the budget: what the driver and torch take of their own accord, in pieces of some MiB.
SLACK_BYTES = 64 * MIB
LEFT_BYTES = 8 * MIB
SANITIZER_S = 150

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(90)]

_lost_in: list[str] = []


@pytest.fixture(autouse=True)
def whole_context(request: pytest.FixtureRequest) -> Iterator[None]:
    """Says which test broke the context, to all that come after it in this process."""
    if _lost_in:
        pytest.fail(f"nothing can run in this process any more: {_lost_in[0]}", pytrace=False)
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        _lost_in.append(f"{request.node.nodeid} broke the context: {error}")
        if "PYTEST_XDIST_WORKER" in os.environ:  # another process takes its place, and all tests that are left
            print(_lost_in[0], file=sys.__stderr__, flush=True)
            time.sleep(1)  # what the test itself said is on its way
            os._exit(1)
        pytest.fail(_lost_in[0], pytrace=False)


@pytest.fixture
def place() -> Place:
    return gpu_place()


def play(scene: Callable[[], Any]) -> None:
    """Plays a scene, and skips where there is nothing to compare with."""
    try:
        scene()
    except UnsteadyError as error:
        pytest.skip(f"on this GPU the model without mball does not repeat its own bits: {error}")


# -- what the design stands on ---------------------------------------------------------------------------------------


def test_torch_reads_pinned_memory_as_a_tensor_of_the_gpu() -> None:
    """So rows of a table are looked up where it lies."""
    torch.zeros(1, device="cuda:0")
    driver = CudaDriver()
    if not driver.reads_pinned_memory():
        pytest.skip("this GPU reads no pinned memory by the host's addresses")
    slab = PinnedSlab(CudaStreams(driver), 1 * MIB, node=facts.numa_node(driver.pci_address()))
    slab.pin()
    assert slab.pinned_bytes == slab.size_bytes, "pinned memory was refused"
    table = torch.arange(64 * 128, dtype=torch.float32).reshape(64, 128)
    slab.view(0, table.nbytes)[:] = table.numpy().tobytes()
    there = CudaRegion(slab.address, table.nbytes, lambda: None, what="table").tensor(0, torch.float32, (64, 128))
    assert there.device == torch.device("cuda", 0)
    rows = torch.tensor([3, 63, 0, 3])
    found = torch.nn.functional.embedding(rows.cuda(), there)
    assert torch.equal(found.cpu(), table[rows])
    torch.cuda.synchronize()
    del there
    slab.close()
    driver.close()


def test_a_driver_stream_is_made_late_by_a_kernel_that_spins() -> None:
    """Else the tests of late copies would show nothing."""
    torch.zeros(1, device="cuda:0")
    driver = CudaDriver()
    streams = CudaStreams(driver)
    with driver.current():
        handle, event = streams.create_stream(), streams.create_event()
    with torch.cuda.stream(torch.cuda.ExternalStream(handle)):
        torch.cuda._sleep(200_000_000)  # some 0.1 s
    with driver.current():
        streams.record(event, handle)
        assert not streams.is_done(event), "the stream was not late"
        streams.drain(handle)
        assert streams.is_done(event)
        streams.destroy_event(event)
        streams.destroy_stream(handle)
    driver.close()


# -- the same bits ---------------------------------------------------------------------------------------------------

KINDS = [(kind, "graphs") for kind in WIDE] + [(kind, "operators") for kind in WIDE if kind != "llama-fp32"]


@pytest.mark.parametrize(("kind", "capture"), KINDS)
def test_streams_as_resident(kind: str, capture: str, place: Place, tmp_path: Path) -> None:
    play(lambda: scenes.streams_as_resident(place, kind, capture=capture, swap_dir=tmp_path))


@pytest.mark.parametrize("capture", ["graphs", "operators"])
@pytest.mark.parametrize("kind", ["llama-fp32", "convolutions"])
def test_casts_as_resident(kind: str, capture: str, place: Place, tmp_path: Path) -> None:
    play(lambda: scenes.casts_as_resident(place, kind, capture=capture, swap_dir=tmp_path))


@pytest.mark.parametrize("hostility", list(Hostility), ids=lambda hostility: hostility.value)
@pytest.mark.parametrize(("num_slots", "capture"), [(2, "graphs"), (3, "operators"), (3, "graphs"), (5, "graphs")])
def test_passes_follow_each_other(
    num_slots: int, capture: str, hostility: Hostility, place: Place, tmp_path: Path
) -> None:
    play(
        lambda: scenes.passes_follow_each_other(
            place, num_slots, capture=capture, swap_dir=tmp_path, hostility=hostility
        )
    )


@pytest.mark.parametrize("hostility", [Hostility.POISONED, Hostility.LATE_COPIES], ids=lambda each: each.value)
def test_steps_are_recorded(hostility: Hostility, place: Place, tmp_path: Path) -> None:
    play(lambda: scenes.steps_are_recorded(place, swap_dir=tmp_path, hostility=hostility))


@pytest.mark.parametrize("hostility", [Hostility.LATE_COPIES, Hostility.LATE_COMPUTE], ids=lambda each: each.value)
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "by-nobody"])
def test_streams_take_turns(ordered: bool, hostility: Hostility, place: Place, tmp_path: Path) -> None:
    play(lambda: scenes.streams_take_turns(place, ordered=ordered, swap_dir=tmp_path, hostility=hostility))


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_writes_are_noticed(capture: str, place: Place, tmp_path: Path) -> None:
    play(lambda: scenes.writes_are_noticed(place, capture=capture, swap_dir=tmp_path))


def test_budgets_follow_each_other(place: Place, tmp_path: Path) -> None:
    play(lambda: scenes.budgets_follow_each_other(place, swap_dir=tmp_path))


@pytest.fixture(params=["torch", "mball"])
def allocator(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Skips where this GPU or machine cannot have it."""
    if request.param == "mball":
        driver = CudaDriver()
        has_virtual_memory = driver.has_virtual_memory
        driver.close()
        if not has_virtual_memory:
            pytest.skip("GPU 0 has no virtual memory")
        try:
            load_library(tmp_path)
        except DeviceError as error:
            pytest.skip(str(error))
    return str(request.param)


def test_residents_yield(allocator: str, place: Place, tmp_path: Path) -> None:
    before = torch.cuda.get_per_process_memory_fraction(0)
    play(lambda: scenes.residents_yield(place, swap_dir=tmp_path, allocator=allocator))
    assert torch.cuda.get_per_process_memory_fraction(0) == before


@pytest.mark.parametrize("allocator", ["mball"], indirect=True)
@pytest.mark.parametrize(("kind", "capture"), [("llama-fp32", "graphs"), ("sequential", "operators")])
def test_streams_in_segments(kind: str, capture: str, allocator: str, place: Place, tmp_path: Path) -> None:
    play(lambda: scenes.streams_as_resident(place, kind, capture=capture, swap_dir=tmp_path, allocator=allocator))


@pytest.mark.parametrize("capture", ["graphs", "operators"])
def test_after_an_error(capture: str, place: Place, tmp_path: Path) -> None:
    play(lambda: scenes.after_an_error(place, capture=capture, swap_dir=tmp_path))


@pytest.mark.parametrize("capture", ["auto", "graphs"])
def test_generates(capture: str, place: Place, tmp_path: Path) -> None:
    play(lambda: scenes.generates(place, capture=capture, swap_dir=tmp_path))


@pytest.mark.parametrize("shift_bytes", [0, 8, 16, 40])
def test_a_checkpoint_is_read_in_place(shift_bytes: int, place: Place, tmp_path: Path) -> None:
    play(lambda: scenes.a_checkpoint_is_read_in_place(place, shift_bytes, swap_dir=tmp_path))


# -- in a process of its own -----------------------------------------------------------------------------------------


def told(story: str, timeout_s: float, *before: str, **environment: str) -> tuple[dict[str, Any], str]:
    """Returns what a story tells, and all that the process said. Fails with that if it did not end well."""
    command = [*before, sys.executable, "-m", "tests.run.gpu_child", story]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    finished = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    said = f"{finished.stdout[-3000:]}\n{finished.stderr[-6000:]}"
    if finished.returncode:
        pytest.fail(f"{' '.join(command)} ended with {finished.returncode}:\n{said}", pytrace=False)
    lines = [line for line in finished.stdout.splitlines() if line.startswith("{")]
    assert lines, f"{story} told nothing:\n{said}"
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer, said


def check_budgets(answer: dict[str, Any]) -> None:
    """Raises AssertionError with all numbers if more was used than a budget and the slack."""
    lines = [
        f"budget {format_bytes(each['budget_bytes'])}: {format_bytes(max(each['above_baseline_bytes'], 0))} above the "
        f"baseline in {each['num_looks']} looks, arena {format_bytes(each['arena_bytes'])}, activations "
        f"{format_bytes(each['activation_bytes'])}"
        for each in answer["budgets"]
    ]
    text = "\n".join([*lines, f"left at the end: {answer['left_bytes']} bytes"])
    for each in answer["budgets"]:
        assert each["above_baseline_bytes"] <= each["budget_bytes"] + SLACK_BYTES, text
        assert each["num_looks"] > 1, text
    assert any(each["bytes_read_last_pass"] for each in answer["budgets"]), f"nothing was streamed\n{text}"
    assert answer["left_bytes"] <= LEFT_BYTES, text


@pytest.mark.alone
@pytest.mark.timeout(130)
def test_the_budget_holds_as_nvml_sees_it() -> None:
    """Nobody else may use the GPU meanwhile: NVML tells of all together."""
    answer, _ = told("budgets", 120)
    check_budgets(answer)


@pytest.mark.alone
@pytest.mark.timeout(130)
def test_unwrapped_all_memory_is_given_back() -> None:
    answer, _ = told("unwrapped", 120)
    assert answer["wrapped"] - answer["before"] > 32 * MIB, answer
    assert abs(answer["after"] - answer["before"]) <= LEFT_BYTES, answer


@pytest.mark.timeout(130)
def test_after_a_kernel_that_went_astray_weights_can_be_saved() -> None:
    answer, _ = told("lost", 120)
    assert len(answer["errors"]) == 2, answer
    assert answer["weights_are_whole"], answer
    assert not answer["unwrapping"], answer
    assert "GpuLostError" in f"{answer['errors']} {answer['budget']}", f"nobody said what is lost: {answer}"


def sanitizer() -> str | None:
    """Returns NVIDIA's compute-sanitizer, where it is on this machine."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


@pytest.mark.timeout(SANITIZER_S + 20)
def test_compute_sanitizer_finds_nothing() -> None:
    """Without torch's own caching, which would hide what reaches past an allocation."""
    tool = sanitizer()
    if tool is None:
        pytest.skip("compute-sanitizer is not on this machine")
    before = (tool, "--tool", "memcheck", "--error-exitcode", "9", "--check-device-heap", "no")
    try:
        answer, said = told("small", SANITIZER_S, *before, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer did not come to an end within {SANITIZER_S} s")
    except pytest.fail.Exception as failed:
        if "Device not supported" in str(failed):
            pytest.skip("compute-sanitizer does not support the GPU as this machine has it")
        raise
    assert answer["read_bytes"] > 0, answer
    assert "ERROR SUMMARY: 0 errors" in said, said


def test_what_these_tests_need_is_here() -> None:
    """Said once, and by name."""
    missing = [name for name in ("pynvml", "transformers", "cuda.bindings") if importlib.util.find_spec(name) is None]
    assert not missing, f"this Python lacks {missing}"
