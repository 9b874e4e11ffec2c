"""A plan followed byte by byte: slow, and without any of `validate`'s reasoning.

Every page of the arena remembers which bytes of which file were read into it, or which pass made it. A transfer
overwrites its pages as soon as it may start, and they can be read from the step on that waits for it; whatever has left
may be overwritten. A write reads its pages to the last step that it may take. Three
passes are followed: what two of them do to each other is seen in the second, and again in the third.
"""

from __future__ import annotations

from collections.abc import Iterator

from mball.schema import Machine, Plan, Tensor, Trace, Transfer, Treatment

PASSES = 3
# A page that is being filled, or that nothing was read into.
_POISON = None

# Of each page: what was read into it, as (file, offset of the page's first byte, bytes that are right).
Page = tuple[str, int, int] | None


class BrokenPlanError(Exception):
    """The plan does something wrong; the message says what."""


def replay(trace: Trace, plan: Plan, machine: Machine) -> None:
    """Returns when the plan does what it should. Raises BrokenPlanError."""
    _follow_steps(trace, plan)
    _Arena(trace, plan, machine).run()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BrokenPlanError(message)


def _follow_steps(trace: Trace, plan: Plan) -> None:
    """Every trace step runs once, in order, and what runs together is of one graph."""
    ran: list[int] = []
    for step in plan.steps:
        numbers = list(range(step.first, step.end))
        _require(bool(numbers), "a step runs nothing")
        ran += numbers
        _require(all(0 <= number < len(trace.steps) for number in numbers), "a step that is not there")
        graphs = [trace.steps[number].graph for number in numbers]
        _require(len(graphs) == 1 or (None not in graphs and len(set(graphs)) == 1), "merged across graphs")
    _require(ran == list(range(len(trace.steps))), "steps are not those of the trace")


