"""The private torch APIs that mball stands on, in one place; `probe` says which of them this torch has.

If one that capture needs is missing, `missing_for_capture` says so and `mball.wrap` runs the model through the dispatch
mode alone: the same results and the same budget, without the knowledge that a captured graph gives.

What has been there for years is used where it is needed: the kinds of operators in `torch._ops`, `torch._neg_view`, a
tensor's `_version`, a module's `_parameters` and `_modules`.
"""

from __future__ import annotations

import contextlib
import importlib
import operator
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateApi:
    """One private API: where it lives, what mball does with it, and whether this torch has it."""

    name: str
    purpose: str
    found: bool


_USED = (
    ("torch.utils._python_dispatch.TorchDispatchMode", "binds weights that operators outside graphs read"),
    (
        "torch.utils._python_dispatch.TorchDispatchMode.ignore_compile_internals",
        "lets graphs be captured while the dispatch mode is active",
    ),
    ("torch.nn.Module._call_impl", "opens a pass at every module call"),
    ("torch.nn.Module._compiled_call_impl", "opens a pass at every module call"),
    (
        "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
        "keeps the dispatch mode away from captured graphs",
    ),
    ("torch._C._DisableTorchDispatch", "keeps the dispatch mode away from captured graphs"),
    ("torch._dynamo.config.skip_nnmodule_hook_guards", "notices hooks that come after capture"),
    ("torch._dynamo.callback.callback_handler", "says when a capture begins, so that its memory is known"),
    ("torch._inductor.compile_fx.compile_fx_inner", "compiles one step (compile='inductor')"),
    (
        "torch._functorch._aot_autograd.descriptors.PlainAOTInput",
        "finds weights in the graph of basic operators (compile='inductor')",
    ),
    ("torch._TorchCompileInductorWrapper", "checks mode and options (compile='inductor')"),
    ("torch._guards.Source.name", "names the weights of graphs that come without their module"),
    ("torch._ops.OpOverload", "tells views and writes from reads"),
    ("torch.utils.flop_counter.flop_registry", "counts floating point operations"),
    ("torch.autograd.graph.increment_version", "makes autograd notice that a slot was reused"),
)
__all__ = [
    "PrivateApi",
    "TorchDispatchMode",
    "argument_of",
    "capturing",
    "compile_call",
    "compile_graph",
    "compile_piece",
    "compile_through_inductor",
    "count_flops",
    "count_node_flops",
    "example_value",
    "get_call",
    "hint_of",
    "inductor_failure",
    "inductor_settings",
    "inner_module",
    "is_elementwise",
    "is_only_mode",
    "is_reduction",
    "is_size",
    "is_subclass",
    "kind_of",
    "known_of",
    "missing_for_capture",
    "no_autocast_cache",
    "numbered_symbol",
    "plain_call",
    "probe",
    "set_call",
    "source_name",
    "storage_key",
    "symbol_of",
    "symbols_of",
    "takes_part_of_tuple",
    "unified",
    "without_dispatch",
    "writes_and_aliases",
    "writes_argument",
]

CAPTURE_NEEDS = frozenset(
    {
        "torch.utils._python_dispatch.TorchDispatchMode.ignore_compile_internals",
    }
)


def probe() -> list[PrivateApi]:
    """Returns all private APIs that mball uses, found or not."""
    return [PrivateApi(name=name, purpose=purpose, found=_exists(name)) for name, purpose in _USED]


