"""The models that traces are recorded from: classes of transformers in real proportions, and their passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DynamicCache,
    EncoderDecoderCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    StaticCache,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.configuration_utils import PretrainedConfig

from bench.speed.model import LARGE

# Makes what a pass needs once, and returns what runs one.
Prepare = Callable[[Any], Callable[[], object]]

_ROOM_TOKENS = 32  # of a cache, beside the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model and the passes that are recorded.

    Attributes:
        config: makes transformers' description of it.
        dtype: of the weights.
        passes: by the name of the trace.
    """

    model_class: Any
    config: Callable[[], PretrainedConfig]
    dtype: torch.dtype
    passes: Mapping[str, Prepare]


def prefill(num_tokens: int) -> Prepare:
    """A prompt of `num_tokens` into an empty static cache; logits of its last token."""

    def prepare(model: Any) -> Callable[[], object]:
        cache = StaticCache(config=model.config, max_cache_len=num_tokens + _ROOM_TOKENS)
        tokens = _tokens(model, num_tokens)

        def run() -> object:
            cache.reset()
            return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

        return run

    return prepare


def decode(num_tokens: int) -> Prepare:
    """One token after a prompt of `num_tokens`, on a static cache of random keys and values."""

    def prepare(model: Any) -> Callable[[], object]:
        config, token = model.config, _tokens(model, 1)
        cache = StaticCache(config=config, max_cache_len=num_tokens + _ROOM_TOKENS)
        cache.early_initialization(
            batch_size=1,
            num_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=model.dtype,
            device=torch.device("cpu"),
        )
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()

        def run() -> object:
            for layer in cache.layers:
                # Always the first token after the prompt; layers with a window count twice.
                layer.cumulative_length.fill_(num_tokens)
                if hasattr(layer, "cumulative_length_int"):
                    layer.cumulative_length_int = num_tokens
            return model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)

        return run

    return prepare


def encode(num_tokens: int) -> Prepare:
    """A text of `num_tokens` through an encoder."""

    def prepare(model: Any) -> Callable[[], object]:
        tokens = _tokens(model, num_tokens)
        return lambda: model(tokens)

    return prepare


def decode_encoded(num_tokens: int) -> Prepare:
    """One token of a decoder that attends to an encoded text of `num_tokens`, whose keys and values are there."""

    def prepare(model: Any) -> Callable[[], object]:
        encoded = (torch.randn(1, num_tokens, model.config.d_model, dtype=model.dtype),)
        own = StaticCache(config=model.config, max_cache_len=_ROOM_TOKENS)
        cache = EncoderDecoderCache(own, DynamicCache())
        token = _tokens(model, 1)

        def run() -> object:
            own.reset()
            return model(encoder_outputs=encoded, decoder_input_ids=token, past_key_values=cache, use_cache=True)

        return run

    return prepare


def look(num_images: int) -> Prepare:
    """Images of 224 × 224, all at once."""

    def prepare(model: Any) -> Callable[[], object]:
        images = torch.randn(num_images, 3, 224, 224, dtype=model.dtype)
        return lambda: model(images)

    return prepare


def _tokens(model: Any, count: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(11))


def _smollm2() -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def _gemma() -> PretrainedConfig:
    return Gemma3TextConfig(
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=262144,
        sliding_window=512,
    )


def _mixtral() -> PretrainedConfig:
    return MixtralConfig(
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=32000,
    )


def _t5() -> PretrainedConfig:
    return T5Config(d_model=768, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12, vocab_size=32128)


def _vit() -> PretrainedConfig:
    return ViTConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)


def _convnext() -> PretrainedConfig:
    return ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536])


def _resnet() -> PretrainedConfig:
    return ResNetConfig(depths=[3, 8, 36, 3])


def _swin() -> PretrainedConfig:
    return SwinConfig(embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48])


SUBJECTS = {
    "llama-1b": Subject(
        model_class=LlamaForCausalLM,
        config=LARGE.config,
        dtype=torch.bfloat16,
        passes={"llama-1b-decode": decode(512), "llama-1b-prefill": prefill(128)},
    ),
    "smollm2-135m": Subject(
        model_class=LlamaForCausalLM,
        config=_smollm2,
        dtype=torch.bfloat16,
        passes={"smollm2-135m-decode": decode(128)},
    ),
    # Two thirds of its weights are one embedding.
    "gemma3-270m": Subject(
        model_class=Gemma3ForCausalLM,
        config=_gemma,
        dtype=torch.bfloat16,
        passes={"gemma3-270m-decode": decode(128)},
    ),
    # A layer's experts are two weights of 117 and 59 MB, its attention four of 2 MB and less.
    "mixtral-8x90m": Subject(
        model_class=MixtralForCausalLM,
        config=_mixtral,
        dtype=torch.bfloat16,
        passes={"mixtral-8x90m-decode": decode(128)},
    ),
    "t5-base": Subject(
        model_class=T5ForConditionalGeneration,
        config=_t5,
        dtype=torch.float32,
        passes={"t5-base-decode": decode_encoded(128)},
    ),
    "t5-base-encoder": Subject(
        model_class=T5EncoderModel,
        config=_t5,
        dtype=torch.float32,
        passes={"t5-base-encode": encode(128)},
    ),
    "vit-large": Subject(
        model_class=ViTForImageClassification,
        config=_vit,
        dtype=torch.float32,
        passes={"vit-large": look(4)},
    ),
    "convnext-large": Subject(
        model_class=ConvNextForImageClassification,
        config=_convnext,
        dtype=torch.float32,
        passes={"convnext-large": look(4)},
    ),
    "resnet-152": Subject(
        model_class=ResNetForImageClassification,
        config=_resnet,
        dtype=torch.float32,
        passes={"resnet-152": look(4)},
    ),
    "swin-large": Subject(
        model_class=SwinForImageClassification,
        config=_swin,
        dtype=torch.float32,
        passes={"swin-large": look(4)},
    ),
}
