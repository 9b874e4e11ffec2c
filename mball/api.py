"""wrap, unwrap, balloon, report: the only place where the parts are put together."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch

from mball import torch_private
from mball.backend import Backend
from mball.config import Capture, Config, Io
from mball.errors import BudgetError, CheckpointError, WrapError
from mball.memory import CpuDevice, Device, Kind, Ledger
from mball.observe.report import Report
from mball.plan import make_plan, smallest_budget
from mball.run.census import Census, OwnedWeight, span_bytes, take_census
from mball.run.doors import Gate, Wrapped, hang_door, mix_in, mix_out
from mball.run.engine import Engine
from mball.run.execution import Execution
from mball.run.homes import PAGE_BYTES, Home, HomeFile, Homes, map_homes
from mball.schema import Machine, Plan, Step, Trace
from mball.storage import CheckpointIndex, DirectIO, FileTable, SwapFile, TensorEntry, ThreadedReader, measure_link
from mball.units import format_bytes, round_up

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")
_R = TypeVar("_R")
AdaptDevice = Callable[[Device], Device]

# Where vector instructions like their operands to begin.
WEIGHT_ALIGNMENT_BYTES = 64
NOT_COUNTED = ("Python and torch themselves", "graph capture", "workspace inside operators", "tensors the user keeps")


@dataclass(slots=True, kw_only=True)
class _State:
    """Everything that belongs to one call of `wrap` or `balloon`."""

    config: Config
    engine: Engine
    gate: Gate
    backend: Backend
    machine: Machine
    reader: ThreadedReader
    device: Device
    roots: tuple[weakref.ref[torch.nn.Module], ...]
    closer: weakref.finalize[..., torch.nn.Module]


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
        model: a module on the CPU, or on the meta device when `weights` is given.
        budget: bytes, or text such as ``"6GiB"``: a hard cap on weights, buffers and predicted activations.
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
        WrapError: the model cannot be wrapped. In every case the model is left as it was.
    """
    _wrap((model,), Config.of(budget=budget, **settings), weights, rename or {})
    return model


def _wrap(
    roots: tuple[torch.nn.Module, ...],
    config: Config,
    weights: str | os.PathLike[str] | None,
    rename: Mapping[str, str],
    adapt_device: AdaptDevice = lambda device: device,
) -> None:
    _check_roots(roots)
    census = take_census(roots)
    if not census.weights:
        raise WrapError("the model has no weights, so there is nothing to stream")
    index = None if weights is None else CheckpointIndex.open(weights)
    entries = None if index is None else _match(census, index, rename)
    new_buffers = _load_buffers(census, index, rename)
    fixed_bytes = census.buffer_bytes() + sum(tensor.nbytes for name, tensor in new_buffers.items())

    files = FileTable(direct=DirectIO.OFF if config.io is Io.BUFFERED else DirectIO.AUTO)
    swap = SwapFile.create(config.swap_dir)
    reader = None
    try:
        files.add_descriptor(swap.name, swap.fd)
        if entries is None:
            _refuse_meta(census)
            home_files, homes_in_order = _write_to_swap(census, swap)
        else:
            home_files, homes_in_order = _map_checkpoint(census, entries, swap, files)
        homes = Homes(homes_in_order, home_files, swap)
        machine = _measure(homes, files)
        expected = _expected_operators(roots, census)
        _check_budget(config, homes, machine, fixed_bytes, expected)
        reader = ThreadedReader(files, num_threads=config.io_threads)
        device = adapt_device(CpuDevice(reader))
        ledger = Ledger(config.budget_bytes)
        ledger.set(Kind.BUFFERS, fixed_bytes)
        arena = device.arena(config.budget_bytes)
        engine = Engine(
            homes=homes,
            execution=Execution(device, arena, homes),
            ledger=ledger,
            plan=functools.partial(_plan, machine=machine, fixed_bytes=fixed_bytes),
            fixed_bytes=fixed_bytes,
            expected=expected,
            verify_files=index.verify_unchanged if index is not None else _nothing_to_verify,
        )
    except BaseException:
        if reader is not None:
            reader.close()
        files.close()
        swap.close()
        raise

    # Nothing above changed the model; nothing below fails.
    parameters = _move_in(census, homes)
    for name, tensor in new_buffers.items():
        owner = census.buffer_owners[name]
        owner.module._buffers[owner.attribute] = tensor
    gate = Gate(engine, parameters, roots)
    backend = Backend(gate, parameters, [b for root in roots for b in root.buffers()])
    _hang_doors(roots, gate, backend, config)
    closer = weakref.finalize(roots[0], _close, engine, reader, files)
    state = _State(
        config=config,
        engine=engine,
        gate=gate,
        backend=backend,
        machine=machine,
        reader=reader,
        device=device,
        roots=tuple(weakref.ref(root) for root in roots),
        closer=closer,
    )
    for root in roots:
        _states[root] = state
    logger.info(
        "%d weights, %s, under a budget of %s",
        len(homes),
        format_bytes(sum(home.span_bytes for home in homes.homes)),
        format_bytes(config.budget_bytes),
    )


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """Gives `model` its weights back as ordinary tensors in memory, and returns it.

    All modules that were wrapped together are unwrapped together.

    Raises:
        WrapError: the model is not wrapped.
    """
    state = _state_of(model)
    roots = [root for ref in state.roots if (root := ref()) is not None]
    fresh: dict[int, torch.Tensor] = {}
    for parameter, home in state.gate.pairs():
        if id(home) not in fresh:
            fresh[id(home)] = home.clone(memory_format=torch.preserve_format)
        parameter.data = fresh[id(home)]
    for root in roots:
        for module in root.modules():
            torch_private.set_call(module, None)
        mix_out(root)
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


