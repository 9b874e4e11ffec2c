"""Residents yield to operators that find no memory: plans that leave more, and what to say where none does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable

import torch

from mball.errors import BudgetError, DeviceError
from mball.run.allocator_room import AllocatorRoom
from mball.run.operator_room import GROWTH_SHARE, OperatorRoom
from mball.run.pass_plans import PassPlan, PassPlans
from mball.units import format_bytes


class MoreRoom:
    """Finds plans that leave more to allocate.

    Args:
        plans: of all passes.
        room: what operators outside graphs need.
        allocator: what the allocator keeps beside tensors.
        planned: returns the plan of a pass, given its keys, by all that is known now.
    """

    def __init__(
        self,
        plans: PassPlans,
        room: OperatorRoom,
        allocator: AllocatorRoom,
        planned: Callable[[tuple[Hashable, ...]], PassPlan],
    ) -> None:
        self._plans = plans
        self._room = room
        self._allocator = allocator
        self._planned = planned

    def at_most(self, keys: tuple[Hashable, ...], arena_bytes: int, has_operators: bool) -> PassPlan | None:
        """Returns a plan whose arena is no larger than that, as passes of these segments get from now on.

        None if there is none, and nothing is changed.
        """
        room, plans = self._room, self._plans
        before_bytes = room.missed_bytes if has_operators else plans.taken_bytes(keys)
        more_bytes = last_bytes = 0
        with contextlib.suppress(BudgetError):
            while more_bytes < plans.budget_bytes:
                planned = self._planned(keys)
                plan = planned.plan
                if plan.arena_bytes <= arena_bytes:
                    return planned
                left_bytes = planned.reserve - room.needed_bytes if has_operators else planned.taken_bytes
                if more_bytes and left_bytes < before_bytes + more_bytes:  # no plan leaves that, nor more
                    break
                if plan.arena_bytes == last_bytes:  # first goes what the plan leaves of the budget for nothing
                    more_bytes += plan.budget_bytes - plan.fixed_bytes - plan.activation_bytes - plan.arena_bytes
                more_bytes += plan.arena_bytes - arena_bytes
                last_bytes = plan.arena_bytes
                self._note(keys, before_bytes + more_bytes, has_operators)
        self._note(keys, before_bytes, has_operators)
        return None

    def _note(self, keys: tuple[Hashable, ...], num_bytes: int, has_operators: bool) -> None:
        if has_operators:
            self._room.missed_bytes = num_bytes
        else:
            self._plans.note_taken(keys, num_bytes)

    def plan(self, active: PassPlan, arena_bytes: int) -> PassPlan | None:
        """Returns a plan like `active`, its arena smaller than that; None if there is none, and nothing is changed."""
        room, allocator, budget_bytes = self._room, self._allocator, self._plans.budget_bytes
        before = room.missed_bytes, allocator.kept_bytes
        while max(room.missed_bytes, allocator.kept_bytes) < budget_bytes:
            # Nobody tells how much it was: twice as much each time.
            if active.has_operators:
                room.missed_bytes = max(2 * room.missed_bytes, budget_bytes // GROWTH_SHARE)
            else:
                allocator.kept_bytes = max(2 * allocator.kept_bytes, budget_bytes // GROWTH_SHARE)
                self._plans.clear()
            try:
                planned = self._planned(active.tape.keys)
            except BudgetError:
                break
            if planned.plan.arena_bytes < arena_bytes:
                return planned
        room.missed_bytes, allocator.kept_bytes = before
        self._plans.clear()  # those that were tried are for other figures
        return None


def full(error: torch.OutOfMemoryError, budget_bytes: int, arena_bytes: int) -> DeviceError:
    """Returns what to raise where no cap kept an operator from memory: there is none."""
    return DeviceError(
        f"an operator found no memory on a device that is full: a budget of {format_bytes(budget_bytes)} "
        f"({budget_bytes} bytes), of which the arena has {arena_bytes} bytes, is more than others leave. "
        f"Free memory of the device, or lower the budget (mball.set_budget). {_said(error)}"
    )


def refusal(
    error: torch.OutOfMemoryError, budget_bytes: int, arena_bytes: int, left_bytes: int | None, *, has_more: bool
) -> DeviceError:
    """Returns what to raise where the budget kept an operator from memory; `has_more`: a plan leaves more."""
    way_out = "the next call leaves more room; call it again, or" if has_more else "no plan leaves more:"
    left = "" if left_bytes is None else f", which leaves {left_bytes} bytes to operators"
    return DeviceError(
        f"an operator found no memory under a budget of {format_bytes(budget_bytes)} ({budget_bytes} "
        f"bytes), of which the arena has {arena_bytes} bytes{left}: {way_out} raise the budget "
        f"(mball.set_budget), or compute less at one time. {_said(error)}"
    )


def lost(budget_bytes: int, left_bytes: int) -> DeviceError:
    """Returns what to raise where operators took so much of the arena that the pass cannot go on."""
    return DeviceError(
        "operators took so much memory of the arena that the rest of the pass does not fit what is left of it, "
        f"{left_bytes} bytes, under a budget of {format_bytes(budget_bytes)} ({budget_bytes} bytes): raise the budget "
        "(mball.set_budget), or compute less at one time"
    )


def _said(error: torch.OutOfMemoryError) -> str:
    return f"The device said: {str(error).partition(' If ')[0]}"
