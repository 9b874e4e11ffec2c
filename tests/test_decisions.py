"""A decision by values becomes a constant of a captured graph, and is right in every call."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from mball import decisions, guarded

pytestmark = pytest.mark.usefixtures("new_dynamo")


def compiled(call: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    return torch.compile(call, backend="eager", **settings)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def breaks() -> int:
    return sum(counters["graph_break"].values())


def all_set(mask: torch.Tensor) -> bool:
    return bool(mask.all())


def all_set_up_to(mask: torch.Tensor, length: int, *, at_least: int = 0) -> bool:
    assert type(length) is int, "a size is an ordinary number"
    return length >= at_least and bool(mask[:, :length].all())


class Masked(nn.Module):
    """Adds 1 where all of a mask is set, else the mask."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept = mask.to(torch.bool)
        return x + 1 if guarded(all_set, kept) else x + mask


def test_each_answer_is_one_graph_and_none_breaks() -> None:
    call = compiled(Masked(), fullgraph=True)
    x, ones, padded = torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([[0.0, 2, 2], [2, 2, 2]])
    for _ in range(3):
        assert torch.equal(call(x, ones), x + 1)
        assert torch.equal(call(x, padded), padded)
        assert torch.equal(call(x, 1 - ones), x)
    assert graphs() == 2


def test_values_that_change_in_place_are_asked_for_anew() -> None:
    call = compiled(Masked(), fullgraph=True)
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.equal(call(x, mask), x + 1)
    mask[0, 0] = 0
    assert torch.equal(call(x, mask), mask)
    mask.data.fill_(1)  # autograd does not notice that one
    assert torch.equal(call(x, mask), x + 1)


