"""A result that is right in every way, for tests to change."""

from __future__ import annotations

from bench.machine import MachineFacts
from bench.results import Measurement, Result


def result(
    *,
    name: str = "toy",
    topic: str = "writes",
    device: str = "cpu",
    date: str = "2026-01-31T09:30:00+00:00",
    share: float = 0.25,
    gpu: str | None = None,
) -> Result:
    """Returns a result whose headline is ``<share> % of a pass``."""
    return Result(
        name=name,
        topic=topic,
        device=device,
        headline="{share} of a pass",
        note="",
        machine=MachineFacts(
            date=date,
            cpu="Toy CPU",
            cores=8,
            memory_bytes=1 << 34,
            kernel="6.1.0",
            python="3.11.7",
            torch="2.13.0",
            transformers=None,
            gpu=gpu,
            gpu_driver="580.1" if gpu else None,
            commit=None,
        ),
        measurements=(
            Measurement.of("share", [share - 0.05, share, share + 0.1], unit="%", description="a share"),
            Measurement.of("pass_s", [0.5], unit="s", description="a pass"),
        ),
    )
