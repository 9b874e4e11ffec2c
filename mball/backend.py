"""The torch.compile backend: turns each graph that Dynamo captures into steps that the engine runs.

[Note: two ways] A graph's steps run as Dynamo captured them, or compiled by Inductor. Without `step_bytes` a model that
fits the budget is compiled in one piece; for the door of torch.compile that is what came of it so far.
"""

from __future__ import annotations

import gc
import itertools
import logging
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from mball.config import Compile, Config
from mball.errors import BudgetError, WrapError
from mball.memory import libc
from mball.run.doors import Gate
from mball.run.engine import Engine
from mball.run.runners_by_weights import RunnersByWeights
from mball.run.step_graphs import RecordingStage
from mball.schema import Step, Tensor
from mball.torch_private.dispatch import is_only_mode
from mball.torch_private.inductor import inductor_failure
from mball.torch_private.tensors import is_subclass, storage_key
from mball.trace.cut import Cut, UnsupportedGraphError
from mball.trace.driver import Driver, StepHooks, build_driver
from mball.trace.graph import CapturedGraph
from mball.trace.grouping import Blocks, EveryWeight, Whole, default_step_bytes
from mball.trace.inductor import CutBy, compile_steps
from mball.trace.profile import CostProfile, TimeProfile
from mball.trace.stage import Recordable, Stage

logger = logging.getLogger(__name__)


class GraphSegment:
    """A captured graph for one range of its symbolic sizes."""

    def __init__(
        self,
        graph: CapturedGraph,
        weight_bytes: Sequence[int],
        values: Mapping[Any, int],
        *,
        is_replaceable: bool = False,
    ) -> None:
        self._graph = graph
        self._is_replaceable = is_replaceable
        self._weight_bytes = weight_bytes
        self.values = values
        self._key = (graph.name, tuple(values.values()))

    @property
    def key(self) -> Hashable:
        return self._key

    @property
    def family(self) -> Hashable:
        return self._graph.name

    @property
    def is_replaceable(self) -> bool:
        return self._is_replaceable

    @property
    def handed(self) -> Sequence[tuple[int, ...]]:
        return [step.reads for step in self._graph.steps]

    def describe(self, *, workspace: bool = True) -> tuple[Sequence[Step], Sequence[Tensor]]:
        return self._graph.schema_steps(self._weight_bytes, self.values, workspace=workspace)


