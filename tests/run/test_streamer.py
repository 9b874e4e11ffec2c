"""`generate` in a thread of its own, with a streamer, as chat programs run it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.run.harness import assert_streamed, engine_of, make, weight_bytes, wrap_hostile
from tests.run.zoo import ids, llama

TOKENS = 7


class Digits:
    """A tokenizer that writes each token as its number."""

    def decode(self, tokens: Any, **_: object) -> str:
        return "".join(f"{int(token)} " for token in tokens)


class Generation:
    """One `generate` in a thread of its own."""

    def __init__(self, model: Any, prompt: torch.Tensor, streamer: Any = None) -> None:
        self.ids: torch.Tensor | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(model, prompt, streamer), daemon=True)
        self._thread.start()

    def _run(self, model: Any, prompt: torch.Tensor, streamer: Any) -> None:
        try:
            self.ids = generated(model, prompt, streamer)
        except BaseException as error:
            self.error = error

    def result(self) -> torch.Tensor:
        self._thread.join(timeout=100)
        assert not self._thread.is_alive(), "generate in a thread hangs"
        assert self.error is None, self.error
        assert self.ids is not None
        return self.ids


def generated(model: Any, prompt: torch.Tensor, streamer: Any = None) -> torch.Tensor:
    mask = torch.ones_like(prompt)
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "disable_compile": True}
    return model.generate(prompt, attention_mask=mask, streamer=streamer, **settings)


@pytest.fixture(params=["graphs", "operators"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    plain, model = make(lambda: llama(layers=2)), make(lambda: llama(layers=2))
    wrap_hostile(model, int(weight_bytes(model) * 0.7), swap_dir=tmp_path, capture=request.param)
    yield plain, model
    assert not engine_of(model).in_pass


def test_tokens_come_while_generate_runs_in_a_thread(pair: tuple[Any, Any]) -> None:
    from transformers import TextIteratorStreamer

    plain, model = pair
    prompt = ids(1, 5)
    expected = generated(plain, prompt)
    for _ in range(2):
        streamer = TextIteratorStreamer(Digits(), skip_prompt=True, timeout=100)  # type: ignore[arg-type]
        generation = Generation(model, prompt, streamer)
        # The pieces of text arrive in this thread while that one runs passes.
        tokens = [int(number) for number in "".join(streamer).split()]
        assert torch.equal(generation.result(), expected)
        assert tokens == expected[0, prompt.shape[1] :].tolist()
        assert len(tokens) == TOKENS
        assert_streamed(model)


def test_two_generates_at_once_take_turns(pair: tuple[Any, Any]) -> None:
    from transformers import TextIteratorStreamer

    plain, model = pair
    prompts = [ids(1, 5), ids(1, 7, seed=3), ids(2, 4, seed=4)]
    expected = [generated(plain, prompt) for prompt in prompts]
    engine = engine_of(model)
    owners: list[int] = []
    enter = engine.execution.enter

    def watched(step: int) -> Any:
        owners.append(threading.get_ident())
        return enter(step)

    engine.execution.enter = watched
    streamer = TextIteratorStreamer(Digits(), skip_prompt=True, timeout=100)  # type: ignore[arg-type]
    generations = [Generation(model, prompts[0], streamer), Generation(model, prompts[1])]
    here = generated(model, prompts[2])
    tokens = [int(number) for number in "".join(streamer).split()]
    assert torch.equal(generations[0].result(), expected[0])
    assert torch.equal(generations[1].result(), expected[1])
    assert torch.equal(here, expected[2])
    assert tokens == expected[0][0, 5:].tolist()
    assert_streamed(model)
    changes = sum(a != b for a, b in itertools.pairwise(owners))
    assert len(set(owners)) == 3
    assert changes > 3, "they did not run at the same time, so nothing was shown"
