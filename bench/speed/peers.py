"""Peers: other ways to run the model in the same memory, each in a process that the kernel caps alike."""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from bench.results import Measurement
from bench.speed import gate
from bench.speed.contender import Contender, ContenderError, order_of
from bench.speed.model import largest_weight_bytes
from bench.speed.ratios import Target, ratio, ratio_measurements
from bench.speed.rounds import Say, interleave, steps_of
from bench.speed.scale import Scale
from bench.speed.ways import Loading, Mode, Way
from bench.speed.workload import Kind
from mball.units import MIB
from tests.run.cgroup import MemoryGroup, NoCgroupError

PERCENT = 50
SPARE_PERCENT = 5
# At least: what a process takes besides does not shrink with the model.
SPARE_BYTES = 48 * MIB
TARGETS = {
    Way.MAPPED: Target(limit=3.5, at_least=True),
    Way.ACCELERATE: Target(limit=2.5, at_least=True),
}
_TITLES = {
    Way.MAPPED: "transformers with memory-mapped weights",
    Way.ACCELERATE: "accelerate's disk offload, the same bytes resident",
}


def why_no_cap() -> str | None:
    """Returns why no process can be capped on this machine, None where it can."""
    try:
        MemoryGroup.create(f"mball-speed-{os.getpid()}").remove()
    except NoCgroupError as error:
        return f"no cap on this machine: {error}"
    return None


