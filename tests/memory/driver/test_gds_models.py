"""Whole models whose checkpoint goes straight to the GPU, over the stand-in for cuFile; and who decides so."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

import mball
from mball import gds
from mball.api import _State, find_state
from mball.cli import disk_findings
from mball.cli.findings import State
from mball.errors import BudgetError, ConfigError, DeviceError, SchemaError
from mball.memory import cufile
from mball.memory.cuda_device import NUM_BUFFERS
from mball.memory.gds_ring import GdsRing
from mball.memory.libc import PAGE_BYTES
from mball.run.file_read import FileRead
from mball.schema import Trace
from mball.storage import file_system_of, mounts
from mball.units import KIB
from tests.adaptors import PoisonedDevice
from tests.memory.driver.models import wrapped_over_the_driver
from tests.memory.driver.standin import Order, StandIn
from tests.run.harness import assert_streamed, make, weight_bytes
from tests.run.there import compare
from tests.run.zoo import ZOO, Specimen, noise

pytestmark = pytest.mark.usefixtures("foreign", "new_process")

READ = "cuFileRead"
BUFFER_BYTES = 16 * KIB
STAGING_BYTES = NUM_BUFFERS * BUFFER_BYTES


def each_token(model: Any) -> torch.Tensor:
    return model(noise(1, 128))


def prompt(model: Any) -> torch.Tensor:
    return model(noise(6, 128))


CHAIN = Specimen(make=lambda: nn.Sequential(*(nn.Linear(128, 128) for _ in range(12))), runs=(each_token, prompt))


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody tried to open cuFile yet, nothing was measured, and host memory has no room to keep anything in."""
    monkeypatch.setattr(cufile, "_session", cufile._Session())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Where tests have their files may be memory.
    monkeypatch.setattr(mounts, "IN_MEMORY", frozenset())


@pytest.fixture
def nvidia_fs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gds, "NVIDIA_FS", tmp_path)


def saved(model: nn.Module, folder: Path) -> Path:
    """Its checkpoint, in which weights lie as they do in memory: kernels sum in another order where they do not."""
    content = save({name: value.detach().clone() for name, value in model.state_dict().items()})
    end = 8 + int.from_bytes(content[:8], "little")
    padding = -end % 4096
    path = folder / "model.safetensors"
    path.write_bytes((end - 8 + padding).to_bytes(8, "little") + content[8:end] + b" " * padding + content[end:])
    return path


@contextmanager
def wrapped(model: nn.Module, share: float, weights: Path, **settings: Any) -> Iterator[Any]:
    settings.setdefault("capture", "operators")
    budget_bytes = settings.pop("budget_bytes", int(weight_bytes(model) * share) + STAGING_BYTES)
    with wrapped_over_the_driver(
        model,
        budget_bytes,
        PoisonedDevice,
        swap_dir=weights.parent,
        weights=weights,
        buffer_bytes=BUFFER_BYTES,
        **settings,
    ):
        yield model


@pytest.mark.parametrize(
    ("specimen", "capture", "order"),
    [
        (ZOO["llama-fp32"], "operators", Order.RANDOM),
        (CHAIN, "graphs", Order.LATEST),
        (CHAIN, "operators", Order.LATEST),
    ],
    ids=["llama", "graphs", "operators"],
)
def test_a_model_that_comes_straight_is_the_resident_one(
    specimen: Specimen, capture: str, order: Order, standin: StandIn, tmp_path: Path
) -> None:
    standin.run_in(order, 5)
    plain = make(specimen.make)
    with wrapped(make(specimen.make), 0.85, saved(plain, tmp_path), io="gds", capture=capture) as model:
        for attempt in range(2):
            for number, call in enumerate(specimen.runs):
                compare(model, plain, call, f"attempt {attempt}, call {number}")
            assert_streamed(model)
        assert standin.calls(READ)
        assert standin.num_compat_reads == 0
        report = mball.report(model)
        assert "straight to the GPU, by cuFile (as asked for)" in report.io_path
        assert "after all" not in report.io_path, "the last page of the checkpoint is cut off"
        assert report.staging_bytes == STAGING_BYTES == standin.opened_bytes
        assert "staging 128.00 KiB" in str(report)
        mball.save_trace(model, tmp_path / "trace.json")
        trace = Trace.from_json((tmp_path / "trace.json").read_text())
        buffers = [tensor.size_bytes for tensor in trace.tensors if tensor.name == "buffers"]
        assert sum(buffers) == report.buffer_bytes < STAGING_BYTES, "who plans the trace has no staging"


