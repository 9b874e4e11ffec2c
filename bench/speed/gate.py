"""No figure of a contender whose logits are wrong.

[Note: how close is close]
Compiling keeps in float32 what runs apart in bfloat16 would round in between, and 22 layers carry each such rounding
on. So compiled logits differ from uncompiled ones, rightly, by what depends on the model, and no constant is both fair
and strict. torch.compile is the accepted way to compute the same in other roundings: what mball compiles may be twice
as far from the uncompiled model as that is. torch.compile itself, whose distance is the measure, has to be within a
loose bound.

A distance is the root mean square difference over the root mean square logit, of the worst step. The largest single
difference would hang on one of a hundred thousand logits. The tokens with the largest logits are not compared: in a
random model they lead by as little as 0.06, and torch.compile moves single logits by 0.2.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy

from bench.speed.contender import Contender
from bench.speed.workload import Kind

# Of torch.compile. Logits that have nothing to do with each other are 1.4 apart.
LOOSE = 0.10
# Times torch.compile's own distance.
FACTOR = 2.0
# A distance that rounding the logits themselves can make: bfloat16 has eight bits.
ROUNDING = 2.0**-8


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


def close(contender: Contender, kind: Kind, reference: Logits, name: str, allowed: float) -> Logits:
    """Checks that a contender's logits are within a distance of the reference's; returns them. Raises GateError."""
    found = logits(contender, kind)
    apart = distance(found, reference)
    # Written so that NaN does not pass.
    if not apart <= allowed:
        raise GateError(
            f"{contender.name}, {kind.value}: logits are {apart:.3g} of their size from {name}, allowed {allowed:.3g}; "
            f"the largest difference is {_difference(found, reference):.3g}"
        )
    return found


def allowance(compiled: Logits, uncompiled: Logits) -> float:
    """Returns how far from the uncompiled model mball's compiled steps may be, by how far torch.compile is.

    Raises GateError when that is too far to be a measure.
    """
    apart = distance(compiled, uncompiled)
    if not apart <= LOOSE:
        raise GateError(f"torch.compile is {apart:.3g} from the uncompiled model, allowed {LOOSE}; it is no measure")
    return max(ROUNDING, FACTOR * apart)


def distance(found: Logits, reference: Logits) -> float:
    """Returns how far apart they are in the worst step, relative to the reference; see [Note: how close is close]."""
    if found.values.shape != reference.values.shape:
        return float("inf")
    apart = numpy.square(found.values - reference.values).mean(axis=-1)
    return float(numpy.sqrt(apart / numpy.square(reference.values).mean(axis=-1)).max())


def _difference(found: Logits, reference: Logits) -> float:
    if found.values.shape != reference.values.shape:
        return float("inf")
    return float(numpy.abs(found.values - reference.values).max())
