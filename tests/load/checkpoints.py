"""Checkpoints that the tests of the loader read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mball.units import MIB


def tensors_of_many_kinds() -> dict[str, torch.Tensor]:
    """Tensors of odd sizes and types; one is larger than what is read at one time, one has no elements."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"t.{number}": torch.randint(0, 2, ((2 * number + 3) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        .view(dtype)
        .clone()
        for number, dtype in enumerate(
            (torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.float32, torch.int64, torch.complex64)
        )
    }
    tensors["large"] = torch.randint(0, 255, (3 * MIB + 5,), generator=generator, dtype=torch.uint8)
    tensors["empty"] = torch.empty(0, 4)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["matrix"] = torch.randn(33, 65, generator=generator)
    return tensors


def save_shards(directory: Path, tensors: dict[str, torch.Tensor], num_shards: int = 3) -> Path:
    """Saves tensors as shards with an index; returns the directory."""
    directory.mkdir(exist_ok=True)
    weight_map = {}
    for number in range(num_shards):
        name = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        part = {key: tensor for at, (key, tensor) in enumerate(tensors.items()) if at % num_shards == number}
        save_file(part, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def save_misaligned(path: Path) -> dict[str, torch.Tensor]:
    """Writes a file whose tensors begin at odd places, as the format allows; returns what is in it."""
    tensors = {"byte": torch.tensor([7], dtype=torch.uint8), "floats": torch.arange(50_000, dtype=torch.float32)}
    end, entries = 0, {}
    for name, tensor in tensors.items():
        dtype = {torch.uint8: "U8", torch.float32: "F32"}[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(entries).encode()
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return tensors


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Asserts that the same names have the same bits, types and shapes."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        bits = [value.cpu().reshape(-1).view(torch.uint8) for value in (found[name], tensor)]
        assert torch.equal(*bits), name
