"""Result files: what was measured, on which machine, and which cell of the README's status table it fills.

A result is `bench/results/<date>-<hardware>-<name>.json`. Every figure that mball shows comes from such a file.
`record` writes one::

    record(
        name="cgroup-1b", topic=Topic.MEMORY_CAP, device=Device.CPU,
        headline="{peak} under a limit of {limit}",
        measurements=[
            Measurement.of("peak", peaks, unit="bytes", description="largest memory.current", compared_with="limit"),
            Measurement.of("limit", [limit], unit="bytes", description="memory.max of the process's group"),
        ],
    )
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path
from string import Formatter
from typing import Self

from bench.machine import MachineFacts, machine_facts
from mball.errors import SchemaError
from mball.schema.document import Document
from mball.units import format_bytes

RESULTS = Path(__file__).parent / "results"

_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]*")
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class Topic(Enum):
    """A row of the status table."""

    EQUALITY = "equality"
    MEMORY_CAP = "memory-cap"
    WRITES = "writes"
    PLANNER = "planner"
    READERS = "readers"
    LINK = "link"
    SPEED = "speed"
    PLANS = "plans"
    PEERS = "peers"
    START = "start"
    FIRST_TOKEN = "first-token"
    SWAP = "swap"
    LOAD = "load"
    DEMO = "demo"


class Device(Enum):
    """A column of the status table: the device that computed."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A quantity that was measured `num_samples` times.

    Attributes:
        name: lower case, digits, underscores; unique in its result; what a headline calls it.
        description: what was measured.
        unit: of the four numbers below: ``"s"``, ``"bytes"``, ``"%"``, ``"x"`` (a ratio) or any other.
        iqr: third quartile minus first.
        compared_with: what the quantity is relative to, or to be held against; None for a plain figure.
    """

    name: str
    description: str
    unit: str
    median: float
    minimum: float
    maximum: float
    iqr: float
    num_samples: int
    compared_with: str | None

    @classmethod
    def of(
        cls, name: str, samples: Sequence[float], *, unit: str, description: str, compared_with: str | None = None
    ) -> Self:
        """Returns the summary of at least one sample. Raises SchemaError without one."""
        if not samples:
            raise SchemaError(f"measurement {name!r} has no samples; measure it at least once")
        low, median, high = (
            statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
        )
        return cls(
            name=name,
            description=description,
            unit=unit,
            median=float(median),
            minimum=float(min(samples)),
            maximum=float(max(samples)),
            iqr=float(high - low),
            num_samples=len(samples),
            compared_with=compared_with,
        )

    def check(self) -> None:
        """Raises SchemaError when the numbers contradict each other."""
        where = f"measurement {self.name!r}"
        if not _IDENTIFIER.fullmatch(self.name):
            raise SchemaError(f"{where}: a name has lower case letters, digits and underscores")
        if self.num_samples < 1:
            raise SchemaError(f"{where} has {self.num_samples} samples; at least 1 is needed")
        if not all(math.isfinite(value) for value in (self.median, self.minimum, self.maximum, self.iqr)):
            raise SchemaError(f"{where} holds a number that is not finite")
        if not self.minimum <= self.median <= self.maximum:
            raise SchemaError(f"{where}: median {self.median} is outside [{self.minimum}, {self.maximum}]")
        # Quartiles are interpolated, so leave room for rounding.
        if not 0 <= self.iqr <= (self.maximum - self.minimum) * (1 + 1e-9):
            raise SchemaError(f"{where}: IQR {self.iqr} does not fit into [{self.minimum}, {self.maximum}]")

    def figure(self) -> str:
        """Returns the median for a person, three digits and the unit."""
        return show(self.median, self.unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result(Document):
    """A result file, version 1.

    Attributes:
        name: what was run: lower case words joined by hyphens.
        topic: value of a `Topic`.
        device: value of a `Device`.
        headline: what the status table shows, with the names of measurements in braces for their figures.
        note: what a reader has to know about the run.
    """

    name: str
    topic: str
    device: str
    headline: str
    note: str
    machine: MachineFacts
    measurements: tuple[Measurement, ...]
    version: int = 1

    def check(self) -> None:
        """Raises SchemaError when the result contradicts itself."""
        if not _SLUG.fullmatch(self.name):
            raise SchemaError(f"result name {self.name!r}: use lower case words joined by hyphens")
        for value, kind in ((self.topic, Topic), (self.device, Device)):
            known = [choice.value for choice in kind]
            if value not in known:
                raise SchemaError(f"{kind.__name__.lower()} {value!r} is none of {', '.join(known)}")
        if self.device == Device.CUDA.value and self.machine.gpu is None:
            raise SchemaError("a result of device 'cuda' needs a machine with a GPU, and this one names none")
        if not _is_date(self.machine.date):
            raise SchemaError(
                f"machine.date {self.machine.date!r} is not written like 2026-01-31T09:30:00+00:00, in UTC"
            )
        for measurement in self.measurements:
            measurement.check()
        names = [measurement.name for measurement in self.measurements]
        if len(names) != len(set(names)):
            raise SchemaError(f"two measurements have one name: {', '.join(names)}")
        self._check_headline(set(names))

    def _check_headline(self, names: set[str]) -> None:
        try:
            parsed = [part[1:] for part in Formatter().parse(self.headline) if part[1] is not None]
        except ValueError as error:
            raise SchemaError(f"headline {self.headline!r} cannot be read: {error}") from error
        fields = {field for field, _, _ in parsed if field is not None}
        if any(form or conversion for _, form, conversion in parsed):
            raise SchemaError(f"headline {self.headline!r} formats a figure itself; write its name only: {{name}}")
        if not fields:
            raise SchemaError(f"headline {self.headline!r} shows no measurement; name one in braces: {sorted(names)}")
        if unknown := fields - names:
            raise SchemaError(f"headline {self.headline!r} names {sorted(unknown)}; measured were {sorted(names)}")

    def summary(self) -> str:
        """Returns the headline with its figures."""
        return self.headline.format(**{measurement.name: measurement.figure() for measurement in self.measurements})

    def hardware(self) -> str:
        """Returns what computed: the GPU's name, or the number of cores."""
        if self.device == Device.CUDA.value and self.machine.gpu is not None:
            return self.machine.gpu
        return f"{self.machine.cores} core{'s' if self.machine.cores != 1 else ''}"

    def day(self) -> str:
        """Returns the date as ``2026-01-31``, in UTC."""
        return self.machine.date[:10]

    def file_name(self) -> str:
        """Returns ``<date>-<hardware>-<name>.json``."""
        hardware = re.sub(r"[^a-z0-9]+", "-", self.hardware().lower()).strip("-")
        return f"{self.day()}-{hardware}-{self.name}.json"


