"""The torch.compile backend: turns each graph that Dynamo captures into steps that the engine runs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from mball.run.doors import Gate, check_graph_inputs
from mball.run.engine import Engine
from mball.schema import Activation, Step
from mball.trace.driver import Driver, build_driver
from mball.trace.graph import CapturedGraph, UnsupportedGraphError

logger = logging.getLogger(__name__)


class GraphSegment:
    """A captured graph for one range of its symbolic sizes."""

    def __init__(self, graph: CapturedGraph, weight_bytes: Sequence[int], values: Mapping[Any, int]) -> None:
        self._graph = graph
        self._weight_bytes = weight_bytes
        self._values = values
        self._key = (graph.name, tuple(values.values()))

    @property
    def key(self) -> Hashable:
        return self._key

    def describe(self) -> tuple[Sequence[Step], Sequence[Activation]]:
        return self._graph.schema_steps(self._weight_bytes, self._values)


class GraphRunner:
    """What Dynamo calls in place of the graph."""

    def __init__(self, graph: CapturedGraph, gate: Gate) -> None:
        self.graph = graph
        self._gate = gate
        self._engine: Engine = gate.engine
        self._weight_bytes = [weight.size_bytes for weight in self._engine.weights]
        self._segments: dict[tuple[int, ...], GraphSegment] = {}
        self._drivers: dict[tuple[tuple[tuple[int, int], ...], tuple[tuple[int, ...], ...]], Driver] = {}
        self._profiled = False

    def __call__(self, *args: Any) -> Any:
        with self._gate.open(args, {}):
            others = (
                a for a, node in zip(args, self.graph.placeholders, strict=True) if node not in self.graph.weights
            )
            check_graph_inputs(others)
            cuts, bound = self._engine.start_graph(self._segment(args))
            driver = self._driver(cuts, bound)
            with self._gate.unbound():
                return driver(*args)

    def _segment(self, args: Sequence[Any]) -> GraphSegment:
        values = {symbol: _bucket(value) for symbol, value in self.graph.symbol_values(args).items()}
        key = tuple(values.values())
        if key not in self._segments:
            self._segments[key] = GraphSegment(self.graph, self._weight_bytes, values)
        return self._segments[key]

    def _driver(self, cuts: tuple[tuple[int, int], ...], bound: tuple[tuple[int, ...], ...]) -> Driver:
        if not self._profiled:
            self._profiled = True
            return build_driver(self.graph, cuts, bound, self._engine, profile=True)
        if (cuts, bound) not in self._drivers:
            self._drivers[cuts, bound] = build_driver(self.graph, cuts, bound, self._engine)
        return self._drivers[cuts, bound]


class Backend:
    """A torch.compile backend for the modules behind one gate.

    Attributes:
        runners: the graphs captured so far.
        unsupported: reasons why a graph runs operator by operator.
    """

    def __init__(
        self, gate: Gate, parameters: Sequence[tuple[torch.nn.Parameter, int]], buffers: Sequence[torch.Tensor]
    ):
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
            graph = CapturedGraph(name, module, weight_of, is_buffer)
        except UnsupportedGraphError as error:
            logger.warning("%s; the graph runs operator by operator", error)
            self.unsupported.append(str(error))
            return module.forward
        logger.info("captured %s: %d steps, %d weights", name, len(graph.steps), len(set(graph.weights.values())))
        runner = GraphRunner(graph, self._gate)
        self.runners.append(runner)
        return runner


def _bucket(size: int) -> int:
    """Rounds a symbolic size up, so that a growing cache is planned anew twice an octave; exact up to 8."""
    grain = 1 if size <= 8 else 1 << ((size - 1).bit_length() - 2)
    return -(-size // grain) * grain
