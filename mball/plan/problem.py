"""What every planner starts from and ends with: the room for slots under a budget, and a plan made from a draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from mball.errors import BudgetError, SchemaError
from mball.plan.bundles import born_bundles, crossing, even_bundle, finest_bundles
from mball.plan.draft import Draft, shifted
from mball.plan.partition import Partition
from mball.plan.placement import keep_in_place
from mball.plan.smallest import check_problem, smallest_for
from mball.schema import Bundle, Lane, Machine, Plan, Trace
from mball.units import format_bytes, round_down


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A pass to plan under a budget that is large enough.

    Attributes:
        finest: the pass under the partition that needs the least space in every step. With nothing resident and no gap
            bridged but stretches (see `Uses.stretches`) it fits the arena.
        budget_bytes: the cap.
        fixed_bytes: of it, device memory that never moves.
        activation_bytes: of it, what the pass needs for what is born in it.
        arena_bytes: what is left for slots, in whole pages.
        born: the bundles of tensors born in the pass that leave where that helps.
        previous: the plan whose residents are in the arena now.
        host_budget_bytes: the cap of host memory, where bundles come through it.
        offload_budget_bytes: the cap of what offloaded tensors take below at one time, part of that of host memory if
            there is one; None if there is none but that.
    """

    finest: Partition
    budget_bytes: int
    fixed_bytes: int
    activation_bytes: int
    arena_bytes: int
    born: tuple[Bundle, ...]
    previous: Plan | None
    host_budget_bytes: int | None = None
    offload_budget_bytes: int | None = None
    _even: dict[tuple[int, ...], Bundle] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        trace: Trace,
        machine: Machine,
        budget_bytes: int,
        *,
        fixed_bytes: int,
        previous: Plan | None = None,
        moves_born: bool = False,
        host_budget_bytes: int | None = None,
        offload_budget_bytes: int | None = None,
    ) -> Self:
        """Returns the problem. Tensors born in the pass leave the device with `moves_born` if they may; else they stay,
        but for those that one lane bears and the other one reads.

        Raises:
            BudgetError: the budget is below the smallest that works, which the error names.
            ConfigError: `fixed_bytes` is negative.
            SchemaError: trace or machine contradict themselves, or bundles come through host memory and it has no
                budget.
        """
        check_problem(trace, machine, fixed_bytes)
        if machine.disk_link is not None and host_budget_bytes is None:
            raise SchemaError(
                f"machine {machine.name!r} has a disk_link, and this planner plans one link only: take `make_plan`, or "
                "a machine without disk_link"
            )
        born = born_bundles(trace, machine, must_leave=not moves_born)
        finest = Partition.of(trace, machine, [*finest_bundles(trace, machine), *born])
        smallest = smallest_for(trace, finest.demand, fixed_bytes)
        if budget_bytes < smallest.size_bytes:
            raise BudgetError(
                f"budget {format_bytes(budget_bytes)} ({budget_bytes} B) is too small for {trace.name!r}: the smallest "
                f"that works is {format_bytes(smallest.size_bytes)} ({smallest.size_bytes} B), because "
                f"{smallest.limited_by}; raise the budget to at least {smallest.size_bytes} B",
                budget_bytes=budget_bytes,
                smallest_bytes=smallest.size_bytes,
                limited_by=smallest.limited_by,
            )
        return cls(
            finest=finest,
            budget_bytes=budget_bytes,
            fixed_bytes=fixed_bytes,
            activation_bytes=smallest.activation_bytes,
            arena_bytes=round_down(budget_bytes - fixed_bytes - smallest.activation_bytes, machine.page_bytes),
            born=tuple(born),
            previous=previous,
            host_budget_bytes=host_budget_bytes,
            offload_budget_bytes=offload_budget_bytes,
        )

    @classmethod
    def of_weights(
        cls, trace: Trace, machine: Machine, budget_bytes: int, *, fixed_bytes: int, previous: Plan | None = None
    ) -> Self:
        """Returns the problem for a policy that knows weights only, and one lane. Errors as for `of`.

        Raises:
            SchemaError: a step runs on the host lane, or as for `of`.
        """
        for step in trace.steps:
            if step.lane is Lane.HOST:
                raise SchemaError(
                    f"step {step.name!r} of trace {trace.name!r} runs on the host lane, and this policy plans the "
                    "device alone: take `make_plan`, or a trace without host steps"
                )
        return cls.of(trace, machine, budget_bytes, fixed_bytes=fixed_bytes, previous=previous)

    @classmethod
    def ways(
        cls,
        trace: Trace,
        machine: Machine,
        budget_bytes: int,
        *,
        fixed_bytes: int,
        previous: Plan | None = None,
        host_budget_bytes: int | None = None,
        offload_budget_bytes: int | None = None,
    ) -> list[Self]:
        """Returns the problem in which what is born may leave, if anything may, and the one in which it stays.

        Those that the budget is too small for are left out. Errors as for `of`.
        """
        problems: list[Self] = []
        errors: list[BudgetError] = []
        for moves_born in (True, False) if {index for index, _ in trace.movable()} - crossing(trace) else (False,):
            try:
                problems.append(
                    cls.of(
                        trace,
                        machine,
                        budget_bytes,
                        fixed_bytes=fixed_bytes,
                        previous=previous,
                        moves_born=moves_born,
                        host_budget_bytes=host_budget_bytes,
                        offload_budget_bytes=offload_budget_bytes,
                    )
                )
            except BudgetError as error:
                errors.append(error)
        if not problems:
            raise min(errors, key=lambda error: error.smallest_bytes)
        return problems

    @property
    def trace(self) -> Trace:
        """The pass."""
        return self.finest.trace

    @property
    def machine(self) -> Machine:
        """What runs it."""
        return self.finest.machine

    @property
    def host_arena_bytes(self) -> int | None:
        """What host memory has for slots, in whole pages; None where bundles do not come through it."""
        if self.host_budget_bytes is None:
            return None
        return round_down(self.host_budget_bytes - (self.offload_budget_bytes or 0), self.machine.page_bytes)

    def even_bundle(self, weights: Sequence[int]) -> Bundle:
        """Returns the bundle that `even_bundle` makes of these weights; policies ask for the same ones many times."""
        key = tuple(weights)
        if key not in self._even:
            self._even[key] = even_bundle(key, self.trace, self.machine)
        return self._even[key]

    def plan(self, draft: Draft) -> Plan:
        """Returns the plan; what is resident stays where `previous` had it, where places allow."""
        residents, transfers, made, offloads = draft.residents, draft.transfers, draft.made, draft.offloads
        shift_bytes = 0
        if self.previous is not None:
            spare_bytes = self.arena_bytes - draft.arena_bytes
            residents, shift_bytes = keep_in_place(draft.partition.demand, residents, self.previous, spare_bytes)
            transfers, made = shifted(transfers, shift_bytes), shifted(made, shift_bytes)
            places = {each.bundle: each.offset_bytes for each in residents}
            offloads = tuple(
                replace(each, offset_bytes=places.get(each.bundle, each.offset_bytes))
                for each in shifted(offloads, shift_bytes)
            )
        return Plan(
            trace_name=self.trace.name,
            budget_bytes=self.budget_bytes,
            fixed_bytes=self.fixed_bytes,
            activation_bytes=self.activation_bytes,
            arena_bytes=draft.arena_bytes + shift_bytes,
            bundles=draft.partition.demand.bundles,
            steps=draft.steps,
            residents=residents,
            transfers=transfers,
            prediction=draft.prediction,
            made=made,
            offloads=offloads,
            offload_budget_bytes=self.offload_budget_bytes if self.host_budget_bytes is None else None,
        )
