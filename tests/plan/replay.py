"""A plan followed byte by byte: slow, and without any of `validate`'s reasoning.

Every page of the arena remembers which bytes of which file were read into it, or which pass made it. A transfer
overwrites its pages as soon as it may start, and they can be read from the step on that waits for it; whatever has left
may be overwritten. A write reads its pages to the last step that it may take. Three
passes are followed: what two of them do to each other is seen in the second, and again in the third.

Every copy of a tensor remembers which step changed it last, and so does its home. A step on the host lane is taken to
end as late as it may: a transfer finds what the steps changed that it waits for, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator

from mball.schema import Lane, Machine, Offload, Plan, Tensor, Trace, Transfer, Treatment

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
        _require(len({trace.steps[number].lane for number in numbers}) == 1, "merged across lanes")
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
        # Of each tensor with a home the steps that change it, and of copies and homes the last of them that is in
        # there, numbered on from pass to pass.
        self._writers: dict[int, list[int]] = {}
        for number, step in enumerate(trace.steps):
            for index in (index for index in step.writes if trace.tensors[index].size_bytes):
                self._writers.setdefault(index, []).append(number)
        self._changed: dict[str, dict[int, int | None]] = {}
        self._home: dict[int, int | None] = {
            index: self._last_change(index, -len(trace.steps)) for index in self._writers
        }
        # Copies that were changed and have not been written back since.
        self._unwritten: set[str] = set()
        # The same as the host lane sees it, and what is being written, by offload and pass.
        self._host_home = dict(self._home)
        self._leaving: dict[tuple[int, int], tuple[str, dict[int, int | None]]] = {}
        # Those that take bytes there, on their way included.
        self._taken: set[tuple[int, int]] = set()

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
                tensor = self._tensor(transfer.bundle)
                if tensor.home is None:
                    is_below = start < 0 or (transfer.bundle, start) in self._below
                    if self._trace.is_born_below(tensor):
                        is_below = self._waits_for_birth(transfer, tensor)
                    _require(is_below, f"{name} brings what nobody wrote")
                    self._make(transfer.bundle, transfer.offset_bytes, start)
                first, last = start * self._count + transfer.needed_by, start * self._count + transfer.last_use
                until = self._until(transfer.bundle, first, last)
                self._present[name] = (transfer.bundle, transfer.offset_bytes, first, last, until)
                self._bring(transfer, name, start)
            if step >= 0:
                self._give_back(*divmod(step, self._count))
                self._bear(*divmod(step, self._count))
                self._read(step)
            if step >= (-self._count if self._trace.cyclic else 0):
                self._change(step)
            self._leave(step)
        for placement in self._plan.residents:
            for index in self._changed_on_device(placement.bundle, f"resident {placement.bundle}"):
                home, right = self._home[index], self._last_change(index, (PASSES - 1) * len(self._trace.steps))
                is_kept = right is None or (home is not None and home >= right)
                _require(is_kept, f"what step {right} wrote to a resident is not written back")

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
            _require(not self._trace.is_born_below(tensor), "made on the device, and born on the host lane")
            step = self._plan.steps[number]
            if made.is_anew:
                _require(Treatment.RECOMPUTE in tensor.may, f"{tensor.name} cannot be made anew")
                _require(step.first > tensor.live.first and made.bundle in step.reads, "made anew for nobody")
            else:
                _require(step.first <= tensor.live.first < step.end, f"{tensor.name} is not born here")
            name = f"bundle {made.bundle} made in step {number} of pass {start}"
            self._write(made.bundle, made.offset_bytes, name)
            self._make(made.bundle, made.offset_bytes, start)
            first, last = start * self._count + number, start * self._count + made.last_use
            until = self._until(made.bundle, first, last)
            self._present[name] = (made.bundle, made.offset_bytes, first, last, until)

    def _give_back(self, start: int, number: int) -> None:
        """The bytes below of what is back for good are free before the step begins."""
        for transfer in self._plan.transfers:
            others = [other.needed_by for other in self._plan.transfers if other.bundle == transfer.bundle]
            if transfer.needed_by == number == max(others):
                self._taken.discard((transfer.bundle, start))

    def _make(self, number: int, offset: int, start: int) -> None:
        bundle = self._plan.bundles[number]
        _require(not bundle.extents, "what is born in a pass is read from nowhere")
        for at in range(0, bundle.size_bytes, self._page):
            self._pages[(offset + at) // self._page] = (f"made in pass {start} for {number}", at, self._page)

    def _residents(self) -> None:
        for placement in self._plan.residents:
            name = f"resident {placement.bundle}"
            self._write(placement.bundle, placement.offset_bytes, name)
            self._changed[name] = {
                index: self._home[index]
                for index in self._plan.bundles[placement.bundle].tensors
                if index in self._home
            }

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
            if asks.lane is Lane.HOST:
                continue
            # Rows of what may gather are read wherever it is.
            gathered = [each.tensor for each in asks.gathers]
            whole = [index for index in gathered if Treatment.GATHER not in self._trace.tensors[index].may]
            for index in (*asks.reads, *whole, *asks.writes):
                if self._trace.tensors[index].home is not None:
                    _require(index in homes, "a weight is in no bundle")
                    wanted.add(homes[index])
            for index, tensor in self._trace.movable():
                used = index in asks.reads
                _require(index in homes or not self._crosses(index), f"{tensor.name} crosses lanes without a bundle")
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

    def _crosses(self, index: int) -> bool:
        """Whether one lane bears a tensor and the other one reads it."""
        live = self._trace.tensors[index].live
        lanes = {step.lane for step in self._trace.steps if index in step.reads}
        return live is not None and bool(lanes - {self._trace.steps[live.first].lane})

    def _last_change(self, index: int, before: int, *, only: Lane | None = None) -> int | None:
        """The last step before this one that changes a tensor, on one lane or any; None if no step has."""
        count = len(self._trace.steps)
        steps = [
            number + passes * count
            for number in self._writers.get(index, ())
            if only is None or self._trace.steps[number].lane is only
            for passes in (range(-4, PASSES + 2) if self._trace.cyclic else (0,))
        ]
        return max((step for step in steps if step < before), default=None)

    def _begin(self, step: int) -> int:
        """The trace step with which a step of the plan begins, both numbered on from pass to pass."""
        passes, number = divmod(step, self._count)
        return passes * len(self._trace.steps) + self._plan.steps[number].first

    def _until(self, bundle: int, first: int, last: int) -> int:
        """When the slot of a stay is free: after its last use, and after what is written from it."""
        until = last
        for offload in self._plan.offloads:
            for passes in range(-2, PASSES + 2):
                after = passes * self._count + offload.after
                if offload.bundle == bundle and first <= after <= last:
                    until = max(until, after - offload.after + offload.until)
        return until

    def _waits_for_birth(self, transfer: Transfer, tensor: Tensor) -> bool:
        assert tensor.live is not None
        birth = next(n for n, step in enumerate(self._plan.steps) if step.first <= tensor.live.first < step.end)
        return transfer.after_host is not None and birth <= transfer.after_host <= transfer.after

    def _bring(self, transfer: Transfer, name: str, start: int) -> None:
        """What a copy holds of tensors that steps change."""
        held: dict[int, int | None] = {}
        for index in self._plan.bundles[transfer.bundle].tensors:
            if index not in self._writers:
                continue
            if start < 0:  # nobody saw the passes before
                held[index] = self._last_change(index, self._begin(start * self._count + transfer.needed_by))
                continue
            waited = -2 * self._count + start * self._count
            if transfer.after_host is not None:
                _require(transfer.after_host <= transfer.after, "waits for what comes later")
                waited = start * self._count + transfer.after_host + 1
            host = self._last_change(index, self._begin(waited), only=Lane.HOST)
            held[index] = max((each for each in (host, self._home[index]) if each is not None), default=None)
        self._changed[name] = held

    def _change(self, step: int) -> None:
        """What a step changes, on the device or at home, and whether it finds what was changed before."""
        plan_step = self._plan.steps[step % self._count]
        base = step // self._count * len(self._trace.steps)
        homes = {index: n for n, bundle in enumerate(self._plan.bundles) for index in bundle.tensors}
        for number in range(plan_step.first, plan_step.end):
            asks = self._trace.steps[number]
            used = {*asks.reads, *(gather.tensor for gather in asks.gathers), *asks.writes}
            if asks.lane is Lane.HOST:
                self._use_home(step, number, used)
                self._host_home |= dict.fromkeys(asks.writes, base + number)
                continue
            for index in sorted(used & self._writers.keys()):
                _require(index in homes, "a weight is in no bundle")
                names = [f"resident {p.bundle}" for p in self._plan.residents if p.bundle == homes[index]]
                for name, (bundle, _, first, last, _) in self._present.items():
                    if bundle == homes[index] and first <= step <= last:
                        names.append(name)
                for name in names:
                    found, right = self._changed[name][index], self._last_change(index, base + number)
                    is_read = homes[index] in plan_step.reads
                    _require(
                        step < 0 or not is_read or found == right,
                        f"step {step} finds what step {found} wrote, not {right}",
                    )
                    if index in asks.writes:
                        self._changed[name][index] = base + number
                        self._unwritten.add(name)

    def _use_home(self, step: int, number: int, used: set[int]) -> None:
        """A step on the host lane finds what was written below before it, or is being written."""
        base = step // self._count * len(self._trace.steps)
        flying: dict[int, int | None] = {}
        for _, held in self._leaving.values():
            flying |= held
        homes = {index: n for n, bundle in enumerate(self._plan.bundles) for index in bundle.tensors}
        for index in sorted(used):
            tensor = self._trace.tensors[index]
            if index in self._writers:
                seen = (self._home[index], self._host_home[index], flying.get(index))
                found = max((each for each in seen if each is not None), default=None)
                right = self._last_change(index, base + number)
                _require(step < 0 or found == right, f"the host lane finds what step {found} wrote, not {right}")
            elif tensor.home is None and not self._trace.is_born_below(tensor):
                _require(index in homes, "born on the device, read on the host lane, and in no bundle")
                start = step // self._count
                written = [n for n, passes in self._leaving if passes == start]
                written = [n for n in written if self._plan.offloads[n].bundle == homes[index]]
                is_below = (homes[index], start) in self._below or bool(written)
                _require(step < 0 or is_below, f"{tensor.name} is not in host memory")

    def _place_of(self, offload: Offload, step: int) -> str:
        """Where a bundle is that is written after a step."""
        for place in self._plan.residents:
            if (place.bundle, place.offset_bytes) == (offload.bundle, offload.offset_bytes):
                return f"resident {offload.bundle}"
        for name, (bundle, offset, first, last, _) in self._present.items():
            if (bundle, offset) == (offload.bundle, offload.offset_bytes) and first <= step <= last:
                return name
        _require(step < 0, f"bundle {offload.bundle} is written from where it is not")
        return ""

    def _leave(self, step: int) -> None:
        start, number = divmod(step, self._count)
        for at, offload in enumerate(self._plan.offloads):
            tensor = self._tensor(offload.bundle)
            end = self._count if not self._trace.cyclic else offload.after + self._count
            _require(0 <= offload.after < self._count, "written in no order")
            _require(offload.after <= offload.until < max(end, self._count), "written in no order")
            if step >= (-self._count if self._trace.cyclic else 0) and offload.after == number:
                name = self._place_of(offload, step)
                if tensor.home is None:
                    if step >= 0:
                        _require(Treatment.OFFLOAD in tensor.may, "cannot be written below")
                        self._check_bytes(offload.bundle, offload.offset_bytes, start)
                        _require((offload.bundle, start) not in self._below, "written twice")
                        self._taken.add((offload.bundle, start))
                        # What nothing brings back is for the host lane, which may still have that of the pass before.
                        brought = {transfer.bundle for transfer in self._plan.transfers}
                        reserved = {each.bundle for each in self._plan.offloads} - brought
                        here = [bundle for bundle, _ in self._taken if bundle not in reserved]
                        here += [bundle for bundle in reserved if not self._plan.bundles[bundle].extents]
                        taken = sum(self._plan.bundles[bundle].size_bytes for bundle in here)
                        limit = self._plan.offload_budget_bytes
                        _require(limit is None or taken <= limit, "more is offloaded than may be")
                    self._leaving[at, start] = name, {}
                elif name:
                    held = self._changed_on_device(offload.bundle, name)
                    _require(bool(held), "nothing on the device changes what is written back")
                    self._leaving[at, start] = name, held
            of_pass = (step - offload.until) // self._count
            if (step - offload.until) % self._count == 0 and (at, of_pass) in self._leaving:
                name, held = self._leaving.pop((at, of_pass))
                if step >= 0 and of_pass >= 0:
                    self._check_bytes(offload.bundle, offload.offset_bytes, of_pass)
                if tensor.home is None:
                    if of_pass >= 0:
                        self._below.add((offload.bundle, of_pass))
                    continue
                _require(
                    held == self._changed_on_device(offload.bundle, name), f"{name} changes while it is written back"
                )
                self._unwritten.discard(name)
                # Small weights share a bundle whatever steps change them: some of it may be as it was.
                is_new = any(changed != self._home[index] for index, changed in held.items())
                _require(of_pass < 0 or is_new, "written back unchanged")
                self._home |= held
        # What has been changed must not be given up before it has been written.
        for name, (_, _, _, _, until) in list(self._present.items()):
            if until == step:
                for page in self._pages_of.pop(name):
                    del self._held[page]
                del self._present[name]
                _require(step < 0 or name not in self._unwritten, f"what a step wrote to {name} is lost")
                self._unwritten.discard(name)

    def _changed_on_device(self, bundle: int, name: str) -> dict[int, int | None]:
        """The tensors of a copy that steps on the device change, with the last step in there that did."""
        device = {index for step in self._trace.steps if step.lane is Lane.COMPUTE for index in step.writes}
        held = self._changed.get(name, {})
        return {index: held[index] for index in self._plan.bundles[bundle].tensors if index in device and index in held}
