"""Copies are asked for in the order of the plan, each once a pass and none before its step was left."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mball.run.copy_order import CopyOrder
from mball.schema import Transfer


def transfers(afters: list[int]) -> list[Transfer]:
    return [
        Transfer(bundle=number, offset_bytes=0, after=after, needed_by=max(after + 1, 0), last_use=max(after + 1, 0))
        for number, after in enumerate(sorted(afters))
    ]


NUM_STEPS = 6


AFTERS = st.lists(st.integers(-NUM_STEPS, NUM_STEPS - 2), min_size=1, max_size=12)


@given(afters=AFTERS, start=st.integers(0, NUM_STEPS - 1))
def test_copies_come_in_the_order_of_the_plan(afters: list[int], start: int) -> None:
    plan = transfers(afters)
    order = CopyOrder(plan, NUM_STEPS)
    order.jump(start)
    asked: list[int] = []
    allowed = {number for number, transfer in enumerate(plan) if transfer.after + NUM_STEPS < start}
    for step in [*range(start, NUM_STEPS), *range(NUM_STEPS), *range(NUM_STEPS)]:
        due = [number for number, transfer in enumerate(plan) if transfer.after % NUM_STEPS == step]
        allowed.update(due)
        for number in order.allow(due):
            assert number in allowed
            allowed.remove(number)
            asked.append(number)
        # What the next step needs was asked for.
        late = {number for number in allowed if plan[number].after >= 0 and plan[number].needed_by <= step}
        assert not late
    first = asked[0]
    assert asked == [(first + number) % len(plan) for number in range(len(asked))]
    assert len(asked) >= 2 * len(plan)
