"""Result files that grow while parts of a bench come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machine import MachineFacts, machine_facts
from bench.results import RESULTS, Device, Measurement, Result, Topic, read_result, write_result
from mball.errors import SchemaError


@dataclass(frozen=True, slots=True, kw_only=True)
class Book:
    """A result of which parts come one after the other.

    Attributes:
        name: the result's.
        topic: its row in the status table.
        phrases: what the headline may say, each with the names of measurements in braces; those that can be said are.
    """

    name: str
    topic: Topic
    phrases: tuple[str, ...]

    def headline(self, names: Sequence[str]) -> str:
        """Returns the phrases of which all measurements are there; if none is, the first measurement."""
        figures = dict.fromkeys(names, "")
        said = [phrase for phrase in self.phrases if _can_be_said(phrase, figures)]
        return "; ".join(said) if said else f"{{{names[0]}}}"


def _can_be_said(phrase: str, figures: dict[str, str]) -> bool:
    try:
        phrase.format(**figures)
    except KeyError:
        return False
    return True


def keep(
    book: Book,
    measurements: Sequence[Measurement],
    *,
    note: str = "",
    directory: Path = RESULTS,
    facts: MachineFacts | None = None,
) -> Path:
    """Writes what was measured just now, beside what the file of this day has already; returns the file.

    What has the same name is replaced. What another commit or machine measured that day is not kept.

    Args:
        book: which result it belongs to.
        measurements: at least one.
        note: what a reader has to know about the run; that of a part before stays where this is empty.
        directory: where result files are.
        facts: of the machine; default this one's, now.

    Raises:
        SchemaError: the numbers contradict each other; nothing was written.
    """
    facts = facts or machine_facts()
    result = _result(book, facts, measurements, note)
    before = _before(directory / result.file_name(), result)
    if before is not None:
        new = {measurement.name for measurement in measurements}
        kept = [measurement for measurement in before.measurements if measurement.name not in new]
        result = _result(book, facts, [*kept, *measurements], note or before.note)
    return write_result(result, directory)


def _result(book: Book, facts: MachineFacts, measurements: Sequence[Measurement], note: str) -> Result:
    return Result(
        name=book.name,
        topic=book.topic.value,
        device=Device.CUDA.value,
        headline=book.headline([measurement.name for measurement in measurements]),
        note=note,
        machine=facts,
        measurements=tuple(measurements),
    )


def _before(path: Path, result: Result) -> Result | None:
    try:
        before = read_result(path)
    except (SchemaError, OSError):
        return None
    same = ("gpu", "gpu_driver", "torch", "transformers", "commit")
    if any(getattr(before.machine, name) != getattr(result.machine, name) for name in same):
        return None
    return before


LINK = Book(
    name="gpu-link",
    topic=Topic.LINK,
    phrases=(
        "out of pinned memory {pinned_in_256_mib}, out of pageable {pageable_in_256_mib}",
        "32 MiB are created in {create_32_mib} and mapped in {map_32_mib}",
    ),
)
DISK = Book(
    name="gpu-load",
    topic=Topic.LOAD,
    phrases=(
        "a cold file comes to the GPU at {disk_mball} by mball.load_file, at {disk_safetensors} by safetensors",
        "its bytes alone at {disk_ring} through pinned memory",
        "at {disk_straight} by GPUDirect Storage",
    ),
)
SPEED = Book(
    name="gpu-speed",
    topic=Topic.SPEED,
    phrases=(
        "decode of 8 B parameters in half the memory takes {decode_50} of the copies alone",
        "prefill {prefill_50} of the larger of copies and compute",
        "all resident {fits_eager} of the time without mball",
    ),
)
PEERS = Book(
    name="gpu-peers",
    topic=Topic.PEERS,
    phrases=(
        "decode of 8 B parameters in half the memory: accelerate's CPU offload takes {peers_accelerate} mball's time",
        "blocks in turn, as diffusers' group offloading, {peers_blocks_decode} at equal bytes",
    ),
)
