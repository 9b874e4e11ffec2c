"""Cold starts: a fresh process, nothing in the page cache, from loading the model to its first tokens."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

from bench.results import Measurement
from bench.speed.contender import Contender, ContenderError, order_of
from bench.speed.peers import drop_caches, forget_pages
from bench.speed.preadv import Span
from bench.speed.ratios import Target, ratio, ratio_measurements
from bench.speed.rounds import Say
from bench.speed.scale import Scale
from bench.speed.ways import Loading, Mode, Way
from bench.speed.workload import Kind

PROMPT_TOKENS = 32
NUM_TOKENS = 6
# What a user gets who does not choose; compiled steps need graphs.
DEFAULT_CAPTURE = {Mode.EAGER: "auto", Mode.INDUCTOR: "graphs"}
# Beyond reading all weights and one pass.
GRACE_S = 0.5


def cold(scale: Scale, mode: Mode, percent: int, num_rounds: int, say: Say) -> list[Measurement]:
    """Returns the time to the first token of mball and of transformers, in turn, and the stalls of the next tokens.

    Compiled steps are compiled in each start: what an earlier one left on disk is not there.

    Raises ContenderError when a contender fails, when mball's starts generate different tokens, or when they are not
    those of transformers in mode EAGER.
    """
    plain = Loading(way=Way.MAPPED, mode=Mode.EAGER, checkpoint=scale.checkpoint)
    mball = replace(
        plain, way=Way.MBALL, mode=mode, budget_bytes=scale.budget_bytes(percent), capture=DEFAULT_CAPTURE[mode]
    )
    starts: dict[str, list[dict[str, Any]]] = {"mball": [], "transformers": []}
    with Contender("yardstick", module="bench.speed.disk_child") as disk:
        disk.tell("prepare", name="all", spans=[asdict(span) for span in _whole(scale)])
        reads_s = [float(disk.tell("read", name="all")["steps_s"][0]) for _ in range(num_rounds)]
    for number in range(num_rounds):
        for name, loading in (("mball", mball), ("transformers", plain)):
            with tempfile.TemporaryDirectory(prefix="mball-inductor-") as caches:
                environment = {"TORCHINDUCTOR_CACHE_DIR": caches}
                starts[name].append(_start(name, loading, drop=True, environment=environment))
        if starts["mball"][-1]["token_ids"] != starts["mball"][0]["token_ids"]:
            raise ContenderError("mball generates different tokens in two starts")
        if mode is Mode.EAGER and starts["mball"][-1]["token_ids"] != starts["transformers"][-1]["token_ids"]:
            raise ContenderError("mball and transformers generate different tokens")
        first = ", ".join(f"{name} {found[-1]['tokens_s'][0]:.2f} s" for name, found in starts.items())
        say(f"{mode.value}, {percent} %: cold start {number + 1} of {num_rounds}: {first}")
    pass_s = _one_pass(scale)
    prefix = f"{mode.value}_cold_{percent}"
    firsts = {name: [start["tokens_s"][0] for start in found] for name, found in starts.items()}
    found = ratio_measurements(
        prefix, ratio(firsts["mball"], firsts["transformers"]),
        f"from_pretrained to the first token, budget {percent} % of the weights", "transformers", Target(limit=0.6),
    )  # fmt: skip
    bound_s = statistics.median(reads_s) + pass_s + GRACE_S
    verdict = Target(limit=bound_s).verdict(statistics.median(firsts["mball"]), " s")
    found += [
        Measurement.of(
            f"{prefix}_s", firsts["mball"], unit="s", description="from_pretrained to the first token",
            compared_with=f"read + one pass + {GRACE_S} s: {verdict}",
        ),
        Measurement.of(f"{prefix}_read_s", reads_s, unit="s", description="a bare read of all weights"),
        Measurement.of(f"{prefix}_pass_s", [pass_s], unit="s", description="a pass without mball, all resident"),
    ]  # fmt: skip
    for name, runs in starts.items():
        gaps = [[after - before for before, after in pairwise(run["tokens_s"])] for run in runs]
        for field, description in (("imports_s", "imports"), ("load_s", "from_pretrained alone")):
            values = [run[field] for run in runs]
            found.append(Measurement.of(f"{prefix}_{name}_{field}", values, unit="s", description=description))
        found += [
            Measurement.of(
                f"{prefix}_{name}_stall_s", [max(row) for row in gaps], unit="s",
                description=f"the longest wait for one of tokens 2 to {NUM_TOKENS}",
            ),
            Measurement.of(
                f"{prefix}_{name}_steady_s", [row[-1] for row in gaps], unit="s", description=f"token {NUM_TOKENS}"
            ),
        ]  # fmt: skip
        found.append(
            Measurement.of(f"{prefix}_{name}_first_s", firsts[name], unit="s", description="to the first token")
        )
    return found


def warm_compile(scale: Scale, percent: int, say: Say) -> list[Measurement]:
    """Returns the time to the first token of a second process, with compiled code on disk, over that of eager mode.

    Eager mode captures the same graphs here; what it takes by default, where it need not, is a figure of its own.
    """
    compiled = Loading(
        way=Way.MBALL, mode=Mode.INDUCTOR, checkpoint=scale.checkpoint, budget_bytes=scale.budget_bytes(percent)
    )
    with tempfile.TemporaryDirectory(prefix="mball-inductor-") as caches:
        environment = {"TORCHINDUCTOR_CACHE_DIR": caches}
        first = _start("cold caches", compiled, environment=environment)["tokens_s"][0]
        warm, eager, default = [], [], []
        uncompiled = replace(compiled, mode=Mode.EAGER)
        for _ in range(3):
            warm.append(_start("warm caches", compiled, environment=environment)["tokens_s"][0])
            eager.append(_start("eager", uncompiled)["tokens_s"][0])
            by_default = replace(uncompiled, capture=DEFAULT_CAPTURE[Mode.EAGER])
            default.append(_start("eager by default", by_default)["tokens_s"][0])
            say(
                f"first token: cold caches {first:.2f} s, warm caches {warm[-1]:.2f} s, eager {eager[-1]:.2f} s, "
                f"eager by default {default[-1]:.2f} s"
            )
    return [
        *ratio_measurements(
            "warm_compile", ratio(warm, eager), "from_pretrained to the first token, compiled code on disk",
            'compile="eager", capture="graphs"', Target(limit=1.5),
        ),
        Measurement.of("warm_compile_s", warm, unit="s", description="caches warm"),
        Measurement.of("cold_compile_s", [first], unit="s", description="caches empty"),
        Measurement.of("eager_first_s", eager, unit="s", description='compile="eager", capture="graphs"'),
        Measurement.of("eager_default_first_s", default, unit="s", description="no setting but the budget"),
    ]  # fmt: skip


def _start(
    name: str, loading: Loading, *, drop: bool = False, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    if drop and not drop_caches():
        forget_pages(loading.checkpoint)  # the imports stay cached then; they are listed apart
    with Contender(name, environment=environment) as contender:
        imports_s = contender.tell("hello")["imports_s"]
        reply = contender.tell("first_tokens", prompt_tokens=PROMPT_TOKENS, num_tokens=NUM_TOKENS, **order_of(loading))
        return {**reply, "imports_s": imports_s}


def _whole(scale: Scale) -> list[Span]:
    size_bytes, step = scale.weights.stat().st_size, 64 << 20
    return [
        Span(path=str(scale.weights), offset_bytes=offset, size_bytes=min(step, size_bytes - offset))
        for offset in range(0, size_bytes, step)
    ]


def _one_pass(scale: Scale) -> float:
    with Contender("plain") as plain:
        plain.load(Loading(way=Way.PLAIN, mode=Mode.EAGER, checkpoint=scale.checkpoint), PROMPT_TOKENS)
        times: list[float] = plain.tell("burst", kind=Kind.PREFILL.value, warm=1, timed=3)["steps_s"]
        return statistics.median(times)
