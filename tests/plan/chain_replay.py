"""Two links followed byte by byte: slow, and without any of the simulation's or `validate`'s reasoning.

When things happen is worked out backwards: each step, copy and read asks for the end of what it waits for. Then all
that begins or ends is gone through in the order of time, over pages that remember what was written into them: which
part of which bundle, as its home was when the read began. Links have no window here.
"""

from __future__ import annotations

from functools import cache

from mball.plan.simulate import step_times
from mball.schema import Link, Machine, Plan, Trace
from tests.plan.replay import BrokenPlanError

_ENDS, _BEGINS = 0, 1

# Of each page: bundle, which page of it, and how often its home had been written; None while it is being filled.
Page = tuple[int, int, int] | None


class ChainReplay:
    """The passes of a plan with a host part.

    Args:
        trace, plan, machine: with a link from disk.
        passes: how many are followed from a cold start.
    """

    def __init__(self, trace: Trace, plan: Plan, machine: Machine, passes: int) -> None:
        assert plan.host is not None
        assert machine.disk_link is not None
        assert not machine.link.window_bytes
        assert not machine.disk_link.window_bytes
        self._trace, self._plan, self._host, self._page = trace, plan, plan.host, machine.page_bytes
        # Before the first of passes that repeat, slots were filled by some that nobody followed.
        self._first_checked = int(trace.cyclic)
        steps, copies, reads = len(plan.steps), len(plan.transfers), len(plan.host.transfers)
        disk = machine.disk_link
        compute = step_times(trace, plan.steps)
        resident = {weight for place in plan.residents for weight in plan.bundles[place.bundle].tensors}
        home = {weight: number for number, bundle in enumerate(plan.bundles) for weight in bundle.tensors}
        for number, plan_step in enumerate(plan.steps):
            for at in range(plan_step.first, plan_step.end):
                rows: dict[int, int] = {}
                for gather in trace.gathered()[at]:
                    beside = plan.bundles[home[gather.tensor]].tensors
                    if gather.tensor not in resident and not set(beside) & set(trace.needs()[at]):
                        rows[home[gather.tensor]] = rows.get(home[gather.tensor], 0) + gather.size_bytes
                compute[number] += sum(
                    disk.latency_s + size_bytes / disk.bandwidth_bytes_per_s for size_bytes in rows.values()
                )

        def seconds(bundle: int, link: Link) -> float:
            return sum(extent.size_bytes for extent in plan.bundles[bundle].extents) / link.bandwidth_bytes_per_s

        @cache
        def step(number: int) -> tuple[float, float]:
            if number < 0:
                return 0.0, 0.0
            turn, within = divmod(number, steps)
            begin = step(number - 1)[1]
            for at, transfer in enumerate(plan.transfers):
                if transfer.needed_by == within:
                    begin = max(begin, copy(turn * copies + at)[1])
            return begin, begin + compute[within]

        @cache
        def copy(number: int) -> tuple[float, float]:
            if number < 0:
                return 0.0, 0.0
            turn, within = divmod(number, copies)
            transfer = plan.transfers[within]
            ready = step(turn * steps + transfer.after)[1]
            for at, each in enumerate(self._host.transfers):
                for back in (0, 1):
                    if (
                        each.bundle == transfer.bundle
                        and each.needed_by <= within + back * copies <= each.last_use
                        and turn >= back
                    ):
                        ready = max(ready, read((turn - back) * reads + at)[1])
            begin = max(ready + machine.link.latency_s, copy(number - 1)[1])
            return begin, begin + seconds(transfer.bundle, machine.link)

        @cache
        def read(number: int) -> tuple[float, float]:
            if number < 0:
                return 0.0, 0.0
            turn, within = divmod(number, reads)
            each = self._host.transfers[within]
            ready = copy(turn * copies + each.after)[1]
            if each.after_step is not None:
                ready = max(ready, step(turn * steps + each.after_step)[1])
            begin = max(ready + disk.latency_s, read(number - 1)[1])
            return begin, begin + seconds(each.bundle, disk)

        self.steps = [step(number) for number in range(passes * steps)]
        self.copies = [copy(number) for number in range(passes * copies)]
        self.reads = [read(number) for number in range(passes * reads)]
        self.pass_ends_s = [self.steps[(number + 1) * steps - 1][1] for number in range(passes)]
        self._served = {
            number: (turn, read)
            for read, each in enumerate(self._host.transfers)
            for turn in range(passes)
            for at in range(each.needed_by, each.last_use + 1)
            if (number := turn * copies + at) < passes * copies
            and plan.transfers[number % copies].bundle == each.bundle
        }

    def follow_bytes(self) -> None:
        """Raises BrokenPlanError when a step or a copy finds other bytes than it should."""
        plan, host = self._plan, self._host
        homes = {index: number for number, bundle in enumerate(plan.bundles) for index in bundle.tensors}
        versions = [0] * len(plan.bundles)
        device: dict[int, Page] = {}
        below: dict[int, Page] = {}
        for place in plan.residents:
            device |= self._filled(place.bundle, place.offset_bytes, 0)
        for place in host.residents:
            below |= self._filled(place.bundle, place.offset_bytes, 0)
        under_way: dict[tuple[str, int], int] = {}
        for time_s, kind, what, number in sorted(self._events()):
            count = {"step": len(plan.steps), "copy": len(plan.transfers), "read": len(host.transfers)}[what]
            turn, within = divmod(number, count)
            where = f"{what} {within} of pass {turn} at {time_s} s"
            if what == "read":
                each = host.transfers[within]
                if kind == _BEGINS:
                    under_way[what, number] = versions[each.bundle]
                    below |= dict.fromkeys(self._filled(each.bundle, each.offset_bytes, 0))
                else:
                    below |= self._filled(each.bundle, each.offset_bytes, under_way.pop((what, number)))
            elif what == "copy":
                transfer = plan.transfers[within]
                source = self._source(number)
                if source is not None and turn >= self._first_checked:
                    wanted = self._filled(transfer.bundle, source, 0)
                    _require({page[:2] for at in wanted if (page := below.get(at))} == {
                        page[:2] for page in wanted.values() if page
                    }, f"{where} does not find its bundle in host memory")  # fmt: skip
                found = [page[2] for at in self._filled(transfer.bundle, source or 0, 0) if (page := below.get(at))]
                version = min(found, default=versions[transfer.bundle]) if source is not None else 0
                filled = self._filled(transfer.bundle, transfer.offset_bytes, version)
                if kind == _BEGINS:
                    under_way[what, number] = version
                    device |= dict.fromkeys(filled)
                else:
                    _require(
                        under_way.pop((what, number)) == version or turn < self._first_checked,
                        f"{where} ends with other bytes than it began with",
                    )
                    device |= filled
            else:
                plan_step = plan.steps[within]
                for bundle in plan_step.reads if turn >= self._first_checked else ():
                    places = [place.offset_bytes for place in plan.residents if place.bundle == bundle]
                    places += [each.offset_bytes for each in plan.transfers if each.bundle == bundle]
                    wanted = [self._filled(bundle, place, versions[bundle]) for place in places]
                    _require(
                        any(all(device.get(at) == page for at, page in each.items()) for each in wanted),
                        f"{where} does not find bundle {bundle} as its home is",
                    )
                if kind == _ENDS:
                    for trace_step in self._trace.steps[plan_step.first : plan_step.end]:
                        for index in trace_step.writes:
                            versions[homes[index]] += 1

    def _events(self) -> list[tuple[float, int, str, int]]:
        found = []
        end_s = self.pass_ends_s[-1]
        for what, spans in (("step", self.steps), ("copy", self.copies), ("read", self.reads)):
            for number, (begin, end) in enumerate(spans):
                # What takes no time ends where it begins, which comes last.
                found.append((begin, _BEGINS, what, number))
                found.append((max(end, begin), _ENDS if end > begin else 2, what, number))
        return [event for event in found if event[0] <= end_s]

    def _source(self, copy: int) -> int | None:
        """Returns where in the host arena a copy finds its bundle; None for one that has no bytes."""
        bundle = self._plan.transfers[copy % len(self._plan.transfers)].bundle
        for place in self._host.residents:
            if place.bundle == bundle:
                return place.offset_bytes
        if copy in self._served:
            return self._host.transfers[self._served[copy][1]].offset_bytes
        _require(not self._plan.bundles[bundle].extents or copy < len(self._plan.transfers), "nothing brings a bundle")
        return None

    def _filled(self, bundle: int, offset: int, version: int) -> dict[int, Page]:
        size = self._plan.bundles[bundle].size_bytes
        _require(offset % self._page == 0, "off a page")
        return {offset // self._page + at: (bundle, at, version) for at in range(size // self._page)}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BrokenPlanError(message)
