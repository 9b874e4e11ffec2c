"""Faults of the disk below `mball.load_file` and `mball.open`: the right bits, or one clear error."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mball
from mball.errors import CheckpointError, ConfigError, StorageError
from mball.load import safetensors_source
from mball.load.file_memory import MappedMemory
from mball.memory import PrivateMapping
from mball.storage import CheckpointIndex, ThreadedReader
from mball.units import MIB
from tests.load.checkpoints import assert_same, save_misaligned, save_shards, tensors_of_many_kinds
from tests.preads import Preadv, preadv_is, read_pool

# A regular file that can be opened and not read: at offset 0 of a process nothing is mapped. The error is the kernel's.
UNREADABLE = "/proc/self/mem"


def of_c(*values: str) -> Any:
    """Returns what is tried with threads of C, where they can be had."""
    return pytest.param("native", *values, marks=pytest.mark.skipif(read_pool() is None, reason="needs cc"))


READERS = [of_c(), "threads"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "model.safetensors"
    save_file(tensors_of_many_kinds(), path)
    return path


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there is a later read."""
    monkeypatch.setattr(safetensors_source.OwnMemory.reads, "__defaults__", (256 << 10,))


def faulty(fault: str, at: int, made: list[int]) -> Preadv:
    """Does `fault` to the read of this number, and counts reads in `made`; looks at the page cache are none."""
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            return real(descriptor, buffers, offset, flags)
        made.append(offset)
        if len(made) - 1 != at:
            return real(descriptor, buffers, offset)
        if fault == "short":
            return real(descriptor, [buffers[0][: max(len(buffers[0]) // 3, 1)]], offset)
        number = getattr(errno, fault)
        raise OSError(number, os.strerror(number))

    return preadv


def is_cached_as(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was just written is in the page cache, and some file systems keep it there whatever one asks for."""
    monkeypatch.setattr(safetensors_source, "is_cached", lambda *_: cached)


# -- reads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("io", READERS)
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("at", [0, 5])
def test_a_read_that_fails(file: Path, io: str, cached: bool, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the page cache and through it, by both pools; what comes next is right, also of the open checkpoint."""
    is_cached_as(cached, monkeypatch)
    made: list[int] = []
    with mball.open(file, copy=True, io=io) as checkpoint:
        for ask in (lambda: mball.load_file(file, copy=True, io=io), checkpoint.get_tensors):
            made.clear()
            with (
                preadv_is(faulty("EIO", at, made)),
                pytest.raises(StorageError, match=r"model\.safetensors.*(Input/output error|EIO)"),
            ):
                ask()
            assert len(made) > at
            assert_same(ask(), tensors_of_many_kinds())


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize(("io", "fault"), [("threads", "short"), of_c("short"), of_c("EINTR")])
def test_a_read_that_is_cut_short_or_interrupted(
    file: Path, io: str, cached: bool, at: int, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of signals threads of C learn; `os.preadv` itself goes on after one."""
    is_cached_as(cached, monkeypatch)
    made: list[int] = []
    with preadv_is(faulty(fault, at, made)):
        found = mball.load_file(file, copy=True, io=io)
    assert len(made) > at
    assert_same(found, tensors_of_many_kinds())


@pytest.mark.parametrize("fault", ["EIO", "short"])
def test_a_fault_on_the_way_to_another_device(
    file: Path, foreign: object, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mball.load.device_copy._BUFFER_BYTES", 65536)
    made: list[int] = []
    with preadv_is(faulty(fault, 7, made)):
        if fault == "EIO":
            with pytest.raises(StorageError, match=r"model\.safetensors.*Input/output error"):
                mball.load_file(file, "foreign")
        else:
            assert_same(mball.load_file(file, "foreign"), tensors_of_many_kinds())
    assert len(made) > 7
    assert_same(mball.load_file(file, "foreign"), tensors_of_many_kinds())


def test_nothing_is_left_after_a_read_that_failed(file: Path) -> None:
    descriptors, tasks = os.listdir("/proc/self/fd"), os.listdir("/proc/self/task")
    for at in range(4):
        with preadv_is(faulty("EIO", at, [])), pytest.raises(StorageError):
            mball.load_file(file, copy=True)
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    assert len(os.listdir("/proc/self/task")) <= len(tasks)


# -- mapped files --------------------------------------------------------------------------------------------------


def test_a_mapped_page_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short after it was mapped; the kernel says the same of a disk that fails. The size looks right to the last,
    so that the error is that of the page."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4 * MIB, dtype=torch.uint8)}, path)
    is_cached_as(True, monkeypatch)
    monkeypatch.setattr(safetensors_source.MappedMemory.fill, "__defaults__", (MIB,))
    monkeypatch.setattr(safetensors_source, "refuse_changed", lambda *_: None)
    with pytest.raises(StorageError, match=r"\d+ B at offset \d+ of .*model\.safetensors, which is mapped, cannot be"):
        mball.load_file(path, progress=lambda done, total: os.truncate(path, 2 * MIB))
    save_file({"a": torch.ones(4 * MIB, dtype=torch.uint8)}, path)
    assert_same(mball.load_file(path), {"a": torch.ones(4 * MIB, dtype=torch.uint8)})


# It is cut short after the last look at its size: no error but that of the page is left. Else a signal ends it.
_SLICE_OF_WHAT_WAS_CUT = """
import os, sys, torch, mball
from mball.load import file_memory
path, index = sys.argv[1], eval(sys.argv[2])
real = file_memory.MappedMemory.part
def part(memory, *given):
    os.truncate(path, 8192)
    return real(memory, *given)
file_memory.MappedMemory.part = part
with mball.open(path) as checkpoint:
    try:
        checkpoint.get_slice("floats")[index]
    except mball.MballError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("index", "misaligned"), [("slice(-5, None)", False), ("slice(-5, None)", True), ("[49_999, 3]", False)]
)
def test_a_slice_of_a_file_that_is_cut_short_meanwhile(tmp_path: Path, index: str, misaligned: bool) -> None:
    """In a process of its own: where no error is raised that dies."""
    path = tmp_path / "model.safetensors"
    if misaligned:
        save_misaligned(path)
    else:
        save_file({"floats": torch.arange(50_000, dtype=torch.float32)}, path)
    command = [sys.executable, "-c", _SLICE_OF_WHAT_WAS_CUT, str(path), index]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout.startswith("CheckpointError checkpoint file")
    assert "model.safetensors changed while it was open: size" in done.stdout


INDICES: list[Any] = [
    slice(3, 5),
    7,
    -1,
    (slice(None), slice(1, 2)),
    (slice(1, 90, 7), 50),
    (..., 3, slice(0, 2)),
    (None, 5, slice(2, 40, 3)),
    (),
    ...,
    [3, -1, 3],
    ([3, 7], [0, 1]),
    [..., [2]],
    [[1, 2], [0, 1]],
    (slice(2, 5), [1, 0]),
    (None, [2]),
    torch.tensor([[5, 6], [0, 1]]),
    torch.arange(96) % 11 == 3,
    torch.zeros(96, 64, 300, dtype=torch.bool).index_fill(0, torch.tensor([5]), True),
    slice(4, 4),
]


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("index", INDICES, ids=lambda index: str(index)[:24].replace("\n", ""))
def test_a_slice_has_all_its_pages_before_it_is_copied(
    tmp_path: Path, index: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that it touches without asking first would end the process where it cannot be read."""
    path = tmp_path / "model.safetensors"
    tensor = torch.arange(96 * 64 * 300, dtype=torch.float32).view(96, 64, 300)
    save_file({"a": tensor}, path)
    asked: list[range] = []
    real = PrivateMapping.populate

    def populate(mapping: PrivateMapping, first: int, end: int) -> None:
        asked.append(range(first, end))
        real(mapping, first, end)

    monkeypatch.setattr(PrivateMapping, "populate", populate)
    with mball.open(path) as checkpoint:
        found = checkpoint.get_slice("a")[index]
    assert torch.equal(found, tensor[index])
    # Elements are their own numbers: they say where they lie.
    offset_bytes = CheckpointIndex.open(path).entries["a"].offset_bytes % 4096
    pages = {page for span in asked for page in range(span.start, span.stop, 4096)}
    assert {(offset_bytes + 4 * int(number)) // 4096 * 4096 for number in found.unique().tolist()} <= pages
    if str(index) in ("7", "slice(3, 5, None)", "[3, -1, 3]"):
        assert len(pages) <= 2 * 64 * 300 * 4 // 4096 + 4, "no more than the rows that were asked for"


@pytest.mark.parametrize("index", [100, [1, 100], (0, 0, 0, 0), (slice(None), [[77]])])
def test_an_index_that_does_not_fit_is_torchs_error(tmp_path: Path, index: Any) -> None:
    path, tensor = tmp_path / "model.safetensors", torch.ones(50, 60)
    save_file({"a": tensor}, path)
    with pytest.raises((IndexError, TypeError)) as expected:
        tensor[index]
    with mball.open(path) as checkpoint, pytest.raises(expected.type):
        checkpoint.get_slice("a")[index]


def test_a_misaligned_tensor_of_a_file_that_was_cut_short(tmp_path: Path) -> None:
    """It is copied out of the mapping at once, whatever was asked for; that asks for its pages too."""
    path = tmp_path / "model.safetensors"
    save_misaligned(path)
    entry = CheckpointIndex.open(path).entries["floats"]
    with path.open("rb") as opened:
        memory = MappedMemory(str(path), opened.fileno(), entry.offset_bytes, entry.offset_bytes + entry.size_bytes)
        os.truncate(path, 8192)
        with pytest.raises(StorageError, match=r"model\.safetensors, which is mapped, cannot be read"):
            memory.tensor(entry)
        memory.close()


# -- headers and indices -------------------------------------------------------------------------------------------


def test_a_header_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.symlink_to(UNREADABLE)
    for name in (path, tmp_path):
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read \(Input/output error\)"):
            mball.load_file(name)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("sharded", [True, False])
def test_the_length_or_the_text_of_a_header_fails(
    tmp_path: Path, at: int, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_shards(tmp_path / "model", tensors_of_many_kinds())
    name = "model-00002-of-00003.safetensors"
    if not sharded:
        path = path / name
    real, made = os.pread, 0

    def pread(descriptor: int, size_bytes: int, offset_bytes: int) -> bytes:
        nonlocal made
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(name):
            made += 1
            if made - 1 == at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, size_bytes, offset_bytes)

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read \(Input/output error\)"):
        mball.load_file(path)
    assert made == at + 1
    assert len(os.listdir("/proc/self/fd")) == before
    assert mball.load_file(path)


@pytest.mark.parametrize("most", [1, 3, 100])
def test_a_header_that_comes_in_small_parts(file: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: real(descriptor, min(size, most), offset))
    assert_same(mball.load_file(file), tensors_of_many_kinds())


def test_a_header_whose_file_ends_early(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when it is cut short between the look at its size and the read."""
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *given: real(*given) if given[2] < 50 and given[1] < 50 else b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        mball.load_file(file)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_of_shards_that_cannot_be_read(tmp_path: Path, index: str) -> None:
    (tmp_path / index).symlink_to(UNREADABLE)
    for name in (tmp_path, tmp_path / index):
        with pytest.raises(CheckpointError, match=rf"{index} cannot be read \(Input/output error\)"):
            mball.load_file(name)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_shard_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    shard = f"part-1.{kind}"
    (tmp_path / shard).symlink_to(UNREADABLE)
    index = tmp_path / f"model.{kind}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match=rf"{shard} cannot be read \(Input/output error\)"):
        mball.load_file(index)


# -- the way to read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("io", "way"),
    [
        ("auto", None),
        ("direct", "past the page cache (always)"),
        ("buffered", "through the page cache (off)"),
        ("cached", "(uncached)"),
        of_c("threads of C"),
        ("threads", "threads of Python"),
    ],
)
def test_the_way_that_was_asked_for_is_taken(
    file: Path,
    io: str,
    way: str | None,
    cached: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    is_cached_as(cached, monkeypatch)
    with caplog.at_level(logging.DEBUG, logger="mball"):
        assert_same(mball.load_file(file, copy=True, io=io), tensors_of_many_kinds())
    (line,) = [record.getMessage() for record in caplog.records if " is read " in record.getMessage()]
    assert str(file) in line
    expected = way or ("(off)" if cached else "(auto)")
    assert expected in line


def test_threads_of_python_are_those_that_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = 0
    real: Callable[..., Any] = ThreadedReader.submit

    def submit(reader: Any, reads: Any) -> Any:
        nonlocal submitted
        submitted += 1
        return real(reader, reads)

    monkeypatch.setattr(ThreadedReader, "submit", submit)
    with mball.open(file, copy=True, io="threads") as checkpoint:
        assert_same(checkpoint.get_tensors(), tensors_of_many_kinds())
    assert submitted > 5


@pytest.mark.parametrize("io", ["gds", "fast", "", None])
def test_ways_that_there_are_not(file: Path, io: Any) -> None:
    with pytest.raises(ConfigError, match=r"io is .*; choose one of 'auto', 'direct', 'buffered', 'cached', 'native'"):
        mball.open(file, io=io)
    with pytest.raises(ConfigError, match="io is "):
        mball.load_file(file, io=io)
