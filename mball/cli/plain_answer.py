"""Answers a prompt with a transformers model, token by token, and measures it. Knows nothing of mball.

The demo runs this file as a program, in a process of its own, for the unwrapped model; and uses its
functions for the wrapped one, so that both are asked and measured alike.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_PSS = re.compile(r"^Pss:\s+(\d+) kB", re.MULTILINE)


def process_bytes() -> int:
    """Returns the memory of this process: its share of all pages (PSS), or its RSS where the kernel hides that."""
    try:
        found = _PSS.search(Path("/proc/self/smaps_rollup").read_text())
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class PeakMemory:
    """Watches by how much this process grows between `__enter__` and `__exit__`, from a thread.

    It looks every 20 ms, or less often where looking would take more than a twentieth of a core: the kernel walks all
    pages of the process for it.

    `peak_bytes` is the largest growth seen so far.
    """

    _EVERY_S = 0.02
    _LARGEST_SHARE = 1 / 20

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        before = process_bytes()

        def watch() -> None:
            pause_s = self._EVERY_S
            while not self._stop.wait(pause_s):
                began_s = time.perf_counter()
                self.peak_bytes = max(self.peak_bytes, process_bytes() - before)
                pause_s = max(self._EVERY_S, (time.perf_counter() - began_s) / self._LARGEST_SHARE)

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


class TokenStream:
    """A streamer for `generate()`: notes when each token came and hands the text so far to `show`."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        self.token_ids: list[int] = []
        self.times_s: list[float] = []
        self._tokenizer = tokenizer
        self._show = show
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt `[B, T]` first, then one token `[1]` at a time."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times_s.append(time.perf_counter())
        self.token_ids += value.flatten().tolist()
        self._show(self.text())

    def end(self) -> None:
        """Called by `generate()` after the last token."""

    def text(self) -> str:
        """Returns the answer so far, without special tokens."""
        text = self._tokenizer.decode(self.token_ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, show: Callable[[str], None]) -> dict[str, Any]:
    """Asks `model` greedily; returns text, token_ids, first_token_s, total_s and tokens_per_s (of the median token)."""
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    stream = TokenStream(tokenizer, show)
    start = time.perf_counter()
    model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=stream,
        pad_token_id=tokenizer.pad_token_id,
    )
    gaps = [later - earlier for earlier, later in zip(stream.times_s, stream.times_s[1:], strict=False)]
    return {
        "text": stream.text(),
        "token_ids": stream.token_ids,
        "first_token_s": stream.times_s[0] - start,
        # The median leaves out tokens that waited for something once, such as the first plan.
        "tokens_per_s": 1 / median(gaps) if gaps else None,
        "total_s": time.perf_counter() - start,
    }


def main(arguments: list[str]) -> None:
    """Prints the answer to `arguments` (directory, prompt, number of tokens) as JSON."""
    directory, prompt, max_new_tokens = arguments
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    with PeakMemory() as memory:
        model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
        model.eval()
        result = answer(model, tokenizer, prompt, int(max_new_tokens), lambda text: None)
    result["peak_bytes"] = memory.peak_bytes
    result["mball_imported"] = "mball" in sys.modules
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
