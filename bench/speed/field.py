"""The contenders of a session: the model without mball, mball under each budget, and the bare reader."""

from __future__ import annotations

from contextlib import ExitStack

from bench.speed import gate
from bench.speed.contender import Contender, ContenderError
from bench.speed.rounds import Say
from bench.speed.scale import Scale
from bench.speed.ways import Loading, Mode, Way

# Everything fits then, activations too.
RESIDENT_PERCENT = 110


class Field:
    """The contenders of one mode, loaded and through the gate; a context manager.

    Attributes:
        plain: without mball, compiled by torch.compile in mode INDUCTOR.
        mball: for each percentage of the scale, and for `RESIDENT_PERCENT`.
        disk: reads as the yardstick does.
        num_threads: that compute, the same in each.

    Entering raises GateError when a contender computes something else, and ContenderError when one fails.
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
        reference = gate.logits(self.plain)
        if self.mode is Mode.INDUCTOR:
            # What is compiled is held against what is not; the uncompiled one has done its work then.
            with Contender("plain eager") as eager:
                eager.load(self._loading(Way.PLAIN, Mode.EAGER), self.scale.prompt_tokens)
                reference = gate.logits(eager)
            gate.close(self.plain, reference, "the uncompiled model")
        for percent, contender in self.mball.items():
            contender.load(self._loading(Way.MBALL, self.mode, percent), self.scale.prompt_tokens)
            if self.mode is Mode.INDUCTOR and percent == RESIDENT_PERCENT:
                reference = gate.close(contender, reference, "the uncompiled model")
            else:
                gate.same_bits(contender, reference, "the reference")
            self._say(f"{self.mode.value}: {contender.name} computes the right logits")

    def _loading(self, way: Way, mode: Mode, percent: int = 0) -> Loading:
        budget_bytes = self.scale.budget_bytes(percent)
        return Loading(way=way, mode=mode, checkpoint=self.scale.checkpoint, budget_bytes=budget_bytes)

    def _start(self, name: str) -> Contender:
        return self._stack.enter_context(Contender(name))
