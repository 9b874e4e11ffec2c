"""The gate of models that mball sees the graphs of and nothing else.

[Note: passes of graphs] Nobody says where a call of the model begins or ends. So a pass begins with a graph, and ends
when that graph comes again, or when another comes for the third time: a loop, such as that of `generate`, has begun.
Between graphs code runs that nobody watches: locks are held during graphs only, and each of them begins by looking for
written homes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from mball.run.doors import Gate, Tenant, check_autograd, check_tenants
from mball.run.engine import Engine
from mball.run.homes import Home, HomeFile
from mball.run.pass_meter import PassEnd
from mball.run.tenants import move_out
from mball.torch_private.dispatch import no_autocast_cache

_R = TypeVar("_R")


class Lodger(NamedTuple):
    """A parameter at its home, which does not keep it alive: the parameter, the home, its address, and the weight."""

    parameter: weakref.ref[torch.nn.Parameter]
    home: Home
    address: int
    weight: int


class GraphGate(Gate):
    """Opens a pass at the first graph of it, and keeps it open from graph to graph.

    Keeps no parameter alive: nobody says here that a model is gone. Homes stay, since tensors may share their memory
    that nobody knows of.

    Args:
        engine: runs the passes.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, (), ())
        # By the parameter's id, until it dies: the id may be another's then.
        self._lodgers: dict[int, Lodger] = {}
        self._released: dict[int, weakref.ref[torch.nn.Parameter]] = {}
        self._ran: Counter[Hashable] = Counter()  # what ran in the pass that is open; empty: none is
        self._first: Hashable = None
        self._ended: PassEnd | None = None  # of the graph that ran last

    def lodger(self, parameter: object) -> Lodger | None:
        """Returns what is known of the parameter, None if it is not at a home of this gate."""
        return self._lodgers.get(id(parameter))

    def was_released(self, parameter: object) -> bool:
        """Returns whether the parameter was at home here, and was given back."""
        return id(parameter) in self._released

    def living_weights(self) -> set[int]:
        """Returns the weights whose parameters live, and are at home."""
        return {lodger.weight for lodger in list(self._lodgers.values())}

    def adopt(
        self, homes: Sequence[Home], file: HomeFile | None, parameters: Sequence[tuple[torch.nn.Parameter, int]]
    ) -> None:
        """Takes on more weights (their homes and the file they are in) and parameters, which are at home already.

        Args:
            homes: come after those that are there.
            file: holds them; None without any.
            parameters: each with the weight it is.
        """
        with self.engine.lock:
            if file is not None:
                self.engine.adopt(homes, file)
            for parameter, weight in parameters:
                home = self.engine.homes.homes[weight]
                self._released.pop(id(parameter), None)
                ref = _until_death(self._lodgers, parameter)
                self._lodgers[id(parameter)] = Lodger(ref, home, home.tensor.data_ptr(), weight)

    def release(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Gives back those of the parameters that are at home here, and remembers them until they are adopted again."""
        with self.engine.lock:
            for parameter in self.give_back(parameters):
                self._released[id(parameter)] = _until_death(self._released, parameter)

    def give_back(self, parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        """Gives those of the parameters that are at home here ordinary memory with the bytes of their homes.

        Returns them.
        """
        with self.engine.lock:
            self.settle()
            leaving = [parameter for parameter in parameters if id(parameter) in self._lodgers]
            move_out([(parameter, self._lodgers[id(parameter)].home.tensor) for parameter in leaving])
            for parameter in leaving:
                self._lodgers.pop(id(parameter), None)
            return leaving

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
            self._follow_requires_grad_of(tenants)
            self.mode.paused = False
            with no_autocast_cache(), self.mode:
                result = call(*args)
            # Code that comes after the last graph may be anybody's.
            self._ended = self.engine.note_end()
        except BaseException:
            self._ran.clear()
            self.engine.recover()
            raise
        return result

    def settle(self) -> None:
        """Ends the pass that is open, if one is: the next graph begins another."""
        with self.engine.lock:
            if self._ran and not self.engine.passing.locked():
                self._ran.clear()
                self.engine.end_pass(self._ended)

    def _follow_requires_grad_of(self, tenants: Sequence[Tenant]) -> None:
        flags = dict.fromkeys((tenant.weight for tenant in tenants), False)
        for tenant in tenants:
            flags[tenant.weight] |= tenant.parameter.requires_grad
        known = self.engine.homes.requires_grad
        if any(known[weight] != flag for weight, flag in flags.items()):
            now = [flags.get(weight, flag) for weight, flag in enumerate(known)]
            self.engine.execution.set_requires_grad(now)

    def _advance(self, part: Hashable) -> None:
        if self._ran and (part == self._first or self._ran[part] > 1):
            self._ran.clear()
            self.engine.end_pass(self._ended)
        if self._ran:
            self.engine.continue_pass()
        else:
            self.engine.begin_pass()
            self._first = part
        self._ran[part] += 1


def _until_death(known: dict[int, Any], parameter: torch.nn.Parameter) -> weakref.ref[torch.nn.Parameter]:
    """Returns a reference that takes the parameter out of `known` when it dies, before its id can be another's."""
    key = id(parameter)
    return weakref.ref(parameter, lambda _: known.pop(key, None))
