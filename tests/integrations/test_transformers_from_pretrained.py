"""`from_pretrained` against transformers' own loading. `mball.wrap` is replaced by something that loads what it is
told to, so a wrong name, a missing alias or a buffer left behind shows as a wrong value."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

import mball  # noqa: E402
from mball.errors import CheckpointError, ConfigError, StorageError  # noqa: E402
from mball.integrations.transformers import from_pretrained  # noqa: E402
from mball.integrations.transformers.checkpoint import read_entries  # noqa: E402
from tests.preads import preadv_is  # noqa: E402

Model = torch.nn.Module

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}


class Wrap:
    """Stands in for `mball.wrap`: notes what came, and fills a meta model from its checkpoint by name."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, model: Model, **settings: Any) -> Model:
        self.calls.append(settings)
        weights = settings.get("weights")
        if weights is None:
            assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
            return model
        entries = read_entries(weights)
        filled: dict[int, torch.nn.Parameter] = {}
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            assert parameter.is_meta, f"{name} was materialised"
            source = settings["rename"][name]
            with safe_open(entries[source].file, framework="pt") as checkpoint:
                value = checkpoint.get_tensor(source)
            assert (value.shape, value.dtype) == (parameter.shape, parameter.dtype)
            home = filled.setdefault(id(parameter), torch.nn.Parameter(value, requires_grad=parameter.requires_grad))
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, home)
        return model

    @property
    def in_place(self) -> bool:
        return self.calls[-1].get("weights") is not None


@pytest.fixture
def wrap(monkeypatch: pytest.MonkeyPatch) -> Wrap:
    stand_in = Wrap()
    # Not setattr: it would look the lazy name up first.
    monkeypatch.setitem(vars(mball), "wrap", stand_in)
    return stand_in


def save(model: Any, directory: Path, **how: Any) -> Path:
    # Random running statistics and norms, or a wrong buffer or bias would not show.
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.numel():
                tensor.copy_(torch.rand_like(tensor))
    model.save_pretrained(directory, **how)
    return directory


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    assert not found.training
    for kind in ("named_parameters", "named_buffers"):
        ours = dict(getattr(found, kind)(remove_duplicate=False))
        theirs = dict(getattr(expected, kind)(remove_duplicate=False))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            other = theirs[name]
            assert tensor.dtype == other.dtype, name
            # requires_grad is not compared: transformers forgets it on load (Whisper's positions), mball does not.
            assert torch.equal(tensor, other), name
    ties = [len(set(map(id, dict(model.named_parameters()).values()))) for model in (found, expected)]
    assert ties[0] == ties[1]


def llama(**more: Any) -> Any:
    return transformers.LlamaConfig(**SMALL, num_key_value_heads=2, **more)


CASES = {
    "llama": lambda: transformers.LlamaForCausalLM(llama()),
    "llama-tied": lambda: transformers.LlamaForCausalLM(llama(tie_word_embeddings=True)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96, n_positions=64)
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=96)
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=96, num_mel_bins=8, max_source_positions=16,
            max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16,
            patch_size=8,
        )
    ),
    "resnet, with running statistics": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loads_what_transformers_loads(case: str, tmp_path: Path, wrap: Wrap) -> None:
    save(CASES[case](), tmp_path)
    found = from_pretrained(tmp_path, budget="1MiB")
    assert wrap.in_place
    assert_same(found, type(found).from_pretrained(tmp_path))


def test_buffers_come_from_all_shards(tmp_path: Path, wrap: Wrap) -> None:
    save(CASES["resnet, with running statistics"](), tmp_path, max_shard_size="5KB")
    assert len({entry.file for name, entry in read_entries(tmp_path).items() if "running" in name}) > 1
    found = from_pretrained(tmp_path, budget="1MiB")
    assert wrap.in_place
    assert_same(found, type(found).from_pretrained(tmp_path))


