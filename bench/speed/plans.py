"""What plans promise, executed: four budgets down to the smallest that works, predicted and measured.

Another checkout of mball may run in the same rounds: what changed between two versions is told only by both together.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.machine import commit_of
from bench.results import Measurement
from bench.speed import gate
from bench.speed.contender import CHECKOUT, Contender, ContenderError
from bench.speed.field import RESIDENT_PERCENT
from bench.speed.model import weight_bytes
from bench.speed.ratios import Target, ratio, ratio_measurements
from bench.speed.rounds import Sample, Say, interleave, reads_of, steps_of
from bench.speed.scale import Scale
from bench.speed.ways import Loading, Mode, Way
from bench.speed.workload import Kind

KIND = Kind.DECODE
BEFORE = "before_"
PREDICTED = Target(limit=0.10)
# The number that a budget error names, in every version of mball.
_ENOUGH = re.compile(r"(?:at least|one module at a time is) (\d+) B")
_TRIES = 20


@dataclass(slots=True)
class _Entry:
    """A contender under one budget.

    Attributes:
        read_bytes: what it streams in each pass.
        reports: mball's, after each burst.
    """

    contender: Contender
    budget_bytes: int
    read_bytes: int = 0
    reports: list[dict[str, Any]] = field(default_factory=list)


def plans(scale: Scale, say: Say, before: Path | None = None) -> list[Measurement]:
    """Returns for the smallest budget and those of `scale` what a decode step takes, uncompiled, against four things:
    its prediction, the roofline of what it reads, the least that anything must read, and `before`.

    [Note: one disk for all] The disk drifts, and one bare read is a tenth off as often as not: held against its own
    read a version that reads less can look slower. So a round has one rate, of all its bare reads, and all that ran in
    that round is held against it.

    Args:
        before: another checkout of mball.

    Raises:
        GateError: a contender computes something else.
        ContenderError: a contender failed.
    """
    versions = {"": CHECKOUT} | ({BEFORE: before} if before else {})
    found: list[Measurement] = []
    with ExitStack() as stack:
        resident = _Entry(stack.enter_context(Contender("all resident")), scale.budget_bytes(RESIDENT_PERCENT))
        disk = stack.enter_context(Contender("yardstick", module="bench.speed.disk_child"))
        _load(resident, scale)
        reference = gate.logits(resident.contender, KIND)
        entries: dict[str, _Entry] = {}
        for version, checkout in versions.items():
            smallest = _smallest(scale, checkout)
            say(f"{version or 'now_'}smallest budget: {smallest} B")
            found.append(
                Measurement.of(
                    f"{version}smallest", [smallest], unit="bytes",
                    description=f"the smallest budget that runs a decode step, mball {commit_of(checkout)}",
                )
            )  # fmt: skip
            budgets = {"smallest": smallest} | {str(percent): scale.budget_bytes(percent) for percent in scale.percents}
            for name, budget_bytes in budgets.items():
                title = f"{version}{name}" if name == "smallest" else f"{version}budget_{name}"
                contender = stack.enter_context(Contender(title, checkout=checkout))
                entries[title] = _Entry(contender, budget_bytes)
                _load(entries[title], scale)
                gate.same_bits(contender, KIND, reference, "where all is resident")
        found += _measured(scale, entries, resident, disk, say)
    return found


def _load(entry: _Entry, scale: Scale) -> None:
    loading = Loading(way=Way.MBALL, mode=Mode.EAGER, checkpoint=scale.checkpoint, budget_bytes=entry.budget_bytes)
    entry.contender.load(loading, scale.prompt_tokens)


def _smallest(scale: Scale, checkout: Path) -> int:
    """Returns the smallest budget under which a decode step runs. What it names as enough is tried until that is so.

    The model is loaded anew for each try: what one budget taught must not help the next.
    """
    budget_bytes, reason = 1, ""
    with Contender("smallest budget", checkout=checkout) as contender:
        for _ in range(_TRIES):
            entry = _Entry(contender, budget_bytes)
            try:
                _load(entry, scale)
                for _ in range(3):
                    contender.tell("burst", kind=KIND.value, warm=0, timed=1)
            except ContenderError as error:
                named = _ENOUGH.findall(str(error))
                if not named or int(named[-1]) <= budget_bytes:
                    raise
                budget_bytes, reason = int(named[-1]), str(error)
            else:
                return budget_bytes
    raise ContenderError(f"{_TRIES} budgets were each too small; the last error: {reason}")


def _measured(
    scale: Scale, entries: dict[str, _Entry], resident: _Entry, disk: Contender, say: Say
) -> list[Measurement]:
    burst = scale.bursts[KIND]
    sources: dict[str, Sample] = {"resident": steps_of(resident.contender, KIND, burst)}
    for title, entry in entries.items():
        # Plans settle: costs are measured, then times, and after five steady passes the link is corrected.
        entry.contender.tell("burst", kind=KIND.value, warm=scale.settling, timed=1)
        spans = entry.contender.tell("spans")["spans"]
        entry.read_bytes = int(disk.tell("prepare", name=title, spans=spans)["size_bytes"])
        sources[f"read_{title}"] = reads_of(disk, title)
        sources[title] = steps_of(entry.contender, KIND, burst, entry.reports)
    samples = interleave(sources, scale.rounds[KIND], say, "plans")
    found = [Measurement.of("resident_s", samples["resident"], unit="s", description="a step with everything resident")]
    rates = _rates(entries, samples)
    off: list[float] = []
    for title, entry in entries.items():
        measured, bare = samples[title], samples[f"read_{title}"]
        times = ratio(measured, _bound_s(entry.read_bytes, rates, samples["resident"]))
        found += [
            Measurement.of(f"{title}_s", measured, unit="s", description="a step"),
            Measurement.of(f"{title}_budget", [entry.budget_bytes], unit="bytes", description="the budget"),
            Measurement.of(f"{title}_bytes", [entry.read_bytes], unit="bytes", description="read in each step"),
            Measurement.of(f"{title}_read_s", bare, unit="s", description="the bare read of the same bytes"),
        ]
        found += ratio_measurements(
            f"{title}_roofline", times, "a step over max(compute, bare read of what it streams)", "the bound"
        )
        left_bytes = max(weight_bytes(scale.checkpoint) - entry.budget_bytes, 0)
        found += ratio_measurements(
            f"{title}_least",
            ratio(measured, _bound_s(left_bytes, rates, samples["resident"])),
            "a step over max(compute, bare read of the weights that exceed the budget)",
            "the bound",
        )
        # An older checkout may not say what it predicts.
        predicted = [(r["pass_s"], r["predicted_s"]) for r in entry.reports if r.get("predicted_s")]
        if predicted:
            against = ratio(*(list(column) for column in zip(*predicted, strict=True)))
            found += ratio_measurements(f"{title}_predicted", against, "the last step over its prediction", "predicted")
            if not title.startswith(BEFORE):
                off += [abs(each - 1) for each in against.samples]
        say(f"{title}: {statistics.median(measured):.3f} s, {times.median:.3g}× the bound")
    verdict = PREDICTED.verdict(statistics.median(off), "")
    found.append(
        Measurement.of("predicted_off", off, unit="x", description="|measured ÷ predicted - 1|, all budgets",
                       compared_with=verdict)
    )  # fmt: skip
    for title in entries:
        if (other := f"{BEFORE}{title}") in entries:
            change = ratio(samples[title], samples[other])
            found += ratio_measurements(f"{title}_change", change, "a step over the same before", "before")
    return found


def _rates(entries: Mapping[str, _Entry], samples: Mapping[str, Sequence[float]]) -> list[float]:
    """Returns of each round the bytes a second of all its bare reads."""
    size_bytes = sum(entry.read_bytes for entry in entries.values())
    seconds = zip(*(samples[f"read_{title}"] for title in entries), strict=True)
    return [size_bytes / sum(reads) for reads in seconds]


def _bound_s(size_bytes: int, rates: Sequence[float], resident_s: Sequence[float]) -> list[float]:
    """Returns of each round the least that a step takes which computes all and reads so much."""
    if not size_bytes:
        return list(resident_s)
    return [max(step_s, size_bytes / rate) for step_s, rate in zip(resident_s, rates, strict=True)]
