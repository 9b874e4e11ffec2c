"""When passes with steps on the host lane end, found again: slow, and in another way than `mball.plan.lanes` does.

Nothing is followed in the order of time. All passes are written down as equations, each time being the latest of those
it waits for; links serve requests in the order of the times at which they may begin. The equations are evaluated over
and over, from times of zero, until nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass

from mball.plan.at_home import host_times
from mball.plan.simulate import busy_times, gathered_bytes
from mball.schema import Lane, Link, Machine, Plan, Trace

MOST_ROUNDS = 2000
_ALIKE = 1e-12


@dataclass(slots=True)
class _Pass:
    """Times of one pass."""

    begin: list[float]
    end: list[float]
    left: list[float]
    asked: list[float]  # of each transfer
    landed: list[float]
    wanted: list[float]  # of each write
    written: list[float]


class LaneReplay:
    """The passes of a plan. Links must not be shared by requests (`window_bytes` is 0)."""

    def __init__(self, trace: Trace, plan: Plan, machine: Machine, num_passes: int) -> None:
        self.trace, self.plan, self.machine, self.num_passes = trace, plan, machine, num_passes

    def run(self) -> list[float]:
        """Returns the ends of passes."""
        trace, plan, count = self.trace, self.plan, len(self.plan.steps)
        assert self.machine.link.window_bytes == 0
        residents = {placement.bundle for placement in plan.residents}
        gathered = gathered_bytes(trace, plan.bundles, residents)
        busy = busy_times(trace, self.machine, plan, gathered)
        host = host_times(trace, self.machine)
        self._is_host = [trace.steps[step.first].lane is Lane.HOST for step in plan.steps]
        self._seconds = [
            sum(host[step.first : step.end]) if is_host else time_s
            for step, is_host, time_s in zip(plan.steps, self._is_host, busy, strict=True)
        ]
        self._home = {index: number for number, bundle in enumerate(plan.bundles) for index in bundle.tensors}
        self._uses = [self._at_home(number, residents) for number in range(count)]
        changed: dict[int, set[int]] = {}
        for step in trace.steps:
            if step.lane is Lane.COMPUTE:
                for index in step.writes:
                    changed.setdefault(self._home[index], set()).add(index)
        self._write_bytes = [
            sum(trace.tensors[index].size_bytes for index in changed[each.bundle])
            if each.bundle in changed
            else plan.bundles[each.bundle].moved_bytes
            for each in plan.offloads
        ]
        self._passes = [
            _Pass(
                begin=[0.0] * count,
                end=[0.0] * count,
                left=[0.0] * count,
                asked=[0.0] * len(plan.transfers),
                landed=[0.0] * len(plan.transfers),
                wanted=[0.0] * len(plan.offloads),
                written=[0.0] * len(plan.offloads),
            )
            for _ in range(self.num_passes)
        ]
        before: list[float] = []
        for _ in range(MOST_ROUNDS):
            for number in range(self.num_passes):
                self._evaluate(number)
            self._serve()
            state = [at for each in self._passes for at in (*each.left, *each.end, *each.landed, *each.written)]
            if before and max((abs(a - b) for a, b in zip(before, state, strict=True)), default=0.0) <= _ALIKE:
                break
            before = state
        else:
            raise AssertionError("the equations have no solution")
        if not trace.cyclic and count:
            return [max([self._passes[0].left[-1], *self._passes[0].end])]
        return [each.left[-1] if count else 0.0 for each in self._passes]

    def _at_home(self, number: int, residents: set[int]) -> tuple[set[int], set[int]]:
        """Bundles that a step on the host lane reads or writes, and writes or bears; of one on the device its rows."""
        read, written = set[int](), set[int]()
        plan_step = self.plan.steps[number]
        for at in range(plan_step.first, plan_step.end):
            step = self.trace.steps[at]
            rows = {self._home[gather.tensor] for gather in step.gathers}
            if step.lane is Lane.COMPUTE:
                present = {self._home[index] for index in (*step.reads, *step.writes) if index in self._home}
                read |= rows - present - residents
                continue
            born = [index for index, tensor in enumerate(self.trace.tensors) if tensor.live and tensor.live.first == at]
            written |= {self._home[index] for index in (*step.writes, *born) if index in self._home}
            read |= rows | {self._home[index] for index in step.reads if index in self._home}
        return read | (written if self._is_host[number] else set()), written

    def _evaluate(self, number: int) -> None:
        now, count = self._passes[number], len(self.plan.steps)
        free = self._passes[number - 1].left[-1] if number and count else 0.0
        host_free = self._host_end(number * count)
        for step in range(count):
            if self._is_host[step]:
                writes = [self._last_write(bundle, number * count + step) for bundle in self._uses[step][0]]
                now.begin[step] = max([free, host_free, *writes])
                host_free = now.end[step] = now.begin[step] + self._seconds[step]
                end = free
            else:
                landed = [
                    at for at, each in zip(now.landed, self.plan.transfers, strict=True) if each.needed_by == step
                ]
                rows = [self._last_use(bundle, number * count + step, 1) for bundle in self._uses[step][0]]
                now.begin[step] = max([free, *landed, *rows])
                end = now.end[step] = now.begin[step] + self._seconds[step]
            for at, offload in enumerate(self.plan.offloads):
                if offload.after == step:
                    now.wanted[at] = max(end, self._last_use(offload.bundle, number * count + step, 0))
            free = end
            for at, offload in enumerate(self.plan.offloads):
                before, within = divmod(offload.until, count)
                if within == step and number >= before:
                    free = max(free, self._passes[number - before].written[at])
            if step == count - 1 and number:
                free = max(free, self._host_end(number * count))
            now.left[step] = free
        for at, transfer in enumerate(self.plan.transfers):
            now.asked[at] = self._left(number * count + transfer.after)
            if transfer.after_host is not None:
                passes, step = divmod(number * count + transfer.after_host, count)
                now.asked[at] = max(now.asked[at], self._passes[passes].end[step] if passes >= 0 else 0.0)

    def _left(self, step: int) -> float:
        passes, within = divmod(step, len(self.plan.steps))
        return self._passes[passes].left[within] if passes >= 0 else 0.0

    def _host_end(self, step: int) -> float:
        """When the host lane has ended all before this step, numbered on from pass to pass."""
        return max(
            (
                self._passes[passes].end[within]
                for passes, within in (divmod(each, len(self.plan.steps)) for each in range(step))
                if self._is_host[within]
            ),
            default=0.0,
        )

    def _last_use(self, bundle: int, step: int, which: int) -> float:
        """When the last step on the host lane before this one has ended that uses a bundle (0) or writes it (1)."""
        for each in range(step - 1, -1, -1):
            passes, within = divmod(each, len(self.plan.steps))
            if self._is_host[within] and bundle in self._uses[within][which]:
                return self._passes[passes].end[within]
        return 0.0

    def _last_write(self, bundle: int, step: int) -> float:
        """When the last write of a bundle that is asked for before this step is done."""
        for each in range(step - 1, -1, -1):
            passes, within = divmod(each, len(self.plan.steps))
            for at, offload in enumerate(self.plan.offloads):
                if (offload.bundle, offload.after) == (bundle, within):
                    return self._passes[passes].written[at]
        return 0.0

    def _serve(self) -> None:
        """Links serve who asks first; of those that ask at the same time, in the order of the plan, writes first."""
        reads, writes = [], []
        for number, each in enumerate(self._passes):
            for at, transfer in enumerate(self.plan.transfers):
                # What is asked for ahead is asked for after what its own pass asks for.
                order = (number + transfer.after // len(self.plan.steps), transfer.after % len(self.plan.steps), 1)
                reads.append((each.asked[at], *order, -(transfer.after // len(self.plan.steps)), at, number))
            for at, offload in enumerate(self.plan.offloads):
                writes.append((each.wanted[at], number, offload.after, 0, 0, at, number))
        out = self.machine.write_link
        if out is None:
            self._serve_link(sorted(reads + writes), self.machine.link)
        else:
            self._serve_link(sorted(reads), self.machine.link)
            self._serve_link(sorted(writes), out)

    def _serve_link(self, requests: list[tuple[float, int, int, int, int, int, int]], link: Link) -> None:
        free = 0.0
        for asked, _, _, is_read, _, at, number in requests:
            bundle = self.plan.transfers[at].bundle if is_read else 0
            size = self.plan.bundles[bundle].moved_bytes if is_read else self._write_bytes[at]
            free = max(free, asked + link.latency_s) + size / link.bandwidth_bytes_per_s
            (self._passes[number].landed if is_read else self._passes[number].written)[at] = free
