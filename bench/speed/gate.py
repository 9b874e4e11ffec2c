"""No figure of a contender whose logits are wrong."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy

from bench.speed.contender import Contender
from bench.speed.workload import Kind

# Two ways of computing the same in bfloat16, with its eight bits.
TOLERANCE = 0.05


class GateError(AssertionError):
    """A contender's logits are not what they have to be; the message says how far off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits:
    """What a contender computes: float32 `[steps, V]`, and a hash of the bits before conversion."""

    values: numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.float32]]
    sha256: str


def logits(contender: Contender, kind: Kind) -> Logits:
    """Returns what a contender computes in a workload. Raises ContenderError."""
    with tempfile.TemporaryDirectory(prefix="mball-gate-") as directory:
        path = Path(directory) / "logits.npy"
        sha256 = contender.tell("logits", kind=kind.value, path=str(path))["sha256"]
        return Logits(values=numpy.load(path), sha256=sha256)


def same_bits(contender: Contender, kind: Kind, reference: Logits, name: str) -> None:
    """Checks that a contender's logits are the reference's, bit for bit. Raises GateError."""
    found = logits(contender, kind)
    if found.sha256 != reference.sha256:
        raise GateError(
            f"{contender.name}, {kind.value}: logits differ from {name} by up to "
            f"{_difference(found, reference):.3g}; they have to have the same bits"
        )


def close(contender: Contender, kind: Kind, reference: Logits, name: str) -> Logits:
    """Checks that a contender's logits are the reference's within what bfloat16 allows; returns them. Raises GateError.

    The tolerance is relative to the largest logit.
    """
    found = logits(contender, kind)
    allowed = TOLERANCE * float(numpy.abs(reference.values).max())
    # Written so that NaN does not pass.
    if not _difference(found, reference) <= allowed:
        raise GateError(
            f"{contender.name}, {kind.value}: logits differ from {name} by up to "
            f"{_difference(found, reference):.3g}, allowed {allowed:.3g}"
        )
    return found


def _difference(found: Logits, reference: Logits) -> float:
    if found.values.shape != reference.values.shape:
        return float("inf")
    return float(numpy.abs(found.values - reference.values).max())