def record(
    *,
    name: str,
    topic: Topic,
    device: Device,
    headline: str,
    measurements: Sequence[Measurement],
    note: str = "",
    directory: Path = RESULTS,
) -> Path:
    """Writes what was measured just now on this machine; returns the file. See `Result` for the arguments.

    A result of the same day, hardware and name is replaced. `make status` then brings it into the README.

    Raises:
        SchemaError: the result contradicts itself; nothing was written.
    """
    result = Result(
        name=name,
        topic=topic.value,
        device=device.value,
        headline=headline,
        note=note,
        machine=machine_facts(),
        measurements=tuple(measurements),
    )
    return write_result(result, directory)


def write_result(result: Result, directory: Path = RESULTS) -> Path:
    """Writes the result file whole or not at all; returns its path. Raises SchemaError as `Result.check`."""
    result.check()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / result.file_name()
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def read_result(path: Path) -> Result:
    """Reads one result file.

    Raises:
        SchemaError: it is malformed, of another version, contradicts itself or has another result's name; the
            message begins with the path.
    """
    try:
        result = Result.from_json(path.read_text(encoding="utf-8"))
    except (SchemaError, UnicodeDecodeError) as error:
        raise SchemaError(f"{path}: {error}") from error
    if path.name != result.file_name():
        raise SchemaError(f"{path}: by its content its name is {result.file_name()}; rename it or record it again")
    return result


def read_results(directory: Path = RESULTS) -> list[Result]:
    """Returns all results of a directory, oldest first. Raises SchemaError as `read_result`, for the first bad file."""
    results = [read_result(path) for path in sorted(directory.glob("*.json"))]
    return sorted(results, key=lambda result: (result.machine.date, result.file_name()))


def show(value: float, unit: str) -> str:
    """Returns a figure for a person: three digits, and a prefix where the unit takes one."""
    if unit == "bytes":
        return format_bytes(round(value))
    if unit == "s":
        for factor, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if abs(value) >= factor:
                return f"{_three_digits(value / factor)} {name}"
        return f"{_three_digits(value / 1e-9)} ns"
    if unit == "x":
        return f"{_three_digits(value)}×"
    return f"{_three_digits(value)} {unit}".strip()


def _is_date(text: str) -> bool:
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        return False
    # Dates are sorted and cut as text, so only one way of writing them will do.
    return date.utcoffset() == timedelta(0) and date.isoformat(timespec="seconds") == text


def _three_digits(value: float) -> str:
    if abs(value) >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.3g}"
