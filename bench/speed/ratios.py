"""What is made of samples: ratios of interleaved runs, their spread and how sure their median is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from bench.results import Measurement

NUM_RESAMPLES = 10_000
SEED = 20260


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Ratios of pairs of samples, one for each round.

    Attributes:
        samples: of each round.
        low, high: between them lies the true median in 95 of 100 such sessions.
    """

    samples: tuple[float, ...]
    median: float
    low: float
    high: float


def ratio(numerator_s: Sequence[float], denominator_s: Sequence[float]) -> Ratio:
    """Returns the median of `numerator / denominator`, of samples of the same rounds, with its bootstrap interval.

    Raises ValueError when there are no samples, or not as many of one as of the other.
    """
    if not numerator_s or len(numerator_s) != len(denominator_s):
        raise ValueError(f"{len(numerator_s)} samples over {len(denominator_s)}; they have to come in pairs")
    samples = numpy.asarray(numerator_s, dtype=float) / numpy.asarray(denominator_s, dtype=float)
    # The same samples give the same interval.
    generator = numpy.random.default_rng(SEED)
    drawn = generator.integers(0, len(samples), size=(NUM_RESAMPLES, len(samples)))
    low, high = numpy.quantile(numpy.median(samples[drawn], axis=1), (0.025, 0.975))
    return Ratio(samples=tuple(samples.tolist()), median=float(numpy.median(samples)), low=float(low), high=float(high))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a figure is held against.

    Attributes:
        limit: a bound, in the figure's unit.
        at_least: whether the bound is from below.
    """

    limit: float
    at_least: bool = False

    def met_by(self, value: float) -> bool:
        """Whether `value` is within it."""
        return value >= self.limit if self.at_least else value <= self.limit

    def verdict(self, value: float, unit: str = "×") -> str:
        """Returns the target and whether `value` met it, or by how much not."""
        outcome = "met" if self.met_by(value) else f"missed by {abs(value - self.limit):.3g}{unit}"
        return f"target {'≥' if self.at_least else '≤'} {self.limit:.3g}{unit}, {outcome}"


def ratio_measurements(
    name: str,
    found: Ratio,
    description: str,
    compared_with: str,
    target: Target | None = None,
    *,
    by_high: bool = False,
) -> list[Measurement]:
    """Returns a ratio as measurements: itself, and the ends of its interval as `<name>_low` and `<name>_high`.

    A target is held against the median, or with `by_high` against the interval's upper end.
    """
    verdict = f"; {target.verdict(found.median)}" if target and not by_high else ""
    high_verdict = f"; {target.verdict(found.high)}" if target and by_high else ""
    return [
        Measurement.of(
            name, found.samples, unit="x", description=description, compared_with=f"{compared_with}{verdict}"
        ),
        Measurement.of(
            f"{name}_low", [found.low], unit="x", description="95 % interval of the median ratio, lower end"
        ),
        Measurement.of(
            f"{name}_high", [found.high], unit="x", description=f"upper end{high_verdict}", compared_with=name
        ),
    ]