def test_a_disk_that_fails_below_buffers_is_named(tmp_path: Path, wrap: Wrap) -> None:
    save(CASES["resnet, with running statistics"](), tmp_path)

    def fails(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with preadv_is(fails), pytest.raises(StorageError, match=r"model\.safetensors.*Input/output error"):
        from_pretrained(tmp_path, budget="1MiB")
    assert not wrap.calls


def test_bfloat16_keeps_rotary_buffers_in_float32(tmp_path: Path, wrap: Wrap) -> None:
    save(CASES["llama-tied"]().to(torch.bfloat16), tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    found = from_pretrained(tmp_path, budget="1MiB", io_threads=2)
    assert wrap.in_place
    assert wrap.calls[-1]["budget"] == "1MiB"
    assert wrap.calls[-1]["io_threads"] == 2
    assert found.model.rotary_emb.inv_freq.dtype == torch.float32
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert_same(found, transformers.LlamaForCausalLM.from_pretrained(tmp_path))


def test_generation_config_comes_along(tmp_path: Path, wrap: Wrap) -> None:
    model = CASES["llama"]()
    model.generation_config.max_new_tokens = 7
    save(model, tmp_path)
    assert from_pretrained(tmp_path, budget="1MiB").generation_config.max_new_tokens == 7


def test_base_model_in_a_task_model_and_back(tmp_path: Path, wrap: Wrap) -> None:
    save(transformers.BertModel(transformers.BertConfig(**SMALL), add_pooling_layer=False), tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"lacks .* weights of BertForMaskedLM.*model_class="):
        from_pretrained(tmp_path / "base", budget="1MiB", model_class=transformers.BertForMaskedLM)
    save(CASES["llama"](), tmp_path / "task")
    found = from_pretrained(tmp_path / "task", budget="1MiB", model_class=transformers.AutoModel)
    assert wrap.in_place
    assert_same(found, transformers.LlamaModel.from_pretrained(tmp_path / "task"))
    save(transformers.LlamaModel(llama(tie_word_embeddings=True)), tmp_path / "prefix")
    found = from_pretrained(tmp_path / "prefix", budget="1MiB", model_class=transformers.AutoModelForCausalLM)
    assert wrap.calls[-1]["rename"]["model.norm.weight"] == "norm.weight"
    assert_same(found, transformers.LlamaForCausalLM.from_pretrained(tmp_path / "prefix"))


def test_minilm_extra_position_ids_are_ignored(minilm: Path, wrap: Wrap, caplog: pytest.LogCaptureFixture) -> None:
    assert "embeddings.position_ids" in read_entries(minilm)
    with caplog.at_level(logging.INFO, logger="mball"):
        found = from_pretrained(minilm, budget="30MiB")
    assert not caplog.records
    assert wrap.in_place
    assert_same(found, transformers.AutoModel.from_pretrained(minilm))


def test_an_entry_nobody_knows_is_named(tmp_path: Path, wrap: Wrap, caplog: pytest.LogCaptureFixture) -> None:
    save(CASES["llama"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"stranger.weight": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    from_pretrained(tmp_path, budget="1MiB")
    assert "stranger.weight" in caplog.text


def test_mixtral_is_converted_on_load_and_goes_to_swap(
    tmp_path: Path, wrap: Wrap, caplog: pytest.LogCaptureFixture
) -> None:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3)
    save(transformers.MixtralForCausalLM(config), tmp_path)
    assert any("experts.0.w1" in key for key in read_entries(tmp_path)), "saved as it is published"
    with caplog.at_level(logging.INFO, logger="mball"):
        found = from_pretrained(tmp_path, budget="1MiB")
    assert not wrap.in_place
    assert len(caplog.records) == 1
    assert "converts" in caplog.text
    assert_same(found, transformers.MixtralForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtype_converts_and_goes_to_swap(dtype: Any, tmp_path: Path, wrap: Wrap) -> None:
    save(CASES["llama"](), tmp_path)
    found = from_pretrained(tmp_path, budget="1MiB", dtype=dtype)
    assert not wrap.in_place
    assert found.dtype == torch.bfloat16
    assert_same(found, transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    from_pretrained(tmp_path, budget="1MiB", dtype=torch.float32)
    assert wrap.in_place, "nothing to convert"


@pytest.mark.parametrize("same", [True, False])
def test_both_names_of_a_tie_in_the_checkpoint(same: bool, tmp_path: Path, wrap: Wrap) -> None:
    save(CASES["llama-tied"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if same else 1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = from_pretrained(tmp_path, budget="1MiB")
    assert wrap.in_place is same
    assert_same(found, transformers.LlamaForCausalLM.from_pretrained(tmp_path))


def test_only_the_alias_of_a_tie_in_the_checkpoint(tmp_path: Path, wrap: Wrap) -> None:
    save(CASES["llama-tied"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = from_pretrained(tmp_path, budget="1MiB")
    assert wrap.calls[-1]["rename"]["model.embed_tokens.weight"] == "lm_head.weight"
    assert_same(found, transformers.LlamaForCausalLM.from_pretrained(tmp_path))


def save_gguf(path: Path) -> None:
    """Writes a llama of one layer, quantised to Q8_0 but for its norms."""
    import gguf
    import numpy

    generator = numpy.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(96)
    shapes = {
        "token_embd": (96, 32), "output": (96, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = generator.standard_normal(shape, dtype=numpy.float32)
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_dequantised_and_goes_to_swap(tmp_path: Path, wrap: Wrap) -> None:
    save_gguf(tmp_path / "model.gguf")
    expected = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="model.gguf",
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    for path in (tmp_path, tmp_path / "model.gguf"):
        found = from_pretrained(path, budget="1MiB", dtype="bfloat16")
        assert not wrap.in_place
        assert_same(found, expected)
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(model\.gguf, other\.gguf\)"):
        from_pretrained(tmp_path, budget="1MiB")
    with pytest.raises(CheckpointError, match=r"other\.gguf cannot be loaded"):
        from_pretrained(tmp_path / "other.gguf", budget="1MiB")


def save_bin(model: Any, directory: Path) -> Any:
    """Saves a model as PyTorch's files, two shards and an index whose total is wrong, as those of many old ones are."""
    save(model, directory)
    tensors = list(load_file(directory / "model.safetensors").items())
    (directory / "model.safetensors").unlink()
    shards = {"pytorch_model-00001-of-00002.bin": tensors[::2], "pytorch_model-00002-of-00002.bin": tensors[1::2]}
    for shard, held in shards.items():
        torch.save(dict(held), directory / shard)
    weight_map = {name: shard for shard, held in shards.items() for name, _ in held}
    index = {"metadata": {"total_size": 7}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return type(model).from_pretrained(directory)


def test_shards_of_pytorchs_own_go_to_swap(tmp_path: Path, wrap: Wrap) -> None:
    expected = save_bin(CASES["llama"](), tmp_path)
    found = from_pretrained(tmp_path, budget="1MiB")
    assert not wrap.in_place
    assert_same(found, expected)
    streamed = mball.load_file(tmp_path)
    assert all(torch.equal(tensor, streamed[name]) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize("damage", ["cut short", "missing", "none at all"])
def test_pytorchs_own_files_that_are_damaged_are_named(damage: str, tmp_path: Path, wrap: Wrap) -> None:
    save_bin(CASES["llama"](), tmp_path)
    shard = tmp_path / "pytorch_model-00002-of-00002.bin"
    if damage == "cut short":
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        shard.unlink()
    if damage == "none at all":
        (tmp_path / "pytorch_model.bin.index.json").unlink()
        (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()
    messages = {
        "cut short": f"{shard} is damaged",
        "missing": f"{shard} is missing",
        "none at all": f"{tmp_path} cannot be loaded whole: ",
    }
    with pytest.raises(CheckpointError, match=messages[damage]):
        from_pretrained(tmp_path, budget="1MiB")
    assert not wrap.calls


def test_an_index_with_a_wrong_total_is_read_all_the_same(tmp_path: Path, wrap: Wrap) -> None:
    save(CASES["llama"](), tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": {"total_size": 7}}))
    found = from_pretrained(tmp_path, budget="1MiB")
    assert wrap.in_place
    assert_same(found, type(found).from_pretrained(tmp_path))


INDICES = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}


def save_shards(kind: str, directory: Path) -> Path:
    """Saves a model in several files, and returns their index."""
    if kind == "bin":
        save_bin(CASES["llama"](), directory)
    else:
        save(CASES["llama"](), directory, max_shard_size="20KB")
    return directory / INDICES[kind]


def change_map(index: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Writes an index anew with what `change` makes of its `weight_map`, which it may alter."""
    weight_map = json.loads(index.read_text())["weight_map"]
    changed = change(weight_map)
    index.write_text(json.dumps({"weight_map": weight_map if changed is None else changed}))


def first_shard(index: Path) -> Path:
    return index.parent / min(json.loads(index.read_text())["weight_map"].values())


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def copy_a_tensor(index: Path) -> None:
    """Puts a tensor of the last shard into the first one too."""
    weight_map = json.loads(index.read_text())["weight_map"]
    shard, last = first_shard(index), max(weight_map.values())
    name = next(name for name, place in weight_map.items() if place == last)
    if shard.suffix == ".bin":
        torch.save(torch.load(shard) | {name: torch.ones(2)}, shard)
    else:
        save_file(load_file(shard) | {name: torch.ones(2)}, shard, metadata={"format": "pt"})


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a list": (lambda index: change_map(index, list), "{index} is corrupt: it has no 'weight_map'"),
    "mixed types": (
        lambda index: change_map(index, lambda found: found | {"a": 1, "b": ["c"]}),
        "{index} is corrupt: it has no 'weight_map'",
    ),
    "no map": (lambda index: index.write_text("{}"), "{index} is corrupt: it has no 'weight_map'"),
    "no object": (lambda index: index.write_text("[]"), "{index} is corrupt: it is not a JSON object"),
    "no JSON": (lambda index: index.write_text('{"weight_map": '), "{index} is corrupt: "),
    "no text": (lambda index: index.write_bytes(b"\xff\xfe"), "{index} is corrupt: "),
    "nested deeply": (lambda index: index.write_text("[" * 100_000), "{index} is corrupt: it is nested too deeply"),
    "no tensors": (lambda index: change_map(index, lambda _: {}), "{index} has no tensors"),
    "an absolute name": (
        lambda index: change_map(index, lambda found: found | dict.fromkeys(found, str(first_shard(index)))),
        "{index} places tensor .* outside its own directory",
    ),
    "a name with ..": (
        lambda index: change_map(
            index, lambda found: {name: f"../{index.parent.name}/{shard}" for name, shard in found.items()}
        ),
        "{index} places tensor .* outside its own directory",
    ),
    "an empty name": (lambda index: change_map(index, lambda found: found | {"a": ""}), "{index} is corrupt: ''"),
    "a NUL in a name": (lambda index: change_map(index, lambda found: found | {"a": "\0"}), "{index} is corrupt: "),
    "a shard that is missing": (
        lambda index: first_shard(index).unlink(),
        "{shard} is missing; index {index.name} places .* again",
    ),
    "a tensor that its shard lacks": (
        lambda index: change_map(index, lambda found: found | {"stranger": first_shard(index).name}),
        "'stranger' is not in {shard} .* where index {index.name} places it",
    ),
    "a tensor in two shards": (
        copy_a_tensor,
        "{shard} holds 1 tensors that index {index.name} does not place there",
    ),
    "a tensor that is not in it": (
        lambda index: change_map(
            index, lambda found: found.pop(min(found, key=lambda name: (found[name], name))) and None
        ),
        "{shard} holds 1 tensors that index {index.name} does not place there",
    ),
    "a shard that is a directory": (
        lambda index: (shard := first_shard(index)).unlink() or shard.mkdir(),
        "{shard} is not a regular file",
    ),
    "a shard that links to itself": (
        lambda index: loop(first_shard(index)),
        "{shard} cannot be opened .*symbolic links",
    ),
    "an index that links to itself": (loop, "{index} cannot be opened .*symbolic links"),
}


@pytest.mark.parametrize(("kind", "dtype"), [("safetensors", None), ("safetensors", "bfloat16"), ("bin", None)])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_index_that_is_wrong_is_named_before_anything_is_loaded(
    fault: str, kind: str, dtype: str | None, tmp_path: Path, wrap: Wrap, no_loading: None
) -> None:
    index = save_shards(kind, tmp_path)
    shard = first_shard(index)
    damage, message = FAULTS[fault]
    damage(index)
    with pytest.raises(CheckpointError, match=message.format(index=index, shard=shard)):
        from_pretrained(tmp_path, budget="1MiB", dtype=dtype)
    assert not wrap.calls


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("transformers was asked to load it")

    monkeypatch.setattr("mball.integrations.transformers._load_whole", refuse)


def deny(path: Path, below: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the system refuse to open `path`; with `below` also to look at what lies in it. Root may do all that."""

    def refusing(call: Callable[..., Any], only_below: bool) -> Callable[..., Any]:
        def refuse(what: Any = ".", *args: Any, **more: Any) -> Any:
            if isinstance(what, str | Path) and (
                (below and path in Path(what).parents) or (not only_below and path == Path(what))
            ):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(what))
            return call(what, *args, **more)

        return refuse

    for module, name in ((os, "open"), (os, "listdir"), (os, "scandir"), (io, "open")):
        monkeypatch.setattr(module, name, refusing(getattr(module, name), False))
    monkeypatch.setattr("builtins.open", io.open)
    monkeypatch.setattr(os, "stat", refusing(os.stat, True))


@pytest.mark.parametrize("kind", INDICES)
@pytest.mark.parametrize("what", ["directory", "index", "shard", "config"])
def test_what_may_not_be_read_is_named(
    what: str, kind: str, tmp_path: Path, wrap: Wrap, no_loading: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = save_shards(kind, tmp_path)
    paths = {"directory": tmp_path, "index": index, "shard": first_shard(index), "config": tmp_path / "config.json"}
    with monkeypatch.context() as patch:
        deny(paths[what], what == "directory", patch)
        with pytest.raises(CheckpointError, match=rf"{paths[what]} cannot be (read|opened) \(Permission denied\); "):
            from_pretrained(tmp_path, budget="1MiB")
    assert not wrap.calls


def test_a_file_below_what_may_not_be_read_is_named(
    tmp_path: Path, wrap: Wrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model", "model.gguf"):
        with monkeypatch.context() as patch:
            deny(tmp_path, True, patch)
            with pytest.raises(CheckpointError, match=rf"{name} cannot be read \(Permission denied\)"):
                from_pretrained(tmp_path / name, budget="1MiB")


@pytest.mark.parametrize(
    "damage", [loop, lambda path: path.unlink() or path.mkdir(), lambda path: path.write_text("{")]
)
def test_a_config_that_cannot_be_read_is_named(damage: Callable[[Path], Any], tmp_path: Path, wrap: Wrap) -> None:
    save(CASES["llama"](), tmp_path)
    damage(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/config\.json (cannot be read|is not a regular file)"):
        from_pretrained(tmp_path, budget="1MiB")
    assert not wrap.calls


def test_a_single_file_comes_before_an_index(tmp_path: Path, wrap: Wrap) -> None:
    save(CASES["llama"](), tmp_path)
    (tmp_path / INDICES["safetensors"]).write_text("left behind")
    found = from_pretrained(tmp_path, budget="1MiB")
    assert wrap.in_place
    assert_same(found, type(found).from_pretrained(tmp_path))


def test_bad_input_is_named(tmp_path: Path, wrap: Wrap) -> None:
    with pytest.raises(CheckpointError, match=r"no directory with a config\.json"):
        from_pretrained(tmp_path / "nowhere", budget="1MiB")
    save(CASES["llama"](), tmp_path)
    with pytest.raises(ConfigError, match="dtype is 'bf16'"):
        from_pretrained(tmp_path, budget="1MiB", dtype="bf16")
    checkpoint = tmp_path / "model.safetensors"
    whole = checkpoint.read_bytes()
    tensors = load_file(checkpoint)
    del tensors["model.norm.weight"]
    save_file(tensors, checkpoint, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of \d+ weights .*model\.norm\.weight"):
        from_pretrained(tmp_path, budget="1MiB")
    checkpoint.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        from_pretrained(tmp_path, budget="1MiB")
    assert not wrap.calls
