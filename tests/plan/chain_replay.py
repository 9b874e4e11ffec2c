"""Two links followed byte by byte: slow, and without any of the simulation's or `validate`'s reasoning.

When things happen is worked out backwards: each step, copy, read and write asks for the end of what it waits for.
Where copies and writes share a link, the order in which they are asked for is guessed, and worked out again until it is
the order that follows from it. Then all that begins or ends is gone through in the order of time, over pages that
remember what was written into them: which part of which bundle, as its home was when the read began, or in which pass
it was born. Links have no window here. Steps may take no time: of what happens at one time, what waits comes last.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from mball.plan.simulate import step_times
from mball.schema import Link, Machine, Plan, Trace
from tests.plan.replay import BrokenPlanError

_ENDS, _BEGINS = 0, 1

# Of each page: bundle, which page of it, and how often its home had been written or in which pass it was born; None
# while it is being filled.
Page = tuple[int, int, int] | None


class Moment(NamedTuple):
    """A time, and how many moments at most led to it one after another."""

    time_s: float
    rank: int

    def later(self, seconds: float) -> Moment:
        """Returns the moment that waits for this one and so much longer."""
        return Moment(self.time_s + seconds, self.rank + 1)


_START = Moment(0.0, 0)


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
        steps, copies, disk = len(plan.steps), len(plan.transfers), machine.disk_link
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

        for made in plan.made:
            if made.is_anew:
                compute[made.step] += trace.tensors[plan.bundles[made.bundle].tensors[0]].recompute_s or 0.0
        self._counts = {
            "step": steps,
            "copy": copies,
            "read": len(plan.host.transfers),
            "write": len(plan.offloads),
        }
        self._moments: dict[str, list[tuple[Moment, Moment]]] = {}
        # By the step that they are asked for after: some order in which nothing waits for itself.
        asked = [
            (turn * steps + each.after, what, turn * len(all_of) + number)
            for what, all_of in (("copy", plan.transfers), ("write", plan.offloads))
            for turn in range(passes)
            for number, each in enumerate(all_of)
        ]
        order = [(what, number) for _, what, number in sorted(asked, key=lambda each: (each[0], each[1] == "copy"))]
        for _ in range(len(order) + 1):
            requests = self._follow_time(compute, machine, order, passes)
            guessed, order = order, sorted(order, key=lambda each: (requests[each], each[0] == "copy"))
            if guessed == order or not plan.offloads:
                break
        else:
            raise BrokenPlanError("no order of copies and writes follows from itself")
        self.spans = {
            what: [(begin.time_s, end.time_s) for begin, end in moments] for what, moments in self._moments.items()
        }
        self._served = {
            number: (turn, read)
            for read, each in enumerate(self._host.transfers)
            for turn in range(passes)
            for at in range(each.needed_by, each.last_use + 1)
            if (number := turn * copies + at) < passes * copies
            and plan.transfers[number % copies].bundle == each.bundle
        }

    def _follow_time(
        self, compute: list[float], machine: Machine, order: list[tuple[str, int]], passes: int
    ) -> dict[tuple[str, int], float]:
        """Works out when all happens if copies and writes are served in this order; returns when each is asked for."""
        plan, host = self._plan, self._host
        steps, copies, reads, writes = (self._counts[what] for what in ("step", "copy", "read", "write"))
        disk, out = machine.disk_link, machine.write_link or machine.link
        assert disk is not None
        lines = [order] if machine.write_link is None else [[e for e in order if e[0] == w] for w in ("copy", "write")]
        before = {each: line[at - 1] for line in lines for at, each in enumerate(line) if at}

        def seconds(bundle: int, link: Link) -> float:
            return plan.bundles[bundle].moved_bytes / link.bandwidth_bytes_per_s

        @cache
        def begun(number: int) -> Moment:
            turn, within = divmod(number, steps)
            begin = left(number - 1)
            for at, transfer in enumerate(plan.transfers):
                if transfer.needed_by == within:
                    begin = max(begin, served("copy", turn * copies + at)[1])
            return begin.later(0.0)

        @cache
        def computed(number: int) -> Moment:
            return _START if number < 0 else begun(number).later(compute[number % steps])

        @cache
        def left(number: int) -> Moment:
            turn, within = divmod(number, steps)
            ends = [computed(number)]
            for at, offload in enumerate(plan.offloads):
                if offload.until == within and number >= 0:
                    ends.append(served("write", turn * writes + at)[1])
            return max(ends)

        @cache
        def asked(what: str, number: int) -> Moment:
            if number < 0:
                return _START
            if what == "write":
                turn, within = divmod(number, writes)
                return computed(turn * steps + plan.offloads[within].after)
            turn, within = divmod(number, copies)
            transfer = plan.transfers[within]
            ready = max(left(turn * steps + transfer.after), asked("copy", number - 1))
            for at, each in enumerate(host.transfers):
                for back in (0, 1):
                    if (
                        each.bundle == transfer.bundle
                        and each.needed_by <= within + back * copies <= each.last_use
                        and turn >= back
                    ):
                        ready = max(ready, read((turn - back) * reads + at)[1])
            return ready

        @cache
        def served(what: str, number: int) -> tuple[Moment, Moment]:
            if number < 0:
                return _START, _START
            link = machine.link if what == "copy" else out
            each = plan.transfers[number % copies] if what == "copy" else plan.offloads[number % writes]
            last = before.get((what, number))
            begin = max(asked(what, number).later(link.latency_s), served(*last)[1].later(0.0) if last else _START)
            return begin, begin.later(seconds(each.bundle, link))

        @cache
        def read(number: int) -> tuple[Moment, Moment]:
            if number < 0:
                return _START, _START
            turn, within = divmod(number, reads)
            each = host.transfers[within]
            ready = served("copy", turn * copies + each.after)[1]
            begin = max(ready.later(disk.latency_s), read(number - 1)[1].later(0.0))
            return begin, begin.later(seconds(each.bundle, disk))

        self._moments = {
            "step": [(begun(number), computed(number)) for number in range(passes * steps)],
            "copy": [served("copy", number) for number in range(passes * copies)],
            "read": [read(number) for number in range(passes * reads)],
            "write": [served("write", number) for number in range(passes * writes)],
        }
        self.pass_ends_s = [left((number + 1) * steps - 1).time_s for number in range(passes)]
        return {each: asked(*each).time_s for each in order}

    def follow_bytes(self) -> None:
        """Raises BrokenPlanError when a step, copy or write finds other bytes than it should, or a write no room."""
        plan, host = self._plan, self._host
        homes = {index: number for number, bundle in enumerate(plan.bundles) for index in bundle.tensors}
        versions = [0] * len(plan.bundles)
        born = {bundle for bundle in range(len(plan.bundles)) if self._is_born(bundle)}
        device: dict[int, Page] = {}
        below: dict[int, Page] = {}
        for place in plan.residents:
            device |= self._filled(place.bundle, place.offset_bytes, 0)
        for place in host.residents:
            below |= self._filled(place.bundle, place.offset_bytes, 0)
        under_way: dict[tuple[str, int], int] = {}
        # What is offloaded, by bundle: the pass that it was written in. And of the bytes set aside those that are free:
        # they are taken from the begin of a write to the end of the last copy back.
        offloaded: dict[int, int] = {}
        free = host.offloaded_bytes
        last_back = {each.bundle: number for number, each in enumerate(plan.transfers) if each.bundle in born}
        for moment, kind, what, number in sorted(self._events()):
            turn, within = divmod(number, self._counts[what])
            where = f"{what} {within} of pass {turn} at {moment.time_s} s"
            if what == "read":
                each = host.transfers[within]
                if kind == _BEGINS:
                    under_way[what, number] = versions[each.bundle]
                    below |= dict.fromkeys(self._filled(each.bundle, each.offset_bytes, 0))
                else:
                    below |= self._filled(each.bundle, each.offset_bytes, under_way.pop((what, number)))
            elif what == "write":
                offload = plan.offloads[within]
                wanted = self._filled(offload.bundle, offload.offset_bytes, turn)
                _require(
                    all(device.get(at) == page for at, page in wanted.items()), f"{where} does not find its tensor"
                )
                if kind == _BEGINS:
                    _require(offload.bundle in last_back, f"{where} is for nobody")
                    free -= plan.bundles[offload.bundle].size_bytes
                    _require(free >= 0, f"{where} needs {-free} B more than are set aside")
                else:
                    offloaded[offload.bundle] = turn
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
                if transfer.bundle in born:
                    version = turn
                    _require(offloaded.get(transfer.bundle) == turn, f"{where} brings back what was not written")
                    if kind != _BEGINS and last_back[transfer.bundle] == within:
                        free += plan.bundles[transfer.bundle].size_bytes
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
                for made in plan.made:
                    if kind == _BEGINS and made.step == within:
                        device |= self._filled(made.bundle, made.offset_bytes, turn)
                for bundle in plan_step.reads if turn >= self._first_checked else ():
                    places = [place.offset_bytes for place in plan.residents if place.bundle == bundle]
                    places += [each.offset_bytes for each in plan.transfers if each.bundle == bundle]
                    places += [made.offset_bytes for made in plan.made if made.bundle == bundle]
                    version = turn if bundle in born else versions[bundle]
                    _require(
                        any(
                            all(device.get(at) == page for at, page in self._filled(bundle, place, version).items())
                            for place in places
                        ),
                        f"{where} does not find bundle {bundle} as its home is",
                    )
                if kind == _ENDS:
                    for trace_step in self._trace.steps[plan_step.first : plan_step.end]:
                        for index in trace_step.writes:
                            versions[homes[index]] += 1

    def _is_born(self, bundle: int) -> bool:
        return any(self._trace.tensors[index].home is None for index in self._plan.bundles[bundle].tensors)

    def _events(self) -> list[tuple[Moment, int, str, int]]:
        found = []
        end_s = self.pass_ends_s[-1]
        for what, moments in self._moments.items():
            for number, (begin, end) in enumerate(moments):
                found += [(begin, _BEGINS, what, number), (end, _ENDS, what, number)]
        return [event for event in found if event[0].time_s <= end_s]

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
