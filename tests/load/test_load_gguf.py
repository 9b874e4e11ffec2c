"""GGUF files: the numbers that transformers gets from them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy
import pytest
import torch

import mball
from mball.cli import smollm2
from mball.errors import CheckpointError, ConfigError

gguf = pytest.importorskip("gguf")  # a machine with a GPU may lack it, and collects all the same


@pytest.fixture(scope="module")
def arrays() -> dict[str, numpy.ndarray]:
    generator = numpy.random.default_rng(0)
    return {
        "blk.0.weight": generator.standard_normal((4, 64), dtype=numpy.float32),
        "blk.0.bias": generator.standard_normal(5).astype(numpy.float16),
        "blk.0.index": numpy.arange(6, dtype=numpy.int32).reshape(2, 3),
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, numpy.ndarray]) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("quantised", gguf.quantize(arrays["blk.0.weight"], kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_types_and_values(file: Path, arrays: dict[str, numpy.ndarray]) -> None:
    found = mball.load_file(file)
    assert list(found) == [*arrays, "quantised"]
    for name, array in arrays.items():
        assert torch.equal(found[name], torch.from_numpy(array))
    assert found["quantised"].dtype == torch.float32
    assert (found["quantised"] - torch.from_numpy(arrays["blk.0.weight"])).abs().max() < 0.02
    found["blk.0.weight"].zero_()  # it is nobody else's


def test_the_call_shapes(file: Path, arrays: dict[str, numpy.ndarray]) -> None:
    with mball.open(file.parent) as checkpoint:
        assert checkpoint.keys() == sorted([*arrays, "quantised"])
        assert checkpoint.offset_keys() == [*arrays, "quantised"]
        assert (checkpoint.metadata() or {})["general.architecture"] == "llama"
        part = checkpoint.get_slice("quantised")
        assert part.get_shape() == [4, 64]
        assert part.get_dtype() == "F32"
        assert torch.equal(part[1:3, ::2], checkpoint.get_tensor("quantised")[1:3, ::2])
        assert checkpoint.get_slice("blk.0.bias").get_dtype() == "F16"


@pytest.mark.slow
def test_a_real_model_as_transformers_dequantises_it() -> None:
    """SmolLM2's file, Q4_1; tensors whose names and layouts transformers keeps."""
    try:
        path = smollm2.find_gguf()
    except CheckpointError as error:
        pytest.skip(str(error))
    reader = gguf.GGUFReader(path)
    with mball.open(path) as checkpoint:
        for tensor in [reader.tensors[0], *reader.tensors[5:9]]:
            expected = torch.from_numpy(numpy.copy(gguf.dequantize(tensor.data, tensor.tensor_type)))
            assert torch.equal(checkpoint.get_tensor(tensor.name).float(), expected)
            assert checkpoint.get_slice(tensor.name).get_shape() == list(expected.shape)


def test_without_the_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"model\.gguf is a GGUF file.*pip install gguf"):
        mball.open(file)


def test_every_truncation_is_noticed(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for length in [*range(0, len(whole), 29), len(whole) - 1]:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        if length > len(whole) - 32 and length >= len(whole.rstrip(b"\0")):
            continue  # only what pads the end is gone
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            mball.open(tmp_path / "cut.gguf")


def test_a_file_that_changes_while_open(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    copy.write_bytes(file.read_bytes())
    with mball.open(copy) as checkpoint:
        os.utime(copy, ns=(0, 1))
        with pytest.raises(CheckpointError, match=r"model\.gguf changed while it was open: modification time"):
            checkpoint.get_tensor("quantised")
