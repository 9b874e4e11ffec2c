"""The model on disk: a Llama of random bfloat16 weights in one safetensors file, made once and kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mball.config import cache_directory

_WEIGHTS = "model.safetensors"
_COPIED_BYTES = 16 << 20
# 128 MiB of bfloat16, made in a second; and how far the stretches of two weights lie apart, an odd number.
_NUM_NOISE = 1 << 26
_NOISE_STEP = 1_000_003


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama, input and output embedding apart."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def config(self) -> LlamaConfig:
        """Returns transformers' description of it."""
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            dtype="bfloat16",
        )


# 1.1 billion parameters, 2.2 GB
LARGE = Shape(
    name="llama-1b", hidden=2048, intermediate=5632, layers=22, heads=32, kv_heads=4, vocabulary=32000
)  # fmt: skip
# 7 MB, for tests of the harness and to load what a process needs before it is capped
SMALL = Shape(name="llama-small", hidden=256, intermediate=704, layers=2, heads=4, kv_heads=2, vocabulary=4096)
# 8.0 billion parameters, 16.1 GB: the shape of Llama 3 8B
LLAMA_8B = Shape(
    name="llama-8b", hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocabulary=128256
)  # fmt: skip
SHAPES = {shape.name: shape for shape in (LARGE, SMALL)}


def make_shards(checkpoint: Path, num_shards: int) -> Path:
    """Returns what `make_checkpoint` made as `num_shards` files and an index, written now unless it is there.

    It lies beside the whole one; tensors stay in their order, and shards are about as large as each other.

    Raises OSError when it cannot be written.
    """
    shards = checkpoint.with_name(f"{checkpoint.name}-{num_shards}-shards")
    if shards.is_dir():
        return shards
    unfinished = checkpoint.with_name(f"{shards.name}.{os.getpid()}.part")
    unfinished.mkdir()
    try:
        with (checkpoint / _WEIGHTS).open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(header_bytes))
            metadata = tensors.pop("__metadata__")
            total_bytes = max(end for _, end in (facts["data_offsets"] for facts in tensors.values()))
            weight_map = {}
            for number in range(num_shards):
                first, last = total_bytes * number // num_shards, total_bytes * (number + 1) // num_shards
                inside = {name: facts for name, facts in tensors.items() if first <= facts["data_offsets"][0] < last}
                name = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
                weight_map |= dict.fromkeys(inside, name)
                _write_shard(unfinished / name, inside, metadata, file, 8 + header_bytes)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (unfinished / f"{_WEIGHTS}.index.json").write_text(json.dumps(index))
        shutil.copy(checkpoint / "config.json", unfinished)
        unfinished.rename(shards)  # it is there whole or not at all
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return shards


def _write_shard(
    path: Path, tensors: dict[str, dict[str, Any]], metadata: dict[str, str], source: BinaryIO, data_start: int
) -> None:
    """Writes a safetensors file of tensors that lie in `source` one after another, by their facts there."""
    first = min(facts["data_offsets"][0] for facts in tensors.values())
    last = max(facts["data_offsets"][1] for facts in tensors.values())
    moved = {
        name: {**facts, "data_offsets": [offset - first for offset in facts["data_offsets"]]}
        for name, facts in tensors.items()
    }
    text = json.dumps({"__metadata__": metadata, **moved}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        source.seek(data_start + first)
        left = last - first
        while left:
            left -= file.write(source.read(min(left, _COPIED_BYTES)))
        file.flush()
        os.fsync(file.fileno())


def weight_bytes(checkpoint: Path) -> int:
    """Returns the bytes of all weights of a checkpoint that `make_checkpoint` made."""
    with (checkpoint / _WEIGHTS).open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    return (checkpoint / _WEIGHTS).stat().st_size - 8 - header_bytes


def largest_weight_bytes(checkpoint: Path) -> int:
    """Returns the bytes of the largest weight of a checkpoint that `make_checkpoint` made."""
    with (checkpoint / _WEIGHTS).open("rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    spans = [entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"]
    return int(max(end - start for start, end in spans))


def weight_file(checkpoint: Path) -> Path:
    """Returns the file that holds the weights."""
    return checkpoint / _WEIGHTS


def make_checkpoint(shape: Shape, directory: Path | None = None, *, quick: bool = False) -> Path:
    """Returns the checkpoint of `shape` in `directory` (default: mball's cache), written now unless it is there whole.

    Holds one weight at a time in memory. `quick`: all weights are stretches of the same noise, each beginning elsewhere
    in it, and nobody waits for the disk: 16 GB take as long as writing them to the page cache.

    Raises OSError when it cannot be written.
    """
    home = directory or cache_directory() / "bench"
    checkpoint = home / shape.name
    header, size_bytes = _header(shape)
    if _is_whole(checkpoint, shape, len(header) + size_bytes):
        return checkpoint
    unfinished = home / f"{shape.name}.{os.getpid()}.part"
    unfinished.mkdir(parents=True)
    try:
        with (unfinished / _WEIGHTS).open("wb") as file:
            file.write(header)
            for weight in _noisy_weights(shape) if quick else _weights(shape):
                file.write(weight.view(torch.uint8).numpy().data)
            file.flush()
            if not quick:
                os.fsync(file.fileno())
        shape.config().save_pretrained(unfinished)
        shutil.rmtree(checkpoint, ignore_errors=True)
        unfinished.rename(checkpoint)  # it is there whole or not at all
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return checkpoint


def _is_whole(checkpoint: Path, shape: Shape, size_bytes: int) -> bool:
    weights, config = checkpoint / _WEIGHTS, checkpoint / "config.json"
    if not weights.is_file() or not config.is_file() or weights.stat().st_size != size_bytes:
        return False
    found = json.loads(config.read_text(encoding="utf-8"))
    return (found["num_hidden_layers"], found["hidden_size"]) == (shape.layers, shape.hidden)


def _parameters(shape: Shape) -> list[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config())
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def _header(shape: Shape) -> tuple[bytes, int]:
    """Returns what a safetensors file begins with, and the bytes of the weights that follow."""
    entries, end = {}, 0
    for name, size in _parameters(shape):
        start, end = end, end + 2 * torch.Size(size).numel()
        entries[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def _weights(shape: Shape) -> Iterator[torch.Tensor]:
    """Yields the weights in the order of the header, flat; always the same."""
    generator = torch.Generator().manual_seed(7)
    for _, size in _parameters(shape):
        weight = torch.ones(size)
        if len(size) > 1:
            weight.normal_(0.0, 0.02, generator=generator)
        yield weight.to(torch.bfloat16).flatten()


def _noisy_weights(shape: Shape, *, num_noise: int = _NUM_NOISE) -> Iterator[torch.Tensor]:
    """Yields what `_weights` does, in parts; numbers come again, but no two weights of one size are alike."""
    noise = torch.empty(num_noise).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    first = 0
    for _, size in _parameters(shape):
        left = torch.Size(size).numel()
        if len(size) == 1:
            yield torch.ones(left, dtype=torch.bfloat16)
            continue
        # Another stretch for each weight: the step has no divisor in common with the length of the noise.
        first = (first + _NOISE_STEP) % num_noise
        start = first
        while left:
            part = noise[start : start + left]
            yield part
            left -= len(part)
            start = 0