def report(model: torch.nn.Module) -> Report:
    """Returns what the wrapped model holds, moves and takes.

    Raises:
        WrapError: the model is not wrapped.
    """
    state = _state_of(model)
    engine, ledger = state.engine, state.engine.ledger
    plan, last = engine.plan, engine.last
    resident = streamed = arena = activations = 0
    if plan is not None:
        resident = _weight_bytes(plan, [placement.bundle for placement in plan.residents], engine)
        streamed = plan.prediction.streamed_bytes
        arena, activations = plan.arena_bytes, plan.activation_bytes
    compute_s = max(last.wall_s - last.stall_s, 0.0)
    roofline_s = max(compute_s, last.bytes_read / state.machine.link.bandwidth_bytes_per_s)
    return Report(
        budget_bytes=state.config.budget_bytes,
        peak_bytes=ledger.peak_bytes,
        buffer_bytes=engine.fixed_bytes,
        activation_bytes=activations,
        arena_bytes=arena,
        weight_bytes=sum(weight.size_bytes for weight in engine.weights),
        resident_bytes=resident,
        streamed_bytes_per_pass=streamed,
        bytes_read=engine.execution.counters.bytes_read,
        bytes_read_last_pass=last.bytes_read,
        passes=engine.passes,
        pass_s=last.wall_s,
        compute_s=compute_s,
        stall_s=last.stall_s,
        roofline_s=roofline_s,
        measured_over_roofline=last.wall_s / roofline_s if roofline_s else None,
        link_bytes_per_s=state.machine.link.bandwidth_bytes_per_s,
        io_path=state.reader.path,
        weights_managed=len(engine.homes),
        weights_owned=len(_census_of(state).weights),
        weights_read=len(engine.weights_read),
        graphs=len(state.backend.runners),
        steps=last.steps,
        unplanned_fetches=last.unplanned_fetches,
        in_place_bytes=last.in_place_bytes,
        swap_bytes=engine.homes.swap.size_bytes,
        not_counted=NOT_COUNTED,
    )


def trace_and_plan(model: torch.nn.Module) -> tuple[Trace, Plan]:
    """Returns the trace and the plan of the pass that ran last.

    Raises:
        WrapError: the model is not wrapped, or nothing ran yet.
    """
    engine = _state_of(model).engine
    if engine.trace is None or engine.plan is None:
        raise WrapError("nothing ran yet, so there is no trace; call the model once")
    return engine.trace, engine.plan


# -- the parts of wrap ---------------------------------------------------------------------------------------------


def _state_of(model: torch.nn.Module) -> _State:
    state = _states.get(model)
    if state is None:
        raise WrapError(
            f"this {type(model).__name__} is not wrapped by mball; call mball.wrap(model, budget=...) first"
        )
    return state


def _census_of(state: _State) -> Census:
    return take_census([root for ref in state.roots if (root := ref()) is not None])


def _weight_bytes(plan: Plan, bundles: Sequence[int], engine: Engine) -> int:
    return sum(engine.weights[weight].size_bytes for bundle in bundles for weight in plan.bundles[bundle].weights)


def _check_roots(roots: Sequence[torch.nn.Module]) -> None:
    for root in roots:
        if not isinstance(root, torch.nn.Module):
            raise WrapError(f"mball wraps torch.nn.Module objects, not {type(root).__name__}")
        for name, module in root.named_modules():
            where = f"its module {name!r}" if name else "it"
            if isinstance(module, Wrapped):
                raise WrapError(f"{type(root).__name__}: {where} is wrapped already; call mball.unwrap first")
            if torch_private.get_call(module) is not None:
                raise WrapError(
                    f"{type(root).__name__}: {where} is compiled in place or belongs to a wrapped model; mball "
                    "captures the model itself: wrap it before, or instead of, compiling"
                )