def test_sizes_are_no_part_of_the_answer() -> None:
    def forward(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        return x + 1 if guarded(all_set_up_to, mask, length - 1, at_least=1) else x - 1

    call = compiled(forward, fullgraph=True, dynamic=True)
    for length in (5, 4, 7, 12, 3):
        mask = torch.ones(2, length + 2)
        mask[:, -1] = 0
        assert torch.equal(call(torch.zeros(2, length), mask), torch.ones(2, length))
    assert graphs() == 1
    mask[:, 0] = 0
    assert torch.equal(call(torch.zeros(2, 3), mask), -torch.ones(2, 3))
    assert graphs() == 2


def test_sizes_of_what_weights_made_are_known() -> None:
    linear = nn.Linear(4, 4)

    def forward(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = linear(x)
        return y + 1 if guarded(all_set_up_to, mask, y.shape[1]) else y

    call = compiled(forward, fullgraph=True, dynamic=True)
    for length in (5, 6, 7):
        x = torch.randn(2, length, 4)
        assert torch.equal(call(x, torch.ones(2, length)), linear(x) + 1)
        assert torch.equal(call(x, torch.zeros(2, length)), linear(x))


def test_inference_mode_is_as_good() -> None:
    call = compiled(Masked(), fullgraph=True)
    x = torch.zeros(2, 3)
    with torch.inference_mode():
        for mask in (torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 3)):
            assert torch.equal(call(x, mask), x + 1 if mask.all() else x)


def test_without_a_capture_the_question_is_just_asked() -> None:
    x = torch.zeros(2, 3)
    call = compiled(Masked())
    assert torch.equal(call(x, torch.ones(2, 3)), x + 1)
    assert torch.equal(Masked()(x, torch.zeros(2, 3)), x)


def of_weights(x: torch.Tensor, state: nn.Module) -> torch.Tensor:
    return x + 1 if guarded(all_set, state.weight > 0) else x


def of_what_was_written(x: torch.Tensor, state: nn.Module) -> torch.Tensor:
    flags = state.flags
    flags.add_(1)
    return x + 1 if guarded(all_set, flags == 1) else x


def of_what_a_view_wrote(x: torch.Tensor, state: nn.Module) -> torch.Tensor:
    state.flags[1:].view(-1)[0] = 1
    return x + 1 if guarded(all_set, state.flags == 0) else x


def of_what_an_assignment_wrote(x: torch.Tensor, state: nn.Module) -> torch.Tensor:
    flags = torch.zeros(3)
    torch.add(x[0, :3], 1, out=flags)
    return x + 1 if guarded(all_set, flags > 0) else x


def of_chance(x: torch.Tensor, state: nn.Module) -> torch.Tensor:
    noise = torch.rand(3)
    return x + noise if guarded(all_set, noise > 0.3) else x - noise


def of_many_operators(x: torch.Tensor, state: nn.Module) -> torch.Tensor:
    y = x
    for _ in range(70):
        y = y * 1.01
    return x + 1 if guarded(all_set, y > 0) else x


class State(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("flags", torch.zeros(3))


@pytest.mark.parametrize(
    "forward",
    [of_weights, of_what_was_written, of_what_a_view_wrote, of_what_an_assignment_wrote, of_chance, of_many_operators],
)
def test_what_cannot_be_asked_again_breaks_the_graph(forward: Callable[..., torch.Tensor]) -> None:
    plain, state = State(), State()
    call = compiled(forward)
    with torch.no_grad():
        for number, x in enumerate((torch.ones(2, 3), -torch.ones(2, 3), torch.ones(2, 3))):
            if number == 2:
                plain.weight.neg_()
                state.weight.neg_()
                plain.flags.zero_()
                state.flags.zero_()
            torch.manual_seed(number)
            expected = forward(x, plain)
            torch.manual_seed(number)
            assert torch.equal(call(x, state), expected)
            assert torch.equal(state.flags, plain.flags)
    assert breaks() > 0


def test_what_the_question_raises_comes_from_the_call() -> None:
    def out_of_range(mask: torch.Tensor) -> bool:
        return bool(mask[:, 7].all())

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if guarded(out_of_range, x) else x

    call = compiled(forward)
    for _ in range(2):
        with pytest.raises(IndexError, match="out of bounds"):
            call(torch.ones(2, 3))
    assert torch.equal(call(torch.ones(2, 9)), 2 * torch.ones(2, 9))


class UnsureError(Exception):
    """A model's own."""


@pytest.mark.parametrize("kind", [AssertionError, UnsureError, StopIteration])
def test_what_the_question_raises_is_caught_where_the_model_catches_it(kind: type[Exception]) -> None:
    def is_sure(mask: torch.Tensor) -> bool:
        if mask.min() < 0:
            raise kind("a mask has no negative values")
        return bool(mask.all())

    def forward(x: torch.Tensor) -> torch.Tensor:
        try:
            answer = guarded(is_sure, x)
        except kind:
            return x - 1
        return x + 1 if answer else x

    call = compiled(forward)
    for value in (-1.0, 1.0, 0.0, -1.0, 1.0):
        x = torch.full((2, 3), value)
        assert torch.equal(call(x), forward(x))


class AnySet:
    """A question without a name."""

    def __call__(self, mask: torch.Tensor) -> bool:
        return bool(mask.any())


@pytest.mark.parametrize("question", [functools.partial(all_set), AnySet()], ids=["partial", "object"])
def test_questions_need_no_name(question: Callable[..., bool]) -> None:
    def forward(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x + 1 if guarded(question, mask) else x

    call = compiled(forward)
    x = torch.zeros(2, 3)
    for mask in (torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 3)):
        assert torch.equal(call(x, mask), forward(x, mask))


def test_a_torch_that_lacks_something_breaks_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "missing_for_decisions", lambda: ("torch.something",))
    call = compiled(Masked())
    x = torch.zeros(2, 3)
    for mask in (torch.ones(2, 3), torch.zeros(2, 3)):
        assert torch.equal(call(x, mask), x + 1 if mask.all() else x)
    assert breaks() > 0


def test_threads_do_not_hear_each_others_answers() -> None:
    call = compiled(Masked(), fullgraph=True)
    x, wrong = torch.zeros(2, 3), []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(50):
            mask = torch.full((2, 3), float(chance.random() < 0.5))
            if not torch.equal(call(x, mask), x + mask):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# What a program may do to its three tensors before it asks for one of them.
_STEPS: list[Callable[[list[torch.Tensor], int, int], None]] = [
    lambda t, a, b: t.__setitem__(a, t[b] + 1),
    lambda t, a, b: t.__setitem__(a, t[b][:, 1:]),
    lambda t, a, b: t.__setitem__(a, t[b].detach()),
    lambda t, a, b: t.__setitem__(a, t[b].cumsum(-1)),
    lambda t, a, b: t.__setitem__(a, torch.where(t[b] > 1, t[b], 0)),
    lambda t, a, b: t.__setitem__(a, torch.ones(t[b].shape) * 2),
    lambda t, a, b: t.__setitem__(a, nn.functional.relu(t[b] - 1, inplace=True)),
    lambda t, a, b: t[a].add_(1),
    lambda t, a, b: t[a][:1].mul_(-1),
    lambda t, a, b: t[a].__setitem__((0, 0), 3),
    lambda t, a, b: t[a].copy_(t[b][:, : t[a].shape[1]]) if t[b].shape[1] >= t[a].shape[1] else None,
]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_ran_before_the_answer_is_the_uncompiled_one(seed: int) -> None:
    chance = random.Random(seed)
    steps = [(chance.randrange(len(_STEPS)), chance.randrange(3), chance.randrange(3)) for _ in range(4)]
    asked = chance.randrange(3)

    def forward(*given: torch.Tensor) -> torch.Tensor:
        tensors = list(given)
        for number, a, b in steps:
            _STEPS[number](tensors, a, b)
        found = tensors[asked]
        return found + 100 if guarded(all_set, found > 1) else found - 100

    call = compiled(forward)
    for attempt in range(6):
        torch.manual_seed(attempt % 4)
        given = [torch.randint(0, 4, (2, 6)).float() for _ in range(2)]
        given.append(given[0][:, :] if chance.random() < 0.5 else torch.full((2, 6), 3.0))
        same = [tensor.clone() for tensor in given]
        if given[2].data_ptr() == given[0].data_ptr():
            same[2] = same[0][:, :]
        assert torch.equal(call(*given), forward(*same)), steps
        assert all(torch.equal(a, b) for a, b in zip(given, same, strict=True)), steps