class Program:
    """One way to run a graph: steps, the driver that runs them, and what is known of them.

    Args:
        graph: the facts of its steps.
        driver: runs them; takes `StepHooks` and the graph's arguments.
        counts_flops: whether operations are still to be counted as the steps run.
        recordable: what of it can be recorded, if that is wished for.

    Attributes:
        is_replaceable: whether another program runs the graph where this one does not fit.
    """

    def __init__(
        self,
        graph: CapturedGraph,
        driver: Driver,
        weight_bytes: Sequence[int],
        *,
        counts_flops: bool,
        recordable: Recordable | None = None,
    ) -> None:
        self.graph = graph
        self.is_replaceable = False
        self._driver = driver
        self._weight_bytes = weight_bytes
        self._counts_flops = counts_flops
        self._recordable = recordable
        self._stage: RecordingStage | None = None
        self._segments: dict[tuple[int, ...], GraphSegment] = {}
        self._costs_due = True
        self._costed: dict[Any, int] = {}  # the largest sizes at which costs were measured
        self._times_due = True

    def renumbered(self, name: str, weights: Mapping[int, int], weight_bytes: Sequence[int]) -> Program:
        """Returns the same program under another name, for other weights of the same shapes; it learns by itself."""
        graph = self.graph.renumbered(name, weights)
        counts_flops = self._counts_flops and self._costs_due
        return Program(graph, self._driver, weight_bytes, counts_flops=counts_flops, recordable=self._recordable)

    def segment(self, values: Mapping[Any, int]) -> GraphSegment:
        """Returns the part of a pass that this is for these sizes."""
        rounded = {symbol: _bucket(value) for symbol, value in values.items()}
        key = tuple(rounded.values())
        if key not in self._segments:
            self._segments[key] = GraphSegment(
                self.graph, self._weight_bytes, rounded, is_replaceable=self.is_replaceable
            )
        return self._segments[key]

    def run(self, gate: Gate, args: Sequence[Any]) -> Any:
        """Runs the steps, and learns from it what is not known yet.

        Raises:
            BudgetError: the steps do not fit the budget; nothing was changed.
        """
        values = self.graph.symbol_values(args)
        segment = self.segment(values)
        if any(size > self._costed.get(symbol, 0) for symbol, size in segment.values.items()):
            self._costs_due = True
        gate.engine.start_graph(segment)
        if self._costs_due:
            return self._with_costs(gate, values, segment, args)
        if self._times_due:
            return self._with_times(gate, args)
        # A mode of the user's sees operators, and would not see those of a replay.
        return self._execute(gate, gate.engine, args, self._recording(gate.engine) if is_only_mode(gate.mode) else None)

    def _execute(self, gate: Gate, hooks: StepHooks, args: Sequence[Any], stage: Stage | None = None) -> Any:
        driver = self._driver if stage is None else partial(self._driver, stage=stage)
        return gate.run_graph(driver, (hooks, *args), higher_order=self.graph.has_higher_order)

    def _recording(self, engine: Engine) -> Stage | None:
        """Returns what has the steps recorded, where they may be."""
        if self._stage is None and self._recordable is not None and engine.step_graphs is not None:
            self._stage = RecordingStage(
                engine.step_graphs,
                self.graph.name,
                copied=self._recordable.copied,
                in_place=self._recordable.in_place,
                can_record=self._recordable.steps,
                rise_bytes=lambda: max(step.rise_bytes or 0 for step in self.graph.steps),
            )
        return self._stage

    def _with_costs(self, gate: Gate, values: Mapping[Any, int], segment: GraphSegment, args: Sequence[Any]) -> Any:
        """Runs the graph and learns what its steps allocate: in its first run, and when its sizes outgrow that."""
        engine = gate.engine
        engine.execution.arena.populate()
        costs = CostProfile(self.graph.steps, engine, engine.execution.device.gauge())
        with costs.counting() if self._counts_flops else nullcontext():
            result = self._execute(gate, costs, args)
        self._costs_due = False
        self._costed = {symbol: max(size, self._costed.get(symbol, 0)) for symbol, size in segment.values.items()}
        if self.graph.learn_workspace(values):
            self._forget_plans(engine)
        return result

    def _with_times(self, gate: Gate, args: Sequence[Any]) -> Any:
        times = TimeProfile(self.graph.steps, gate.engine, gate.engine.execution.device.moment)
        result = self._execute(gate, times, args)
        self._times_due = False
        self._forget_plans(gate.engine)
        return result

    def _forget_plans(self, engine: Engine) -> None:
        engine.forget_plans(segment.key for segment in self._segments.values())


class GraphRunner:
    """What Dynamo calls in place of the graph: runs the first of its programs that fits the budget."""

    def __init__(self, programs: Sequence[Program], gate: Gate) -> None:
        self._programs = list(programs)
        for program in self._programs[:-1]:
            program.is_replaceable = True
        self._gate = gate
        self._is_new = True
        self._has_said_why = False

    @property
    def graph(self) -> CapturedGraph:
        """The facts of the program that runs while it fits."""
        return self._programs[0].graph

    def renumbered(self, suffix: str, weights: Mapping[int, int], weight_bytes: Sequence[int]) -> GraphRunner:
        """Returns the same runner for other weights of the same shapes; `suffix` is added to its programs' names."""
        # Each keeps a name of its own: plans are found by it.
        programs = [
            program.renumbered(f"{program.graph.name}{suffix}", weights, weight_bytes) for program in self._programs
        ]
        runner = GraphRunner(programs, self._gate)
        runner._is_new = False  # nothing was captured
        return runner

    def __call__(self, *args: Any) -> Any:
        return self._gate.run(self._run, args, {})

    def _run(self, *args: Any) -> Any:
        if self._is_new:
            # Capture has just ended, and what it freed is as large as many layers.
            gc.collect()
            libc.trim_heap()
            self._gate.engine.note_capture()
            self._is_new = False
        if len(self._programs) > 1:
            try:
                return self._programs[0].run(self._gate, args)
            except BudgetError as error:
                if not self._has_said_why:
                    logger.warning(
                        "%s does not fit the budget in one piece at these sizes (%s): such calls run in steps, which "
                        "are not compiled; a larger budget, or step_bytes=..., has them compiled",
                        self.graph.name,
                        error,
                    )
                    self._has_said_why = True
        return self._programs[-1].run(self._gate, args)


