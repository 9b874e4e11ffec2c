"""What `memory_proof` runs in processes of their own: writes a checkpoint, or generates with one and watches memory.

Each prints lines of JSON. Run from the root of the checkout: `python -m tests.run.memory_child write|generate ...`.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch._dynamo  # before the base is measured, in both ways of running
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mball
from mball.api import _states
from mball.integrations.transformers import from_pretrained
from mball.memory.facts import cgroup_memory, process_memory
from mball.memory.virtual import HostMemory
from tests.run.cgroup import PAGE_BYTES, MemoryGroup

NUM_THREADS = 2
PROMPT = torch.arange(32).reshape(1, 32)


def say(event: str, **facts: Any) -> None:
    """Prints a line at once: the process may be killed at any time."""
    print(json.dumps({"event": event, **facts}), flush=True)


class Watch:
    """Notes the most memory this process has between `__enter__` and `__exit__`, from a thread, every 10 ms.

    Attributes:
        anonymous_bytes, pss_bytes: the largest of each that was seen.
        stack: where the main thread was when anonymous memory was largest, innermost first.
    """

    def __init__(self) -> None:
        self.anonymous_bytes = 0
        self.pss_bytes = 0
        self.stack: list[str] = []
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            memory = process_memory()
            self.pss_bytes = max(self.pss_bytes, memory.pss_bytes or 0)
            if memory.anonymous_bytes > self.anonymous_bytes:
                self.anonymous_bytes = memory.anonymous_bytes
                frame = sys._current_frames().get(self._main)
                names = []
                while frame is not None and len(names) < 9:
                    names.append(
                        f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
                    )
                    frame = frame.f_back
                self.stack = names


class Digest:
    """A logits processor that changes nothing and keeps a hash of all logits `[B, V]`, not the logits."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._hash.update(scores.contiguous().view(torch.uint8).numpy())
        return scores

    def hex(self) -> str:
        return self._hash.hexdigest()


def generate(model: Any, num_tokens: int) -> dict[str, Any]:
    """Generates greedily, through the prefill and both decode graphs; returns the tokens and a hash of all logits."""
    digest = Digest()
    began_s = time.perf_counter()
    with torch.no_grad():
        tokens = model.generate(
            PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[digest],
        )
    return {
        "token_ids": tokens[0, PROMPT.shape[1] :].tolist(),
        "logits_sha256": digest.hex(),
        "generate_s": time.perf_counter() - began_s,
    }


def load(way: str, checkpoint: Path, budget_bytes: int) -> Any:
    if way == "mball":
        return from_pretrained(checkpoint, budget=budget_bytes)
    # Without mmap the weights are anonymous memory. With it they are page
    # cache, which the kernel drops and reads again under a cap: slower, but no cap on it can make that fail.
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, local_files_only=True, disable_mmap=way == "transformers-no-mmap"
    )
    return model.eval()


def warm_up(way: str, checkpoint: Path, num_tokens: int) -> None:
    """Runs the small model, under a budget that makes it stream, and drops it: what is left is machinery."""
    weight_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    model = load(way, checkpoint, weight_bytes * 3 // 4)
    generate(model, num_tokens)
    if way == "mball":
        arena = _states[model].engine.execution.arena
        assert mball.report(model).bytes_read_last_pass > 0
    del model
    gc.collect()
    # An arena that outlived its model would be memory that the limit, counted from here, gives for nothing.
    assert way != "mball" or arena.closed, "the small model's arena was not given back"


def run(arguments: argparse.Namespace) -> None:
    if arguments.blind:
        # mball asks for the limit and refuses what does not fit; then the kernel never has to.
        HostMemory.__init__.__kwdefaults__["headroom"] = lambda: 1 << 60
    group = MemoryGroup(arguments.group) if arguments.group else None
    imported_bytes = process_memory().anonymous_bytes
    if arguments.warm_up:
        warm_up(arguments.way, arguments.warm_up, arguments.new_tokens)
    base = process_memory()
    limit_bytes = None
    if group is not None:
        assert os.getpid() in group.pids(), "this process is not in the group"
        limit_bytes = (arguments.limit or base.anonymous_bytes + arguments.allow) // PAGE_BYTES * PAGE_BYTES
        group.set_limit(limit_bytes)
        assert group.limit_bytes() == limit_bytes, (group.limit_bytes(), limit_bytes)
        seen = cgroup_memory()
        assert seen is not None
        assert seen.limit_bytes == limit_bytes, (seen, limit_bytes)
    say(
        "limited",
        imported_bytes=imported_bytes,
        base_bytes=base.anonymous_bytes,
        base_pss_bytes=base.pss_bytes,
        limit_bytes=limit_bytes,
        usage_bytes=group.usage_bytes() if group else None,
        times_at_limit=group.times_at_limit() if group else 0,
    )
    with Watch() as watch:
        model = load(arguments.way, arguments.checkpoint, arguments.budget)
        made = generate(model, arguments.new_tokens)
    gc.collect()
    after = process_memory()
    facts: dict[str, Any] = {}
    if arguments.way == "mball":
        engine = _states[model].engine
        facts["report"] = mball.report(model).as_dict()
        facts["arena_bytes"] = engine.execution.arena.backed_bytes
        facts["capture_bytes"] = (
            after.anonymous_bytes - base.anonymous_bytes - facts["arena_bytes"] - facts["report"]["buffer_bytes"]
        )
    say(
        "done",
        **made,
        **facts,
        peak_growth_bytes=watch.anonymous_bytes - base.anonymous_bytes,
        peak_pss_bytes=watch.pss_bytes,
        peak_stack=watch.stack,
        after_growth_bytes=after.anonymous_bytes - base.anonymous_bytes,
        times_at_limit=group.times_at_limit() if group else 0,
        stat=group.stat() if group else {},
    )


def write(arguments: argparse.Namespace) -> None:
    """Writes random weights, a Llama's, in shards of bfloat16."""
    torch.manual_seed(arguments.layers)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=4,
        vocab_size=arguments.vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(arguments.directory, max_shard_size="500MB")
    say("written", weight_bytes=sum(weight.nbytes for weight in model.parameters()))


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    writer = commands.add_parser("write")
    writer.set_defaults(command=write)
    writer.add_argument("directory", type=Path)
    for name in ("--hidden", "--layers", "--vocabulary"):
        writer.add_argument(name, type=int, required=True)
    runner = commands.add_parser("generate")
    runner.set_defaults(command=run)
    runner.add_argument("checkpoint", type=Path)
    runner.add_argument("--way", choices=("mball", "transformers", "transformers-no-mmap"), required=True)
    runner.add_argument("--warm-up", type=Path, help="checkpoint of a small model of the same kind, to run first")
    runner.add_argument("--budget", type=int, default=0)
    runner.add_argument("--new-tokens", type=int, default=12)
    runner.add_argument("--group", type=Path, help="the control group that this process is in, to be limited")
    runner.add_argument("--allow", type=int, default=0, help="the limit, beyond the anonymous memory at that moment")
    runner.add_argument("--limit", type=int, default=0, help="the limit")
    runner.add_argument("--blind", action="store_true", help="mball does not ask how much memory is free")
    arguments = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    try:
        arguments.command(arguments)
    except (MemoryError, RuntimeError, OSError, mball.MballError) as error:
        say("failed", error=f"{type(error).__name__}: {error}")
        traceback.print_exc()
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
