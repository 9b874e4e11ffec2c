"""The contenders of a session: the model without mball, mball under each budget, and the bare reader."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

from bench.speed import gate
from bench.speed.contender import Contender, ContenderError
from bench.speed.rounds import Say
from bench.speed.scale import Scale
from bench.speed.ways import Loading, Mode, Way
from bench.speed.workload import Kind

# Everything fits then, activations too.
RESIDENT_PERCENT = 110


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reference:
    """What compiled contenders are held against.

    Attributes:
        uncompiled: by the model without mball.
        in_steps: by mball with everything resident, cut like what streams.
        allowed: distance from `uncompiled`, see `gate.allowance`.
    """

    uncompiled: gate.Logits
    in_steps: gate.Logits
    allowed: float


class Field:
    """The contenders of one mode, loaded and through the gate; a context manager.

    Attributes:
        plain: without mball, compiled by torch.compile in mode INDUCTOR.
        mball: for each percentage of the scale, and for `RESIDENT_PERCENT`.
        disk: reads as the yardstick does.
        num_threads: that compute, the same in each.

    Entering raises ContenderError when one fails.
    """

    def __init__(self, scale: Scale, mode: Mode, say: Say) -> None:
        self.scale = scale
        self.mode = mode
        self._say = say
        self._stack = ExitStack()
        self.mball: dict[int, Contender] = {}
        self.plain: Contender
        self.disk: Contender
        self.num_threads = 0
        self._references: dict[Kind, _Reference] = {}

    def __enter__(self) -> Field:
        try:
            self._fill()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _fill(self) -> None:
        # All at once: they import for seconds.
        self.plain = self._start("plain")
        for percent in (RESIDENT_PERCENT, *self.scale.percents):
            self.mball[percent] = self._start(f"mball {percent} %")
        self.disk = self._stack.enter_context(Contender("yardstick", module="bench.speed.disk_child"))
        contenders = (self.plain, *self.mball.values())
        found = {int(contender.tell("hello")["num_threads"]) for contender in contenders}
        if len(found) > 1:
            raise ContenderError(f"contenders compute with different numbers of threads: {sorted(found)}")
        (self.num_threads,) = found
        self.plain.load(self._loading(Way.PLAIN, self.mode), self.scale.prompt_tokens)
        for percent, contender in self.mball.items():
            contender.load(self._loading(Way.MBALL, self.mode, percent), self.scale.prompt_tokens)

    def check(self, kind: Kind) -> None:
        """Holds what the contenders compute against the model without mball, and warms them up by that.

        In mode EAGER all have the same bits. In mode INDUCTOR the bits depend on what is compiled in one piece: what
        streams has the same bits as what is resident in the same steps; that, and what is compiled whole, is close to
        the uncompiled model.

        Raises:
            GateError: a contender computes something else.
            ContenderError: a contender failed.
        """
        resident = self.mball[RESIDENT_PERCENT]
        if self.mode is Mode.INDUCTOR:
            if not self._references:
                self._references = self._compiled_references()
            held = self._references[kind]
            gate.close(self.plain, kind, held.uncompiled, "the uncompiled model", gate.LOOSE)
            gate.close(resident, kind, held.uncompiled, "the uncompiled model", held.allowed)
            reference = held.in_steps
        else:
            reference = gate.logits(self.plain, kind)
            gate.same_bits(resident, kind, reference, "the model without mball")
        for percent in self.scale.percents:
            gate.same_bits(self.mball[percent], kind, reference, "where all is resident")
        self._say(f"{self.mode.value} {kind.value}: all compute the right logits")

    def _compiled_references(self) -> dict[Kind, _Reference]:
        kinds = list(self.scale.rounds)
        with Contender("plain eager") as eager:
            eager.load(self._loading(Way.PLAIN, Mode.EAGER), self.scale.prompt_tokens)
            uncompiled = {kind: gate.logits(eager, kind) for kind in kinds}
        found = {}
        # In the steps of those that stream, which the contender that is timed has no need of.
        with Contender("mball, all resident, in steps") as stepwise:
            loading = self._loading(Way.MBALL, self.mode, RESIDENT_PERCENT)
            stepwise.load(replace(loading, step_bytes=self.scale.step_bytes), self.scale.prompt_tokens)
            for kind in kinds:
                allowed = gate.allowance(gate.logits(self.plain, kind), uncompiled[kind])
                in_steps = gate.close(stepwise, kind, uncompiled[kind], "the uncompiled model", allowed)
                found[kind] = _Reference(uncompiled=uncompiled[kind], in_steps=in_steps, allowed=allowed)
        return found

    def _loading(self, way: Way, mode: Mode, percent: int = 0) -> Loading:
        budget_bytes = self.scale.budget_bytes(percent)
        streams = way is Way.MBALL and mode is Mode.INDUCTOR and percent in self.scale.percents
        return Loading(
            way=way, mode=mode, checkpoint=self.scale.checkpoint, budget_bytes=budget_bytes,
            step_bytes=self.scale.step_bytes if streams else 0,
        )  # fmt: skip

    def _start(self, name: str) -> Contender:
        return self._stack.enter_context(Contender(name))
