"""Streaming against the roofline: the larger of the compute with everything resident and a bare read of the bytes."""

from __future__ import annotations

import os
import statistics
from typing import Any

from bench.results import Measurement
from bench.speed import fio
from bench.speed.field import RESIDENT_PERCENT, Field
from bench.speed.ratios import Target, ratio, ratio_measurements
from bench.speed.rounds import Sample, Say, interleave, larger, reads_of, smaller, steps_of
from bench.speed.workload import Kind

TARGET = Target(limit=1.10)


def roofline(field: Field, say: Say) -> list[Measurement]:
    """Returns measured ÷ roofline of each workload and budget, and what it is made of.

    Raises:
        GateError: a contender computes something else; there is no figure then.
        ContenderError: a contender failed.
    """
    waiting = os.environ.get("OMP_WAIT_POLICY", "not set")
    found = [
        Measurement.of(
            f"{field.mode.value}_threads", [field.num_threads], unit="threads",
            description=f"that compute, in each process; OMP_WAIT_POLICY {waiting}",
        )
    ]  # fmt: skip
    for kind in field.scale.rounds:
        field.check(kind)
        found += _of_workload(field, kind, say)
    return found


def _of_workload(field: Field, kind: Kind, say: Say) -> list[Measurement]:
    scale, mode = field.scale, field.mode
    burst = scale.bursts[kind]
    sources: dict[str, Sample] = {"plain": steps_of(field.plain, kind, burst)}
    reports: dict[str, list[dict[str, Any]]] = {}
    yardsticks: dict[int, list[str]] = {}
    sizes: dict[int, int] = {}
    for percent, contender in field.mball.items():
        # A plan settles in the first passes after another workload: costs are measured, then times, then it is made
        # again. The gate was the first of them; decode steps are short and get two more to be sure.
        contender.tell("burst", kind=kind.value, warm=2 if kind is Kind.DECODE else 0, timed=1)
        reports[f"mball_{percent}"] = []
        sources[f"mball_{percent}"] = steps_of(contender, kind, burst, reports[f"mball_{percent}"])
        if percent in scale.percents:
            yardsticks[percent], sizes[percent] = _yardsticks(field, kind, percent, sources, say)
    samples = interleave(sources, scale.rounds[kind], say, f"{mode.value} {kind.value}")

    prefix = f"{mode.value}_{kind.value}"
    found = [
        Measurement.of(
            f"{prefix}_{RESIDENT_PERCENT}_s", samples[f"mball_{RESIDENT_PERCENT}"], unit="s",
            description=f"a step, budget {RESIDENT_PERCENT} % of the weights",
        ),
        Measurement.of(f"{prefix}_plain_s", samples["plain"], unit="s", description="a step without mball"),
    ]  # fmt: skip
    for percent in scale.percents:
        name, disk = f"{prefix}_{percent}", smaller(samples, yardsticks[percent])
        measured = samples[f"mball_{percent}"]
        bound = larger(samples, [f"mball_{RESIDENT_PERCENT}", disk])
        plain_bound = larger(samples, ["plain", disk])
        compared = "the read" if bound == disk else "the compute"
        times = ratio(measured, samples[bound])
        found += ratio_measurements(name, times, f"a step over the roofline, budget {percent} %", compared, TARGET)
        stalls = [report["stall_s"] for report in reports[f"mball_{percent}"]]
        found += [
            Measurement.of(
                f"{name}_plain", ratio(measured, samples[plain_bound]).samples, unit="x",
                description="the same with the compute of the model without mball",
            ),
            Measurement.of(f"{name}_s", measured, unit="s", description="a step"),
            Measurement.of(f"{name}_disk_s", samples[disk], unit="s", description=f"the bare read, by {_tool(disk)}"),
            Measurement.of(f"{name}_stall_s", stalls, unit="s", description="waiting for reads, in the last step"),
            Measurement.of(f"{name}_bytes", [sizes[percent]], unit="bytes", description="read in each step"),
        ]  # fmt: skip
        say(f"{name}: {statistics.median(measured):.3f} s, {times.median:.3g}× {compared}; {disk}")
    if not scale.pairs[kind]:
        resident = f"mball_{RESIDENT_PERCENT}"
        found += _fits(prefix, samples[resident], samples["plain"], reports[resident])
    return found


def _tool(source: str) -> str:
    return source.partition("_")[0]


def _yardsticks(field: Field, kind: Kind, percent: int, sources: dict[str, Sample], say: Say) -> tuple[list[str], int]:
    """Adds the bare reads of what one contender streams; returns their names and the bytes."""
    scale = field.scale
    name = f"{kind.value}_{percent}"
    setting = field.disk.tell("prepare", name=name, spans=field.mball[percent].tell("spans")["spans"])
    size_bytes = int(setting["size_bytes"])
    say(f"{name}: {size_bytes / 1e9:.3f} GB a pass; preadv by {setting['num_threads']} × {setting['chunk_bytes']} B")
    names = [f"preadv_{percent}"]
    sources[names[0]] = reads_of(field.disk, name)
    if scale.with_fio and not fio.is_there():
        say("fio is not installed: the bare preadv loop alone is the yardstick")
    elif scale.with_fio:
        job = fio.best_job(scale.weights, size_bytes)
        say(f"{name}: fio by {job}")
        names.append(f"fio_{percent}")
        sources[names[1]] = lambda: fio.read(scale.weights, size_bytes, job)
    return names, size_bytes


def fits(field: Field, say: Say) -> list[Measurement]:
    """Returns mball over plain where the model fits its budget, by many pairs, and the bytes that were read meanwhile.

    Raises as `roofline`.
    """
    found = []
    scale, fitting = field.scale, field.mball[RESIDENT_PERCENT]
    for kind in (kind for kind, pairs in scale.pairs.items() if pairs):
        field.check(kind)
        burst = scale.bursts[kind]
        reports: list[dict[str, Any]] = []
        sources = {
            "mball": steps_of(fitting, kind, burst, reports), "plain": steps_of(field.plain, kind, burst)
        }  # fmt: skip
        for source in sources.values():
            source()
        samples = interleave(sources, scale.pairs[kind], say, f"{field.mode.value} {kind.value}, all resident")
        found += _fits(f"{field.mode.value}_{kind.value}", samples["mball"], samples["plain"], reports)
    return found


def _fits(prefix: str, mball_s: list[float], plain_s: list[float], reports: list[dict[str, Any]]) -> list[Measurement]:
    target = Target(limit=1.02)
    return [
        *ratio_measurements(
            f"{prefix}_fits", ratio(mball_s, plain_s), f"a step, budget {RESIDENT_PERCENT} % of the weights",
            "the same without mball", target, by_high=True,
        ),
        Measurement.of(f"{prefix}_fits_s", mball_s, unit="s", description="a step"),
        Measurement.of(f"{prefix}_fits_plain_s", plain_s, unit="s", description="a step without mball"),
        Measurement.of(
            f"{prefix}_fits_read", [reports[-1]["bytes_read"] - reports[0]["bytes_read"]], unit="bytes",
            description="read by mball from the first of these bursts to the last", compared_with="target 0",
        ),
    ]  # fmt: skip
