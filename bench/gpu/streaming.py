"""Streaming a model to a GPU, against the copies alone, against itself where it fits, and against others.

Each function runs its contenders' bursts in turn, for as many rounds as there is time, and returns measurements.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.gpu.contender import GpuContender, step_s
from bench.gpu.limit import Limit
from bench.gpu.ways import Loading, Way, offloaded_bytes
from bench.results import Measurement
from bench.speed.model import weight_bytes
from bench.speed.ratios import Target, ratio, ratio_measurements
from bench.speed.rounds import Say
from bench.speed.workload import Kind
from mball.units import GIB, format_bytes

DECODE_TARGET = Target(limit=1.02)
PREFILL_TARGET = Target(limit=1.10)
FITS_TARGET = Target(limit=1.02)
DECODE_PROMPT_TOKENS = 128
# The length of a prompt whose compute takes about as long as the copies is looked for between these.
PREFILL_TOKENS = (256, 16384)
# How much longer than the copies a prompt computes that is said to wait for compute.
COMPUTE_BOUND = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is run.

    Attributes:
        checkpoint: the model.
        device: where steps run, as torch names it.
        settling: passes before the first that counts.
        burst: steps of a burst.
        rounds: of bursts, at most.
        copies: of the yardstick in each round.
        prefill_tokens: of the first prompt, from whose time the one that counts is reckoned.
        spare_bytes: of the budget beside its part of the weights, for what steps compute.
    """

    checkpoint: Path
    device: str = "cuda:0"
    settling: int = 8
    burst: int = 4
    rounds: int = 7
    copies: int = 8
    prefill_tokens: int = 1024
    spare_bytes: int = GIB // 4

    def budget_bytes(self, percent: int) -> int:
        """Returns a budget of so many percent of the weights, and what is spared."""
        return weight_bytes(self.checkpoint) * percent // 100 + self.spare_bytes

    def mball(self, percent: int, steps: Way = Way.PLAIN) -> Loading:
        """Returns how mball loads the model under a budget of so many percent, and runs its steps."""
        return Loading(
            way=Way.MBALL,
            checkpoint=self.checkpoint,
            device=self.device,
            budget_bytes=self.budget_bytes(percent),
            steps=steps,
        )


def take_turns(
    sources: Mapping[str, Callable[[], float]], num_rounds: int, limit: Limit, say: Say, title: str
) -> dict[str, list[float]]:
    """Returns the samples of each source, as many of each: a round is one of all, and every second one goes backwards.

    A round is begun only if there is time for one as long as the longest so far.
    """
    samples: dict[str, list[float]] = {name: [] for name in sources}
    longest_s = 0.0
    for number in range(num_rounds):
        before_s = limit.left_s()
        if number and before_s < longest_s:
            say(f"{title}: {number} of {num_rounds} rounds in the time there is")
            break
        for name in list(sources)[:: -1 if number % 2 else 1]:
            samples[name].append(sources[name]())
        longest_s = max(longest_s, before_s - limit.left_s())
    return samples


def decode(scale: Scale, percent: int, limit: Limit, say: Say, *, steps: Way = Way.PLAIN) -> list[Measurement]:
    """Returns a decode step over the copies of what it streams at the link's rate of the same round.

    Raises ContenderError.
    """
    with GpuContender(f"mball {percent} %") as child:
        load_s = child.bring(scale.mball(percent, steps))
        child.tell("work", prompt_tokens=DECODE_PROMPT_TOKENS)
        settled = child.tell("settle", kind=Kind.DECODE.value, passes=scale.settling)
        _gate(child, Kind.DECODE)
        say(f"decode {percent} %: loaded in {load_s:.1f} s, {_told(settled)}")
        reports: list[dict[str, Any]] = []
        samples = take_turns(
            {"step": _steps_of(child, Kind.DECODE, scale.burst, reports), "bare": _bare_of(child, scale.copies)},
            scale.rounds, limit, say, f"decode {percent} %",
        )  # fmt: skip
    name = f"decode_{percent}" if steps is Way.PLAIN else f"decode_{percent}_{steps.value}"
    found = against_copies(name, f"a decode step, budget {percent} %", samples, reports, DECODE_TARGET)
    found += held(name, load_s, settled, reports[-1])
    found += _recorded(name, steps, reports[-1])
    say(f"{name}: {statistics.median(samples['step']) * 1e3:.1f} ms a token, {found[0].figure()} of the copies")
    return found