def _refuse_meta(census: Census) -> None:
    on_meta = [weight.name for weight in census.weights if weight.parameter.is_meta]
    if on_meta:
        raise WrapError(
            f"{len(on_meta)} weights are on the meta device ({on_meta[0]!r} first) and no checkpoint was given: "
            "pass weights=<safetensors file or directory>"
        )


def _match(census: Census, index: CheckpointIndex, rename: Mapping[str, str]) -> list[TensorEntry]:
    """Returns the checkpoint's entry of every weight.

    Raises:
        CheckpointError: a weight is missing, or has another shape or dtype there.
    """
    entries = []
    for weight in census.weights:
        entry = _find(weight.names, index, rename)
        if entry is None:
            near = ", ".join(list(index.entries)[:3])
            raise CheckpointError(
                f"weight {weight.name!r} is not in checkpoint {index.path} ({len(index.entries)} tensors: {near}, …); "
                "use the checkpoint of this model, or rename={parameter: name in the checkpoint}"
            )
        _check_entry(weight, entry, index)
        entries.append(entry)
    return entries


def _find(names: Sequence[str], index: CheckpointIndex, rename: Mapping[str, str]) -> TensorEntry | None:
    # A tied weight is stored under one of its names.
    return next((e for name in names if (e := index.entries.get(rename.get(name, name))) is not None), None)


def _check_entry(weight: OwnedWeight, entry: TensorEntry, index: CheckpointIndex) -> None:
    parameter = weight.parameter
    dtype = str(parameter.dtype).removeprefix("torch.")
    if entry.shape != tuple(parameter.shape):
        raise CheckpointError(
            f"weight {weight.name!r} has shape {tuple(parameter.shape)}, but {entry.name!r} in checkpoint {index.path} "
            f"has {entry.shape}; use the checkpoint of this model"
        )
    if entry.dtype != dtype:
        raise CheckpointError(
            f"weight {weight.name!r} is {dtype}, but {entry.name!r} in checkpoint {index.path} is {entry.dtype}, and a "
            f"checkpoint is read in place: build the model in {entry.dtype} "
            f"(model.to(torch.{entry.dtype})), or load it and wrap it without weights="
        )


