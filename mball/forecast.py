"""What is known before anything ran: the machine, the operators to expect, and the smallest budget for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from mball.config import calibration_directory
from mball.errors import BudgetError
from mball.lookups import gathered_bytes, is_table
from mball.plan import smallest_budget, smallest_host_budget
from mball.run.census import Census
from mball.run.homes import Home
from mball.run.segments import OperatorReads
from mball.schema import Gather, Link, Machine, Step, Tier, Trace
from mball.storage import FileTable, ReaderChoice, find_calibrated_link, measure_link
from mball.units import PAGE_BYTES, format_bytes

logger = logging.getLogger(__name__)


def measure_machine(homes: Sequence[Home], files: FileTable, choice: ReaderChoice, link: Link | None) -> Machine:
    """Returns this machine with `link`, or with that of the reader of `choice` from the file of the largest weight.

    If `link` begins in host memory, that one brings what is on disk to there. As `mball doctor --calibrate` measured
    it, where that file lies on a file system with a calibration, else measured now.
    """
    disk_link = None
    if link is None:
        link = _disk_link(homes, files, choice)
    elif link.source is Tier.HOST:
        disk_link = replace(_disk_link(homes, files, choice), target=Tier.HOST)
    return Machine(
        name="this machine", page_bytes=PAGE_BYTES, alignment_bytes=PAGE_BYTES, link=link, disk_link=disk_link
    )


def _disk_link(homes: Sequence[Home], files: FileTable, choice: ReaderChoice) -> Link:
    largest = max(homes, key=lambda home: home.span_bytes)
    known = find_calibrated_link(calibration_directory(), files, largest.file, choice)
    if known is None:
        return measure_link(files, largest.file, choice=choice)
    link, day = known
    logger.info("weights come at %.2f GB/s, as calibrated on %s", link.bandwidth_bytes_per_s / 1e9, day)
    return link


def expected_operators(roots: Sequence[torch.nn.Module], census: Census) -> list[OperatorReads]:
    """Returns in module order the weights that one operator will probably read together.

    A module with a weight and a bias reads both at once; one with more of them (a recurrent one) reads them in parts.
    Of an embedding some rows are looked up.
    """
    of_module: dict[int, list[int]] = {}
    for number, weight in enumerate(census.weights):
        for owner in weight.owners:
            of_module.setdefault(id(owner.module), []).append(number)
    expected: list[OperatorReads] = []
    for identity, module in {id(module): module for root in roots for module in root.modules()}.items():
        own = tuple(sorted(set(of_module.get(identity, ()))))
        if len(own) == 1:
            expected.append(OperatorReads(own, _rows_bytes(module, census.weights[own[0]].parameter)))
        elif len(own) == 2:
            expected.append(OperatorReads(own))
        else:
            expected += [OperatorReads((weight,)) for weight in own]
    return expected


def _rows_bytes(module: torch.nn.Module, weight: torch.Tensor) -> int | None:
    """Returns about how much a module reads of its weight to look up a row, None if it reads all of it."""
    is_embedding = isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and module.max_norm is None
    if not is_embedding or not is_table(weight):
        return None
    return gathered_bytes(1, weight[0].nbytes, weight.nbytes)


def check_budget(
    budget_bytes: int,
    host_budget_bytes: int | None,
    homes: Sequence[Home],
    machine: Machine,
    fixed_bytes: int,
    expected: Sequence[OperatorReads],
) -> None:
    """Refuses budgets that cannot hold the model even one module at a time.

    Args:
        budget_bytes: the budget.
        host_budget_bytes: that of host memory, where weights come through it.
        homes: of all weights.
        machine: the machine that runs the model.
        fixed_bytes: bytes of buffers.
        expected: see `expected_operators`.

    Raises:
        BudgetError: a budget is too small; it names the smallest and what sets it.
    """
    steps = tuple(
        Step(
            name=homes[weights[0]].name.rpartition(".")[0] or "the model",
            graph=None,
            reads=weights if rows_bytes is None else (),
            gathers=() if rows_bytes is None else (Gather(tensor=weights[0], size_bytes=rows_bytes),),
            scratch_bytes=0,
            flops=0,
            time_s=0.0,
        )
        for weights, rows_bytes in expected
    )
    trace = Trace(name="one module at a time", tensors=tuple(home.schema() for home in homes), steps=steps)
    smallest = smallest_budget(trace, machine, fixed_bytes=fixed_bytes)
    if budget_bytes < smallest.size_bytes:
        raise BudgetError(
            f"a budget of {format_bytes(budget_bytes)} ({budget_bytes} B) is too small: the smallest "
            f"that holds the model one module at a time is {smallest.size_bytes} B "
            f"({format_bytes(smallest.size_bytes)}), set by {smallest.limited_by}; activations come on top",
            budget_bytes=budget_bytes,
            smallest_bytes=smallest.size_bytes,
            limited_by=smallest.limited_by,
        )
    if host_budget_bytes is None:
        return
    least = smallest_host_budget(trace, machine, budget_bytes, fixed_bytes=fixed_bytes)
    if host_budget_bytes < least.size_bytes:
        raise BudgetError(
            f"a host budget of {format_bytes(host_budget_bytes)} ({host_budget_bytes} B) is too small: the smallest "
            f"beside {format_bytes(budget_bytes)} on the device is {least.size_bytes} B "
            f"({format_bytes(least.size_bytes)}), because {least.limited_by}; raise it, or the budget of the device",
            budget_bytes=host_budget_bytes,
            smallest_bytes=least.size_bytes,
            limited_by=least.limited_by,
        )