def _exists(name: str) -> bool:
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for attribute in parts[split:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def missing_for_capture() -> list[str]:
    """Returns the names without which graphs cannot be captured beside the dispatch mode."""
    # Only these are looked for: looking for Inductor's imports it, which takes seconds.
    return [name for name in CAPTURE_NEEDS if not _exists(name)]


def set_call(module: torch.nn.Module, call: Callable[..., Any] | None) -> None:
    """Makes `module(...)` run `call(...)`; None restores the plain call.

    This is the attribute that `Module.compile` sets. Dynamo traces through the module's own call and
    does not see it, and pickling drops it.
    """
    module._compiled_call_impl = call


def get_call(module: torch.nn.Module) -> Callable[..., Any] | None:
    """Returns what `set_call` or `Module.compile` set, or None."""
    call: Callable[..., Any] | None = module._compiled_call_impl
    return call


def plain_call(module: torch.nn.Module) -> Callable[..., Any]:
    """Returns the module's call with its hooks, without any replacement."""
    call: Callable[..., Any] = module._call_impl
    return call


def storage_key(tensor: torch.Tensor) -> int:
    """Returns a number that all tensors over the same storage share while it lives."""
    key: int = tensor.untyped_storage()._cdata
    return key


def example_value(node: torch.fx.Node) -> Any:
    """Returns the fake value that Dynamo or AOTAutograd recorded for `node`, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def writes_and_aliases(func: Any) -> tuple[frozenset[str | int], bool]:
    """Returns which arguments operator `func` writes (positions and names), and whether it returns an alias of one.

    The facts come from the operator's schema.
    """
    schema = func._schema
    writes: set[str | int] = set()
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            writes.add(argument.name)
            if not argument.kwarg_only:
                writes.add(position)
    return frozenset(writes), any(result.alias_info is not None for result in schema.returns)


def count_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Returns the floating point operations of one operator call, 0 when no formula is known."""
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(func._overloadpacket) if hasattr(func, "_overloadpacket") else None
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0


def count_node_flops(node: torch.fx.Node) -> int:
    """Returns the floating point operations of a node of a graph of basic operators, at the sizes that were traced."""

    def sized(value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            value = example_value(value)
        if isinstance(value, torch.Tensor):
            return torch.empty([hint_of(size) for size in value.shape], dtype=value.dtype, device="meta")
        return hint_of(value) if isinstance(value, torch.SymInt) else value

    from torch.utils.flop_counter import flop_registry

    if getattr(node.target, "_overloadpacket", None) not in flop_registry:
        return 0
    args, kwargs, result = tree_map(sized, (node.args, node.kwargs, example_value(node)))
    return count_flops(node.target, args, kwargs, result)


def source_name(placeholder: torch.fx.Node) -> str | None:
    """Returns the expression that Dynamo reads an argument of a graph from, None if it says none.

    Such as ``L['self']._modules['layers']._modules['0']._parameters['weight']``.
    """
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", None)
    found = name() if callable(name) else name  # a method up to torch 2.11
    return found if isinstance(found, str) else None


def inner_module(module: torch.nn.Module) -> torch.nn.Module:
    """Returns the module that `torch.compile(module)` made this one of, or itself."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None or not isinstance(module, torch._dynamo.OptimizedModule) else inner


def symbol_of(value: Any) -> Any:
    """Returns the sympy expression of a symbolic int, or the int itself."""
    return value.node.expr if isinstance(value, torch.SymInt) else value


def unified(value: Any) -> Any:
    """Returns a symbolic int under the name that sizes have which turned out to be equal; other values as they are.

    Shapes are written in these names, and Inductor looks for them among the arguments.
    """
    if not isinstance(value, torch.SymInt):
        return value
    return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)


def is_size(value: Any) -> bool:
    """Returns whether this fake value is a number, symbolic or not."""
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def symbols_of(value: Any) -> dict[Any, Any]:
    """Returns the symbols that this fake value is made of, in order, each with the ShapeEnv that knows it."""
    found: dict[Any, Any] = {}
    for size in _sizes_of(value):
        if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            for symbol in sorted(size.node.expr.free_symbols, key=str):
                found[symbol] = size.node.shape_env
    return found


def known_of(symbols: Mapping[Any, Any], names: Mapping[Any, Any]) -> Hashable:
    """Returns what a compiler may take for granted of symbols, in order, under these names: ranges and relations.

    Args:
        symbols: as `symbols_of` returns them.
        names: for each of them the one to use.
    """
    ranges = tuple(str(shape_env.var_to_range.get(symbol)) for symbol, shape_env in symbols.items())
    relations = {
        str(relation.xreplace(names))
        for shape_env in {id(shape_env): shape_env for shape_env in symbols.values()}.values()
        for relation in shape_env.get_axioms()
        if relation.free_symbols and relation.free_symbols <= names.keys()
    }
    return ranges, tuple(sorted(relations))


def numbered_symbol(number: int) -> Any:
    """Returns a symbol that stands for the same place in every graph."""
    import sympy

    return sympy.Symbol(f"size{number}", integer=True)


def kind_of(value: Any, names: Mapping[Any, Any]) -> Hashable:
    """Returns what code that is compiled for this fake value depends on, with its symbols under these names."""

    def named(size: Any) -> str:
        return str(size.node.expr.xreplace(names) if isinstance(size, torch.SymInt) else size)

    sizes = tuple(named(size) for size in _sizes_of(value))
    if not isinstance(value, torch.Tensor):
        return sizes
    return value.dtype, value.device, value.is_inference(), sizes


def _sizes_of(value: Any) -> list[Any]:
    found: list[Any] = []
    for leaf in tree_leaves(value):
        found += (*leaf.shape, *leaf.stride(), leaf.storage_offset()) if isinstance(leaf, torch.Tensor) else (leaf,)
    return found


def hint_of(value: Any) -> int:
    """Returns the value that a symbolic int had while tracing, 0 if that depended on data; or the int itself."""
    if isinstance(value, torch.SymInt):
        return int(value.node.hint) if value.node.hint is not None else 0
    return int(value)


def is_elementwise(node: torch.fx.Node) -> bool:
    """Returns whether Inductor computes the operator element by element, in the loop of whoever reads the result."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_reduction(node: torch.fx.Node) -> bool:
    """Returns whether the operator reduces; Inductor reads its argument in the loop that makes it."""
    reduction = getattr(torch.Tag, "reduction", None)
    return reduction is not None and reduction in getattr(node.target, "tags", ())


def takes_part_of_tuple(node: torch.fx.Node) -> bool:
    """Returns whether `node` takes one of the results of an operator that has several."""
    return node.target is operator.getitem and isinstance(node.args[0], torch.fx.Node)


def writes_argument(node: torch.fx.Node) -> bool:
    """Returns whether `node` is how AOTAutograd writes a result to an argument of the graph."""
    return node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder"  # type: ignore[union-attr]


def argument_of(placeholder: torch.fx.Node) -> int | None:
    """Returns which argument of Dynamo's graph a placeholder of AOTAutograd's is, None if it is made of others."""
    from torch._functorch._aot_autograd.descriptors import PlainAOTInput

    described = placeholder.meta.get("desc")
    return described.idx if isinstance(described, PlainAOTInput) else None


def is_only_mode(mode: TorchDispatchMode) -> bool:
    """Returns whether `mode` is the one dispatch mode that is active in this thread."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    stack = _get_current_dispatch_mode_stack()
    return len(stack) == 1 and stack[0] is mode


def without_dispatch() -> AbstractContextManager[None]:
    """Returns a context without dispatch modes. It is C++, so that Ctrl-C cannot leave it half entered."""
    context: AbstractContextManager[None] = torch._C._DisableTorchDispatch()
    return context


def is_subclass(value: object) -> bool:
    """Returns whether `value` is a tensor that may have its own ideas of what an operator does."""
    return isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, torch.nn.Parameter)


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Under autocast: keeps no cast copies of weights until its region ends."""
    if not (torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()):
        yield
        return
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(True)


class _Capture(threading.local):
    active = False


_capture = _Capture()


class _Running(threading.local):
    here = False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's decorator has no types
def capturing() -> bool:
    """Returns whether a wrapped model runs whose numbers are to be those of the uncompiled one, in this thread.

    Perhaps it is being captured. Dynamo takes it as a constant.
    """
    return _capture.active


def compile_call(
    call: Callable[..., Any],
    backend: Callable[..., Any],
    *,
    before_capture: Callable[[], None],
    faithful: bool,
    fullgraph: bool,
    dynamic: bool | None,
) -> Callable[..., Any]:
    """Returns `torch.compile(call, backend=backend)`, made to notice hooks that come or go after capture.

    With `faithful` the model is told by `capturing` to do what it does uncompiled. `before_capture` is called in
    the calling thread whenever Dynamo begins to capture.
    """
    import torch._dynamo
    import torch._inductor.config  # which the line above imports too, and no more of it
    from torch._dynamo.callback import callback_handler

    compiled = torch.compile(call, backend=backend, fullgraph=fullgraph, dynamic=dynamic)

    running = _Running()

    def started(_: object) -> None:
        if running.here:
            before_capture()

    def run(*args: Any, **kwargs: Any) -> Any:
        before = _capture.active, running.here
        try:
            _capture.active, running.here = faithful, True
            # Here and not once for all: `torch._dynamo.reset()` removes what is registered.
            callback_handler.register_start_callback(started)
            with _weights_as_arguments(), torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
                return compiled(*args, **kwargs)
        finally:
            with contextlib.suppress(ValueError):
                callback_handler.remove_start_callback(started)
            _capture.active, running.here = before

    return run


@contextmanager
def _weights_as_arguments() -> Iterator[None]:
    """Keeps Dynamo from putting weights into graphs as constants, which it does where Inductor is to freeze them."""
    frozen, prepared = torch._inductor.config.freezing, torch._dynamo.config.prepare_freezing
    if not frozen and not prepared:
        yield
        return
    with torch._inductor.config.patch(freezing=False), torch._dynamo.config.patch(prepare_freezing=False):
        yield


def compile_graph(
    module: torch.fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Returns Dynamo's graph as `torch.compile` itself compiles it.

    Raises:
        torch._inductor.exc.InductorError: it cannot be compiled.
    """
    from torch._inductor.compile_fx import compile_fx

    call: Any = compile_fx(module, list(inputs), config_patches=dict(options))
    compiled: Callable[..., Any] = call
    return compiled


def compile_through_inductor(
    module: torch.fx.GraphModule,
    inputs: Sequence[Any],
    compile_graph: Callable[[torch.fx.GraphModule, Mapping[str, Any]], Callable[[list[Any]], Any]],
    options: Mapping[str, Any],
) -> Callable[..., Any]:
    """Returns what Inductor makes of Dynamo's graph, but with `compile_graph` instead of its own compilation.

    `compile_graph` is given the graph of basic operators and settings for `compile_piece`, and returns a function
    of a list of all arguments. `module` is copied, since it is changed meanwhile.
    """
    import torch._functorch.config
    from torch._guards import TracingContext
    from torch._inductor.compile_fx import compile_fx

    def inner(graph: torch.fx.GraphModule, _: Sequence[Any], **settings: Any) -> Any:
        call = compile_graph(graph, settings)
        context = TracingContext.try_get()
        if context is not None and context.output_strides is not None:
            # What AOTAutograd would read; each piece left its own there.
            context.output_strides.clear()
            results: Any = graph.graph.output_node().args[0]
            context.output_strides.extend(None for _ in results)
        call._boxed_call = True  # type: ignore[attr-defined]  # how AOTAutograd knows that it takes a list
        return call

    copy = torch.fx.Graph()
    copy.output(copy.graph_copy(module.graph, {}))
    copy.output_node().meta = dict(module.graph.output_node().meta)
    copied = torch.fx.GraphModule(module, copy)
    copied.meta = dict(module.meta)
    # That cache does not know that graphs are compiled in another way here.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        call: Any = compile_fx(copied, inputs, inner_compile=inner, config_patches=dict(options))
    compiled: Callable[..., Any] = call
    return compiled


def compile_piece(
    module: torch.fx.GraphModule, num_weights: int, settings: Mapping[str, Any]
) -> Callable[[list[Any]], Any]:
    """Returns the compiled form of a part of a graph of basic operators: a function of a list, which it empties.

    Its results have the strides that were traced. The first `num_weights` arguments are weights.

    Raises:
        torch._inductor.exc.InductorError: it cannot be compiled.
    """
    from torch._guards import TracingContext
    from torch._inductor.compile_fx import compile_fx_inner

    output = module.graph.output_node()
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))  # type: ignore[arg-type]
    context = TracingContext.try_get()
    if context is not None and context.output_strides is not None:
        context.output_strides.clear()
    inputs = [example_value(node) for node in module.graph.find_nodes(op="placeholder")]
    compiled: Callable[[list[Any]], Any] = compile_fx_inner(
        module, inputs, **{**settings, "static_input_idxs": list(range(num_weights))}
    )
    return compiled


def inductor_failure() -> type[Exception]:
    """Returns what Inductor raises when it cannot compile, a missing compiler included."""
    from torch._inductor.exc import InductorError

    failure: type[Exception] = InductorError
    return failure


def inductor_settings(mode: str | None, options: Mapping[str, Any], dynamic: bool | None) -> dict[str, Any]:
    """Returns the settings of Inductor that torch.compile makes of its arguments of these names.

    Raises:
        RuntimeError: the mode or an option is unknown, or an option has another type.
    """
    return dict(torch._TorchCompileInductorWrapper(mode, dict(options), dynamic).config)
