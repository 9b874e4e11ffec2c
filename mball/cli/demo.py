"""`mball demo`: a language model answers under a budget, beside the same model unwrapped in another process."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mball.cli import smollm2
from mball.config import cache_directory
from mball.errors import CheckpointError, WrapError
from mball.units import format_bytes, parse_bytes


def run_demo(*, budget: str, prompt: str, max_new_tokens: int) -> int:
    """Runs the demo on the terminal and returns 0 when both answers are the same, else 1.

    Raises:
        MballError: the budget cannot be read or is too small, or the model cannot be had.
    """
    console = Console()
    budget_bytes = parse_bytes(budget, what="budget")
    checkpoint = _checkpoint(console)
    console.print(
        "SmolLM2-135M-Instruct, bfloat16. The weights are dequantised Q4_1: real, and a little worse than the original."
    )
    console.print(f"[bold]> {escape(prompt)}[/]")
    wrapped, report = ask_wrapped(console, checkpoint, budget_bytes, prompt, max_new_tokens)
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    with console.status("the same prompt on the unwrapped model, in a process of its own"):
        unwrapped = ask_unwrapped(checkpoint, prompt, max_new_tokens)
    same = wrapped["token_ids"] == unwrapped["token_ids"] and wrapped["text"] == unwrapped["text"]
    console.print(_comparison(wrapped, unwrapped, budget_bytes))
    if same:
        console.print(f"[green]identical: both answered with the same {len(wrapped['token_ids'])} tokens[/]")
        return 0
    console.print(f"[red]DIFFERENT. The unwrapped model says:[/]\n{escape(unwrapped['text'])}")
    return 1


def _checkpoint(console: Console) -> Path:
    cache = cache_directory()
    found = smollm2.converted_checkpoint(cache)
    if found is not None:
        return found
    with console.status("converting the model to safetensors, once (about half a minute)"):
        start = time.perf_counter()
        made = smollm2.convert(cache)
    console.print(f"converted in {time.perf_counter() - start:.0f} s, kept in {made}")
    return made


def ask_wrapped(
    console: Console, checkpoint: Path, budget_bytes: int, prompt: str, max_new_tokens: int
) -> tuple[dict[str, Any], Any]:
    """Returns the wrapped model's answer with its times, and its report. Raises WrapError if it was not managed."""
    # Loaded before memory is measured, as in the other process: libraries are no part of the model.
    import torch._dynamo  # noqa: F401
    from transformers import AutoTokenizer

    import mball
    from mball.cli.plain_answer import PeakMemory, answer
    from mball.integrations.transformers import from_pretrained

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    with PeakMemory() as memory:
        model = from_pretrained(checkpoint, budget=budget_bytes)
        with _Screen(console) as screen:
            result = answer(model, tokenizer, prompt, max_new_tokens, screen.show)
        report = mball.report(model)
    facts = report.as_dict()
    if facts["weights_managed"] != facts["weights_owned"]:
        raise WrapError(
            f"{facts['weights_managed']} of {facts['weights_owned']} weights were managed: the demo proves nothing"
        )
    result["peak_bytes"] = memory.peak_bytes
    result["managed_peak_bytes"] = facts["peak_bytes"]
    return result, report


def ask_unwrapped(checkpoint: Path, prompt: str, max_new_tokens: int) -> dict[str, Any]:
    """Returns the same of the unwrapped model, from a process of its own. Raises CheckpointError if that fails."""
    program = Path(__file__).with_name("plain_answer.py")
    # -P: the folder of the program is no place to import from.
    command = [sys.executable, "-P", str(program), str(checkpoint), prompt, str(max_new_tokens)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise CheckpointError(f"the unwrapped model failed:\n{finished.stderr[-2000:]}")
    result = json.loads(finished.stdout)
    assert isinstance(result, dict)
    assert not result["mball_imported"], "the yardstick must not be touched by what it measures"
    return result


def _comparison(wrapped: dict[str, Any], unwrapped: dict[str, Any], budget_bytes: int) -> Table:
    table = Table(title="the same prompt, greedy decoding", title_justify="left")
    table.add_column("")
    table.add_column(f"mball, budget {format_bytes(budget_bytes)}", justify="right")
    table.add_column("unwrapped", justify="right")
    table.add_row("weights, KV cache, activations: peak", format_bytes(wrapped["managed_peak_bytes"]), "no budget")
    table.add_row(
        "growth of the process: peak (PSS)",
        format_bytes(wrapped["peak_bytes"]),
        format_bytes(unwrapped["peak_bytes"]),
    )
    table.add_row("first token after", f"{wrapped['first_token_s']:.2f} s", f"{unwrapped['first_token_s']:.2f} s")
    table.add_row("tokens/s (median token)", _rate(wrapped), _rate(unwrapped))
    table.add_row("whole answer", f"{wrapped['total_s']:.1f} s", f"{unwrapped['total_s']:.1f} s")
    return table


def _rate(result: dict[str, Any]) -> str:
    rate = result["tokens_per_s"]
    return "one token only" if rate is None else f"{rate:.1f}"


class _LastMessage(logging.Handler):
    """Keeps what mball logged last, to be shown while one waits."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage().splitlines()[0]


class _Screen:
    """Shows the answer as it grows. While no token comes for a while, a line below says what is being waited for."""

    _PATIENCE_S = 0.7

    def __init__(self, console: Console) -> None:
        self._console = console
        self._answer = ""
        self._since_s = time.perf_counter()
        self._spinner = Spinner("dots")
        self._messages = _LastMessage()
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        logger = logging.getLogger("mball")
        self._level = logger.level
        logger.addHandler(self._messages)
        logger.setLevel(logging.INFO)
        self._since_s = time.perf_counter()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logger = logging.getLogger("mball")
        logger.removeHandler(self._messages)
        logger.setLevel(self._level)
        if self._console.is_terminal:
            self._live.stop()
            self._console.print(escape(self._answer))
        else:
            self._console.print()

    def show(self, text: str) -> None:
        """Takes the answer so far."""
        if not self._console.is_terminal and text.startswith(self._answer) and not text.endswith("\ufffd"):
            self._console.file.write(text[len(self._answer) :])
            self._console.file.flush()
        # A half character at the end is shown when its other half is there.
        if not text.endswith("\ufffd"):
            self._answer = text
        self._since_s = time.perf_counter()

    def _render(self) -> Group:
        waited_s = time.perf_counter() - self._since_s
        if waited_s < self._PATIENCE_S:
            return Group(Text(self._answer))
        message = f"waiting for the next token, {waited_s:.0f} s"
        if self._messages.text:
            message += f"  ({self._messages.text})"
        self._spinner.update(text=Text(message, style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(Text(self._answer), self._spinner)
