"""How large a session is: the model, the prompt, and how often what is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.speed.model import weight_bytes, weight_file
from bench.speed.workload import Burst, Kind
from mball.units import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """One session's size.

    Attributes:
        checkpoint: of the model.
        kin: a small checkpoint of the same kind, run and dropped before a process is capped.
        prompt_tokens: of the prefill.
        percents: budgets, of the weights' bytes.
        step_bytes: of what streams compiled steps, under every budget the same: equal cuts compute equal bits.
        rounds, bursts: for each workload that is run.
        settling: steps before anything is timed where predictions are held against measurements.
        pairs: rounds of mball against plain where the model fits; 0 takes the rounds of all contenders for it.
        peer_kinds: what peers are compared in.
        with_fio: whether fio is asked as well; it cannot time reads of a few milliseconds.
    """

    checkpoint: Path
    kin: Path
    prompt_tokens: int
    percents: tuple[int, ...]
    step_bytes: int
    rounds: dict[Kind, int]
    bursts: dict[Kind, Burst]
    settling: int
    pairs: dict[Kind, int]
    peer_kinds: tuple[Kind, ...]
    with_fio: bool

    def budget_bytes(self, percent: int) -> int:
        """Returns `percent` of the weights."""
        return weight_bytes(self.checkpoint) * percent // 100

    @property
    def weights(self) -> Path:
        """The file that holds the weights."""
        return weight_file(self.checkpoint)


def full(checkpoint: Path, kin: Path, *, prefill_rounds: int = 3) -> Scale:
    """Returns the size of `make bench`.

    A prefill of 512 is a trillion operations, half a minute on two cores without bfloat16 instructions. So it gets
    few rounds, and peers are compared in decode, where their ways of reading tell. Nor has it a warming step in each
    burst: what was read ahead before its clock began, at most the budget, counts in its favour by that much reading.
    """
    return Scale(
        checkpoint=checkpoint,
        kin=kin,
        prompt_tokens=512,
        percents=(25, 50, 75),
        step_bytes=32 * MIB,
        rounds={Kind.DECODE: 10} | ({Kind.PREFILL: prefill_rounds} if prefill_rounds else {}),
        bursts={Kind.DECODE: Burst(warm=1, timed=3), Kind.PREFILL: Burst(warm=0, timed=1)},
        settling=8,
        pairs={Kind.DECODE: 30} | ({Kind.PREFILL: 0} if prefill_rounds else {}),
        peer_kinds=(Kind.DECODE,),
        with_fio=True,
    )


def smoke(checkpoint: Path) -> Scale:
    """Returns the size of a test of the harness itself."""
    return Scale(
        checkpoint=checkpoint,
        kin=checkpoint,
        prompt_tokens=16,
        percents=(50,),
        step_bytes=MIB // 2,
        rounds={Kind.DECODE: 2},
        bursts={Kind.DECODE: Burst(warm=1, timed=2)},
        settling=8,
        pairs={Kind.DECODE: 0},
        peer_kinds=(Kind.DECODE,),
        with_fio=False,
    )
