"""wrap, unwrap, balloon, set_budget, report, timeline, save_trace: the only place where the parts are put together."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from mball.assembly import Machinery, Storage, inductor_options
from mball.backend import Backend
from mball.backend_door import Door, find_door
from mball.compute import OpenCompute, open_compute
from mball.config import Capture, Compile, Config, Io
from mball.errors import ConfigError, WrapError
from mball.forecast import check_budget, expected_operators, measure_machine
from mball.gds import choose_way
from mball.integrations import make_faithful
from mball.memory import Kind
from mball.observe.report import Report
from mball.run.census import Census, count_weights, take_census
from mball.run.checkpoint_match import load_buffers, match_weights
from mball.run.doors import Gate, Wrapped, hang_door, mix_in, mix_out, mixed_class
from mball.run.engine import Engine
from mball.run.home_sources import map_checkpoint, write_homes
from mball.run.homes import Homes, refuse_misaligned
from mball.run.placed import displace, place
from mball.run.tenants import buffer_bytes, move_buffers, move_in, move_out, place_buffers, return_buffers
from mball.run.tiers import TieredCall
from mball.schema import LiveRange, Plan, Tensor, Trace
from mball.snapshot import take_report, take_timeline
from mball.storage import CheckpointIndex, TensorEntry
from mball.torch_private.calls import get_call, inner_module, plain_call, set_call
from mball.torch_private.capture import compile_call
from mball.torch_private.faked import fake_homes_on
from mball.torch_private.probes import missing_for_capture
from mball.units import format_bytes, parse_bytes
from mball.whole_files import replace_file

logger = logging.getLogger(__name__)

_HOW = {
    Capture.AUTO: "operator by operator until capturing graphs has paid (capture='graphs' captures at once)",
    Capture.GRAPHS: "in captured steps (compile='inductor' has them compiled)",
    Capture.OPERATORS: "operator by operator",
}

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(slots=True, kw_only=True)
class _State:
    """Everything that belongs to one call of `wrap` or `balloon`."""

    machinery: Machinery
    gate: Gate
    backend: Backend
    moved: list[tuple[weakref.ref[torch.nn.Module], str]]  # the buffers that went to the compute device
    roots: tuple[weakref.ref[torch.nn.Module], ...]
    closer: weakref.finalize[..., torch.nn.Module]

    @property
    def engine(self) -> Engine:
        return self.machinery.engine

    def settle(self) -> None:
        """Nothing to do: every pass ends with its call."""


_states: weakref.WeakKeyDictionary[torch.nn.Module, _State] = weakref.WeakKeyDictionary()


def wrap(
    model: torch.nn.Module,
    budget: int | str,
    weights: str | os.PathLike[str] | None = None,
    *,
    rename: Mapping[str, str] | None = None,
    **settings: Any,
) -> torch.nn.Module:
    """Makes `model` run under a memory budget, in place.

    Args:
        model: a module on the CPU, or on the meta device when `weights` is given. With ``device="cuda"`` its weights
            stay in host memory; buffers move to the GPU, and inputs belong there (``model.device``).
        budget: bytes, or text such as ``"6GiB"``: a hard cap on weights, buffers and predicted activations on the
            device that computes.
        weights: a safetensors file or checkpoint directory to read the weights from, in place. Without it the
            model's own weights are written once to a swap file.
        rename: for parameters and buffers that have another name in the checkpoint, that name.
        settings: see `mball.Config`.

    Returns:
        The same module. `mball.unwrap` gives it back its weights.

    Raises:
        ConfigError: a setting cannot be read.
        BudgetError: the budget is too small even for the weights of one module; it names the smallest.
        CheckpointError: the checkpoint is missing, damaged or does not fit the model.
        StorageError: the swap file cannot be written.
        DeviceError: the device is not there, or lacks memory or something else that is needed.
        WrapError: the model cannot be wrapped. In every case the model is left as it was.
    """
    _wrap((model,), Config.of(budget=budget, **settings), weights, rename or {})
    return model


def _wrap(
    roots: tuple[torch.nn.Module, ...],
    config: Config,
    weights: str | os.PathLike[str] | None,
    rename: Mapping[str, str],
    open_compute: OpenCompute = open_compute,
) -> None:
    _check_roots(roots)
    options = inductor_options(config)
    capture = _capture_of(config)
    if config.io is Io.GDS and weights is None:
        raise ConfigError(
            "io='gds' has a checkpoint go straight to a GPU, and without weights= the weights lie in the swap file: "
            "give weights, or leave io out"
        )
    for root in roots:
        _check_derivable(root)
    census = take_census(roots)
    if not census.weights:
        raise WrapError("the model has no weights, so there is nothing to stream")
    index = None if weights is None else CheckpointIndex.open(weights)
    entries = None if index is None else match_weights(census, index, rename)
    new_buffers = load_buffers(census, index, rename)
    with contextlib.ExitStack() as undo:
        storage = Storage.open(config)
        undo.callback(storage.close)
        for file in () if index is None else index.files:
            storage.files.add_path(file.path)  # which disk they lie on decides how they are read
        compute = open_compute(config, storage.files)
        undo.callback(compute.close)
        homes = _homes(census, entries, storage)
        largest = max(homes.homes, key=lambda home: home.span_bytes)
        refuse_misaligned(homes.homes, compute.device.place)
        machine = measure_machine(homes.homes, storage.files, compute.choice, compute.link)
        expected = expected_operators(roots, census)
        in_buffers_bytes = buffer_bytes(census, new_buffers, compute.device.place)

        def check_room(staging_bytes: int) -> None:
            check_budget(
                config.budget_bytes,
                config.host_budget_bytes,
                homes.homes,
                machine,
                in_buffers_bytes + staging_bytes + compute.rounded_bytes,
                expected,
            )

        compute = choose_way(compute, config, storage.files, largest.file, check_room=check_room)
        check_room(compute.staging_bytes)
        moved = move_buffers(census, new_buffers, compute.device.place)
        machinery = Machinery.start(
            config,
            storage,
            homes,
            compute,
            lambda: machine,
            buffer_bytes=in_buffers_bytes,
            expected=expected,
            # A file that another one replaced is still the one that is mapped and read.
            verify_files=_nothing_to_verify
            if index is None
            else functools.partial(index.verify_unchanged, storage.files.stat),
        )
        undo.pop_all()

    # Nothing above changed the model; nothing below fails.
    parameters = move_in(census, homes.homes)
    place_buffers(census, {**new_buffers, **moved})
    if compute.device.place.type != "cpu":
        place((module for root in roots for module in root.modules()), compute.device.place)
    fake_homes_on(compute.device.place, homes)
    buffers = [buffer for root in roots for buffer in root.buffers()]
    if capture is not Capture.GRAPHS:
        machinery.engine.live.count_inputs(buffers)
    gate = Gate(machinery.engine, parameters, roots)
    if config.compile is Compile.EAGER:
        make_faithful()
    backend = Backend(gate, parameters, buffers, config, options)
    _hang_doors(roots, gate, backend, config, capture)
    state = _State(
        machinery=machinery,
        gate=gate,
        backend=backend,
        moved=[(weakref.ref(owner.module), owner.attribute) for owner in map(census.buffer_owners.get, moved) if owner],
        roots=tuple(weakref.ref(root) for root in roots),
        closer=weakref.finalize(roots[0], machinery.close_dropped),
    )
    for root in roots:
        _states[root] = state
    logger.info(
        "%d weights, %s, under a budget of %s; the model runs %s",
        len(homes),
        format_bytes(sum(home.span_bytes for home in homes.homes)),
        format_bytes(config.budget_bytes),
        _HOW[capture] if config.compile is Compile.EAGER else "compiled",
    )


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """Gives `model` its weights back as ordinary tensors in memory, and returns it.

    All modules that were wrapped together are unwrapped together. Models that share a budget because they were
    compiled with equal options are not: the others go on, unless they hold the very same Parameters.

    Raises:
        WrapError: the model is not wrapped.
    """
    state = _state_of(model)
    if isinstance(state, Door):
        inner = inner_module(model)
        state.release(inner.parameters())
        set_call(inner, None)  # `model.compile(backend="mball")` set it
        return model
    roots = [root for ref in state.roots if (root := ref()) is not None]
    move_out(state.gate.pairs())
    return_buffers([(module, name) for ref, name in state.moved if (module := ref()) is not None])
    for root in roots:
        for module in root.modules():
            set_call(module, None)
        mix_out(root)
        displace(root.modules())
        del _states[root]
    state.closer()
    return model


@contextmanager
def _ballooned(modules: Sequence[torch.nn.Module], config: Config) -> Iterator[None]:
    _wrap(tuple(modules), config, None, {})
    try:
        yield
    finally:
        unwrap(modules[0])


class balloon:  # noqa: N801 - used like a function
    """Wraps modules together, under one budget, for a while; they are unwrapped on exit.

    As a context manager: ``with mball.balloon(encoder, decoder, budget="2GiB"): ...``. As a decorator:
    ``@mball.balloon(budget="2GiB")`` wraps the modules found among the function's arguments during each call,
    besides those that are named.

    Args:
        modules: the modules; for a decorator they may be left out.
        budget: as for `mball.wrap`.
        settings: as for `mball.wrap`.
    """

    def __init__(self, *modules: torch.nn.Module, budget: int | str, **settings: Any) -> None:
        self._modules = modules
        self._config = Config.of(budget=budget, **settings)
        self._open: list[Any] = []

    def __enter__(self) -> balloon:
        if not self._modules:
            raise WrapError("mball.balloon was given no modules; name them: mball.balloon(model, budget=...)")
        context = _ballooned(self._modules, self._config)
        context.__enter__()
        self._open.append(context)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.pop().__exit__(*error)

    def __call__(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def ballooned(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            found = [*self._modules]
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.nn.Module) and all(value is not other for other in found):
                    found.append(value)
            if not found:
                raise WrapError(f"{function.__name__} was called without a module among its arguments")
            with _ballooned(found, self._config):
                return function(*args, **kwargs)

        return ballooned


def set_budget(model: torch.nn.Module, budget: int | str) -> None:
    """Changes the budget of a wrapped model between two of its calls.

    Nothing is captured or compiled anew, and most weights that both budgets let stay are not read again. With a smaller
    budget memory is given back before this returns; a larger one fills as the next passes read. The peaks of
    `mball.report` begin anew. Calls in other threads are waited for. Modules that share a budget share the new one.

    A graph that was compiled in one piece because all of it fitted runs in steps that are not compiled while it does
    not fit; ``step_bytes`` has it compiled in steps at once. After ``torch.compile(model, backend="mball")`` nobody
    says where a call ends: the pass that is open is taken to end here.

    Args:
        model: the wrapped model.
        budget: as for `mball.wrap`.

    Raises:
        ConfigError: the budget cannot be read.
        BudgetError: it is too small for one module, or for a pass like those that ran; it names the smallest.
        WrapError: the model is not wrapped, or this is called in the middle of one of its calls.
        DeviceError: the device has not so much memory. In every case the budget is what it was.
    """
    state = _state_of(model)
    budget_bytes = parse_bytes(budget, what="budget")
    engine = state.engine
    with engine.lock:
        if engine.in_pass:
            raise WrapError("set_budget was called in the middle of a call of the model; call it before or after")
        state.settle()
        machine = state.machinery.machine()
        fixed_bytes = engine.fixed_bytes + state.machinery.compute.rounded_bytes
        host_budget_bytes = state.machinery.host_budget_bytes
        check_budget(budget_bytes, host_budget_bytes, engine.homes.homes, machine, fixed_bytes, engine.expected)
        engine.set_budget(budget_bytes)
    logger.info("the budget is %s now", format_bytes(budget_bytes))


def report(model: torch.nn.Module) -> Report:
    """Returns what the wrapped model holds, moves and takes.

    Raises:
        WrapError: the model is not wrapped.
    """
    state = _state_of(model)
    state.settle()
    roots = [model] if isinstance(state, Door) else [root for ref in state.roots if (root := ref()) is not None]
    return take_report(
        state.engine,
        policy=state.machinery.policy.value,
        machine=state.machinery.machine(),
        io_path=state.machinery.compute.io_path,
        weights_owned=count_weights(roots),
        graphs=len(state.backend.runners),
    )


def timeline(model: torch.nn.Module, path: str | os.PathLike[str]) -> Path:
    """Writes what ran when in the last pass that ended well to `path`, and returns that.

    Compute, stalls and reads have a lane each. ``.json`` and ``.json.gz`` are Chrome traces, which Perfetto
    (ui.perfetto.dev) opens; ``.png`` is a picture, and needs ``pip install 'mball[plot]'``.

    Raises:
        WrapError: the model is not wrapped, or no pass ended well yet.
        ConfigError: `path` has another suffix.
        StorageError: the file cannot be written.
        MballError: a picture without matplotlib.
    """
    state = _state_of(model)
    state.settle()
    taken = take_timeline(state.engine)
    if taken is None:
        raise WrapError("no pass ended well yet, so there is no timeline; call the model once")
    return taken.save(path)


def save_trace(model: torch.nn.Module, path: str | os.PathLike[str]) -> Path:
    """Writes what is known of the pass that ran last, as JSON, and returns `path`: ``mball plan`` plans it.

    Steps with the weights they read, sizes, and what lives between them; no bytes of a weight. Times of captured graphs
    are measured from their second run on; those of single operators are guessed from sizes, and one activation stands
    for the room that was kept for them. Buffers are an activation that always lives.

    Raises:
        WrapError: the model is not wrapped, or nothing ran yet.
        ConfigError: `path` does not end in ``.json``.
        StorageError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix != ".json":
        raise ConfigError(f"a trace cannot be written to {str(target)!r}: its suffix must be .json")
    state = _state_of(model)
    with state.engine.lock:
        trace, _ = trace_and_plan(model)
    if size_bytes := state.engine.ledger.account(Kind.BUFFERS).current_bytes:
        buffers = Tensor.activation("buffers", size_bytes=size_bytes, live=LiveRange(first=0, end=len(trace.steps)))
        trace = replace(trace, tensors=(*trace.tensors, buffers))
    replace_file(target, trace.to_json().encode(), "trace")
    return target


