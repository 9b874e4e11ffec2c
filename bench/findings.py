"""What a bench module hands to the fixture `findings`, which makes a result file of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.results import Device, Measurement, Topic


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """What a bench module calls its result: its variable `HEADING`; the fields are those of `Result`."""

    name: str
    topic: Topic
    device: Device
    headline: str


@dataclass(slots=True, kw_only=True)
class Findings:
    """Collects the measurements of one bench module."""

    measurements: list[Measurement] = field(default_factory=list)

    def add(self, *measurements: Measurement) -> None:
        """Adds measurements to the module's result. Raises SchemaError for numbers that contradict each other."""
        for measurement in measurements:
            measurement.check()
            self.measurements.append(measurement)
