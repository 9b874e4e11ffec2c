"""How large a session is: the model, the prompt, and how often what is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.speed.model import weight_bytes, weight_file
from bench.speed.workload import Burst, Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """One session's size.

    Attributes:
        checkpoint: of the model.
        kin: a small checkpoint of the same kind, run and dropped before a process is capped.
        prompt_tokens: of the prefill.
        percents: budgets, of the weights' bytes.
        rounds, bursts: for each workload.
        pairs: rounds of mball against plain where the model fits.
        with_fio: whether fio is asked as well; it cannot time reads of a few milliseconds.
    """

    checkpoint: Path
    kin: Path
    prompt_tokens: int
    percents: tuple[int, ...]
    rounds: dict[Kind, int]
    bursts: dict[Kind, Burst]
    pairs: dict[Kind, int]
    with_fio: bool

    def budget_bytes(self, percent: int) -> int:
        """Returns `percent` of the weights."""
        return weight_bytes(self.checkpoint) * percent // 100

    @property
    def weights(self) -> Path:
        """The file that holds the weights."""
        return weight_file(self.checkpoint)


def full(checkpoint: Path, kin: Path) -> Scale:
    """Returns the size of `make bench`."""
    return Scale(
        checkpoint=checkpoint,
        kin=kin,
        prompt_tokens=512,
        percents=(25, 50, 75),
        rounds={Kind.DECODE: 15, Kind.PREFILL: 6},
        bursts={Kind.DECODE: Burst(warm=1, timed=3), Kind.PREFILL: Burst(warm=0, timed=1)},
        pairs={Kind.DECODE: 40, Kind.PREFILL: 30},
        with_fio=True,
    )


def smoke(checkpoint: Path) -> Scale:
    """Returns the size of a test of the harness itself."""
    return Scale(
        checkpoint=checkpoint,
        kin=checkpoint,
        prompt_tokens=16,
        percents=(75,),
        rounds={Kind.DECODE: 2, Kind.PREFILL: 2},
        bursts={Kind.DECODE: Burst(warm=1, timed=2), Kind.PREFILL: Burst(warm=1, timed=1)},
        pairs={Kind.DECODE: 2, Kind.PREFILL: 2},
        with_fio=False,
    )
