"""The contenders of a session: the model without mball, mball under each budget, and the bare reader."""

from __future__ import annotations

from contextlib import ExitStack

from bench.speed import gate
from bench.speed.contender import Contender, ContenderError
from bench.speed.rounds import Say
from bench.speed.scale import Scale
from bench.speed.ways import Loading, Mode, Way
from bench.speed.workload import Kind

# Everything fits then, activations too.
RESIDENT_PERCENT = 110


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

        In mode EAGER all have the same bits. In mode INDUCTOR both compiled ones are close to the uncompiled model,
        and what streams has the same bits as what is resident.

        Raises:
            GateError: a contender computes something else.
            ContenderError: a contender failed.
        """
        if self.mode is Mode.INDUCTOR:
            with Contender("plain eager") as eager:
                eager.load(self._loading(Way.PLAIN, Mode.EAGER), self.scale.prompt_tokens)
                uncompiled = gate.logits(eager, kind)
            gate.close(self.plain, kind, uncompiled, "the uncompiled model")
            reference = gate.close(self.mball[RESIDENT_PERCENT], kind, uncompiled, "the uncompiled model")
        else:
            reference = gate.logits(self.plain, kind)
            gate.same_bits(self.mball[RESIDENT_PERCENT], kind, reference, "the model without mball")
        for percent in self.scale.percents:
            gate.same_bits(self.mball[percent], kind, reference, "where all is resident")
        self._say(f"{self.mode.value} {kind.value}: all compute the right logits")

    def _loading(self, way: Way, mode: Mode, percent: int = 0) -> Loading:
        budget_bytes = self.scale.budget_bytes(percent)
        return Loading(way=way, mode=mode, checkpoint=self.scale.checkpoint, budget_bytes=budget_bytes)

    def _start(self, name: str) -> Contender:
        return self._stack.enter_context(Contender(name))