def trace_and_plan(model: torch.nn.Module) -> tuple[Trace, Plan]:
    """Returns the trace and the plan of the pass that ran last.

    Raises:
        WrapError: the model is not wrapped, or nothing ran yet.
    """
    state = _state_of(model)
    state.settle()
    engine = state.engine
    if engine.trace is None or engine.plan is None:
        raise WrapError("nothing ran yet, so there is no trace; call the model once")
    return engine.trace, engine.plan


# -- the parts of wrap ---------------------------------------------------------------------------------------------


def find_state(model: torch.nn.Module) -> _State | Door | None:
    """Returns what runs a model, None if it is not wrapped."""
    inner = inner_module(model)
    return _states.get(inner) or find_door(inner)


def _state_of(model: torch.nn.Module) -> _State | Door:
    state = find_state(model)
    if state is None:
        raise WrapError(
            f"this {type(inner_module(model)).__name__} is not wrapped by mball; call mball.wrap(model, budget=...) "
            "first (or, after torch.compile(model, backend='mball', ...), call the compiled model once)"
        )
    return state


def _check_roots(roots: Sequence[torch.nn.Module]) -> None:
    for root in roots:
        if not isinstance(root, torch.nn.Module):
            raise WrapError(f"mball wraps torch.nn.Module objects, not {type(root).__name__}")
        for name, module in root.named_modules():
            where = f"its module {name!r}" if name else "it"
            if isinstance(module, Wrapped):
                raise WrapError(f"{type(root).__name__}: {where} is wrapped already; call mball.unwrap first")
            if get_call(module) is not None:
                raise WrapError(
                    f"{type(root).__name__}: {where} is compiled in place or belongs to a wrapped model; mball "
                    "captures the model itself: wrap it before, or instead of, compiling"
                )


