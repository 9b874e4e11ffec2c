"""The calibration: what is measured, what follows from it, and which of those on disk are believed."""

from __future__ import annotations

import json
import logging
import os
import platform
import random
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mball
from mball.config import calibration_directory, own_cache
from mball.errors import StorageError
from mball.schema import Calibration, Link, Tier
from mball.storage import (
    DirectIO,
    Effort,
    FileTable,
    ReaderChoice,
    Threads,
    calibrate,
    calibrated_choice,
    choose_reader,
    file_system_of,
    find_calibrated_link,
    load_calibration,
    save_calibration,
)
from mball.storage import calibration as module
from mball.storage.calibration import _Cell, _choose, _derive, _Run
from mball.storage.calibration_cache import calibration_path
from mball.storage.request_choice import SETTINGS, choose_requests, fastest
from mball.units import KIB, MIB
from tests.calibrations import keep_calibration, roomy_directory
from tests.preads import SetPreadv
from tests.storage.reads import num_descriptors

QUICK = Effort(
    size_bytes=64 * MIB,
    time_limit_s=0.0,
    sample_s=0.001,
    blocks_bytes=(64 * KIB, 2 * MIB, 16 * MIB),
    depths=(1, 2, 8),
    requests_s=0.0,
)
WINDOW_BYTES = 16 * MIB


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory where 64 MiB are written at once."""
    with tempfile.TemporaryDirectory(dir=roomy_directory()) as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    with tempfile.TemporaryDirectory(dir=roomy_directory()) as directory:
        return calibrate(directory, effort=QUICK)


def test_every_combination_is_measured_in_each_round_and_nothing_is_left(in_memory: Path) -> None:
    descriptors = num_descriptors()
    doing: list[str] = []
    effort = replace(QUICK, time_limit_s=0.2)
    calibration = calibrate(in_memory, effort=effort, progress=doing.append)
    calibration.check()
    assert Calibration.from_json(calibration.to_json()) == calibration
    assert calibration.place == str(file_system_of(str(in_memory)))
    assert calibration.host == platform.node()
    assert abs(datetime.now(UTC) - calibration.time) < timedelta(minutes=1)
    found = calibration.find_link(Tier.DISK, Tier.DEVICE)
    assert found is not None
    assert found.file_bytes == 64 * MIB
    # 16 MiB, eight at a time, would only make them wait.
    wanted = [(block, depth) for block in QUICK.blocks_bytes for depth in QUICK.depths if block * depth <= 64 * MIB]
    assert [(sample.block_bytes, sample.depth) for sample in found.samples] == wanted
    assert found.num_rounds >= 1
    assert doing[0].startswith("writing 64.00 MiB")
    assert sum("round 1," in line for line in doing) == len(wanted)
    assert list(in_memory.iterdir()) == []
    assert num_descriptors() == descriptors


def test_a_disk_past_the_page_cache_or_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_preadv: SetPreadv
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(random.Random(0).randbytes(64 * MIB))
    effort = replace(QUICK, blocks_bytes=(MIB, 8 * MIB), depths=(1, 4))
    reads: list[tuple[int, int]] = []
    real = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset_bytes: int) -> int:
        done = real(descriptor, buffers, offset_bytes)
        reads.append((offset_bytes, done))
        return done

    set_preadv(counting)
    with_cache = calibrate(path, effort=effort).links[0]
    assert {offset_bytes for offset_bytes, _ in reads} <= set(range(0, 64 * MIB, MIB)), "the file itself was read"
    assert max(done for _, done in reads) == 2 * MIB, "by the reader's requests"
    files = FileTable()
    assert ("O_DIRECT" in with_cache.reader) == files.is_direct(files.add_path(path))
    files.close()

    # Where direct reads are refused, what was read is dropped from the cache before it is read again.
    dropped: list[int] = []
    monkeypatch.setattr(FileTable, "is_direct", lambda self, name: False)
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: dropped.append(arguments[-1]))
    assert "page cache" in calibrate(path, effort=effort).links[0].reader
    assert dropped == [os.POSIX_FADV_DONTNEED] * 5, (
        "once for each combination, and for the first read that is not counted"
    )


def test_what_cannot_be_measured_says_why(in_memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"/no/such cannot be calibrated \(No such file"):
        calibrate("/no/such")
    (in_memory / "small").write_bytes(bytes(MIB))
    with pytest.raises(StorageError, match=r"a file of 1.00 MiB, it takes 64.00 MiB"):
        calibrate(in_memory / "small")
    real = os.statvfs

    def full(path: str) -> Any:
        usage = list(real(path))
        usage[4] = 10 * MIB // usage[1]
        return os.statvfs_result(usage)

    monkeypatch.setattr(os, "statvfs", full)
    with pytest.raises(StorageError, match=r"a file of 5.00 MiB, it takes 64.00 MiB: free twice as much"):
        calibrate(in_memory)


def test_a_failing_disk_is_an_error_and_leaves_no_thread(in_memory: Path, set_preadv: SetPreadv) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    descriptors = num_descriptors()
    set_preadv(broken)
    with pytest.raises(StorageError, match="Input/output error"):
        calibrate(in_memory, effort=QUICK)
    assert num_descriptors() == descriptors
    assert list(in_memory.iterdir()) == []


def ideal_runs(bandwidth: float, latency_s: float, noise: random.Random | None = None) -> dict[_Cell, list[_Run]]:
    """What an ideal link does: a request that finds it idle pays the latency, one behind others does not."""
    runs: dict[_Cell, list[_Run]] = {}
    for block_bytes in Effort().blocks_bytes:
        for depth in Effort().depths:
            if block_bytes * depth > 4 * WINDOW_BYTES:
                continue
            cell = _Cell(block_bytes, depth)
            for _ in range(9):
                slower = 1.0 if noise is None or noise.random() > 0.3 else noise.uniform(1, 30)
                alone_s = latency_s + block_bytes / bandwidth
                time_s = max(alone_s, depth * block_bytes / bandwidth) * slower
                runs.setdefault(cell, []).append(_Run(depth * block_bytes / time_s, [time_s]))
    return runs


@pytest.mark.parametrize("noise", [None, random.Random(1)], ids=["quiet", "a third of the runs up to 30 times slower"])
def test_the_link_that_was_there_is_found(noise: random.Random | None) -> None:
    runs = ideal_runs(2e9, 4e-4, noise)
    link, spread = _derive(runs, WINDOW_BYTES)
    assert link.bandwidth_bytes_per_s == pytest.approx(2e9, rel=0.02)
    assert link.latency_s == pytest.approx(4e-4, rel=0.05)
    assert link.window_bytes == WINDOW_BYTES
    assert (spread > 0.1) == (noise is not None)
    # Four hundred microseconds are 800 kB: 1 MiB in flight hides them nearly, unless it is one request.
    best = _choose(runs, link)
    assert (best.block_bytes, best.depth) == (256 * KIB, 4)


def test_a_request_alone_is_never_predicted_to_take_less_than_the_smallest_did() -> None:
    runs = ideal_runs(2e9, 0.0)
    for cell in runs:
        if cell.depth == 1 and cell.block_bytes == 64 * KIB:
            runs[cell] = [_Run(2e8, [3e-4])]
    link, _ = _derive(runs, WINDOW_BYTES)
    assert link.transfer_s(64 * KIB) == pytest.approx(3e-4)


def test_a_calibration_is_kept_and_found_again(
    calibration: Calibration, in_memory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = file_system_of(str(in_memory))
    assert load_calibration(None, place) is None
    assert load_calibration(tmp_path / "cache", place) is None
    path = save_calibration(tmp_path / "cache", calibration)
    assert load_calibration(tmp_path / "cache", place) == calibration
    assert load_calibration(tmp_path / "cache", file_system_of("/proc")) is None
    newer = replace(calibration, measured_at=datetime.now(UTC).isoformat())
    assert save_calibration(tmp_path / "cache", newer) == path
    assert load_calibration(tmp_path / "cache", place) == newer
    assert list(path.parent.iterdir()) == [path]
    assert not caplog.records
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="XDG_CACHE_HOME"):
        save_calibration(tmp_path / "file", calibration)


def test_only_files_of_that_file_system_and_that_reader_have_the_link(
    calibration: Calibration, in_memory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_calibration(tmp_path, calibration)
    (in_memory / "weights").write_bytes(bytes(8192))
    files = FileTable()
    here, elsewhere = files.add_path(in_memory / "weights"), files.add_path("/proc/self/status")
    with tempfile.TemporaryFile(dir=in_memory) as unlinked:
        swap = files.add_descriptor("swap", unlinked.fileno())
    link = calibration.links[0].link
    assert find_calibrated_link(tmp_path, files, here, choose_reader()) == (link, calibration.measured_at[:10])
    assert find_calibrated_link(tmp_path, files, swap, choose_reader()) is not None, "though it has no path any more"
    assert find_calibrated_link(tmp_path, files, elsewhere, choose_reader()) is None
    assert find_calibrated_link(None, files, here, choose_reader()) is None
    assert not caplog.records
    caplog.set_level(logging.INFO)
    assert find_calibrated_link(tmp_path, files, here, choose_reader(num_threads=3)) is None
    assert "3 threads" in caplog.text
    was_direct = files.is_direct(here)
    files.close()

    buffered = FileTable(direct=DirectIO.OFF)
    found = find_calibrated_link(tmp_path, buffered, buffered.add_path(in_memory / "weights"), choose_reader())
    assert (found is None) == was_direct
    buffered.close()


def changed(calibration: Calibration, **changes: Any) -> str:
    return json.dumps({**json.loads(calibration.to_json()), **changes})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda c: "{", "is no JSON"),
        (lambda c: "", "is no JSON"),
        (lambda c: b"\xff\xfe", "utf-8"),
        (lambda c: "[" * 100_000, "recursion"),
        (lambda c: changed(c, version=99), "version 99"),
        (lambda c: changed(c, links=[]), "joins two tiers"),
        (lambda c: changed(c, surprise=1), "unknown fields"),
        (lambda c: re.sub(r'"spread":[^,}]*', '"spread":1' + "0" * 400, c.to_json()), "too large"),
        (lambda c: changed(c, host="another"), "of the machine another"),
        (lambda c: changed(c, place="/dev/sdb on /mnt type ext4"), "/dev/sdb on /mnt"),
        (lambda c: changed(c, measured_at="2020-01-01T00:00:00+00:00"), "days old, more than 180"),
        (lambda c: changed(c, measured_at="0001-01-01T00:00:00+14:00"), "out of range"),
        (lambda c: changed(c, measured_at="2999-01-01T00:00:00+00:00"), "still to come"),
    ],
)
def test_what_is_broken_foreign_or_stale_is_ignored_with_one_line(
    content: Any, why: str, calibration: Calibration, in_memory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_calibration(tmp_path, calibration)
    text = content(calibration)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    place = file_system_of(str(in_memory))
    assert load_calibration(tmp_path, place) is None
    assert load_calibration(tmp_path, place) is None
    (record,) = caplog.records
    assert why in record.getMessage()
    assert str(path) in record.getMessage()
    assert "mball doctor --calibrate" in record.getMessage()
    # And it is no obstacle.
    save_calibration(tmp_path, calibration)
    assert load_calibration(tmp_path, place) == calibration


def test_a_file_that_cannot_be_read_is_ignored(
    calibration: Calibration, in_memory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = file_system_of(str(in_memory))
    calibration_path(tmp_path, str(place)).mkdir()
    assert load_calibration(tmp_path, place) is None
    assert "Is a directory" in caplog.text


def test_another_way_of_reading_has_another_calibration(
    calibration: Calibration, in_memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_calibration(tmp_path, calibration)
    (in_memory / "weights").write_bytes(bytes(8192))
    files = FileTable()
    name = files.add_path(in_memory / "weights")
    assert find_calibrated_link(tmp_path, files, name, choose_reader()) is not None
    monkeypatch.setattr(module, "READER_VERSION", module.READER_VERSION + 1)
    assert find_calibrated_link(tmp_path, files, name, choose_reader()) is None
    files.close()


def test_the_default_effort_saturates_the_reader() -> None:
    cells = [(block, depth) for block in Effort().blocks_bytes for depth in Effort().depths]
    assert sum(32 * MIB <= block * depth <= 64 * MIB for block, depth in cells) >= 6
    assert Effort().size_bytes >= 1 << 30


def rounds_of(gain: float, spread: float, num_rounds: int) -> list[tuple[float, float, float]]:
    """A disk that drifts by half, and another setting that is `gain` times as fast, give or take `spread`."""
    drift = random.Random(1)
    before_s = [drift.uniform(1.0, 1.5) for _ in range(num_rounds)]
    return [(before, before / (gain + spread * (-1) ** number), before) for number, before in enumerate(before_s)]


@pytest.mark.parametrize(
    ("gain", "spread", "num_rounds", "is_taken"),
    [(1.2, 0.02, 7, True), (1.2, 0.2, 7, False), (1.02, 0.0, 7, False), (1.5, 0.0, 4, False), (0.8, 0.0, 7, False)],
    ids=["clearly faster", "perhaps by chance", "not worth it", "hardly tried", "slower"],
)
def test_requests_are_changed_where_that_is_clearly_faster(
    gain: float, spread: float, num_rounds: int, is_taken: bool
) -> None:
    default = choose_reader()
    choices = [default, replace(default, num_threads=16), replace(default, num_threads=4)]
    assert fastest(choices, rounds_of(gain, spread, num_rounds)) == choices[is_taken]


def test_settings_are_tried_and_nothing_is_left(in_memory: Path) -> None:
    path = in_memory / "weights"
    path.write_bytes(random.Random(0).randbytes(4 * MIB))
    before = num_descriptors()
    doing: list[str] = []
    default = choose_reader()
    with path.open("rb", buffering=0) as file:
        found = choose_requests(file.fileno(), default, 0.3, doing.append)
        assert choose_requests(file.fileno(), default, 0.0, doing.append) == default
    assert (found.num_threads, found.chunk_bytes) in {(8, 2 * MIB), *SETTINGS}
    wanted = [default, *(replace(default, num_threads=number, chunk_bytes=size) for number, size in SETTINGS)]
    assert {line.partition(" (")[0] for line in doing} == {f"reading by {each}" for each in wanted}
    assert num_descriptors() == before


def test_readers_make_the_requests_that_were_calibrated(
    in_memory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    link = Link(bandwidth_bytes_per_s=2e9, latency_s=1e-4)
    calibration = keep_calibration(in_memory, link, monkeypatch, num_threads=16, chunk_bytes=4 * MIB)
    (in_memory / "weights").write_bytes(bytes(8192))
    default = choose_reader(cache=own_cache())
    files = FileTable()
    assert calibrated_choice(calibration_directory(), files, default) == default, "nobody knows what will be read"
    here = files.add_path(in_memory / "weights")
    choice = calibrated_choice(calibration_directory(), files, default)
    assert str(choice).startswith("16 threads of ")
    assert str(choice).endswith("4.00 MiB a request")
    assert choice.reason == f"{default.reason}; requests as calibrated on {calibration.day}"
    assert find_calibrated_link(calibration_directory(), files, here, choice) == (link, calibration.day)
    reader = choice.open(files)
    assert reader.window_bytes == 64 * MIB
    reader.close()
    python = choose_reader(Threads.PYTHON)
    if default.library is not None:
        assert calibrated_choice(calibration_directory(), files, python) == python, "they were not calibrated"
    files.add_path("/proc/self/status")
    assert calibrated_choice(calibration_directory(), files, default) == choice, "the largest file decides"
    assert calibrated_choice(tmp_path, files, default) == default
    files.close()


def test_a_wrapped_model_and_a_load_do_so_too_unless_threads_are_named(
    in_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Link(bandwidth_bytes_per_s=2e9, latency_s=1e-4)
    calibration = keep_calibration(in_memory, link, monkeypatch, num_threads=16, chunk_bytes=4 * MIB)
    model = torch.nn.Linear(64, 64)
    save_file(model.state_dict(), in_memory / "model.safetensors")
    how: dict[str, Any] = {"weights": in_memory / "model.safetensors", "swap_dir": tempfile.gettempdir()}
    said = []
    for settings in ({}, {"io_threads": 8}):
        mball.wrap(model, "1MiB", **how, **settings)
        said.append(mball.report(model).io_path)
        mball.unwrap(model)
    assert "by 16 threads" in said[0]
    assert f"calibrated on {calibration.day}" in said[0]
    assert "by 8 threads" in said[1]
    assert "calibrated" not in said[1]
    opened: list[ReaderChoice] = []
    real = ReaderChoice.open

    def note(self: ReaderChoice, files: FileTable) -> Any:
        opened.append(self)
        return real(self, files)

    monkeypatch.setattr(ReaderChoice, "open", note)
    monkeypatch.setattr("mball.load.safetensors_source.is_cached", lambda *_: False)
    loaded = mball.load_file(in_memory / "model.safetensors")
    assert torch.equal(loaded["weight"], model.weight)
    assert [(choice.num_threads, choice.chunk_bytes) for choice in opened] == [(16, 4 * MIB)]