def prefill(scale: Scale, percent: int, limit: Limit, say: Say) -> list[Measurement]:
    """Returns a prefill over the larger of its copies and its compute, at a length where both are about equal.

    Compute is what the model takes that is on the GPU whole. Raises ContenderError.
    """
    with GpuContender(f"mball {percent} %") as child, GpuContender("plain") as plain:
        load_s = child.bring(scale.mball(percent))
        plain.bring(Loading(way=Way.PLAIN, checkpoint=scale.checkpoint, device=scale.device))
        plain.tell("work", prompt_tokens=scale.prefill_tokens)
        compute_s = min(plain.tell("burst", kind=Kind.PREFILL.value, warm=2, timed=2)["steps_s"])
        streamed_bytes = weight_bytes(scale.checkpoint) * (100 - percent) // 100
        rate = float(child.tell("bare", num_copies=scale.copies)["bytes_per_s"])
        tokens = balanced_tokens(scale.prefill_tokens, compute_s, streamed_bytes / rate)
        say(f"prefill {percent} %: {tokens} tokens, since {scale.prefill_tokens} take {compute_s * 1e3:.1f} ms")
        for each in (child, plain):
            each.tell("work", prompt_tokens=tokens)
        settled = child.tell("settle", kind=Kind.PREFILL.value, passes=scale.settling)
        _gate(child, Kind.PREFILL)
        plain.tell("burst", kind=Kind.PREFILL.value, warm=1, timed=1)
        reports: list[dict[str, Any]] = []
        samples = take_turns(
            {
                "step": _steps_of(child, Kind.PREFILL, 2, reports),
                "bare": _bare_of(child, scale.copies),
                "compute": _steps_of(plain, Kind.PREFILL, 2, []),
            },
            scale.rounds, limit, say, f"prefill {percent} %",
        )  # fmt: skip
    name = f"prefill_{percent}"
    found = against_copies(name, f"a prefill of {tokens} tokens, budget {percent} %", samples, reports, PREFILL_TARGET)
    found.append(Measurement.of(f"{name}_tokens", [tokens], unit="tokens", description="of the prompt"))
    found += held(name, load_s, settled, reports[-1])
    say(f"{name}: {statistics.median(samples['step']) * 1e3:.1f} ms, {found[0].figure()} of the larger")
    return found


def balanced_tokens(tokens: int, compute_s: float, link_s: float) -> int:
    """Returns the length of a prompt that computes for `link_s`, if `tokens` take `compute_s`; a multiple of 64."""
    lowest, highest = PREFILL_TOKENS
    wanted = round(tokens * link_s / max(compute_s, 1e-9) / 64) * 64
    return min(max(wanted, lowest), highest)


