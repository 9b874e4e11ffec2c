"""What is timed: a prefill, and decode steps of one token after it, on a static cache."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from transformers import StaticCache

NUM_DECODED = 4


class Kind(Enum):
    """Which steps."""

    DECODE = "decode"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """Steps that are run one after the other; only the last `timed` count."""

    warm: int
    timed: int


class Workload:
    """A prompt of random tokens, and a cache with room for it and a few tokens more.

    Every decode step follows a cache of the same random keys and values, so that all do the same work, and nobody has
    to run a long prompt before the first of them.

    Args:
        model: a Llama of transformers, however it is run.
        prompt_tokens: the prompt's length.
        collects: whether garbage is collected after each step: what accelerate reads from disk stays in reference
            cycles, all weights within a few steps.
        device: where inputs and cache are; a step is over when all compute there is.
    """

    def __init__(self, model: Any, prompt_tokens: int, *, collects: bool = False, device: str = "cpu") -> None:
        self._model = model
        self._device = torch.device(device)
        self._collects = collects
        config = model.config
        generator = torch.Generator().manual_seed(11)
        self._tokens = torch.randint(config.vocab_size, (1, prompt_tokens + NUM_DECODED), generator=generator)
        self._tokens = self._tokens.to(self._device)
        self._prompt_tokens = prompt_tokens
        # Bound before anything is captured, so that prefill and decode find the same cache.
        self._cache = StaticCache(config=config, max_cache_len=prompt_tokens + NUM_DECODED)
        self._cache.early_initialization(
            batch_size=1,
            num_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            dtype=torch.bfloat16,
            device=self._device,
        )
        self._is_filled = False

    @torch.no_grad()
    def logits(self, kind: Kind) -> torch.Tensor:
        """Returns logits: `[1, V]` after the prompt, or `[NUM_DECODED, V]` after each of the tokens that follow it."""
        if kind is Kind.PREFILL:
            return self._step(0, self._prompt_tokens)
        self._fill()
        logits = []
        for number in range(NUM_DECODED):
            logits.append(self._step(self._prompt_tokens + number, 1))
            if self._collects:
                gc.collect()
        return torch.cat(logits)

    @torch.no_grad()
    def run(self, kind: Kind, burst: Burst) -> list[float]:
        """Returns the seconds of each timed step, from the end of the one before it.

        Nothing is outside the clock, for mball reads on meanwhile. Only the collection is, in ways that read nothing
        ahead.
        """
        if kind is Kind.DECODE:
            self._fill()
        first, count = (self._prompt_tokens, 1) if kind is Kind.DECODE else (0, self._prompt_tokens)
        times = []
        self._finish()
        began_s = time.perf_counter()
        for _ in range(burst.warm + burst.timed):
            self._step(first, count)
            self._finish()
            ended_s = time.perf_counter()
            times.append(ended_s - began_s)
            began_s = ended_s
            if self._collects:
                gc.collect()
                began_s = time.perf_counter()
        return times[burst.warm :]

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _fill(self) -> None:
        """Fills the cache as a prompt would, unless no prompt was run since the last time."""
        if self._is_filled:
            return
        generator = torch.Generator().manual_seed(13)
        for layer in self._cache.layers:
            for values in (layer.keys, layer.values):
                values.copy_(torch.randn(values.shape, generator=generator))
        self._is_filled = True

    def _step(self, first: int, count: int) -> torch.Tensor:
        """Runs the tokens `[first, first + count)`; returns the last one's logits `[1, V]`."""
        self._is_filled &= first > 0
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(first)
        output = self._model(
            self._tokens[:, first : first + count], past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        logits: torch.Tensor = output.logits[:, -1].clone()
        return logits
