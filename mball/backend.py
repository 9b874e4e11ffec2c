"""The torch.compile backend: turns each graph that Dynamo captures into steps that the engine runs."""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from mball.integrations import make_faithful
from mball.memory import libc
from mball.run.doors import Gate, check_graph_inputs
from mball.run.engine import Engine
from mball.schema import Activation, Step
from mball.trace.cut import Cut, UnsupportedGraphError
from mball.trace.driver import Driver, StepHooks, build_driver
from mball.trace.graph import CapturedGraph
from mball.trace.profile import CostProfile, TimeProfile

logger = logging.getLogger(__name__)


class GraphSegment:
    """A captured graph for one range of its symbolic sizes."""

    def __init__(self, graph: CapturedGraph, weight_bytes: Sequence[int], values: Mapping[Any, int]) -> None:
        self._graph = graph
        self._weight_bytes = weight_bytes
        self.values = values
        self._key = (graph.name, tuple(values.values()))

    @property
    def key(self) -> Hashable:
        return self._key

    @property
    def family(self) -> Hashable:
        return self._graph.name

    def describe(self, *, workspace: bool = True) -> tuple[Sequence[Step], Sequence[Activation]]:
        return self._graph.schema_steps(self._weight_bytes, self.values, workspace=workspace)


class GraphRunner:
    """What Dynamo calls in place of the graph."""

    def __init__(self, graph: CapturedGraph, driver: Driver, gate: Gate) -> None:
        self.graph = graph
        self._driver = driver
        self._gate = gate
        self._engine: Engine = gate.engine
        self._weight_bytes = [weight.size_bytes for weight in self._engine.weights]
        self._segments: dict[tuple[int, ...], GraphSegment] = {}
        self._is_new = True
        self._costs_due = True
        self._costed: dict[Any, int] = {}  # the largest sizes at which costs were measured
        self._times_due = True

    def __call__(self, *args: Any) -> Any:
        return self._gate.run(self._run, args, {})

    def _run(self, *args: Any) -> Any:
        check_graph_inputs(args[number] for number in self.graph.others)
        if self._is_new:
            # Capture has just ended, and what it freed is as large as many layers.
            gc.collect()
            libc.trim_heap()
            self._engine.note_capture()
            self._is_new = False
        values = self.graph.symbol_values(args)
        segment = self._segment(values)
        if any(size > self._costed.get(symbol, 0) for symbol, size in segment.values.items()):
            self._costs_due = True
        self._engine.start_graph(segment)
        if self._costs_due:
            return self._with_costs(values, segment, args)
        if self._times_due:
            return self._with_times(args)
        return self._execute(self._engine, args)

    def _execute(self, hooks: StepHooks, args: Sequence[Any]) -> Any:
        return self._gate.run_graph(self._driver, (hooks, *args), higher_order=self.graph.has_higher_order)

    def _with_costs(self, values: Mapping[Any, int], segment: GraphSegment, args: Sequence[Any]) -> Any:
        """Runs the graph and learns what its steps allocate: in its first run, and when its sizes outgrow that."""
        costs = CostProfile(self.graph.steps, self._engine, self._engine.execution.device.gauge())
        with costs.counting():
            result = self._execute(costs, args)
        self._costs_due = False
        self._costed = {symbol: max(size, self._costed.get(symbol, 0)) for symbol, size in segment.values.items()}
        if self.graph.learn_workspace(values):
            self._forget_plans()
        return result

    def _with_times(self, args: Sequence[Any]) -> Any:
        result = self._execute(TimeProfile(self.graph.steps, self._engine), args)
        self._times_due = False
        self._forget_plans()
        return result

    def _forget_plans(self) -> None:
        self._engine.forget_plans(segment.key for segment in self._segments.values())

    def _segment(self, values: Mapping[Any, int]) -> GraphSegment:
        rounded = {symbol: _bucket(value) for symbol, value in values.items()}
        key = tuple(rounded.values())
        if key not in self._segments:
            self._segments[key] = GraphSegment(self.graph, self._weight_bytes, rounded)
        return self._segments[key]


class Backend:
    """A torch.compile backend for the modules behind one gate.

    Attributes:
        runners: the graphs captured so far.
        unsupported: reasons why a graph runs operator by operator.
    """

    def __init__(
        self, gate: Gate, parameters: Sequence[tuple[torch.nn.Parameter, int]], buffers: Sequence[torch.Tensor]
    ):
        make_faithful()
        self.runners: list[GraphRunner] = []
        self.unsupported: list[str] = []
        self._gate = gate
        self._weights = {id(parameter): weight for parameter, weight in parameters}
        self._buffers = {id(buffer) for buffer in buffers}
        self._numbers = itertools.count()

    def __call__(self, module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        name = f"graph{next(self._numbers)}"
        weight_of = [self._weights.get(id(value)) for value in example_inputs]
        is_buffer = [id(value) in self._buffers for value in example_inputs]
        try:
            cut = Cut(name, module, weight_of)
            graph = CapturedGraph(cut, is_buffer)
        except UnsupportedGraphError as error:
            logger.warning("%s; the graph runs operator by operator", error)
            self.unsupported.append(str(error))
            return module.forward
        logger.info("captured %s: %d steps, %d weights", name, len(graph.steps), len(set(cut.weights.values())))
        runner = GraphRunner(graph, build_driver(cut), self._gate)
        self.runners.append(runner)
        return runner


def _bucket(size: int) -> int:
    """Rounds a symbolic size up, so that a growing cache is planned anew twice an octave; exact up to 8."""
    grain = 1 if size <= 8 else 1 << ((size - 1).bit_length() - 2)
    return -(-size // grain) * grain