def fits(scale: Scale, other: Way, limit: Limit, say: Say) -> list[Measurement]:
    """Returns a decode step of mball where all fits over one without it. Raises ContenderError."""
    loading = Loading(way=other, checkpoint=scale.checkpoint, device=scale.device)
    with GpuContender("mball 110 %") as child, GpuContender(other.value) as plain:
        load_s = child.bring(scale.mball(110, other))
        plain.bring(loading)
        for each in (child, plain):
            each.tell("work", prompt_tokens=DECODE_PROMPT_TOKENS)
            settled = each.tell("settle", kind=Kind.DECODE.value, passes=scale.settling)
            if each is child:
                mine = settled
        _gate(child, Kind.DECODE)
        if other is Way.PLAIN:  # compiled code rounds otherwise
            _same_tokens(child, plain, Kind.DECODE)
        reports: list[dict[str, Any]] = []
        samples = take_turns(
            {
                "mball": _steps_of(child, Kind.DECODE, 4 * scale.burst, reports),
                "plain": _steps_of(plain, Kind.DECODE, 4 * scale.burst, []),
            },
            2 * scale.rounds, limit, say, f"fits, {other.value}",
        )  # fmt: skip
    name = f"fits_{'eager' if other is Way.PLAIN else other.value}"
    without = {
        Way.PLAIN: "the same without mball",
        Way.COMPILED: "the same by torch.compile, without mball",
        Way.GRAPHS: "the same by torch.compile(mode='reduce-overhead'), without mball",
    }[other]
    found = ratio_measurements(
        name, ratio(samples["mball"], samples["plain"]), "a decode step, budget 110 % of the weights", without,
        FITS_TARGET, by_high=True,
    )  # fmt: skip
    found += [
        Measurement.of(f"{name}_s", samples["mball"], unit="s", description="a decode step"),
        Measurement.of(f"{name}_plain_s", samples["plain"], unit="s", description=f"a decode step, {without}"),
        Measurement.of(
            f"{name}_read", [reports[-1]["bytes_read_last_pass"]], unit="bytes", description="read in the last step",
            compared_with="target 0",
        ),
    ]  # fmt: skip
    found += held(name, load_s, mine, reports[-1])
    found += _recorded(name, other, reports[-1])
    say(f"{name}: {found[0].figure()} of the time without mball")
    return found


def peers(scale: Scale, percent: int, limit: Limit, say: Say) -> list[Measurement]:
    """Returns how many times as long accelerate takes for a decode step at equal bytes. Raises ContenderError."""
    resident_bytes = weight_bytes(scale.checkpoint) * percent // 100
    offloaded = Loading(
        way=Way.ACCELERATE, checkpoint=scale.checkpoint, device=scale.device, resident_bytes=resident_bytes
    )
    with GpuContender(f"mball {percent} %") as child, GpuContender("accelerate") as other:
        load_s = child.bring(scale.mball(percent))
        other_load_s = other.bring(offloaded)
        for each in (child, other):
            each.tell("work", prompt_tokens=DECODE_PROMPT_TOKENS)
        settled = child.tell("settle", kind=Kind.DECODE.value, passes=scale.settling)
        other.tell("burst", kind=Kind.DECODE.value, warm=1, timed=1)
        _gate(child, Kind.DECODE)
        _same_tokens(child, other, Kind.DECODE)
        reports: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        samples = take_turns(
            {
                "mball": _steps_of(child, Kind.DECODE, scale.burst, reports),
                "accelerate": _steps_of(other, Kind.DECODE, 2, others),
            },
            scale.rounds, limit, say, f"accelerate, {percent} %",
        )  # fmt: skip
    found = ratio_measurements(
        "peers_accelerate", ratio(samples["accelerate"], samples["mball"]),
        f"a decode step by accelerate's CPU offload, {format_bytes(resident_bytes)} of weights on the GPU",
        f"mball's, with a budget of {format_bytes(scale.budget_bytes(percent))}",
    )  # fmt: skip
    found += [
        Measurement.of("peers_mball_s", samples["mball"], unit="s", description="a decode step by mball"),
        Measurement.of(
            "peers_accelerate_s", samples["accelerate"], unit="s", description="a decode step by accelerate"
        ),
        Measurement.of("peers_accelerate_load", [other_load_s], unit="s", description="accelerate's loading"),
        Measurement.of(
            "peers_accelerate_host_peak", [others[-1]["host_peak_bytes"]], unit="bytes",
            description="accelerate's largest resident set in host memory, mapped files included",
        ),
    ]  # fmt: skip
    found += held("peers_mball", load_s, settled, reports[-1])
    say(f"accelerate takes {found[0].figure()} mball's time")
    return found