def _load_buffers(census: Census, index: CheckpointIndex | None, rename: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Returns real tensors for the buffers that the checkpoint holds or that are on the meta device."""
    loaded: dict[str, torch.Tensor] = {}
    for name, buffer in census.buffers.items():
        if not buffer.is_meta:
            continue
        entry = None if index is None else index.entries.get(rename.get(name, name))
        if entry is not None:
            if entry.shape != tuple(buffer.shape) or entry.dtype != str(buffer.dtype).removeprefix("torch."):
                raise CheckpointError(
                    f"buffer {name!r} is {buffer.dtype} {tuple(buffer.shape)}, but {entry.name!r} in the checkpoint is "
                    f"{entry.dtype} {entry.shape}; use the checkpoint of this model"
                )
            loaded[name] = _read_tensor(entry)
        elif buffer.is_meta:
            raise CheckpointError(
                f"buffer {name!r} is on the meta device and not in the checkpoint: build the model with real buffers "
                "(only its parameters on the meta device), or use mball.integrations.transformers.from_pretrained"
            )
    return loaded


def _read_tensor(entry: TensorEntry) -> torch.Tensor:
    tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    if entry.size_bytes:
        with open(entry.file, "rb") as file:
            file.seek(entry.offset_bytes)
            file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return tensor


def _write_to_swap(census: Census, swap: SwapFile) -> tuple[dict[str, HomeFile], list[Home]]:
    offsets, end = [], 0
    for weight in census.weights:
        offsets.append(end)
        end = round_up(end + span_bytes(weight.parameter), WEIGHT_ALIGNMENT_BYTES)
    start = swap.allocate(end)
    placed = []
    for weight, offset in zip(census.weights, offsets, strict=True):
        data = weight.parameter.detach()
        flat = data.as_strided((span_bytes(data) // data.element_size(),), (1,))
        swap.write(start + offset, flat.view(torch.uint8).numpy())
        placed.append((weight.name, start + offset, data))
    swap.flush()
    home_file, homes = map_homes(swap.name, swap.fd, swap, placed)
    return {swap.name: home_file}, homes


def _map_checkpoint(
    census: Census, entries: Sequence[TensorEntry], swap: SwapFile, files: FileTable
) -> tuple[dict[str, HomeFile], list[Home]]:
    by_file: dict[str, list[int]] = {}
    for number, entry in enumerate(entries):
        by_file.setdefault(entry.file, []).append(number)
    home_files, homes = {}, dict[int, Home]()
    for path, numbers in by_file.items():
        files.add_path(path)
        placed = []
        for number in numbers:
            like = torch.empty(entries[number].shape, dtype=getattr(torch, entries[number].dtype), device="meta")
            placed.append((census.weights[number].name, entries[number].offset_bytes, like))
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            home_files[path], mapped = map_homes(path, descriptor, swap, placed)
        finally:
            os.close(descriptor)
        homes.update(zip(numbers, mapped, strict=True))
    return home_files, [homes[number] for number in range(len(entries))]


def _measure(homes: Homes, files: FileTable) -> Machine:
    largest = max(homes.homes, key=lambda home: home.span_bytes)
    link = measure_link(files, largest.file)
    return Machine(name="this machine", page_bytes=PAGE_BYTES, alignment_bytes=PAGE_BYTES, link=link)


def _expected_operators(roots: Sequence[torch.nn.Module], census: Census) -> list[tuple[int, ...]]:
    """Returns in module order the weights that one operator will probably read together.

    A module with a weight and a bias reads both at once; one with more of them (a recurrent one) reads them in parts.
    """
    of_module: dict[int, list[int]] = {}
    for number, weight in enumerate(census.weights):
        for owner in weight.owners:
            of_module.setdefault(id(owner.module), []).append(number)
    expected: list[tuple[int, ...]] = []
    for module in {id(module): None for root in roots for module in root.modules()}:
        own = tuple(dict.fromkeys(of_module.get(module, ())))
        if len(own) <= 2:
            expected += [own] if own else []
        else:
            expected += [(weight,) for weight in own]
    return expected


def _check_budget(
    config: Config, homes: Homes, machine: Machine, fixed_bytes: int, expected: Sequence[tuple[int, ...]]
) -> None:
    steps = tuple(
        Step(
            name=homes.homes[weights[0]].name.rpartition(".")[0] or "the model",
            graph=None,
            reads=weights,
            scratch_bytes=0,
            flops=0,
            time_s=0.0,
        )
        for weights in expected
    )
    trace = Trace(name="one module at a time", weights=homes.schema(), steps=steps)
    smallest = smallest_budget(trace, machine, fixed_bytes=fixed_bytes)
    if config.budget_bytes < smallest.size_bytes:
        raise BudgetError(
            f"a budget of {format_bytes(config.budget_bytes)} ({config.budget_bytes} B) is too small: the smallest "
            f"that holds the model one module at a time is {smallest.size_bytes} B "
            f"({format_bytes(smallest.size_bytes)}), set by {smallest.limited_by}; activations come on top",
            budget_bytes=config.budget_bytes,
            smallest_bytes=smallest.size_bytes,
            limited_by=smallest.limited_by,
        )


def _plan(trace: Trace, budget_bytes: int, *, machine: Machine, fixed_bytes: int) -> Plan:
    return make_plan(trace, machine, budget_bytes, fixed_bytes=fixed_bytes)


def _nothing_to_verify() -> None:
    """A swap file has no name: nobody can change it."""


def _move_in(census: Census, homes: Homes) -> list[tuple[torch.nn.Parameter, int]]:
    """Makes every parameter its home; returns all parameters with the weight each of them is."""
    parameters = []
    for number, (weight, home) in enumerate(zip(census.weights, homes.homes, strict=True)):
        moved: dict[int, torch.nn.Parameter] = {}
        for owner in weight.owners:
            old = owner.module._parameters[owner.attribute]
            assert old is not None
            if id(old) not in moved:
                moved[id(old)] = _at_home(old, home.tensor)
                parameters.append((moved[id(old)], number))
            if moved[id(old)] is not old:
                # Through setattr, since some modules keep lists of their own parameters.
                setattr(owner.module, owner.attribute, moved[id(old)])
    return parameters


def _at_home(parameter: torch.nn.Parameter, home: torch.Tensor) -> torch.nn.Parameter:
    if parameter.is_meta:
        fresh = torch.nn.Parameter(home, requires_grad=parameter.requires_grad)
        fresh.__dict__.update(parameter.__dict__)
        return fresh
    parameter.data = home
    return parameter


def _hang_doors(roots: Sequence[torch.nn.Module], gate: Gate, backend: Backend, config: Config) -> None:
    capture = config.capture
    missing = torch_private.missing_for_capture()
    if capture is Capture.GRAPHS and missing:
        logger.warning("this torch lacks %s: no graphs are captured, operators are watched instead", ", ".join(missing))
        capture = Capture.OPERATORS
    for root in roots:
        for module in root.modules():
            if torch_private.get_call(module) is None and any(True for _ in module.parameters()):
                hang_door(module, gate)
        if capture is Capture.GRAPHS:
            hang_door(root, gate, torch_private.compile_faithfully(torch_private.plain_call(root), backend))
        mix_in(root, gate)


def _close(engine: Engine, reader: ThreadedReader, files: FileTable) -> None:
    engine.close()
    reader.close()
    files.close()
