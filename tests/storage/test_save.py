"""Saving a safetensors file: whole or not at all, in place of another one too, and read by safetensors."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import mball
from mball.errors import StorageError
from mball.storage.header import SAFETENSORS_NAMES
from mball.storage.save import save_tensors
from mball.units import MIB
from mball.whole_files import replace_file, whole_file

REAL = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_safetensors_reads_is_what_was_saved(data: st.DataObject, tmp_path: Path) -> None:
    shapes = st.lists(st.integers(0, 5), max_size=3)
    tensors = {}
    for name in data.draw(st.lists(st.text(min_size=1, max_size=8), max_size=6, unique=True)):
        dtype, shape = data.draw(st.sampled_from(REAL)), data.draw(shapes)
        tensors[name] = torch.randint(0, 2, shape).to(dtype)
    metadata = data.draw(st.none() | st.dictionaries(st.text(), st.text(), max_size=2))
    mball.save_file(tensors, tmp_path / "new", metadata)
    found = load_file(tmp_path / "new")
    assert {name: (t.dtype, t.shape, bits(t)) for name, t in found.items()} == {
        name: (t.dtype, t.shape, bits(t)) for name, t in tensors.items()
    }
    with safe_open(tmp_path / "new", "pt") as file:
        assert (file.metadata() or {}) == (metadata or {})


def test_every_dtype_that_checkpoints_may_have(tmp_path: Path) -> None:
    tensors = {name: torch.ones(3).to(getattr(torch, name)) for name in SAFETENSORS_NAMES if hasattr(torch, name)}
    mball.save_file(tensors, tmp_path / "all")
    found = load_file(tmp_path / "all")
    assert {name: bits(tensor) for name, tensor in found.items()} == {name: bits(t) for name, t in tensors.items()}


def test_strides_are_saved_as_what_they_mean(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "t": whole.t(),
        "part": whole[1:3, ::2],
        "conj": torch.tensor([1 + 2j]).conj(),
        "none": torch.empty(0, 3),
    }
    mball.save_file(tensors, tmp_path / "file")
    found = load_file(tmp_path / "file")
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a": torch.ones(2, device="meta")}, None, "meta device"),
        ({"a": 3}, None, "is a int"),
        ({"a": torch.ones(2).to_sparse()}, None, "to_dense"),
        ({"__metadata__": torch.ones(2)}, None, "rename it"),
        ({"a": torch.ones(2)}, {"a": 3}, "must be text"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, None, "does not know"),
    ],
)
def test_what_cannot_be_saved_replaces_nothing(tensors: Any, metadata: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(StorageError, match=message):
        mball.save_file(tensors, path, metadata)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_one_memory_under_two_names(tmp_path: Path) -> None:
    shared = torch.ones(3)
    with pytest.raises(StorageError, match=r"'a' and 'b' are the same memory: .*save the module"):
        mball.save_file({"a": shared, "b": shared}, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


# -- whole or not at all -----------------------------------------------------------------------------------------


@pytest.fixture(params=["unnamed", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With O_TMPFILE and without."""
    if request.param == "named":
        real = os.open

        def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "not supported")
            return real(path, flags, *rest, **more)

        monkeypatch.setattr(os, "open", refuse)
    return str(request.param)


