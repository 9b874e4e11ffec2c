"""Small models of every kind that users have, each with the calls that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Run = Callable[[nn.Module], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Specimen:
    """A model and what to do with it.

    Attributes:
        make: builds the model, with the seed that the test sets.
        runs: what is called, in order; results are compared bit for bit.
        budget: of its weights' bytes.
        graphs: whether Dynamo captures anything.
        slow: not in the short suite.
    """

    make: Callable[[], nn.Module]
    runs: tuple[Run, ...]
    budget: float = 0.6
    graphs: bool = True


def ids(*shape: int, vocabulary: int = 128, seed: int = 7) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 7, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def llama(
    layers: int = 2,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 2,
    vocabulary: int = 128,
    hidden: int = 128,
) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype)


def generate(cache: str, length: int = 5) -> Run:
    def run(model: Any) -> Any:
        prompt = ids(1, length)
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=6,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            cache_implementation=cache,
            disable_compile=True,
        )[:2]

    return run


def logits(*shape: int) -> Run:
    return lambda model: model(ids(*shape), use_cache=False).logits


class BrokenLayer(nn.Module):
    """A layer that Dynamo captures in two graphs, which serve all layers like it; one weight of its own is tied."""

    def __init__(self, width: int, shared: nn.Parameter) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x) @ self.shared
        torch._dynamo.graph_break()
        return x + self.second(y).relu()


class BrokenLayers(nn.Module):
    """Equal layers with a break in each, some of them used twice."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        shared = nn.Parameter(torch.randn(width, width) / width)
        self.layers = nn.ModuleList(BrokenLayer(width, shared) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in (0, 1, 2, 1, 3, 4, 0):
            x = self.layers[number](x)
        return x


class Breaks(nn.Module):
    """Graph breaks, an eager read of a child's weight, a parameter of its own, a buffer, a shared module."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(width, 4 * width)
        self.second = nn.Linear(4 * width, width)
        self.shared = nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.randn(width, width))
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.register_buffer("shift", torch.randn(width))

    @torch._dynamo.disable
    def by_hand(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.first.weight.t() @ self.second.weight.t() + self.scale)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.shared(x + self.shift)
        y = self.second(self.first(x).relu())
        torch._dynamo.graph_break()
        y = self.shared(y) @ self.scale[:, : len(self.scale) // 2].repeat(1, 2)
        y = self.by_hand(y)
        y, _ = self.rnn(y)
        return y + x, self.scale.t()


class Net(nn.Module):
    """A convolutional network with batch norm."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=4),
            nn.ConvTranspose2d(2 * width, width, 2, stride=2),
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x).mean((2, 3)))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=128,
        max_position_embeddings=128,
        eos_token_id=None,
        pad_token_id=0,
    )
    return MixtralForCausalLM(config)


class Experts(nn.Module):
    """A mixture of experts with a data-dependent loop over modules."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 6)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)) for _ in range(6)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        choice = self.gate(x).argmax(-1)
        out = torch.zeros_like(x)
        for number in choice.unique().tolist():
            rows = choice == number
            out[rows] = self.experts[number](x[rows])
        return out


def t5(width: int = 64) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        vocab_size=128,
        decoder_start_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def t5_generate(model: Any) -> Any:
    return model.generate(ids(2, 7), max_new_tokens=5, do_sample=False)


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=128,
        num_mel_bins=80,
        d_model=64,
        encoder_layers=2,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=1500,
        max_target_positions=64,
        decoder_start_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config)


def whisper_generate(model: Any) -> Any:
    # Half a minute of sound, as the feature extractor makes it: 80 mel bins, 3000 frames.
    return model.generate(input_features=noise(1, 80, 3000), max_new_tokens=5, do_sample=False)


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=128
    )
    return BertModel(config)


def tied_sequential(width: int = 64) -> nn.Module:
    first, last = nn.Linear(width, width), nn.Linear(width, width)
    last.weight = first.weight
    block = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
    return nn.Sequential(first, block, nn.LayerNorm(width), block, last)


def transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 3)


ZOO: dict[str, Specimen] = {
    "llama-fp32": Specimen(make=llama, runs=(logits(1, 9), logits(2, 5), logits(1, 1), logits(3, 17))),
    "llama-bf16-dynamic-cache": Specimen(make=lambda: llama(dtype=torch.bfloat16), runs=(generate("dynamic"),)),
    "llama-tied-static-cache": Specimen(
        make=lambda: llama(tied=True),
        runs=(generate("static"), generate("static", 7)),
    ),
    "llama-fp16": Specimen(make=lambda: llama(dtype=torch.float16), runs=(logits(2, 6),)),
    "sequential": Specimen(
        make=tied_sequential, runs=(lambda m: m(noise(4, 64)), lambda m: m(noise(1, 64)), lambda m: m[1](noise(3, 64)))
    ),
    "lstm": Specimen(
        make=lambda: nn.LSTM(64, 128, num_layers=2, bidirectional=True),
        runs=(lambda m: m(noise(5, 2, 64)), lambda m: m(noise(3, 1, 64))),
        budget=0.8,
        graphs=False,
    ),
    "breaks": Specimen(
        make=Breaks, runs=(lambda m: m(noise(2, 3, 64)), lambda m: m.forward(noise(2, 3, 64))), budget=0.85
    ),
    "breaks-in-layers": Specimen(
        make=BrokenLayers, runs=(lambda m: m(noise(3, 64)), lambda m: m(noise(2, 3, 64))), budget=0.85
    ),
    "convolutions": Specimen(
        make=Net, runs=(lambda m: m(noise(2, 3, 16, 16)), lambda m: m(noise(2, 3, 16, 14))), budget=1.95
    ),
    "convolutions-channels-last": Specimen(
        make=lambda: Net().to(memory_format=torch.channels_last), runs=(lambda m: m(noise(2, 3, 16, 16)),), budget=1.95
    ),
    "mixtral": Specimen(make=mixtral, runs=(logits(1, 6), logits(2, 3)), budget=0.7),
    "experts": Specimen(make=Experts, runs=tuple((lambda m, s=s: m(noise(8, 64, seed=s))) for s in range(4))),
    "t5": Specimen(make=t5, runs=(t5_generate,), budget=0.5),
    # Most of the budget is for the encoder's activations.
    "whisper": Specimen(
        make=whisper,
        runs=(whisper_generate, lambda m: m.model.encoder(noise(1, 80, 3000))[0]),
        budget=3.1,
    ),
    "bert-bf16": Specimen(
        make=lambda: bert().to(torch.bfloat16),
        runs=(lambda m: m(ids(2, 9))[0], lambda m: m.encoder.layer[0](noise(1, 4, 64, dtype=torch.bfloat16))),
    ),
    "transformer-encoder": Specimen(make=transformer_encoder, runs=(lambda m: m(noise(2, 5, 64)),), budget=0.9),
}
