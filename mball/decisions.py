"""Decisions by the values of tensors that a captured graph takes as constants, for as long as they hold.

[Note: a decision without a break] Whether a mask is all ones nobody can say while a graph is captured: Dynamo would end
the graph there, and capture each of the calls around it again, before the break and after it. But such values mostly
follow from what the model was called with by a few operators (a comparison, a sum). They are found in the graph as far
as it was captured, and run for this call; the answer becomes a constant of the graph, and a guard of Dynamo's runs them
again before each later call. Another answer captures another graph. So an answer is never wrong. Where values follow
from weights, were written to before, or come from what Dynamo cannot name, the graph breaks as it would have.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch._dynamo.comptime import ComptimeContext, ComptimeVar, comptime
from torch.utils._pytree import tree_leaves

from mball.torch_private.dispatch import without_dispatch
from mball.torch_private.guards import captured_frame, guard_capture, items_of
from mball.torch_private.nodes import example_value
from mball.torch_private.probes import missing_for_decisions
from mball.torch_private.sources import expression_of, name_of
from mball.torch_private.symbols import is_size
from mball.torch_private.tensors import is_subclass, storage_key

_log = logging.getLogger(__name__)

# What follows from more operators than this is better computed once, between two graphs.
MAX_OPERATORS = 64


def guarded(question: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
    """Returns `question(*args, **kwargs)`. A graph that is being captured takes it as a constant, and is guarded by it.

    Args:
        question: a pure function that is not captured itself and gives the same answer for the same values; it may
            look at the values of tensors, must not write to them, and must not ask whether it is compiled. What it
            raises comes from this call.
        args: tensors, integers (sizes too), constants. Not tuples of them, as shapes are: they may break the graph.
        kwargs: the same.
    """
    # `_decide` knows these names.
    names = tuple(kwargs)
    values = (*args, *kwargs.values())
    comptime(_decide, _leave_open)
    answer = _decided()
    if answer is None:
        return _outside_the_graph(question, values, names)
    return answer


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's decorator has no types
def _outside_the_graph(question: Callable[..., bool], values: Sequence[Any], names: Sequence[str]) -> bool:
    return _ask(question, values, names)


def _ask(question: Callable[..., bool], values: Sequence[Any], names: Sequence[str]) -> bool:
    split = len(values) - len(names)
    return bool(question(*values[:split], **dict(zip(names, values[split:], strict=True))))


class _Answer(threading.local):
    value: bool | None = None


_answer = _Answer()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's decorator has no types
def _decided() -> bool | None:
    """Returns what `_decide` found; None where the graph has to break, or nothing is captured."""
    return _answer.value


def _leave_open() -> None:
    """Is called where nothing is captured."""
    _answer.value = None


def _decide(context: ComptimeContext) -> None:
    """Is called by Dynamo while it captures `guarded`."""
    _leave_open()
    try:
        question = context.get_local("question").as_python_constant()
    except NotImplementedError:  # an object, or a function made by the code that is captured
        _log.info("a question that Dynamo cannot name is asked between two graphs")
        return
    try:
        _answer.value = _settle(context, question)
    except _OpenError as reason:
        _log.info("%s is asked between two graphs: %s", _name(question), reason)


def _name(question: Callable[..., bool]) -> str:
    return getattr(question, "__name__", None) or repr(question)


class _OpenError(Exception):
    """The answer cannot be had while a graph is captured."""


def _settle(context: ComptimeContext, question: Callable[..., bool]) -> bool:
    """Returns the answer for the values of this call, and has Dynamo guard it.

    Raises:
        _OpenError: it cannot be had, or could not be asked again.
    """
    if missing := missing_for_decisions():
        raise _OpenError(f"this torch has no {missing[0]}")
    names = context.get_local("names").as_python_constant()
    recipe = _Recipe(context.graph())
    values = recipe.of(items_of(context.get_local("values")))
    local, scope = captured_frame(context)
    read = _reader(recipe.inputs, scope)

    def answer(frame: Mapping[str, Any]) -> bool:
        # Nobody is to take these operators for some of the model's.
        with without_dispatch(), torch.no_grad():
            return _ask(question, values(read(frame)), names)

    try:
        found = read(local)
        expected = answer(local)
    except Exception as error:
        # Of any kind: between two graphs the question raises it again, and there the model can catch it.
        raise _OpenError(f"{type(error).__name__}: {error}") from error
    if not all(each.is_read_as(value) for each, value in zip(recipe.inputs, found, strict=True)):
        raise _OpenError("an argument is not what it was when the call began")

    guard_capture(lambda frame: answer(frame) == expected, f"{_name(question)} is {expected}")
    return expected


class _Input(NamedTuple):
    """What values follow from: the expression that reads it in the frame, and the value it has, None if unknown."""

    expression: str
    known: torch.Tensor | int | None

    def is_read_as(self, found: object) -> bool:
        if isinstance(self.known, torch.Tensor):
            return found is self.known
        return isinstance(found, int) and self.known in (None, found)


def _reader(inputs: Iterable[_Input], scope: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], list[Any]]:
    """Returns a function that reads the inputs from the locals of a frame."""
    text = ", ".join(each.expression for each in inputs)
    read: Callable[[Mapping[str, Any]], list[Any]] = eval(f"lambda L: [{text}]", {"G": scope})
    return read


class _Recipe:
    """How values in a graph that is being captured follow from its inputs.

    Args:
        graph: Dynamo's, as far as it was captured.

    Attributes:
        inputs: what the values follow from.
    """

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.inputs: list[_Input] = []
        self._captured = graph
        self._graph = torch.fx.Graph()
        self._copies: dict[torch.fx.Node, torch.fx.Node] = {}
        self._sizes: dict[str, torch.fx.Node] = {}
        self._operators = 0

    def of(self, values: Sequence[ComptimeVar]) -> Callable[[Sequence[Any]], Sequence[Any]]:
        """Returns a function from the values of `inputs` to these values.

        Raises:
            _OpenError: some follow from what cannot be asked again.
        """
        results = [self._value(value) for value in values]
        _check_unwritten(self._captured, self._copies)
        self._graph.output(tuple(results))
        call = torch.fx.GraphModule(torch.nn.Module(), self._graph).forward
        return lambda inputs: call(*inputs)

    def _value(self, value: ComptimeVar) -> Any:
        if value.is_python_constant():
            constant = value.as_python_constant()
            if constant is None or isinstance(constant, (bool, int, float, str, torch.dtype, torch.device)):
                return constant
        if value.is_proxy() and isinstance(proxy := value.as_proxy(), torch.fx.Proxy):
            return self._copy(proxy.node)
        raise _OpenError(f"an argument is a {value.python_type().__name__}")

    def _copy(self, node: torch.fx.Node) -> Any:
        if node in self._copies:
            return self._copies[node]
        example = example_value(node)
        if is_size(example):
            # By its formula and not by its operators: a size may be that of the layers' result.
            return self._size(example)
        if node.op == "placeholder":
            copy = self._input(node)
        elif node.op in ("call_function", "call_method"):
            self._operators += 1
            if self._operators > MAX_OPERATORS:
                raise _OpenError(f"it takes more than {MAX_OPERATORS} operators")
            args = torch.fx.node.map_aggregate(node.args, self._argument)
            kwargs = torch.fx.node.map_aggregate(node.kwargs, self._argument)
            copy = self._graph.create_node(node.op, node.target, args, kwargs)
        else:
            raise _OpenError(f"{node.target} belongs to a module")
        self._copies[node] = copy
        return copy

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, torch.fx.Node):
            return self._copy(argument)
        return self._size(argument) if isinstance(argument, torch.SymInt) else argument

    def _input(self, node: torch.fx.Node) -> torch.fx.Node:
        given: Any = node.meta.get("grapharg")
        name = name_of(given.source) if given is not None else None
        if name is None or given.pass_arg_as_tensor:
            raise _OpenError(f"{node.name} has no name in the call")
        if isinstance(given.example, torch.nn.Parameter) or is_subclass(given.example):
            raise _OpenError(f"it follows from {name}, a {type(given.example).__name__}")
        return self._new_input(name, given.example)

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        try:
            text = expression_of(size)
        except LookupError:
            raise _OpenError("a size depends on values") from None
        if text not in self._sizes:
            self._sizes[text] = self._new_input(text, size.node.hint)
        return self._sizes[text]

    def _new_input(self, expression: str, value: torch.Tensor | int | None) -> torch.fx.Node:
        self.inputs.append(_Input(expression, value))
        return self._graph.placeholder(f"input{len(self.inputs)}")


def _check_unwritten(graph: torch.fx.Graph, read: Iterable[torch.fx.Node]) -> None:
    """Raises _OpenError if a node's memory is written to, or random: asked again, it would hold something else."""
    written: set[int] = set()
    for node in graph.nodes:
        if not _is_plain(node):
            written.update(*(_memory(each) for each in (node, *node.all_input_nodes)))
    if any(_memory(node) & written for node in read):
        raise _OpenError("it follows from what the graph has written, or from random numbers")


def _memory(node: torch.fx.Node) -> set[int]:
    leaves = tree_leaves(example_value(node))
    return {storage_key(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided}


_WRITERS = frozenset(
    {"setitem", "delitem", "iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow"}
    | {"irshift", "isub", "itruediv", "ixor"}
)
# Parts of the names of operators that give other results each time.
_RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal", "poisson", "empty")


def _is_plain(node: torch.fx.Node) -> bool:
    """Returns whether a node of Dynamo's graph writes to no argument, and gives the same result for the same ones.

    By what its operator is called: says no where that is not known.
    """
    if node.op not in ("call_function", "call_method"):
        return node.op != "call_module"
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return False
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    of_python = getattr(target, "__module__", None) in ("_operator", "builtins", "math")
    of_torch = isinstance(target, str) or (getattr(target, "__module__", None) or "").partition(".")[0] == "torch"
    if not (of_python or of_torch) or isinstance(target, torch._ops.HigherOrderOperator):
        return False
    name = name.strip("_") if name.startswith("__") else name
    writes = name in _WRITERS or (name.endswith("_") and not of_python)
    return not writes and not any(part in name for part in _RANDOM)