def peers(scale: Scale, mode: Mode, say: Say) -> list[Measurement]:
    """Returns how many times longer peers take than mball, a budget of half the weights, all under one cap.

    The cap is what the process has once a small model was run in it and dropped, and the budget and 5 %; a peer
    that the kernel kills for that gets more, and its cap is a figure of its own. Peers are
    not compiled: under torch.compile they would not run this way.

    Raises:
        GateError, ContenderError: as in `bench.speed.field`.
        NoCgroupError: no process can be capped here; see `why_no_cap`.
    """
    budget_bytes = scale.budget_bytes(PERCENT)
    common = Loading(
        way=Way.MBALL, mode=mode, checkpoint=scale.checkpoint, budget_bytes=budget_bytes,
        step_bytes=scale.step_bytes if mode is Mode.INDUCTOR else 0,
    )  # fmt: skip
    found: list[Measurement] = []
    with ExitStack() as stack:
        with Contender("plain eager") as plain:
            plain.load(replace(common, way=Way.PLAIN, mode=Mode.EAGER), scale.prompt_tokens)
            references = {kind: gate.logits(plain, kind) for kind in scale.peer_kinds}
            # In a process that ends: this way it is not read into one that is capped.
            offload = plain.tell("offload", checkpoint=str(scale.checkpoint), folder=str(_offload_folder(scale)))["at"]
        allowed = _allowances(scale, references) if mode is Mode.INDUCTOR else {}
        capped: dict[Way, Contender] = {}
        common = replace(common, offload=Path(offload))
        for way in (Way.MBALL, *TARGETS):
            loading = replace(common, way=way, mode=mode if way is Way.MBALL else Mode.EAGER)
            contender, limit_bytes = _admitted(scale, loading, references, allowed, stack, say)
            capped[way] = contender
            if way is Way.MBALL:
                report = contender.tell("burst", kind=Kind.DECODE.value, warm=2, timed=1)["report"]
                common = replace(common, resident_bytes=report["resident_bytes"])
            say(f"{contender.name}: right logits under a cap of {limit_bytes >> 20} MiB")
            found.append(
                Measurement.of(
                    f"{mode.value}_{way.value}_cap", [limit_bytes], unit="bytes",
                    description="the kernel's limit on all memory of the process, page cache included",
                )
            )  # fmt: skip
        for kind in references:
            burst = scale.bursts[kind]
            sources = {way.value: steps_of(contender, kind, burst) for way, contender in capped.items()}
            samples = interleave(sources, max(3, scale.rounds[kind] // 2), say, f"{mode.value} {kind.value}, capped")
            prefix = f"{mode.value}_{kind.value}"
            for way in capped:
                found.append(
                    Measurement.of(f"{prefix}_{way.value}_s", samples[way.value], unit="s", description="a step")
                )
            for way, target in TARGETS.items():
                times = ratio(samples[way.value], samples[Way.MBALL.value])
                found += ratio_measurements(
                    f"{prefix}_{way.value}", times, f"time of {_TITLES[way]}", f"mball, budget {PERCENT} %", target
                )
                say(f"{prefix}: {way.value} takes {statistics.median(times.samples):.2f} × mball's time")
    return found


def _allowances(scale: Scale, references: Mapping[Kind, gate.Logits]) -> dict[Kind, float]:
    """Returns how far from the references mball's compiled steps may be."""
    with Contender("plain compiled") as plain:
        loading = Loading(way=Way.PLAIN, mode=Mode.INDUCTOR, checkpoint=scale.checkpoint)
        plain.load(loading, scale.prompt_tokens)
        return {kind: gate.allowance(gate.logits(plain, kind), found) for kind, found in references.items()}


def _admitted(
    scale: Scale,
    loading: Loading,
    references: Mapping[Kind, gate.Logits],
    allowed: Mapping[Kind, float],
    stack: ExitStack,
    say: Say,
) -> tuple[Contender, int]:
    """Returns a contender that passed the gate, and its cap: for a peer that dies of it, the least of a few higher."""
    extras = (0,) if loading.way is Way.MBALL else (0, 2, 4, 8, 16)
    for extra in extras:
        forget_pages(scale.checkpoint, *([loading.offload] if loading.offload else []))
        with ExitStack() as attempt:
            try:
                contender, limit_bytes = _capped(scale, loading, extra, attempt)
                for kind, reference in references.items():
                    if loading.mode is Mode.INDUCTOR:
                        gate.close(contender, kind, reference, "the uncompiled model", allowed[kind])
                    else:
                        gate.same_bits(contender, kind, reference, "the model without mball")
                    # The steps that are timed come closer together, and may take more.
                    burst = scale.bursts[kind]
                    contender.tell("burst", kind=kind.value, warm=burst.warm, timed=burst.timed)
            except ContenderError as error:
                if extra == extras[-1]:
                    raise
                say(f"{loading.way.value} gets a higher cap: {str(error).splitlines()[0]}")
                continue
            stack.push(attempt.pop_all())
            return contender, limit_bytes
    raise AssertionError("unreachable")


def _capped(scale: Scale, loading: Loading, extra: int, stack: ExitStack) -> tuple[Contender, int]:
    """Returns a capped contender and its cap, with room for `extra` copies of the largest weight on top."""
    group = MemoryGroup.create(f"mball-speed-{os.getpid()}-{loading.way.value}")
    stack.callback(group.remove)
    contender = stack.enter_context(Contender(f"{loading.way.value}, capped", group=group))
    # Accelerate's folder is of the large model; the machinery of transformers is what it needs besides its hooks.
    way = Way.MAPPED if loading.way is Way.ACCELERATE else loading.way
    kin = replace(loading, way=way, checkpoint=scale.kin, budget_bytes=_kin_budget(scale))
    base = contender.tell("rehearse", prompt_tokens=scale.prompt_tokens, **order_of(kin))["anonymous_bytes"]
    limit_bytes = base + loading.budget_bytes + max(SPARE_BYTES, loading.budget_bytes * SPARE_PERCENT // 100)
    limit_bytes += extra * largest_weight_bytes(scale.checkpoint)
    contender.cap(limit_bytes)
    contender.load(loading, scale.prompt_tokens)
    return contender, limit_bytes


def _kin_budget(scale: Scale) -> int:
    # Enough for activations of a long prompt, which outweigh a small model.
    return 1 << 30 if scale.kin != scale.checkpoint else scale.budget_bytes(75)


def _offload_folder(scale: Scale) -> Path:
    return scale.checkpoint.with_name(f"{scale.checkpoint.name}-offload")


def forget_pages(*folders: Path) -> None:
    """Drops what these folders hold from the page cache, so that reading it is charged to whoever reads it next."""
    for path in (path for folder in folders for path in folder.iterdir()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def drop_caches() -> bool:
    """Drops the page cache of the whole machine; returns whether that is allowed here."""
    subprocess.run(["sync"], check=True)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True