def test_a_new_file_has_the_mode_of_any_and_one_replaced_its_own(way: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    before = os.umask(0o027)
    try:
        mball.save_file({"a": torch.ones(2)}, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        mball.save_file({"a": torch.zeros(2)}, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)
    assert list(tmp_path.iterdir()) == [path]


def test_who_has_the_old_file_keeps_it(way: str, tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    mball.save_file({"a": torch.ones(2)}, path)
    link.symlink_to(path)
    with path.open("rb") as old:
        mball.save_file({"a": torch.zeros(2)}, link)
        assert link.is_symlink()
        assert load_file(path)["a"].tolist() == [0, 0]
        assert old.read().endswith(bits(torch.ones(2)))


CALLS = ["write", "fsync", "link", "replace", "posix_fallocate"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_every_call_that_fails(call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    mball.save_file({"a": torch.ones(2)}, path)
    before = path.read_bytes()
    real, calls = getattr(os, call), []

    def fail(*arguments: Any, **more: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(
            StorageError, match=rf"checkpoint cannot be written to .*file' \(\d+ B\): {os.strerror(number)}"
        ):
            mball.save_file({"a": torch.zeros(1000)}, path)
    assert calls
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    mball.save_file({"a": torch.zeros(1000)}, path)
    assert torch.equal(load_file(path)["a"], torch.zeros(1000))


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, view: real(descriptor, view[: max(1, len(view) // 3)]))
    tensor = torch.randn(100_000)
    mball.save_file({"a": tensor}, tmp_path / "file")
    assert torch.equal(load_file(tmp_path / "file")["a"], tensor)


def test_a_full_disk_is_known_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = tmp_path / "small"
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(point)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        mball.save_file({"a": torch.ones(2)}, point / "file")
        monkeypatch.setattr(os, "write", lambda *_: pytest.fail("something was written"))
        with pytest.raises(StorageError, match=r"\(2097\d+ B\): No space left on device.*room"):
            mball.save_file({"a": torch.zeros(2 * MIB, dtype=torch.int8)}, point / "file")
        assert load_file(point / "file")["a"].tolist() == [1, 1]
        assert [path.name for path in point.iterdir()] == ["file"]
    finally:
        subprocess.run(["umount", str(point)], check=True)


def test_no_copy_of_what_lies_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: torch.randn(1000) for name in "abc"}
    addresses: list[int] = []
    real = os.write

    def look(descriptor: int, view: Any) -> int:
        addresses.append(numpy.frombuffer(view, dtype=numpy.uint8).__array_interface__["data"][0])
        return real(descriptor, view)

    monkeypatch.setattr(os, "write", look)
    saved: list[str] = []
    save_tensors(tensors, tmp_path / "file", None, written=saved.append)
    assert addresses[1:] == [tensor.data_ptr() for tensor in tensors.values()]
    assert saved == ["a", "b", "c"]


_CHILD = """
import sys
sys.path[:0] = [{root!r}]
from pathlib import Path
from mball.whole_files import whole_file, write_all
value = int(sys.argv[2])
print("begun", flush=True)
while True:
    value = (value + 1) % 256
    with whole_file(Path(sys.argv[1]), 4 << 20, "file") as descriptor:
        for _ in range(4):
            write_all(descriptor, memoryview(bytes([value]) * (1 << 20)))
    print("saved", flush=True)
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_any_moment_the_file_is_old_or_new(kill: signal.Signals, tmp_path: Path) -> None:
    path, chance = tmp_path / "file", random.Random(kill)
    path.write_bytes(bytes(4 << 20))
    code = _CHILD.format(root=str(Path(__file__).parents[2]))
    seen = set()
    for number in range(12):
        command = [sys.executable, "-c", code, str(path), str(20 * number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
            assert child.stdout is not None
            lines = ["begun\n", *["saved\n"] * (number % 3)]  # so that some files are new, however slow the disk
            assert [child.stdout.readline() for _ in lines] == lines
            time.sleep(chance.uniform(0.005, 0.05))
            child.send_signal(kill)
        content = path.read_bytes()
        assert content == content[:1] * (4 << 20)
        seen.add(content[0])
    assert len(seen) > 3
    # Of a process that was killed between giving a name and the last one; never one that is not whole.
    for left in tmp_path.iterdir():
        assert left.name.endswith(".unfinished") or left == path
        assert left.stat().st_size == 4 << 20


def test_other_files_are_written_so_too(tmp_path: Path) -> None:
    replace_file(tmp_path / "text", b"first", "text")
    replace_file(tmp_path / "text", b"", "text")
    assert (tmp_path / "text").read_bytes() == b""
    with pytest.raises(StorageError, match=r"the text cannot be written to .*nowhere/text' \(5 B\): No such file"):
        replace_file(tmp_path / "nowhere" / "text", b"first", "text")


@pytest.mark.parametrize("unnamed", [True, False])
def test_two_that_write_one_file_do_not_meet(unnamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever ends last has the file; nobody's half ever gets there, also where files have names from the beginning."""
    if not unnamed:
        real = os.open

        def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return real(path, flags, *rest, **more)

        monkeypatch.setattr(os, "open", refuse)
    path = tmp_path / "file"
    with whole_file(path, 2, "file") as first:
        os.write(first, b"1")
        with whole_file(path, 2, "file") as second:
            os.write(second, b"2")
            os.write(first, b"1")
            assert not path.exists()
            os.write(second, b"2")
        assert path.read_bytes() == b"22"
    assert path.read_bytes() == b"11"
    assert list(tmp_path.iterdir()) == [path]
