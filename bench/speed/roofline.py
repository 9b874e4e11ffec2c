"""Streaming against the roofline: the larger of the compute with everything resident and a bare read of the bytes."""

from __future__ import annotations

import os
import statistics
from typing import Any

from bench.results import Measurement
from bench.speed import fio
from bench.speed.contender import Contender
from bench.speed.field import RESIDENT_PERCENT, Field
from bench.speed.ratios import Target, ratio, ratio_measurements
from bench.speed.rounds import Sample, Say, interleave, larger, smaller, steps_of
from bench.speed.workload import Burst, Kind

TARGET = Target(limit=1.10)


def roofline(field: Field, say: Say) -> list[Measurement]:
    """Returns measured ÷ roofline of each workload and budget, and what it is made of.

    Raises ContenderError when a contender fails.
    """
    waiting = os.environ.get("OMP_WAIT_POLICY", "not set")
    found = [
        Measurement.of(
            f"{field.mode.value}_threads", [field.num_threads], unit="threads",
            description=f"that compute, in each process; OMP_WAIT_POLICY {waiting}",
        )
    ]  # fmt: skip
    for kind in Kind:
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
        # Plans settle in the first passes after another workload.
        contender.tell("burst", kind=kind.value, warm=2, timed=1)
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
        found += ratio_measurements(
            name, ratio(measured, samples[bound]), f"a step over the roofline, budget {percent} %", compared, TARGET
        )
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
        say(f"{name}: {statistics.median(measured):.3f} s, {found[-8].figure()} of {compared}; {disk}")
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
    sources[names[0]] = _bare_read(field.disk, name)
    if scale.with_fio and not fio.is_there():
        say("fio is not installed: the bare preadv loop alone is the yardstick")
    elif scale.with_fio:
        job = fio.best_job(scale.weights, size_bytes)
        say(f"{name}: fio by {job}")
        names.append(f"fio_{percent}")
        sources[names[1]] = lambda: fio.read(scale.weights, size_bytes, job)
    return names, size_bytes


def _bare_read(disk: Contender, name: str) -> Sample:
    return lambda: float(disk.tell("read", name=name)["steps_s"][0])


def fits(field: Field, say: Say) -> list[Measurement]:
    """Returns mball over plain where the model fits its budget, by many pairs, and the bytes that were read meanwhile.

    Raises ContenderError when a contender fails.
    """
    found, target = [], Target(limit=1.02)
    scale, fitting = field.scale, field.mball[RESIDENT_PERCENT]
    for kind in Kind:
        burst = scale.bursts[kind]
        reports: list[dict[str, Any]] = []
        for contender in (fitting, field.plain):
            steps_of(contender, kind, Burst(warm=2, timed=1), reports)()
        before = reports[0]["bytes_read"]
        sources = {
            "mball": steps_of(fitting, kind, burst, reports), "plain": steps_of(field.plain, kind, burst)
        }  # fmt: skip
        samples = interleave(sources, scale.pairs[kind], say, f"{field.mode.value} {kind.value}, all resident")
        name = f"{field.mode.value}_{kind.value}"
        found += ratio_measurements(
            f"{name}_fits", ratio(samples["mball"], samples["plain"]),
            f"a step, budget {RESIDENT_PERCENT} % of the weights", "the same without mball", target, by_high=True,
        )  # fmt: skip
        found += [
            Measurement.of(f"{name}_fits_s", samples["mball"], unit="s", description="a step"),
            Measurement.of(f"{name}_fits_plain_s", samples["plain"], unit="s", description="a step without mball"),
            Measurement.of(
                f"{name}_fits_read", [reports[-1]["bytes_read"] - before], unit="bytes",
                description="read by mball in all these steps", compared_with="target 0",
            ),
        ]  # fmt: skip
    return found
