"""The safetensors index: against the library, and against every kind of damage."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mball.errors import CheckpointError
from mball.storage import CheckpointIndex

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def tensors_of_all_dtypes() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, dtype in enumerate(DTYPES):
        # Odd sizes, so that offsets are aligned to nothing.
        raw = torch.randint(0, 2, ((2 * number + 3) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        tensors[f"t.{number}"] = raw.view(dtype)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, 4)
    tensors["matrix"] = torch.randn(33, 65, generator=generator)
    return tensors


def bytes_of(index: CheckpointIndex, name: str) -> bytes:
    entry = index.entries[name]
    with open(entry.file, "rb") as file:
        file.seek(entry.offset_bytes)
        return file.read(entry.size_bytes)


def assert_same(index: CheckpointIndex, expected: dict[str, torch.Tensor]) -> None:
    assert set(index.entries) == set(expected)
    for name, tensor in expected.items():
        entry = index.entries[name]
        assert entry.shape == tuple(tensor.shape)
        assert f"torch.{entry.dtype}" == str(tensor.dtype)
        assert bytes_of(index, name) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def sharded(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {f"w{i}": torch.randn(5, i + 1) for i in range(6)}
    weight_map: dict[str, str] = {}
    for shard in range(2):
        name = f"model-0000{shard + 1}-of-00002.safetensors"
        part = {key: value for key, value in tensors.items() if int(key[1:]) % 2 == shard}
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_one_file_agrees_with_the_library(tmp_path: Path) -> None:
    save_file(tensors_of_all_dtypes(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = load_file(tmp_path / "model.safetensors")
    assert len(expected) == len(DTYPES) + 3
    assert_same(CheckpointIndex.open(tmp_path / "model.safetensors"), expected)
    assert_same(CheckpointIndex.open(tmp_path), expected)


def test_sharded_directory(tmp_path: Path) -> None:
    expected = sharded(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        index = CheckpointIndex.open(path)
        assert_same(index, expected)
        assert len(index.files) == 2


def test_relative_path_and_other_single_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "adapter.safetensors")
    monkeypatch.chdir(tmp_path)
    index = CheckpointIndex.open(".")
    assert index.entries["a"].file == str(tmp_path / "adapter.safetensors")


def test_missing_things(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing.*No such file"):
        CheckpointIndex.open(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"has no \.safetensors file"):
        CheckpointIndex.open(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: convert"):
        CheckpointIndex.open(tmp_path)
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"2 candidates \(a\.safetensors, b\.safetensors\)"):
        CheckpointIndex.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        CheckpointIndex.open(tmp_path / "pipe")


def test_missing_shard_and_missing_tensor(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"w1": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'w3' is not in .*00002-of-00002\.safetensors \(1 tensors\)"):
        CheckpointIndex.open(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard .*00002-of-00002\.safetensors is missing; .* 3 tensors"):
        CheckpointIndex.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is corrupt"),
        ("[]", "not a JSON object"),
        ('{"weight_map": [1]}', "no 'weight_map'"),
        ('{"weight_map": {"a": 1}}', "no 'weight_map'"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside its own directory"),
        ('{"weight_map": {"a": "/x.safetensors"}}', "outside its own directory"),
        ('{"weight_map": {"a": "b/../../x.safetensors"}}', "outside its own directory"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' appears twice"),
        ('{"weight_map": {"a": "x\\u0000"}}', "no file name"),
        ('{"weight_map": {"a": ""}}', "no file name"),
        ('{"weight_map": {"a": "."}}', "not a regular file"),
    ],
)
def test_corrupt_index(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        CheckpointIndex.open(tmp_path)


def test_a_shard_that_holds_more_than_the_index_says(tmp_path: Path) -> None:
    sharded(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["w3"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors holds 1 tensors .*'w3'"):
        CheckpointIndex.open(tmp_path)
    index["weight_map"]["w3"] = "model-00001-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'w3' is not in .*00001-of-00002\.safetensors \(3 tensors\)"):
        CheckpointIndex.open(tmp_path)


def test_links(tmp_path: Path) -> None:
    """Caches of downloads hold links to files elsewhere; a loop of links is no file."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    expected = sharded(tmp_path / "blobs")
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "model" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    assert_same(CheckpointIndex.open(tmp_path / "model"), expected)
    shard = tmp_path / "model" / "model-00001-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(shard.name)
    with pytest.raises(CheckpointError, match=r"00001-of-00002.* cannot be opened \(Too many levels of symbolic links"):
        CheckpointIndex.open(tmp_path / "model")
    with pytest.raises(CheckpointError, match="Too many levels of symbolic links"):
        CheckpointIndex.open(shard)


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that every user may enter, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root becomes nobody for a while, without rights beyond those that files give; other users have none anyway."""
    effective = os.geteuid()
    if effective == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(effective)


def test_without_permission(shared_folder: Path) -> None:
    sharded(shared_folder)
    (shared_folder / "model-00001-of-00002.safetensors").chmod(0)
    with (
        ordinary_user(),
        pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors cannot be read \(Permission denied"),
    ):
        CheckpointIndex.open(shared_folder)


def test_a_directory_without_permission(shared_folder: Path) -> None:
    model = shared_folder / "model"
    model.mkdir()
    sharded(model)
    model.chmod(0)
    for path in (model, model / "model-00001-of-00002.safetensors", model / "model.safetensors.index.json"):
        with ordinary_user(), pytest.raises(CheckpointError, match=r"model.* cannot be opened \(Permission denied\)"):
            CheckpointIndex.open(path)
    model.chmod(0o755)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "header of 8 B is corrupt"),
        (b"[" * 100_000, b"", r"begins with b'\['"),
        (b'{"a":' * 100_000, b"", "nested too deeply"),
        (b' {"a": 1}', b"", "begins with b' '"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', b"", "'dtype' appears twice"),
        (b'{"\\ud800": 1}', b"", "surrogates not allowed"),
        (b'{"a": -0}', b"", "the number -0 is no size"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", r"the number 9+\.\.\.9+ is no size"),
        ({"a": entry(shape=[2.0])}, b"\0" * 8, "the number 2.0 is no size"),
        (b'{"a": 0.' + b"9" * 5000 + b"}", b"", r"the number 0\.9+\.\.\.9+ is no size"),
        ({"a": float("nan")}, b"", "the number NaN is no size"),
        ({"a": entry(shape=[1 << 64])}, b"\0" * 8, "the number 18446744073709551616 is no size"),
        ({"a": entry(shape=[1 << 32, 1 << 32])}, b"", "more than 63 bits"),
        ({"a": entry(shape=[1 << 32, 1 << 32, 0], offsets=[0, 0])}, b"", "more than 63 bits"),
        ({"a": entry(shape=[2] * 100_000)}, b"", r"shape \[2, 2, .*\.\.\.\] of F32 is more than 63 bits"),
        ({"a" * 100_000: 1}, b"", r"entry of tensor 'aa.*\.\.\.aa.*' is corrupt"),
        ({"__metadata__": {"a": 1}}, b"", "no object of texts"),
        ({"__metadata__": ["a"]}, b"", "no object of texts"),
        (b"\xff\xfe{}", b"", "is corrupt"),
        (b'{"a": 1, "a": 2}', b"", "'a' appears twice"),
        ({"a": 1}, b"", "entry of tensor 'a' is corrupt"),
        ({"a": entry(dtype="F4")}, b"\0" * 8, "tensor 'a' has dtype 'F4'.*convert"),
        ({"a": entry(dtype=["F32"])}, b"\0" * 8, "dtype"),
        ({"a": entry(shape=[-2])}, b"\0" * 8, "the number -2 is no size"),
        ({"a": entry(shape=[True, 2])}, b"\0" * 8, "no list of sizes"),
        ({"a": entry(offsets=[8, 0])}, b"\0" * 8, "no pair"),
        ({"a": entry(offsets=[0, 8, 9])}, b"\0" * 8, "no pair"),
        ({"a": entry(offsets=[0, 7])}, b"\0" * 7, r"hold 7 B, but F32 of shape \[2\] takes 8 B"),
        ({"a": entry(offsets=[4, 12])}, b"\0" * 12, "overlap or leave a hole"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12, "overlap or leave a hole"),
        ({"a": entry()}, b"\0" * 7, r"truncated: tensor 'a' ends at .* \(1 B of it missing\)"),
        ({"a": entry()}, b"\0" * 9, "corrupt: its tensors end at"),
    ],
)
def test_damaged_header(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointIndex.open(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(5, dtype=torch.int8)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    cut = tmp_path / "model.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            CheckpointIndex.open(cut)


def test_absurd_header_length(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="claims a header of 1152921504606846976 B"):
        CheckpointIndex.open(path)


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def _rewrite(path: Path) -> None:
    facts = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))


def _replace(path: Path) -> None:
    facts = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    other.rename(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [(_append, r"size \d+ B is now"), (_rewrite, "modification time"), (_replace, "inode"), (Path.unlink, "be found")],
)
def test_a_changed_checkpoint_is_noticed(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3)}, path)
    index = CheckpointIndex.open(path)
    index.verify_unchanged()
    change(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        index.verify_unchanged()
    assert str(path) in str(caught.value)


def test_a_second_shard_that_changes_is_noticed(tmp_path: Path) -> None:
    sharded(tmp_path)
    index = CheckpointIndex.open(tmp_path)
    _append(tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="00002-of-00002"):
        index.verify_unchanged()


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    sharded(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    CheckpointIndex.open(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
