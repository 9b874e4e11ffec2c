"""The gate of models that mball sees the graphs of and nothing else.

[Note: passes of graphs] Nobody says where a call of the model begins or ends. So a pass begins with a graph, and ends
when that graph comes again, or when another comes for the third time: a loop, such as that of `generate`, has begun.
Between graphs code runs that nobody watches: locks are held during graphs only, and each of them begins by looking for
written homes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from mball import torch_private
from mball.run.doors import Gate, Tenant, check_autograd, check_tenants, tenant_of
from mball.run.engine import Engine
from mball.run.homes import Home, HomeFile

_R = TypeVar("_R")


class GraphGate(Gate):
    """Opens a pass at the first graph of it, and keeps it open from graph to graph.

    Args:
        engine: runs the passes.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, (), ())
        self._ran: Counter[Hashable] = Counter()  # what ran in the pass that is open; empty: none is
        self._first: Hashable = None
        self._ended_s = 0.0

    def adopt(
        self, homes: Sequence[Home], file: HomeFile | None, parameters: Sequence[tuple[Any, int]]
    ) -> list[Tenant]:
        """Takes on more weights (their homes and the file they are in) and parameters, which are at home already.

        Args:
            homes: come after those that are there.
            file: holds them; None without any.
            parameters: each with the weight it is.
        """
        with self.engine.lock:
            if file is not None:
                self.engine.adopt(homes, file)
            tenants = [tenant_of(self.engine, parameter, weight) for parameter, weight in parameters]
            self._tenants += tenants
            return tenants

    def run_part(self, part: Hashable, tenants: Sequence[Tenant], call: Callable[..., _R], args: Sequence[Any]) -> _R:
        """Returns `call(*args)`, as the next part of the pass that is open, or as the first of a new one.

        Args:
            part: what runs: equal for the same graph with the same weights.
            tenants: what it reads.
            call: runs it.
            args: of the graph.

        Raises:
            AutogradError: autograd would record through streamed weights.
            WrapError: a weight was exchanged behind mball's back.
        """
        engine = self.engine
        with engine.lock:
            if engine.passing.locked():
                return call(*args)
            with engine.passing:
                return self._run_part(part, tenants, call, args)

    def _run_part(self, part: Hashable, tenants: Sequence[Tenant], call: Callable[..., _R], args: Sequence[Any]) -> _R:
        try:
            self._advance(part)
            check_tenants(tenants)
            check_autograd(tenants, args, {})
            self._follow_requires_grad()
            self.mode.paused = False
            with torch_private.no_autocast_cache(), self.mode:
                result = call(*args)
        except BaseException:
            self._ran.clear()
            self.engine.recover()
            raise
        self._ended_s = time.perf_counter()
        return result

    def settle(self) -> None:
        """Ends the pass that is open, if one is: the next graph begins another."""
        with self.engine.lock:
            if self._ran and not self.engine.passing.locked():
                self._ran.clear()
                self.engine.end_pass(self._ended_s)

    def _advance(self, part: Hashable) -> None:
        if self._ran and (part == self._first or self._ran[part] > 1):
            self._ran.clear()
            self.engine.end_pass(self._ended_s)
        if self._ran:
            self.engine.continue_pass()
        else:
            self.engine.begin_pass()
            self._first = part
        self._ran[part] += 1