def _capture_of(config: Config) -> Capture:
    capture = config.capture
    if capture is Capture.AUTO and (config.compile is Compile.INDUCTOR or config.fullgraph):
        capture = Capture.GRAPHS
    missing = missing_for_capture()
    if capture is Capture.GRAPHS and missing:
        logger.warning("this torch lacks %s: no graphs are captured, operators are watched instead", ", ".join(missing))
    return Capture.OPERATORS if missing else capture


def _homes(census: Census, entries: Sequence[TensorEntry] | None, storage: Storage) -> Homes:
    if entries is not None:
        return map_checkpoint(census, entries, storage.swap)
    file, homes = write_homes(census.weights, storage.swap)
    return Homes(homes, [file], storage.swap)


def _nothing_to_verify() -> None:
    """A swap file has no name: nobody can change it."""


def _check_derivable(root: torch.nn.Module) -> None:
    try:
        mixed_class(type(root))
    except TypeError as error:
        raise WrapError(
            f"{type(root).__name__} cannot be derived from ({error}), and mball derives a class to wrap it: put the "
            "model into a plain module and wrap that"
        ) from error


def _hang_doors(
    roots: Sequence[torch.nn.Module],
    gate: Gate,
    backend: Backend,
    config: Config,
    capture: Capture,
) -> None:
    for root in roots:
        for module in root.modules():
            if get_call(module) is None and any(True for _ in module.parameters()):
                hang_door(module, gate)
        if capture is not Capture.OPERATORS:
            plain = plain_call(root)
            compiled = functools.partial(
                compile_call,
                plain,
                backend,
                before_capture=gate.engine.capture.begin,
                faithful=config.compile is Compile.EAGER,
                fullgraph=config.fullgraph,
            )
            call = compiled(dynamic=config.dynamic)
            if capture is Capture.AUTO:
                # Where sizes differed so far a graph for one of them would soon be captured again.
                varied = call if config.dynamic is not None else compiled(dynamic=True)
                call = TieredCall(gate.engine, gate.mode, plain, call, varied)
            hang_door(root, gate, call)
        mix_in(root, mixed_class(type(root)), gate)
