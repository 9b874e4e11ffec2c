"""A session: the yardstick and each loader in turn, on a cold file and on a warm one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.load.loaders import PEERS, TITLES, Way
from bench.results import Measurement
from bench.speed import fio
from bench.speed.contender import Contender, ContenderError
from bench.speed.peers import forget_pages
from bench.speed.preadv import Span
from bench.speed.ratios import Target, ratio, ratio_measurements
from bench.speed.rounds import Sample, Say, interleave, reads_of, smaller
from mball.units import MIB

_SPAN_BYTES = 64 * MIB


def cold(path: Path, ways: Sequence[Way], num_rounds: int, peers: Path | None, say: Say) -> list[Measurement]:
    """Returns what loading `path` takes when it is not in the page cache, beside bare reads of it.

    Raises ContenderError when a loader fails, or has other tensors than the others.
    """
    with ExitStack() as stack:
        sources = _yardsticks(path, stack)
        yardsticks = list(sources)
        loads = _Loads(path, ways, peers, stack)
        sources |= {way.value: loads.sample(way, before=lambda: forget_pages(path.parent)) for way in ways}
        samples = interleave(sources, num_rounds, say, "cold")
    best = smaller(samples, yardsticks)
    found = _times("cold", samples, loads)
    found += [
        Measurement.of("cold_yardstick_s", samples[best], unit="s", description=f"a bare read by {best}"),
        Measurement.of("size", [path.stat().st_size], unit="bytes", description="the file"),
    ]
    for way in (Way.BARE, Way.PREFAULTED, Way.MBALL):
        target = Target(limit=0.95, at_least=True) if way is Way.PREFAULTED else None
        of_disk = ratio(samples[best], samples[way.value])
        found += ratio_measurements(f"cold_disk_{way.value}", of_disk, f"speed of {TITLES[way]}", "a bare read", target)
    # The yardstick reads into the same memory over and over, which its loop does faster than into other memory.
    alike = ratio(samples[Way.BARE.value], samples[Way.PREFAULTED.value])
    what = f"speed of {TITLES[Way.PREFAULTED]}"
    found += ratio_measurements("cold_bare_prefaulted", alike, what, TITLES[Way.BARE])
    return found + _against_peers("cold", samples, ways)


def warm(path: Path, ways: Sequence[Way], num_rounds: int, peers: Path | None, say: Say) -> list[Measurement]:
    """Returns what loading `path` takes when all of it is in the page cache. Raises as `cold`."""
    with ExitStack() as stack:
        loads = _Loads(path, ways, peers, stack)
        sources = {way.value: loads.sample(way, before=lambda: _read_whole(path)) for way in ways}
        samples = interleave(sources, num_rounds, say, "warm")
    return _times("warm", samples, loads) + _against_peers("warm", samples, ways)


class _Loads:
    """A process for each way; all have to find the same tensors."""

    def __init__(self, path: Path, ways: Sequence[Way], peers: Path | None, stack: ExitStack) -> None:
        self._path = path
        self._contenders = {way: stack.enter_context(Contender(way.value, module="bench.load.child")) for way in ways}
        for contender in self._contenders.values():
            contender.tell("hello", peers=str(peers or ""))
        self._sums: dict[str, int] | None = None
        self.cpu_s: dict[str, list[float]] = {way.value: [] for way in ways}

    def sample(self, way: Way, before: Any) -> Sample:
        """Returns a source: the seconds of one load, after `before` was called."""

        def load() -> float:
            before()
            reply = self._contenders[way].tell("load", way=way.value, path=str(self._path))
            if self._sums is None:
                self._sums = reply["sums"]
            if reply["sums"] != self._sums:
                raise ContenderError(f"{way.value} loads other tensors than the one before")
            self.cpu_s[way.value].append(reply["cpu_s"])
            return float(reply["load_s"])

        return load


def _yardsticks(path: Path, stack: ExitStack) -> dict[str, Sample]:
    size_bytes = path.stat().st_size
    spans = [
        Span(path=str(path), offset_bytes=offset, size_bytes=min(_SPAN_BYTES, size_bytes - offset))
        for offset in range(0, size_bytes, _SPAN_BYTES)
    ]
    disk = stack.enter_context(Contender("yardstick", module="bench.speed.disk_child"))
    disk.tell("prepare", name="all", spans=[asdict(span) for span in spans])
    sources = {"preadv": reads_of(disk, "all")}
    if fio.is_there():
        job = fio.best_job(path, size_bytes)
        sources["fio"] = lambda: fio.read(path, size_bytes, job)
    return sources


def _times(state: str, samples: dict[str, list[float]], loads: _Loads) -> list[Measurement]:
    found = []
    for name, cpu_s in loads.cpu_s.items():
        title = TITLES[Way(name)]
        found += [
            Measurement.of(f"{state}_{name}_s", samples[name], unit="s", description=f"{title}, all of it in memory"),
            Measurement.of(f"{state}_{name}_cpu_s", cpu_s, unit="s", description=f"{title}, processor time"),
        ]
    return found


def _against_peers(state: str, samples: dict[str, list[float]], ways: Sequence[Way]) -> list[Measurement]:
    found = []
    for peer in (way for way in PEERS if way in ways):
        times = ratio(samples[peer.value], samples[Way.MBALL.value])
        target = Target(limit=1.0, at_least=True)
        what = f"time of {TITLES[peer]}"
        found += ratio_measurements(f"{state}_{peer.value}", times, what, "mball.load_file", target)
    return found


def _read_whole(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(8 * MIB)
        while file.readinto(buffer):
            pass
