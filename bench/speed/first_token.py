"""The first token of a checkpoint of several shards that is not in the page cache, imports apart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.results import Measurement
from bench.speed.contender import Contender, ContenderError, order_of
from bench.speed.peers import forget_pages
from bench.speed.preadv import Span
from bench.speed.ratios import Target, ratio, ratio_measurements
from bench.speed.rounds import Say, interleave
from bench.speed.ways import Loading, Mode, Way

_SPAN_BYTES = 64 << 20


def first_token(
    checkpoint: Path, budget_bytes: int, prompt_tokens: int, prefix: str, num_rounds: int, say: Say
) -> list[Measurement]:
    """Returns the time from `from_pretrained` to the first token: mball's, transformers', and that of a bare read.

    Each start is a process of its own that has imported all it needs, on a machine that has the memory. Figures are
    called `prefix` and so on.

    Raises ContenderError when a contender fails, or when they generate different tokens.
    """
    plain = Loading(way=Way.MAPPED, mode=Mode.EAGER, checkpoint=checkpoint)
    loadings = {"transformers": plain}
    loadings["mball"] = replace(plain, way=Way.MBALL, budget_bytes=budget_bytes, capture="auto")
    starts: dict[str, list[dict[str, Any]]] = {name: [] for name in loadings}

    def start(name: str) -> Callable[[], float]:
        def sample() -> float:
            forget_pages(checkpoint)
            with Contender(name) as contender:
                contender.tell("take_memory", size_bytes=size_bytes)
                order = order_of(loadings[name])
                found = contender.tell("first_tokens", prompt_tokens=prompt_tokens, num_tokens=2, **order)
            if any(found["token_ids"] != other["token_ids"] for others in starts.values() for other in others):
                raise ContenderError(f"{name} generates other tokens than a start before it")
            starts[name].append(found)
            return float(found["tokens_s"][0])

        return sample

    spans = _spans(checkpoint)
    size_bytes = sum(span.size_bytes for span in spans)
    with ExitStack() as stack:
        disk = stack.enter_context(Contender("yardstick", module="bench.speed.disk_child"))
        disk.tell("prepare", name="all", spans=[asdict(span) for span in spans])
        sources = {name: start(name) for name in loadings}
        sources["read"] = lambda: float(disk.tell("read", name="all")["steps_s"][0])
        samples = interleave(sources, num_rounds, say, prefix)
    what = f"from_pretrained to the first token, a prompt of {prompt_tokens}"
    found = ratio_measurements(
        prefix, ratio(samples["mball"], samples["transformers"]), what, "transformers", Target(limit=0.5)
    )
    for name, runs in starts.items():
        loads_s = [run["load_s"] for run in runs]
        found += [
            Measurement.of(f"{prefix}_{name}_s", samples[name], unit="s", description=f"{name}: {what}"),
            Measurement.of(f"{prefix}_{name}_load_s", loads_s, unit="s", description=f"{name}: from_pretrained alone"),
        ]
    return [*found, Measurement.of(f"{prefix}_read_s", samples["read"], unit="s", description="a bare read of it all")]


def _spans(checkpoint: Path) -> list[Span]:
    sizes = {path: path.stat().st_size for path in sorted(checkpoint.glob("*.safetensors"))}
    return [
        Span(path=str(path), offset_bytes=offset, size_bytes=min(_SPAN_BYTES, size_bytes - offset))
        for path, size_bytes in sizes.items()
        for offset in range(0, size_bytes, _SPAN_BYTES)
    ]