def test_what_is_trained_comes_from_swap_and_is_checked_there(standin: StandIn, tmp_path: Path) -> None:
    """Swap does not go straight: its checksums are made in host memory."""
    plain = make(CHAIN.make)
    with wrapped(make(CHAIN.make), 0.9, saved(plain, tmp_path), io="gds") as model:
        compare(model, plain, prompt)
        for each in (plain, model):
            for parameter in each.parameters():
                parameter.data.mul_(0.5)
        before = standin.calls(READ)
        compare(model, plain, prompt)
        assert standin.calls(READ) == before


def test_the_report_says_what_did_not_come_straight_after_all(standin: StandIn, tmp_path: Path) -> None:
    plain = make(CHAIN.make)
    with wrapped(make(CHAIN.make), 0.9, saved(plain, tmp_path), io="gds") as model:
        standin.fail(3, code=5008, function=READ)
        compare(model, plain, prompt)
        assert "1 of them through pinned memory after all, such as" in mball.report(model).io_path
        assert "IO_NOT_SUPPORTED" in mball.report(model).io_path


def test_a_thread_that_reads_may_drop_the_model(
    standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector runs wherever Python allocates, and who closes a device waits for each of its threads."""
    plain = make(CHAIN.make)
    path = saved(plain, tmp_path)
    with wrapped(make(CHAIN.make), 0.9, path, io="gds") as model:
        compare(model, plain, prompt)
        state = find_state(model)
        assert isinstance(state, _State)
        cuda = state.machinery.compute.cuda
        assert cuda is not None
        cuda.changed(str(path), 0, path.stat().st_size)  # so nothing comes from pinned memory
        fill = GdsRing._fill

        def fill_and_drop(ring: GdsRing, *args: Any) -> None:
            fill(ring, *args)
            state.closer()

        monkeypatch.setattr(GdsRing, "_fill", fill_and_drop)
        read = FileRead(file=str(path), offset_bytes=0, size_bytes=PAGE_BYTES, arena_offset_bytes=0)
        event = cuda.copy([read], None)
        deadline_s = time.monotonic() + 20
        while not standin.has_no_files():
            assert time.monotonic() < deadline_s, "the thread waits for itself"
            time.sleep(0.001)
        for thread in threading.enumerate():
            if thread.name == "mball-close":
                thread.join()
        assert event.done()
    assert not any(thread.name.startswith(("mball-gds", "mball-feed")) for thread in threading.enumerate())


# -- asked for, and not to be had ------------------------------------------------------------------------------------


def test_what_is_asked_for_and_does_not_work_is_one_error(standin: StandIn, tmp_path: Path) -> None:
    plain = make(CHAIN.make)
    path = saved(plain, tmp_path)
    standin.set_files(straight=False)
    with pytest.raises(DeviceError, match=r"io='gds' cannot be had: .*is not loaded.*modprobe nvidia-fs.*leave io out"):
        wrapped(make(CHAIN.make), 0.9, path, io="gds").__enter__()


def test_a_file_that_cufile_does_not_take_is_named(standin: StandIn, tmp_path: Path) -> None:
    plain = make(CHAIN.make)
    path = saved(plain, tmp_path)
    standin.fail(1, code=5008, function="cuFileHandleRegister")
    with pytest.raises(DeviceError, match=rf"cuFile does not take {path}: .*IO_NOT_SUPPORTED"):
        wrapped(make(CHAIN.make), 0.9, path, io="gds").__enter__()


def test_a_file_that_cufile_takes_and_does_not_read_is_an_error(standin: StandIn, tmp_path: Path) -> None:
    plain = make(CHAIN.make)
    path = saved(plain, tmp_path)
    standin.fail(1, 99, code=5008, function=READ)
    with pytest.raises(DeviceError, match=rf"cannot be had: cuFile takes {path}, and does.*IO_NOT.*leave io out"):
        wrapped(make(CHAIN.make), 0.9, path, io="gds").__enter__()
    assert standin.has_no_files()


def test_weights_without_a_checkpoint_do_not_go_straight(standin: StandIn, tmp_path: Path) -> None:
    model = make(CHAIN.make)
    with pytest.raises(ConfigError, match="without weights= the weights lie in the swap file"):
        wrapped_over_the_driver(model, 1 << 30, PoisonedDevice, swap_dir=tmp_path, io="gds").__enter__()


@pytest.mark.parametrize("settings", [{"device": "cpu"}, {"device": "cuda", "host_budget": "1GiB"}])
def test_settings_that_exclude_each_other(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"io='gds' is for files that go straight to a GPU, and .*leave one of them"):
        mball.Config.of(budget="1GiB", io="gds", **settings)


# -- nobody asked -----------------------------------------------------------------------------------------------------


def io_path_of(standin: StandIn, path: Path, plain: nn.Module, *, num_opens: int | None = None, **settings: Any) -> str:
    """Which way a model comes that nobody said anything of; cuFile is opened so often for it."""
    with wrapped(make(CHAIN.make), 0.9, path, **settings) as model:
        compare(model, plain, prompt)
        assert num_opens in (None, standin.calls("cuFileDriverOpen"))
        return mball.report(model).io_path


@pytest.fixture
def large_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gds, "_MOST_OF_BUDGET", 1.0)


@pytest.mark.parametrize("is_faster", [True, False])
def test_the_faster_way_is_taken_and_known_from_then_on(
    is_faster: bool,
    standin: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nvidia_fs: None,
    large_part: None,
) -> None:
    plain = make(CHAIN.make)
    path = saved(plain, tmp_path)
    monkeypatch.setattr(gds, "_FASTER", 0.0 if is_faster else 1e9)
    first = io_path_of(standin, path, plain)
    assert ("straight to the GPU, by cuFile (" in first) == is_faster
    assert ("through pinned memory to the GPU (GPUDirect Storage: " in first) == (not is_faster)
    assert "GB/s straight, " in first
    assert " GB/s through pinned memory, on 2" in first
    assert standin.has_no_files()
    (kept,) = (tmp_path / "cache" / "mball" / "calibration").glob("straight-*.json")
    written = kept.stat().st_mtime_ns
    assert io_path_of(standin, path, plain, num_opens=int(is_faster)).rpartition("; ")[2] == first.rpartition("; ")[2]
    assert kept.stat().st_mtime_ns == written, "it was measured again"
    kept.write_text("{")
    assert io_path_of(standin, path, plain).partition(" (")[0] == first.partition(" (")[0]
    assert gds.StraightSpeeds.from_json(kept.read_text()).straight_bytes_per_s > 0


@pytest.mark.parametrize("call", ["cuFileDriverOpen", "cuFileBufRegister", "cuFileHandleRegister", READ])
def test_where_it_does_not_work_the_report_says_why(
    call: str, standin: StandIn, tmp_path: Path, nvidia_fs: None, large_part: None
) -> None:
    plain = make(CHAIN.make)
    path = saved(plain, tmp_path)
    standin.fail(1, 99, code=5008, function=call)
    text = io_path_of(standin, path, plain)
    assert "through pinned memory to the GPU (GPUDirect Storage: " in text
    assert "IO_NOT_SUPPORTED" in text
    assert standin.has_no_files()


def test_without_threads_for_it_the_other_way_is_taken(
    standin: StandIn, tmp_path: Path, nvidia_fs: None, large_part: None, few_threads: None
) -> None:
    plain = make(CHAIN.make)
    text = io_path_of(standin, saved(plain, tmp_path), plain)
    assert "through pinned memory to the GPU (GPUDirect Storage: 8 threads" in text
    assert standin.has_no_files()


def test_cufile_is_not_opened_for_nothing(
    standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large_part: None
) -> None:
    plain = make(CHAIN.make)
    path = saved(plain, tmp_path)
    monkeypatch.setattr(gds, "NVIDIA_FS", tmp_path / "nothing")
    assert "(GPUDirect Storage: nvidia-fs is not loaded)" in io_path_of(standin, path, plain, num_opens=0)
    monkeypatch.setattr(gds, "NVIDIA_FS", tmp_path)
    assert "GPUDirect" not in io_path_of(standin, path, plain, num_opens=0, host_budget="8MiB")
    monkeypatch.setattr(gds, "_MOST_OF_BUDGET", 1e-6)
    assert "would be a large part of the budget" in io_path_of(standin, path, plain, num_opens=0)


@pytest.mark.parametrize("day", ["2020-01-01", "2999-01-01"])
def test_speeds_of_another_time_are_measured_again(
    day: str, standin: StandIn, tmp_path: Path, nvidia_fs: None, large_part: None
) -> None:
    plain = make(CHAIN.make)
    path = saved(plain, tmp_path)
    io_path_of(standin, path, plain)
    (kept,) = (tmp_path / "cache" / "mball" / "calibration").glob("straight-*.json")
    speeds = gds.StraightSpeeds.from_json(kept.read_text())
    kept.write_text(replace(speeds, measured_at=f"{day}T00:00:00+00:00").to_json())
    assert day not in io_path_of(standin, path, plain, num_opens=1)
    assert day not in kept.read_text()


def test_a_budget_without_room_for_its_buffers_is_none_too_small(
    standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvidia_fs: None, large_part: None
) -> None:
    """Only who asks for GPUDirect Storage is told that the budget is too small for it."""
    monkeypatch.setattr(gds, "_FASTER", 0.0)
    plain = make(CHAIN.make)
    path = saved(plain, tmp_path)
    assert "straight to the GPU, by cuFile (" in io_path_of(standin, path, plain)
    with pytest.raises(BudgetError) as caught:
        wrapped(make(CHAIN.make), 0, path, budget_bytes=1, io="gds").__enter__()
    smallest_bytes = caught.value.smallest_bytes
    for budget_bytes in (smallest_bytes - 1, smallest_bytes - STAGING_BYTES):
        with wrapped(make(CHAIN.make), 0, path, budget_bytes=budget_bytes) as model:
            assert "no room for its buffers beside the model" in mball.report(model).io_path
            assert standin.calls("cuFileDriverOpen") == 0
    with wrapped(make(CHAIN.make), 0, path, budget_bytes=smallest_bytes) as model:
        assert "straight to the GPU" in mball.report(model).io_path
    with pytest.raises(BudgetError):
        wrapped(make(CHAIN.make), 0, path, budget_bytes=smallest_bytes - STAGING_BYTES - 1).__enter__()


def test_the_doctor_tells_what_was_measured_here(
    standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this file system on this machine, and of no other."""
    monkeypatch.setattr(disk_findings, "NVIDIA_FS", tmp_path)
    folder = tmp_path / "cache" / "mball" / "calibration"
    folder.mkdir(parents=True)
    here, now = str(file_system_of("/")), datetime.now(UTC)
    measured = [(platform.node(), here, now), ("another", here, now), (platform.node(), "x on y", now)]
    measured.append((platform.node(), here, now - timedelta(days=200)))
    for number, (host, place, moment) in enumerate(measured, 1):
        speeds = gds.StraightSpeeds(
            host=host,
            place=place,
            gpu="0000:3b:00.0",
            measured_at=moment.isoformat(),
            straight_bytes_per_s=6.5e9,
            pinned_bytes_per_s=number * 1e9,
        )
        (folder / f"straight-{number}.json").write_text(speeds.to_json())
    found = disk_findings._gpu_direct_storage("disk of /", "xfs", "/")
    assert found.state is State.FOUND
    assert found.value.startswith("could work here, cuFile 1200: a model for a GPU is read so if that is faster")
    assert found.value.count("GB/s straight") == 1
    assert "6.50 GB/s straight, 1.00 GB/s through pinned memory, on 2" in found.value
    refused = disk_findings._gpu_direct_storage("disk of /", "tmpfs", "/")
    assert refused.state is State.LIMITED
    assert refused.value == "could not work here: tmpfs is not a file system that it reads"


@pytest.mark.parametrize(
    "change", [{"measured_at": "2026-01-01T00:00:00"}, {"measured_at": "x"}, {"straight_bytes_per_s": 0.0}]
)
def test_speeds_that_nobody_measured(change: dict[str, Any]) -> None:
    facts: dict[str, Any] = {"host": "h", "place": "p", "gpu": "g", "measured_at": "2026-01-01T00:00:00+00:00"}
    speeds = gds.StraightSpeeds(**facts | {"straight_bytes_per_s": 2e9, "pinned_bytes_per_s": 1e9})
    assert gds.StraightSpeeds.from_json(speeds.to_json()) == speeds
    assert speeds.is_worth_it
    with pytest.raises(SchemaError, match="cannot have been measured"):
        gds.StraightSpeeds.from_json(replace(speeds, **change).to_json())
