"""The door of torch.compile: `torch.compile(model, backend="mball", options={"budget": ...})`.

[Note: weights without their module] A backend is given graphs and never the module. A weight is an argument that is a
Parameter. It moves to its home when the first graph comes that reads it, and engine, plans and swap file grow. Dynamo
calls one graph with the weights of any module that its guards let pass (equal layers, another model of the same class),
so each call looks which Parameters it was given, and the graph is renumbered for them once. A graph without Parameters
runs as it is.

[Note: one door] Dynamo takes two backends with equal options for the same one, and calls graphs that it captured for
the first on behalf of the second. So there is one door, with one budget, for equal settings.

[Note: models that go] Nobody says that a model is gone, so nothing here keeps a Parameter alive. What is known of a
model goes with it, but for its homes: their place in the swap file is given back when the door closes.
"""

from __future__ import annotations

import contextlib
import logging
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from mball.assembly import Machinery, Storage, inductor_options
from mball.backend import Backend, GraphRunner, backends
from mball.compute import OpenCompute, open_compute
from mball.config import Compile, Config
from mball.errors import ConfigError, MballError, WrapError
from mball.forecast import check_budget, measure_machine
from mball.run.census import OwnedWeight, check_overlap, check_streamable, identity_of
from mball.run.doors import Tenant
from mball.run.engine import Engine
from mball.run.graph_gate import GraphGate, Lodger
from mball.run.home_sources import write_homes
from mball.run.homes import Home, Homes
from mball.run.runners_by_weights import RunnersByWeights
from mball.run.segments import OperatorReads
from mball.schema import Machine
from mball.torch_private.faked import opens_passes
from mball.torch_private.inductor import compile_graph, inductor_failure
from mball.torch_private.sources import source_name
from mball.torch_private.tensors import storage_key
from mball.trace.cut import Cut, UnsupportedGraphError
from mball.trace.grouping import EveryWeight
from mball.units import format_bytes, parse_bytes

logger = logging.getLogger(__name__)

# What torch.compile itself takes.
_TORCH_COMPILE_HAS = ("fullgraph", "dynamic")
_PATH = re.compile(r"_(?:modules|parameters)\['([^']+)'\]")


@opens_passes
def mball_backend(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    open_compute: OpenCompute = open_compute,
) -> Callable[..., Any]:
    """The backend that torch.compile knows as ``"mball"``. Returns what runs the graph under the budget.

    What is wrong with the settings, the weights or the budget is raised whenever the graph is called, because Dynamo
    would hide an error of a backend inside one of its own. Other options have the graph captured anew, and so has
    `torch._dynamo.reset()`.

    Args:
        module: the graph.
        example_inputs: its arguments; Parameters among them are the weights.
        options: ``"budget"`` as for `mball.wrap`, and the other settings of `mball.Config` by name, Inductor's own as
            ``"options"``. Models that are compiled with equal options share one budget.
        mode: as the setting of that name.
        open_compute: for tests.
    """
    try:
        if frozen := [name for name, value in module.named_parameters() if _is_weight(value)]:
            raise ConfigError(
                f"a graph came with {len(frozen)} weights as its constants ({frozen[0]!r}), which cannot be streamed: "
                "set torch._inductor.config.freezing = False (or leave TORCHINDUCTOR_FREEZING out), and "
                "torch._dynamo.config.prepare_freezing and inline_inbuilt_nn_modules as they are by default"
            )
        parameters = [value for value in example_inputs if _is_weight(value)]
        if not parameters:
            return _as_it_is(module, example_inputs, options, mode)
        if wrapped := _wrapped_backend(parameters, options, mode):
            return wrapped(module, example_inputs)
        config = _config_of(options, mode)
        door = next((each for each in list(_doors) if each.config == config and not each.engine.closed), None)
        if door is None:
            door = Door(config, open_compute)
        return door.capture(module, example_inputs)
    except MballError as error:
        return _Refusal(error)


def find_door(module: torch.nn.Module) -> Door | None:
    """Returns the door that streams weights of this module, or None."""
    parameters = list(module.parameters())
    found = (door for door in list(_doors) if not door.engine.closed)
    return next((door for door in found if any(map(door.backend.manages, parameters))), None)


class _Refusal:
    """Stands for a graph that cannot run, and says why."""

    def __init__(self, error: MballError) -> None:
        self._kind, self._args, self._facts = type(error), error.args, dict(error.__dict__)

    def __call__(self, *args: Any) -> Any:
        # A new one each time: the one that was raised keeps all frames that it went through.
        error = self._kind.__new__(self._kind, *self._args)
        error.__dict__.update(self._facts)
        raise error