def group_offload(scale: Scale, kind: Kind, limit: Limit, say: Say) -> list[Measurement]:
    """Returns how many times as long diffusers' schedule takes at equal bytes on the device.

    A decode waits for the link, where what counts is how much less mball streams; the prompt is so long that it waits
    for compute, of which both do the same. Raises ContenderError.
    """
    resident_bytes, copied_bytes = offloaded_bytes(scale.checkpoint)
    budget_bytes = resident_bytes + scale.spare_bytes
    mine = replace(scale.mball(100), budget_bytes=budget_bytes)
    theirs = Loading(way=Way.BLOCKS, checkpoint=scale.checkpoint, device=scale.device)
    with GpuContender("mball") as child, GpuContender("group offload") as other:
        load_s = child.bring(mine)
        other_load_s = other.bring(theirs)
        tokens = DECODE_PROMPT_TOKENS
        if kind is Kind.PREFILL:
            # The longest waits for compute if any does, so it tells the pace.
            other.tell("work", prompt_tokens=PREFILL_TOKENS[1])
            pass_s = min(other.tell("burst", kind=kind.value, warm=1, timed=2)["steps_s"])
            rate = float(child.tell("bare", num_copies=scale.copies)["bytes_per_s"])
            tokens = balanced_tokens(PREFILL_TOKENS[1], pass_s, COMPUTE_BOUND * copied_bytes / rate)
        for each in (child, other):
            each.tell("work", prompt_tokens=tokens)
        settled = child.tell("settle", kind=kind.value, passes=scale.settling)
        other.tell("burst", kind=kind.value, warm=1, timed=1)
        _gate(child, kind)
        _same_tokens(child, other, kind)
        reports: list[dict[str, Any]] = []
        samples = take_turns(
            {"mball": _steps_of(child, kind, scale.burst, reports), "other": _steps_of(other, kind, 2, [])},
            scale.rounds, limit, say, f"group offload, {kind.value}",
        )  # fmt: skip
    name = f"peers_blocks_{kind.value}"
    streamed = statistics.median(float(report["bytes_read_last_pass"]) for report in reports)
    least = 1.0 if kind is Kind.PREFILL or not streamed else 0.9 * copied_bytes / streamed
    found = ratio_measurements(
        name, ratio(samples["other"], samples["mball"]),
        f"a {kind.value} step by group offloading with a stream, {format_bytes(resident_bytes)} of weights on the GPU",
        f"mball's, with a budget of {format_bytes(budget_bytes)}", Target(limit=least, at_least=True),
    )  # fmt: skip
    found += [
        Measurement.of(f"{name}_mball_s", samples["mball"], unit="s", description="a step by mball"),
        Measurement.of(f"{name}_s", samples["other"], unit="s", description="a step by group offloading"),
        Measurement.of(f"{name}_copied", [copied_bytes], unit="bytes", description="that group offloading copies"),
        Measurement.of(f"{name}_streamed", [streamed], unit="bytes", description="that mball streams"),
        Measurement.of(f"{name}_tokens", [tokens], unit="tokens", description="of the prompt"),
        Measurement.of(f"{name}_load", [other_load_s], unit="s", description="group offloading's loading"),
    ]
    found += held(f"{name}_mball", load_s, settled, reports[-1])
    say(f"group offload, {kind.value}: takes {found[0].figure()} mball's time")
    return found


# -- what they share -----------------------------------------------------------------------------------------------


def against_copies(
    name: str,
    what: str,
    samples: Mapping[str, list[float]],
    reports: list[dict[str, Any]],
    target: Target,
) -> list[Measurement]:
    """Returns a step over the larger of its copies alone and, where there is one, its compute.

    Args:
        name: of the ratio, what all other names begin with.
        what: was run.
        samples: of each round the seconds of a "step", the rate of the "bare" copies in bytes a second, and perhaps
            the seconds of the "compute".
        reports: after each burst.
        target: for the ratio.
    """
    streamed = [float(report["bytes_read_last_pass"]) for report in reports]
    copies_s = [size / rate for size, rate in zip(streamed, samples["bare"], strict=True)]
    computes_s = samples.get("compute", [0.0] * len(copies_s))
    bound_s = [max(pair) for pair in zip(copies_s, computes_s, strict=True)]
    found = []
    if min(bound_s) > 0:
        against = "the larger of copies and compute" if "compute" in samples else "the copies alone"
        found = ratio_measurements(name, ratio(samples["step"], bound_s), what, against, target)
    found += [
        Measurement.of(f"{name}_s", samples["step"], unit="s", description=what),
        Measurement.of(f"{name}_copies_s", copies_s, unit="s", description="what it streams, at the link's rate"),
        Measurement.of(f"{name}_bytes", streamed, unit="bytes", description="streamed in the last step of a burst"),
        Measurement.of(
            f"{name}_link", [rate / 1e9 for rate in samples["bare"]], unit="GB/s",
            description="bare copies out of pinned memory, in the same rounds",
        ),
        Measurement.of(
            f"{name}_stall_s", [report["stall_s"] for report in reports], unit="s",
            description="the host's waits for reads, in the last step of a burst",
        ),
    ]  # fmt: skip
    if "compute" in samples:
        found.append(
            Measurement.of(f"{name}_compute_s", computes_s, unit="s", description="the same, all on the GPU, no mball")
        )
    return found


