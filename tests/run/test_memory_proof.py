"""A budget holds: measured from inside without a limit, and enforced by the kernel in a control group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mball.units import MIB
from tests.run import memory_proof as proof
from tests.run.cgroup import MemoryGroup, NoCgroupError
from tests.run.memory_proof import Checkpoints, Outcome

BUDGET_BYTES = 640 * MIB
# Beside the budget: what capture keeps, allocator slack and workspace inside operators. Seen: 9.3 MiB.
SMALL_BUDGET_BYTES = 32 * MIB
SMALL_ALLOWANCE_BYTES = 16 * MIB


def assert_proves(outcome: Outcome, reference: Outcome, budget_bytes: int) -> None:
    """It ran to the end, streamed, managed every weight, kept to its budget and gave the tokens of the plain model."""
    assert outcome.completed, outcome
    assert reference.completed, reference
    done = outcome.events["done"]
    report = done["report"]
    assert report["budget_bytes"] == budget_bytes
    assert report["weights_managed"] == report["weights_owned"] > 0
    assert report["streamed_bytes_per_pass"] > 0
    assert report["bytes_read_last_pass"] > 0
    assert report["in_place_bytes"] == 0
    assert report["peak_bytes"] <= budget_bytes
    assert report["weight_bytes"] > 2 * budget_bytes, "the model nearly fits, so this proves little"
    assert done["token_ids"] == reference.events["done"]["token_ids"]
    assert len(set(done["token_ids"])) > 1, "a constant answer proves little"


@pytest.mark.slow  # three processes that import torch, two of which capture
def test_anonymous_memory_grows_by_the_budget(tmp_path: Path) -> None:
    """The same with a small model and no control group: what this process counts itself."""
    checkpoints = proof.write_checkpoints(tmp_path, proof.SMALL)
    outcome = proof.wrapped(checkpoints, SMALL_BUDGET_BYTES)
    assert_proves(outcome, proof.unwrapped(checkpoints), SMALL_BUDGET_BYTES)
    growth_bytes = outcome.events["done"]["peak_growth_bytes"]
    assert SMALL_BUDGET_BYTES // 2 < growth_bytes <= SMALL_BUDGET_BYTES + SMALL_ALLOWANCE_BYTES, outcome


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoints]:
    try:
        MemoryGroup.create("mball-proof-probe").remove()
    except NoCgroupError as error:
        pytest.skip(str(error))
    directory = tmp_path_factory.mktemp("proof")
    yield proof.write_checkpoints(directory, proof.LARGE)
    for path in directory.glob("*/*"):  # 2 GB
        path.unlink()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_kernel_enforces_the_budget(checkpoints: Checkpoints) -> None:
    reference = proof.unwrapped(checkpoints)
    outcome = proof.capped(checkpoints, BUDGET_BYTES)
    assert_proves(outcome, reference, BUDGET_BYTES)
    assert outcome.oom_kills == 0

    limited = outcome.events["limited"]
    assert limited["limit_bytes"] <= limited["base_bytes"] + BUDGET_BYTES * 105 // 100
    # The two-layer model is gone from the base; what is left of it is machinery.
    assert limited["base_bytes"] - limited["imported_bytes"] < 96 * MIB, limited

    # The same limit ends the same model without mball: the cap bites.
    alone = proof.unwrapped_capped(checkpoints, limited["limit_bytes"])
    assert alone.killed_at_limit, alone


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_half_the_budget_is_not_enough(checkpoints: Checkpoints) -> None:
    """With mball's own question suppressed the kernel kills it, so the memory is really taken."""
    outcome = proof.capped(checkpoints, BUDGET_BYTES, BUDGET_BYTES // 2, blind=True)
    assert outcome.killed_at_limit, outcome


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_half_the_budget_is_refused(checkpoints: Checkpoints) -> None:
    """mball sees the limit before the kernel has to act, and says what is missing."""
    outcome = proof.capped(checkpoints, BUDGET_BYTES, BUDGET_BYTES // 2)
    assert outcome.code == 1, outcome
    assert outcome.oom_kills == 0, outcome
    assert "lower the budget" in outcome.events["failed"]["error"]