class Backend:
    """A torch.compile backend for the modules behind one gate.

    Args:
        gate: of the modules.
        parameters: as the user holds them, each with the weight it is.
        buffers: of the modules.
        config: says how steps are compiled.
        options: of Inductor.

    Attributes:
        runners: the graphs captured so far.
        unsupported: reasons why a graph runs operator by operator.
    """

    def __init__(
        self,
        gate: Gate,
        parameters: Sequence[tuple[torch.nn.Parameter, int]],
        buffers: Sequence[torch.Tensor],
        config: Config,
        options: Mapping[str, Any],
    ):
        self.runners: list[GraphRunner] = []
        self.unsupported: list[str] = []
        self.gate = gate
        self.config = config
        # Inductor's own graphs would keep a copy of every streamed weight.
        self._options = {**options, "triton.cudagraphs": False}
        self._records = bool(options.get("triton.cudagraphs")) and gate.engine.step_graphs is not None
        self._weights = {id(parameter): weight for parameter, weight in parameters}
        self._weight_bytes: list[int] = []
        self._buffers = {id(buffer) for buffer in buffers}
        self._numbers = itertools.count()
        self.learn_sizes()
        _backends.add(self)

    @property
    def engine(self) -> Engine:
        return self.gate.engine

    def manages(self, parameter: torch.nn.Parameter) -> bool:
        """Returns whether the parameter lies at a home of this backend's engine."""
        if is_subclass(parameter) or parameter.layout is not torch.strided:
            return False
        return storage_key(parameter) in self.engine.homes.weight_of_storage

    def __call__(self, module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        weight_of = [self._weights.get(id(value)) for value in example_inputs]
        runner = self.capture(module, example_inputs, weight_of)
        if runner is None:
            return module.forward
        return self._for_any_weights(runner, weight_of)

    def _for_any_weights(self, runner: GraphRunner, weight_of: Sequence[int | None]) -> Callable[..., Any]:
        """Returns what Dynamo calls, which may be for any layer that its guards take for the one that was captured."""
        places = [(position, weight) for position, weight in enumerate(weight_of) if weight is not None]
        if not places:
            return runner
        name = self._names()[places[0][1]]
        runners = RunnersByWeights(runner, partial(self.renumbered, runner), name, [weight for _, weight in places])

        def call(*args: Any) -> Any:
            weights = [self._weights.get(id(args[position])) for position, _ in places]
            found = tuple([weight for weight in weights if weight is not None])
            if len(found) < len(weights):
                raise WrapError(
                    f"the graph that reads {name!r} is called with a Parameter that is none of the model's: make its "
                    "module a part of the model before mball.wrap, or wrap with capture='operators'"
                )
            return runners.of(found)(*args)

        return call

    def capture(
        self, module: torch.fx.GraphModule, example_inputs: Sequence[Any], weight_of: Sequence[int | None]
    ) -> GraphRunner | None:
        """Returns what runs the graph in steps, or None, said once, if it must run operator by operator.

        Args:
            module: the graph.
            example_inputs: its arguments.
            weight_of: for each of them the weight it is, or None.
        """
        name = f"graph{next(self._numbers)}"
        is_buffer = [id(value) in self._buffers for value in example_inputs]
        try:
            cut = Cut(name, module, weight_of, EveryWeight())
            graph = CapturedGraph(cut, is_buffer)
        except UnsupportedGraphError as error:
            logger.warning("%s; the graph runs operator by operator", error)
            self.unsupported.append(str(error))
            return None
        programs = []
        if self.config.compile is Compile.INDUCTOR:
            programs += self._compiled(cut, example_inputs, weight_of, is_buffer)
        if not programs or len(programs[0].graph.steps) == 1:
            # What is compiled in one piece cannot be streamed, should it not fit one day.
            programs.append(Program(graph, build_driver(cut), self._weight_bytes, counts_flops=True))
        runner = GraphRunner(programs, self.gate)
        logger.info("captured %s: %d steps, %d weights", name, len(runner.graph.steps), len(set(cut.weights.values())))
        self.runners.append(runner)
        return runner

    def renumbered(self, runner: GraphRunner, suffix: str, weights: Mapping[int, int]) -> GraphRunner:
        """Returns a runner of the same graph for other weights of the same shapes.

        Args:
            runner: of the graph.
            suffix: what the new one's names have besides.
            weights: for each weight that the graph reads the one that takes its place.
        """
        return runner.renumbered(suffix, weights, self._weight_bytes)

    def _compiled(
        self, called: Cut, example_inputs: Sequence[Any], weight_of: Sequence[int | None], is_buffer: Sequence[bool]
    ) -> list[Program]:
        """Returns the program of compiled steps, or none, said once, where they cannot be compiled."""
        facts: list[CapturedGraph] = []

        def choose(cut_by: CutBy, arguments: Sequence[int]) -> Cut:
            buffers = [is_buffer[argument] for argument in arguments]
            step_bytes = self.config.step_bytes or default_step_bytes(self.engine.budget_bytes)
            blocks = Blocks(names=self._names(), sizes_bytes=self._weight_bytes, step_bytes=step_bytes)
            for grouping in (Whole(), blocks) if self.config.step_bytes is None else (blocks,):
                cut = cut_by(grouping)
                graph = CapturedGraph(cut, buffers, called)
                if grouping is blocks or self._fits(graph):
                    break
            facts.append(graph)
            return cut

        began_s = time.perf_counter()
        try:
            compiled = compile_steps(
                f"{called.name}c",
                called.module,
                example_inputs,
                weight_of,
                is_buffer,
                choose,
                self._options,
                records=self._records,
            )
        except (UnsupportedGraphError, inductor_failure()) as error:
            logger.warning(
                "%s cannot be compiled in steps (%s); its steps run as they were captured", called.name, error
            )
            return []
        (graph,) = facts
        for step, flops in zip(graph.steps, compiled.flops, strict=True):
            step.flops = flops
        logger.info(
            "compiled %s in %.1f s: %d steps, %d of them different",
            called.name,
            time.perf_counter() - began_s,
            len(graph.steps),
            compiled.num_pieces,
        )
        return [Program(graph, compiled.driver, self._weight_bytes, counts_flops=False, recordable=compiled.recordable)]

    def learn_sizes(self) -> None:
        """Brings the list of sizes, which is shared by all graphs, up to the engine's weights."""
        self._weight_bytes += [weight.size_bytes for weight in self.engine.weights[len(self._weight_bytes) :]]

    def _names(self) -> list[str]:
        return [weight.name for weight in self.engine.weights]

    def _fits(self, graph: CapturedGraph) -> bool:
        """Returns whether all weights and what this graph needs besides fit the budget, for the sizes of this call."""
        if sum(self._weight_bytes) > self.engine.budget_bytes:
            return False
        return self.engine.fits(GraphSegment(graph, self._weight_bytes, graph.traced_values()))


_backends: weakref.WeakSet[Backend] = weakref.WeakSet()


def backends() -> list[Backend]:
    """Returns all that are in use."""
    return [backend for backend in _backends if not backend.engine.closed]


def _bucket(size: int) -> int:
    """Rounds a symbolic size up, so that a growing cache is planned anew twice an octave; exact up to 8."""
    grain = 1 if size <= 8 else 1 << ((size - 1).bit_length() - 2)
    return -(-size // grain) * grain