def held(name: str, load_s: float, settled: dict[str, Any], report: dict[str, Any]) -> list[Measurement]:
    """Returns what loading took and what was held: host memory, pinned memory, the arena."""
    told = settled["report"]
    return [
        Measurement.of(f"{name}_load", [load_s], unit="s", description="loading and wrapping"),
        Measurement.of(f"{name}_first", settled["steps_s"][:1], unit="s", description="the first pass"),
        Measurement.of(
            f"{name}_pin", [settled["pin_s"]], unit="s",
            description="waiting for pinned memory after the first passes, beside which it had begun",
        ),
        Measurement.of(f"{name}_pinned", [report["pinned_bytes"]], unit="bytes", description="pinned host memory"),
        Measurement.of(
            f"{name}_host_peak", [report["host_peak_bytes"]], unit="bytes",
            description="largest resident set in host memory, mapped files included",
        ),
        Measurement.of(
            f"{name}_host_anonymous", [report["host_anonymous_bytes"]], unit="bytes",
            description="host memory that no file backs, pinned memory in it",
        ),
        Measurement.of(
            f"{name}_arena", [report["arena_bytes"]], unit="bytes", description="the arena",
            compared_with=f"a budget of {format_bytes(told['budget_bytes'])}",
        ),
    ]  # fmt: skip


def _recorded(name: str, steps: Way, report: dict[str, Any]) -> list[Measurement]:
    if steps is not Way.GRAPHS:
        return []
    recorded = Measurement.of(
        f"{name}_recorded", [report["step_graphs"]], unit="steps", description="launched as CUDA graphs",
        compared_with=f"{report['steps']} steps of the plan",
    )  # fmt: skip
    return [recorded]


def _steps_of(child: GpuContender, kind: Kind, timed: int, reports: list[dict[str, Any]]) -> Callable[[], float]:
    def sample() -> float:
        reply = child.tell("burst", kind=kind.value, warm=1, timed=timed)
        reports.append(reply["report"])
        return step_s(reply)

    return sample


def _bare_of(child: GpuContender, num_copies: int) -> Callable[[], float]:
    return lambda: float(child.tell("bare", num_copies=num_copies)["bytes_per_s"])


class WrongError(AssertionError):
    """A contender computes something else, so there is no figure."""


def _gate(child: GpuContender, kind: Kind) -> None:
    if not child.tell("logits", kind=kind.value)["finite"]:
        raise WrongError(f"{child.name}: logits are not finite, so a weight was read that had not come")


def _same_tokens(child: GpuContender, other: GpuContender, kind: Kind) -> None:
    """The same operators ran; that their logits have the same bits is for tests."""
    mine, theirs = (each.tell("logits", kind=kind.value)["tokens"] for each in (child, other))
    if mine != theirs:
        raise WrongError(f"{child.name} says {mine}, {other.name} says {theirs}")


def _told(settled: dict[str, Any]) -> str:
    report = settled["report"]
    return (
        f"first pass {settled['steps_s'][0]:.2f} s, waited {settled['pin_s']:.1f} s for pinned memory, "
        f"{format_bytes(report['pinned_bytes'])} of it, "
        f"{format_bytes(report['bytes_read_last_pass'])} streamed a pass"
    )
