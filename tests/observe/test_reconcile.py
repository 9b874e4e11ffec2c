"""Numbers from outside against numbers from inside: what is left over is said, and never invented."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mball.memory.ledger import Account, Kind, Ledger
from mball.observe.reconcile import CudaFacts, Reconciliation, reconcile_gpu, reconcile_host
from mball.observe.told import NotTold
from mball.snapshot import take_host_memory
from mball.units import GIB, MIB

FACTS = CudaFacts(ordinal=1, uuid="0-1", reserved_bytes=3 * GIB, free_bytes=60 * GIB)
LEDGER = {"buffers": MIB, "arena": 6 * GIB, "activations": 2 * GIB, "capture": 0}


def of_gpu(**changes: Any) -> Reconciliation:
    settings: dict[str, Any] = {
        "facts": FACTS, "driver_free_bytes": 61 * GIB, "held_bytes": 10 * GIB, "ledger": LEDGER,
        "in_allocator": frozenset({"buffers", "activations", "capture"}), "spare_bytes": 64 * MIB,
    }  # fmt: skip
    return reconcile_gpu(**settings | changes)


def test_a_gpu_is_explained_part_by_part() -> None:
    explained = of_gpu()
    assert explained.known_bytes == 9 * GIB + 64 * MIB
    assert explained.rest_bytes == GIB - 64 * MIB
    assert str(explained) == (
        "cuda:1: 10.00 GiB by NVML = mball's arena 6.00 GiB + mball's spare pages 64.00 MiB + PyTorch's allocator "
        "3.00 GiB (of it mball's buffers 1.00 MiB, mball's activations 2.00 GiB) + CUDA context and all else 960.00 MiB"
        "; 61.00 GiB free by NVML; 60.00 GiB free by CUDA"
    )


def test_what_nvml_does_not_tell_leaves_no_rest() -> None:
    explained = of_gpu(held_bytes=NotTold(why="hidden"), driver_free_bytes=NotTold(why="Not Supported"))
    assert explained.rest_bytes == NotTold(why="hidden")
    assert str(explained).startswith("cuda:1: NVML does not tell (hidden); known: mball's arena 6.00 GiB + ")
    assert str(explained).endswith("; ? (Not Supported) free by NVML; 60.00 GiB free by CUDA")


def test_a_rest_below_nothing_is_said_and_is_no_number() -> None:
    explained = of_gpu(facts=replace(FACTS, reserved_bytes=5 * GIB))
    assert isinstance(explained.rest_bytes, NotTold)
    assert "1.06 GiB more than that" in explained.rest_bytes.why
    assert "CUDA context and all else ? (parts are 1.06 GiB more" in str(explained)


@given(
    held_bytes=st.integers(0, 1 << 40),
    ledger=st.dictionaries(st.sampled_from([kind.value for kind in Kind]), st.integers(0, 1 << 39)),
    reserved_bytes=st.integers(0, 1 << 39),
    spare_bytes=st.integers(0, 1 << 30),
    in_allocator=st.frozensets(st.sampled_from([kind.value for kind in Kind])),
)
def test_parts_and_rest_add_up_or_there_is_no_rest(
    held_bytes: int, ledger: dict[str, int], reserved_bytes: int, spare_bytes: int, in_allocator: frozenset[str]
) -> None:
    explained = of_gpu(
        held_bytes=held_bytes, ledger=ledger, facts=replace(FACTS, reserved_bytes=reserved_bytes),
        spare_bytes=spare_bytes, in_allocator=in_allocator,
    )  # fmt: skip
    outside = sum(num_bytes for kind, num_bytes in ledger.items() if kind not in in_allocator)
    rest = held_bytes - reserved_bytes - spare_bytes - outside
    assert explained.rest_bytes == rest if rest >= 0 else isinstance(explained.rest_bytes, NotTold)
    assert "-" not in str(explained).replace("0-1", "")


def test_this_process_is_explained() -> None:
    ledger = Ledger(GIB)
    ledger.set(Kind.ARENA, 4096)
    explained = take_host_memory(ledger)
    assert isinstance(explained.held_bytes, int)
    assert isinstance(explained.rest_bytes, int)
    assert explained.rest_bytes == explained.held_bytes - 4096 > 10 * MIB
    ledger.set(Kind.ACTIVATIONS, GIB - 4096)
    planned = take_host_memory(ledger)
    if planned.held_bytes < GIB:
        assert isinstance(planned.rest_bytes, NotTold)


class MovedBetween(Ledger):
    """What is in buffers moves to the arena after the first question."""

    def account(self, kind: Kind) -> Account:
        answer = super().account(kind)
        self.move()
        return answer

    def snapshot(self) -> Mapping[str, Account]:
        answer = super().snapshot()
        self.move()
        return answer

    def move(self) -> None:
        self.set(Kind.BUFFERS, 0)
        self.set(Kind.ARENA, MIB)


def test_what_moves_from_kind_to_kind_is_counted_once() -> None:
    ledger = MovedBetween(2 * MIB)
    ledger.set(Kind.BUFFERS, MIB)
    assert take_host_memory(ledger).known_bytes == MIB


def test_a_kernel_that_tells_nothing() -> None:
    explained = reconcile_host(anonymous_bytes=NotTold(why="old"), ledger={"arena": 0})
    assert str(explained) == "cpu: the kernel does not tell (old); known: nothing"