class Door:
    """All graphs and weights of the models that were compiled with the same settings.

    Dynamo holds the graphs, they hold the door, and when they go it gives everything back.

    Args:
        config: the settings.
        open_compute: for tests.

    Raises:
        ConfigError: the mode is unknown.
        StorageError: the swap file cannot be made.
    """

    def __init__(self, config: Config, open_compute: OpenCompute) -> None:
        options = inductor_options(config)
        self.config = config
        self._machine = _MachineOnceKnown()
        with contextlib.ExitStack() as undo:
            self._storage = Storage.open(config)
            undo.callback(self._storage.close)
            compute = open_compute(config, self._storage.files)
            undo.callback(compute.close)
            homes = Homes([], [], self._storage.swap)
            self.machinery = Machinery.start(config, self._storage, homes, compute, self._machine)
            undo.pop_all()
        self._closer = weakref.finalize(self, self.machinery.close_dropped)
        self.gate = GraphGate(self.machinery.engine)
        self.backend = Backend(self.gate, (), (), config, options)
        _doors.add(self)

    @property
    def engine(self) -> Engine:
        return self.machinery.engine

    def settle(self) -> None:
        """Ends the pass that is open, so that it is reported."""
        self.gate.settle()

    def release(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Gives these weights back as ordinary memory. Graphs that are called with them afterwards raise WrapError.

        The door closes with its last weight.
        """
        with self.engine.lock:
            self.gate.release(parameters)
            if not self.gate.living_weights():
                self._closer()

    def capture(self, module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Returns what runs the graph, once its weights are at home.

        Raises:
            BudgetError: the budget is too small for a step of the graph; it names the smallest.
            StorageError: the swap file cannot take the weights.
            WrapError: a weight cannot be streamed. In every case all is left as it was.
        """
        placeholders = module.graph.find_nodes(op="placeholder")
        positions = [number for number, value in enumerate(example_inputs) if _is_weight(value)]
        names = [_name_of(placeholders[number]) for number in positions]
        parameters = [example_inputs[number] for number in positions]

        def steps(weights: Sequence[int]) -> list[OperatorReads]:
            """Returns what each step of the graph reads: these weights, if they are its arguments."""
            weight_of: list[int | None] = [None] * len(example_inputs)
            for number, weight in zip(positions, weights, strict=True):
                weight_of[number] = weight
            try:
                cut = Cut("graph", module, weight_of, EveryWeight())
            except UnsupportedGraphError:
                return [OperatorReads((weight,)) for weight in weights]
            return [OperatorReads(whole) for step in cut.steps if (whole := step.read_whole())]

        new = [parameter for parameter in parameters if self.gate.lodger(parameter) is None]
        lodgers = self.adopt(names, parameters, steps)
        weight_of: list[int | None] = [None] * len(example_inputs)
        for number, lodger in zip(positions, lodgers, strict=True):
            weight_of[number] = lodger.weight
        try:
            runner = self.backend.capture(module, example_inputs, weight_of)
        except BaseException:
            self.gate.give_back(new)
            raise
        return DoorRunner(self, runner or module.forward, positions, names, [lodger.weight for lodger in lodgers])

    def adopt(
        self,
        names: Sequence[str],
        parameters: Sequence[torch.nn.Parameter],
        steps: Callable[[Sequence[int]], Sequence[OperatorReads]],
    ) -> list[Lodger]:
        """Brings those of the parameters home that are not there yet; returns what is known of all of them.

        Args:
            names: of the parameters, for people.
            parameters: each once.
            steps: given the weight that each of them is (or will be), returns the weights that steps read together, or
                raises WrapError.

        Raises:
            BudgetError: the budget cannot hold a step.
            StorageError: the swap file cannot take the weights.
            WrapError: a weight cannot be streamed. In every case all is left as it was.
        """
        new = [(n, p) for n, p in zip(names, parameters, strict=True) if self.gate.lodger(p) is None]
        if new:
            with torch.no_grad(), self.engine.lock:
                self._bring_home(new, parameters, steps)
        found = [self.gate.lodger(parameter) for parameter in parameters]
        return [lodger for lodger in found if lodger is not None]

    def _bring_home(
        self,
        new: Sequence[tuple[str, torch.nn.Parameter]],
        parameters: Sequence[torch.nn.Parameter],
        steps: Callable[[Sequence[int]], Sequence[OperatorReads]],
    ) -> None:
        if self.engine.closed:
            raise WrapError(_UNWRAPPED)
        known = self.engine.homes
        taken = {home.name for home in known.homes}
        found: dict[object, OwnedWeight] = {}
        weight_of: dict[int, int] = {}
        joined: dict[object, list[torch.nn.Parameter]] = {}
        for name, parameter in new:
            check_streamable(name, parameter)
            if any(backend.manages(parameter) for backend in backends() if backend is not self.backend):
                raise WrapError(
                    f"weight {name!r} is streamed already, under another budget: call mball.unwrap(model) first, or "
                    "compile with the same options"
                )
            identity = identity_of(parameter)
            at_home = known.weight_of_storage.get(storage_key(parameter))
            if at_home is not None:  # another Parameter over the memory of one that is at home
                home = known.homes[at_home].tensor
                if identity != (home.data_ptr(), home.dtype, tuple(home.shape), home.stride()):
                    raise WrapError(
                        f"weight {name!r} is part of the memory of {known.homes[at_home].name!r}; give it its own "
                        "(clone it), or make them one Parameter"
                    )
                weight_of[id(parameter)] = at_home
                continue
            if identity not in found:
                unique = _unique(name, taken)
                taken.add(unique)
                found[identity] = OwnedWeight(names=[unique], parameter=parameter)
            joined.setdefault(identity, []).append(parameter)
        owned = list(found.values())
        check_overlap(owned)
        for weight, identity in enumerate(found, len(known)):
            weight_of |= {id(parameter): weight for parameter in joined[identity]}

        for parameter in parameters:
            if (lodger := self.gate.lodger(parameter)) is not None:
                weight_of[id(parameter)] = lodger.weight
        # May refuse them.
        expected = steps([weight_of[id(parameter)] for parameter in parameters])

        homes: list[Home] = []
        file = None
        if owned:
            file, homes = write_homes(owned, self._storage.swap)
            try:
                machine = measure_machine(homes, self._storage.files, self.machinery.compute.choice, None)
                check_budget(self.engine.budget_bytes, None, [*known.homes, *homes], machine, 0, expected)
            except BaseException:
                self._storage.swap.free(file.mapped_from)
                self._storage.swap.trim()
                raise
            self._machine.learn(machine, sum(home.span_bytes for home in homes))
            logger.info(
                "%d more weights, %s, under a budget of %s",
                len(homes),
                format_bytes(sum(home.span_bytes for home in homes)),
                format_bytes(self.engine.budget_bytes),
            )
        # Nothing above changed a weight; nothing below fails.
        for weight, identity in enumerate(found):
            for parameter in joined[identity]:
                parameter.data = homes[weight].tensor
        self.gate.adopt(homes, file, [(parameter, weight_of[id(parameter)]) for _, parameter in new])
        self.backend.learn_sizes()


class DoorRunner:
    """What Dynamo calls in place of a graph: finds the runner for the weights that it is given.

    Args:
        door: of the graph.
        runner: runs the graph: for the weights it was captured with if it knows steps, else for any.
        positions: of the weights among the arguments.
        names: of the weights.
        weights: that it was captured with.
    """

    def __init__(
        self,
        door: Door,
        runner: Callable[..., Any],
        positions: Sequence[int],
        names: Sequence[str],
        weights: Sequence[int],
    ) -> None:
        self._door = door
        self._runner = runner
        self._positions = positions
        self._names = names
        renumbered = partial(door.backend.renumbered, runner) if isinstance(runner, GraphRunner) else None
        self._known = RunnersByWeights(runner, renumbered, names[0], weights)

    def __call__(self, *args: Any) -> Any:
        gate = self._door.gate
        if self._door.engine.closed:
            raise WrapError(_UNWRAPPED)
        parameters = [args[position] for position in self._positions]
        lodgers = [lodger for parameter in parameters if (lodger := gate.lodger(parameter)) is not None]
        if len(lodgers) < len(parameters):
            lodgers = self._adopt(parameters)
        weights = tuple([lodger.weight for lodger in lodgers])
        runner = self._known.of(weights, gate.living_weights)
        tenants = [
            Tenant(parameter, lodger.home, lodger.address, lodger.weight)
            for parameter, lodger in zip(parameters, lodgers, strict=True)
        ]
        return gate.run_part((id(self), weights), tenants, runner, args)

    def _adopt(self, parameters: Sequence[Any]) -> list[Lodger]:
        """Returns the other weights that the graph is given now, once they are at home."""
        if not all(map(_is_weight, parameters)):
            raise WrapError(
                f"the graph that reads {self._names[0]!r} was captured with Parameters and is called without: "
                "torch._dynamo.reset(), then call the model again"
            )
        if any(map(self._door.gate.was_released, parameters)):
            raise WrapError(_UNWRAPPED)

        def steps(weights: Sequence[int]) -> list[OperatorReads]:
            if not isinstance(self._runner, GraphRunner):
                return [OperatorReads((weight,)) for weight in weights]
            now = self._known.replaced(weights)
            whole = [step.read_whole() for step in self._runner.graph.steps]
            return [OperatorReads(tuple(now[weight] for weight in weights)) for weights in whole if weights]

        return self._door.adopt(self._names, parameters, steps)


class _MachineOnceKnown:
    """The machine, its link measured with the most bytes that came at once so far."""

    def __init__(self) -> None:
        self._machine: Machine | None = None
        self._size_bytes = 0

    def learn(self, machine: Machine, size_bytes: int) -> None:
        if size_bytes > self._size_bytes:
            self._machine, self._size_bytes = machine, size_bytes

    def __call__(self) -> Machine:
        if self._machine is None:
            raise WrapError("no weights came yet, so nothing is known of the disk they are on")
        return self._machine


_doors: weakref.WeakSet[Door] = weakref.WeakSet()
_UNWRAPPED = (
    "this model was unwrapped, and its graphs are of no use any more: torch._dynamo.reset(), and compile it again if "
    "it is to be streamed"
)


def _as_it_is(
    module: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None, mode: str | None
) -> Callable[..., Any]:
    """Returns what runs a graph that reads no weights: nobody needs a plan or a disk for it, or perhaps a budget.

    Raises:
        ConfigError: the options make no sense. Without any the graph may belong to a model that is wrapped.
    """
    if options:
        config = _config_of(options, mode)
        settings = inductor_options(config)
        if config.compile is Compile.INDUCTOR:
            try:
                return compile_graph(module, example_inputs, settings)
            except inductor_failure() as error:
                logger.warning("a graph without weights cannot be compiled (%s); it runs as it was captured", error)
    return module.forward


def _wrapped_backend(
    parameters: Sequence[torch.nn.Parameter], options: Mapping[str, Any] | None, mode: str | None
) -> Backend | None:
    """Returns the backend of the model that these are weights of, if `mball.wrap` wrapped it."""
    own = {id(door.backend) for door in list(_doors)}
    for backend in backends():
        if id(backend) in own or not any(map(backend.manages, parameters)):
            continue
        if mode is not None:
            raise ConfigError(
                f"the model is wrapped already, with settings of its own, and mode={mode!r} is none of them: leave it "
                "out here, or call mball.unwrap(model) first and give it to mball.wrap, with compile='inductor'"
            )
        if options:
            budget = options.get("budget")
            budget_bytes = None if budget is None else parse_bytes(budget, what="budget")
            # Dynamo gives the options of the first capture for ever, whatever `set_budget` did since.
            known = {backend.config.budget_bytes, backend.engine.budget_bytes}
            if options.keys() != {"budget"} or budget_bytes not in known:
                raise ConfigError(
                    f"the model is wrapped already, with a budget of {format_bytes(backend.engine.budget_bytes)} and "
                    "settings of its own: leave options out, or call mball.unwrap(model) first"
                )
        return backend
    return None


def _config_of(options: Mapping[str, Any] | None, mode: str | None) -> Config:
    settings = dict(options or {})
    if mode is not None:
        settings.setdefault("mode", mode)
    if "budget" not in settings:
        raise ConfigError(
            "the backend 'mball' needs a budget: torch.compile(model, backend='mball', options={'budget': '6GiB'})"
            + ("; mode goes there too: options={'budget': '6GiB', 'compile': 'inductor', 'mode': ...}" if mode else "")
        )
    if "capture" in settings:
        raise ConfigError("capture is for mball.wrap: a backend of torch.compile is given graphs; leave it out")
    if str(settings.get("device", "cpu")) != "cpu":
        raise ConfigError(
            f"device is {settings['device']!r}: the backend 'mball' of torch.compile brings weights home on the CPU "
            "only, since Dynamo has looked where they are before it is asked. Wrap the model first: "
            "mball.wrap(model, budget=..., device=...), then torch.compile(model, backend='mball') without options"
        )
    if found := [name for name in _TORCH_COMPILE_HAS if name in settings]:
        raise ConfigError(f"{' and '.join(found)} is torch.compile's own: torch.compile(model, {found[0]}=...)")
    return Config.of(budget=settings.pop("budget"), **settings)


def _is_weight(value: Any) -> bool:
    return isinstance(value, torch.nn.Parameter) and value.numel() > 0


def _name_of(placeholder: torch.fx.Node) -> str:
    source = source_name(placeholder) or ""
    return ".".join(_PATH.findall(source)) or placeholder.name


def _unique(name: str, taken: set[str]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}#{number}"
    return found
