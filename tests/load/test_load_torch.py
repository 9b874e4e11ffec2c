"""PyTorch's own files: nothing is run, what is tied stays tied, and what is no dict of tensors is refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mball
from mball.errors import CheckpointError
from tests.load.checkpoints import assert_same, tensors_of_many_kinds

COPIES = (None, True, False)


def tied() -> dict[str, torch.Tensor]:
    """Two names of one tensor, and a view of a part of it, transposed."""
    weight = torch.arange(60.0).reshape(5, 12)
    return {"embed": weight, "head": weight, "part": weight[1:4].T, "alone": torch.ones(3)}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_one_file(tmp_path: Path, copy: bool | None, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(tensors_of_many_kinds(), path, _use_new_zipfile_serialization=zipped)
    assert_same(mball.load_file(path, copy=copy), tensors_of_many_kinds())
    with mball.open(path, copy=copy) as checkpoint:
        assert checkpoint.keys() == sorted(tensors_of_many_kinds())
        assert checkpoint.offset_keys() == list(tensors_of_many_kinds())
        assert checkpoint.metadata() is None
        assert checkpoint.get_slice("matrix").get_shape() == [33, 65]
        assert checkpoint.get_slice("matrix").get_dtype() == "F32"
        assert torch.equal(checkpoint.get_slice("matrix")[3:5, ::2], tensors_of_many_kinds()["matrix"][3:5, ::2])


@pytest.mark.parametrize("copy", COPIES)
def test_what_is_tied_stays_tied(tmp_path: Path, copy: bool | None) -> None:
    torch.save(tied(), tmp_path / "model.pt")
    found = mball.load_file(tmp_path / "model.pt", copy=copy)
    assert_same({name: value.contiguous() for name, value in found.items()}, {
        name: value.contiguous() for name, value in tied().items()
    })  # fmt: skip
    found["embed"][2, 3] = -1
    assert found["head"][2, 3] == found["part"][3, 1] == -1
    assert found["part"].stride() == tied()["part"].stride()
    assert found["alone"].untyped_storage().data_ptr() != found["embed"].untyped_storage().data_ptr()


def test_a_copy_is_not_the_file(tmp_path: Path) -> None:
    torch.save(tied(), tmp_path / "model.pt")
    found = mball.load_file(tmp_path / "model.pt", copy=True)
    os.truncate(tmp_path / "model.pt", 0)
    assert int(found["embed"].sum()) == sum(range(60))


@pytest.mark.parametrize("copy", COPIES)
def test_a_file_that_changes_while_open(tmp_path: Path, copy: bool | None) -> None:
    torch.save(tied(), tmp_path / "model.pt")
    with mball.open(tmp_path / "model.pt", copy=copy) as checkpoint:
        os.utime(tmp_path / "model.pt", ns=(0, 1))
        for ask in (lambda: checkpoint.get_tensor("alone"), lambda: checkpoint.get_slice("alone")[:1]):
            with pytest.raises(CheckpointError, match=r"model\.pt changed while it was open: modification time"):
                ask()


def test_ties_on_another_device(tmp_path: Path, foreign: ModuleType) -> None:
    torch.save(tied(), tmp_path / "model.pt")
    found = mball.load_file(tmp_path / "model.pt", "foreign")
    assert all(value.device.type == "foreign" for value in found.values())
    found["embed"][2, 3] = -1
    assert found["head"].cpu()[2, 3] == found["part"].cpu()[3, 1] == -1


def save_shards(directory: Path) -> dict[str, torch.Tensor]:
    tensors = tensors_of_many_kinds()
    weight_map = {}
    for number in range(2):
        name = f"pytorch_model-{number + 1:05}-of-00002.bin"
        part = {key: tensor for at, (key, tensor) in enumerate(tensors.items()) if at % 2 == number}
        torch.save(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_shards(tmp_path: Path) -> None:
    expected = save_shards(tmp_path)
    torch.save({"step": 3}, tmp_path / "training_args.bin")
    assert_same(mball.load_file(tmp_path), expected)
    assert_same(mball.load_file(tmp_path / "pytorch_model.bin.index.json"), expected)
    torch.save({"t.1": torch.ones(1)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"is not in .*00002-of-00002\.bin \(1 tensors\)"):
        mball.open(tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.bin is missing"):
        mball.open(tmp_path)


class Malicious:
    """Unpickling it would make a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_is_run(tmp_path: Path, zipped: bool) -> None:
    content = {"a": torch.ones(2), "b": Malicious(str(tmp_path / "made"))}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"model\.pt holds more than tensors.*Nothing of it was run"):
        mball.load_file(tmp_path / "model.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(content["b"]))
    with pytest.raises(CheckpointError, match=r"plain\.pt"):
        mball.load_file(tmp_path / "plain.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list, not a dict of tensors"),
        ({"model": {"a": torch.ones(2)}, "step": 3}, r"2 things that are no tensors by name, such as 'model' \(dict\)"),
        ({1: torch.ones(2)}, r"such as 1 \(Tensor\)"),
    ],
)
def test_what_is_no_dict_of_tensors(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        mball.open(tmp_path / "model.pt")


def test_missing_things(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no\.pt cannot be opened \(No such file"):
        mball.open(tmp_path / "no.pt")
    with pytest.raises(CheckpointError, match=r"no \.safetensors, \.bin, \.pt or \.pth file, and 0 \.gguf files"):
        mball.open(tmp_path)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(CheckpointError, match="not a regular file"):
        mball.open(tmp_path / "pipe.pt")
    for name in ("a.pt", "b.pt"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"3 candidates \(a\.pt, b\.pt, pipe\.pt\) .*give the path"):
        mball.open(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_every_truncation_is_noticed(tmp_path: Path, zipped: bool) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "whole.pt").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            mball.open(tmp_path / "cut.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torch") / "whole.pt"
    torch.save({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.int16)}, path)
    return path


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_end_in_one_kind_of_error(whole: Path, data: st.DataObject) -> None:
    raw = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    damaged = whole.with_name("damaged.pt")
    damaged.write_bytes(raw)
    try:
        found = mball.load_file(damaged, copy=True)
    except CheckpointError:
        return
    assert all(isinstance(value, torch.Tensor) for value in found.values())


@pytest.mark.parametrize("copy", COPIES)
def test_what_is_conjugated_or_negated_lazily_has_its_numbers(tmp_path: Path, copy: bool | None) -> None:
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    negated = torch._neg_view(torch.tensor([1.0, -2.0]))
    assert negated.is_neg()
    tensors = {"plain": numbers, "conjugated": numbers.conj(), "negated": negated}
    torch.save(tensors, tmp_path / "model.pt")
    found = mball.load_file(tmp_path / "model.pt", copy=copy)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].tolist() == tensor.tolist()


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(3).to_sparse(), "of layout torch.sparse_coo"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
        (torch.empty(3, device="meta"), "meta"),
    ],
    ids=["sparse", "quantised", "meta"],
)
def test_what_is_not_plain_numbers_is_refused(tmp_path: Path, tensor: torch.Tensor, kind: str) -> None:
    torch.save({"odd": tensor}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=rf"tensor 'odd' is {kind}, not plain numbers in memory"):
        mball.load_file(tmp_path / "model.pt")


def test_a_type_that_safetensors_has_no_name_for(tmp_path: Path) -> None:
    torch.save({"wide": torch.ones(2, dtype=torch.complex128)}, tmp_path / "model.pt")
    with mball.open(tmp_path / "model.pt") as checkpoint:
        assert checkpoint.get_slice("wide").get_dtype() == "complex128"