class _Arena:
    """The arena's pages while passes run."""

    def __init__(self, trace: Trace, plan: Plan, machine: Machine) -> None:
        self._trace, self._plan, self._machine = trace, plan, machine
        self._page = machine.page_bytes
        self._count = len(plan.steps)
        apart = {index for bundle in plan.bundles for index in bundle.tensors}
        need = max(trace.activation_bytes(apart), default=0)
        _require(plan.activation_bytes >= need, "too little room for activations")
        _require(min(plan.fixed_bytes, plan.arena_bytes) >= 0, "negative bytes")
        _require(
            plan.fixed_bytes + plan.activation_bytes + plan.arena_bytes <= plan.budget_bytes, "more than the budget"
        )
        self._pages: list[Page] = [_POISON] * (plan.arena_bytes // self._page)
        # Who may read which pages: until it has left, nobody else may touch them.
        self._held: dict[int, str] = {}
        self._pages_of: dict[str, range] = {}
        # Who is there to be read: bundle, offset, first and last step, and the step in which its pages become free.
        self._present: dict[str, tuple[int, int, int, int, int]] = {}
        # Bundles of tensors born in the pass, by pass, that have been written below.
        self._below: set[tuple[int, int]] = set()

    def run(self) -> None:
        """Follows the passes."""
        if self._trace.cyclic:
            # Between passes residents are there; nothing else brings them.
            self._residents()
        else:
            _require(not self._plan.residents, "residents of a pass that nothing came before")
        order = [(transfer.after, transfer.needed_by) for transfer in self._plan.transfers]
        _require(order == sorted(order), "transfers are not in the order in which they are issued")
        for transfer in self._plan.transfers:
            self._check(transfer)
        for step in range(-2 * self._count, (PASSES if self._trace.cyclic else 1) * self._count):
            for number, start in list(self._starting(step)):
                transfer, name = self._plan.transfers[number], f"transfer {number} of pass {start}"
                self._write(transfer.bundle, transfer.offset_bytes, name)
                if self._tensor(transfer.bundle).home is None:
                    _require(start < 0 or (transfer.bundle, start) in self._below, f"{name} brings what nobody wrote")
                    self._make(transfer.bundle, transfer.offset_bytes, start)
                first, last = start * self._count + transfer.needed_by, start * self._count + transfer.last_use
                self._present[name] = (transfer.bundle, transfer.offset_bytes, first, last, last)
            if step >= 0:
                self._bear(*divmod(step, self._count))
                self._read(step)
            self._leave(step)

    def _tensor(self, bundle: int) -> Tensor:
        """The first tensor of a bundle; all of them have a home, or it is the only one and has none."""
        _require(0 <= bundle < len(self._plan.bundles), "a bundle that is not there")
        tensors = self._plan.bundles[bundle].tensors
        _require(bool(tensors) and all(0 <= index < len(self._trace.tensors) for index in tensors), "an odd bundle")
        return self._trace.tensors[tensors[0]]

    def _bear(self, start: int, number: int) -> None:
        """What the step makes takes its place."""
        for made in self._plan.made:
            tensor = self._tensor(made.bundle)
            _require(0 <= made.step <= made.last_use < self._count, "made and used in no order")
            if made.step != number:
                continue
            _require(tensor.live is not None and len(self._plan.bundles[made.bundle].tensors) == 1, "cannot be made")
            assert tensor.live is not None
            step = self._plan.steps[number]
            if made.is_anew:
                _require(Treatment.RECOMPUTE in tensor.may, f"{tensor.name} cannot be made anew")
                _require(step.first > tensor.live.first and made.bundle in step.reads, "made anew for nobody")
            else:
                _require(step.first <= tensor.live.first < step.end, f"{tensor.name} is not born here")
            name = f"bundle {made.bundle} made in step {number} of pass {start}"
            self._write(made.bundle, made.offset_bytes, name)
            self._make(made.bundle, made.offset_bytes, start)
            untils = [o.until for o in self._plan.offloads if (o.bundle, o.after) == (made.bundle, made.last_use)]
            last = start * self._count + made.last_use
            until = start * self._count + max([made.last_use, *untils])
            self._present[name] = (made.bundle, made.offset_bytes, start * self._count + number, last, until)

    def _make(self, number: int, offset: int, start: int) -> None:
        bundle = self._plan.bundles[number]
        _require(not bundle.extents, "what is born in a pass is read from nowhere")
        for at in range(0, bundle.size_bytes, self._page):
            self._pages[(offset + at) // self._page] = (f"made in pass {start} for {number}", at, self._page)

    def _residents(self) -> None:
        for placement in self._plan.residents:
            self._write(placement.bundle, placement.offset_bytes, f"resident {placement.bundle}")

    def _check(self, transfer: Transfer) -> None:
        _require(0 <= transfer.needed_by < self._count, "needed in a step that is not there")
        _require(transfer.after < transfer.needed_by <= transfer.last_use, "ends before it begins")
        _require(transfer.after >= -self._count, "starts more than a pass ahead")
        _require(transfer.last_use - transfer.after <= self._count, "holds its place for more than a pass")
        if not self._trace.cyclic:
            _require(transfer.after >= -1 and transfer.last_use < self._count, "there is no other pass")

    def _starting(self, step: int) -> Iterator[tuple[int, int]]:
        """Yields the transfers that may start right before step `step` runs, with the pass that reads them."""
        for number, transfer in enumerate(self._plan.transfers):
            # What came before the first pass is as if there had been passes for ever.
            for start in range(-1, PASSES + 1) if self._trace.cyclic else range(1):
                if start * self._count + transfer.after + 1 == step:
                    yield number, start

    def _write(self, number: int, offset: int, name: str) -> None:
        _require(0 <= number < len(self._plan.bundles), "a bundle that is not there")
        bundle = self._plan.bundles[number]
        _require(bundle.size_bytes >= 0 and bundle.size_bytes % self._page == 0, "a slot is no whole pages")
        _require(offset >= 0 and offset % self._page == 0, "a slot begins within a page")
        first, end = offset // self._page, (offset + bundle.size_bytes) // self._page
        _require(offset + bundle.size_bytes <= self._plan.arena_bytes, "a slot ends outside the arena")
        self._pages_of[name] = range(first, end)
        for page in range(first, end):
            _require(page not in self._held, f"{name} overwrites {self._held.get(page)}")
            self._held[page] = name
            self._pages[page] = _POISON
        filled: set[int] = set()
        for extent in bundle.extents:
            _require(extent.offset_bytes >= 0 and extent.size_bytes > 0, "a read of nothing")
            _require(extent.offset_bytes % self._machine.alignment_bytes == 0, "a read is not aligned")
            _require(extent.size_bytes % self._machine.alignment_bytes == 0, "a read is not aligned")
            _require(extent.slot_offset_bytes >= 0 and extent.slot_offset_bytes % self._page == 0, "off a page")
            _require(extent.slot_offset_bytes + extent.size_bytes <= bundle.size_bytes, "a read leaves its slot")
            for at in range(0, extent.size_bytes, self._page):
                page = (offset + extent.slot_offset_bytes + at) // self._page
                _require(page not in filled, "two reads of a bundle meet")
                filled.add(page)
                right = min(self._page, extent.size_bytes - at)
                self._pages[page] = (extent.file, extent.offset_bytes + at, right)

    def _read(self, step: int) -> None:
        """What the step's weights lie in has been waited for, and holds their bytes."""
        number = step % self._count
        plan_step = self._plan.steps[number]
        _require(len(set(plan_step.reads)) == len(plan_step.reads), "a step reads a bundle twice")
        homes = {index: n for n, bundle in enumerate(self._plan.bundles) for index in bundle.tensors}
        wanted: set[int] = set()
        for trace_step in range(plan_step.first, plan_step.end):
            asks = self._trace.steps[trace_step]
            # Rows of what may gather are read wherever it is.
            gathered = [each.tensor for each in asks.gathers]
            whole = [index for index in gathered if Treatment.GATHER not in self._trace.tensors[index].may]
            for index in (*asks.reads, *whole):
                if self._trace.tensors[index].home is not None:
                    _require(index in homes, "a weight is in no bundle")
                    wanted.add(homes[index])
            for index, tensor in self._trace.movable():
                used = index in asks.reads
                if index in homes and tensor.live is not None and (used or tensor.live.first == trace_step):
                    wanted.add(homes[index])
        _require(wanted == set(plan_step.reads), "a step reads other bundles than its weights are in")
        for bundle in plan_step.reads:
            offsets = [place.offset_bytes for place in self._plan.residents if place.bundle == bundle]
            for other, offset, first, last, _ in self._present.values():
                if first <= step <= last and other == bundle:
                    offsets.append(offset)
            _require(len(offsets) == 1, f"step {number} finds bundle {bundle} in {len(offsets)} places")
            self._check_bytes(bundle, offsets[0], step // self._count)

    def _check_bytes(self, number: int, offset: int, start: int) -> None:
        bundle = self._plan.bundles[number]
        _require(len(bundle.tensors) == len(bundle.offsets_bytes), "a weight without an offset")
        for index, within in zip(bundle.tensors, bundle.offsets_bytes, strict=True):
            _require(0 <= index < len(self._trace.tensors), "a weight that is not there")
            tensor = self._trace.tensors[index]
            at, end = within, within + tensor.size_bytes
            file, source = f"made in pass {start} for {number}", at
            if tensor.home is not None:
                file, source = tensor.home.file, tensor.home.offset_bytes
            _require(at >= 0 and (end <= bundle.size_bytes), "a weight is outside its slot")
            while at < end:
                page, inside = divmod(offset + at, self._page)
                length = min(self._page - inside, end - at)
                found = self._pages[page]
                is_right = found is not None and (found[0], found[1] + inside) == (file, source)
                _require(is_right and found is not None and inside + length <= found[2], f"{tensor.name} is not there")
                at, source = at + length, source + length

    def _leave(self, step: int) -> None:
        start, number = divmod(step, self._count)
        for offload in self._plan.offloads:
            _require(0 <= offload.after <= offload.until < self._count, "written in no order")
            if step >= 0 and offload.after == number:
                _require(Treatment.OFFLOAD in self._tensor(offload.bundle).may, "cannot be written below")
                self._check_bytes(offload.bundle, offload.offset_bytes, start)
                _require((offload.bundle, start) not in self._below, "written twice")
            if step >= 0 and offload.until == number:
                self._check_bytes(offload.bundle, offload.offset_bytes, start)
                self._below.add((offload.bundle, start))
        for name, (_, _, _, _, until) in list(self._present.items()):
            if until == step:
                for page in self._pages_of.pop(name):
                    del self._held[page]
                del self._present[name]
