"""Bundles of a plan before are known again: which of them pool tiny weights, and which are of these weights at all."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mball.plan.bundles import finest_bundles
from mball.plan.partition import Partition
from mball.plan.search import partitions
from mball.schema import Machine, Trace
from mball.units import MIB
from tests.plan.traces import machines, make_machine, make_step, make_weights, traces

few = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def finest_of(trace: Trace, machine: Machine) -> Partition:
    return Partition.of(trace, machine, finest_bundles(trace, machine))


@few
@given(trace=traces(), machine=machines, arena_bytes=st.integers(0, 64 * MIB))
def test_bundles_are_known_again(trace: Trace, machine: Machine, arena_bytes: int) -> None:
    finest = finest_of(trace, machine)
    for made in (finest, *partitions(trace, machine, arena_bytes)):
        again = Partition.like(finest, made.demand.bundles)
        assert again is not None
        assert again.demand.bundles == made.demand.bundles
        if set(made.demand.bundles) != set(finest.demand.bundles):
            assert again.demand.pooled == made.demand.pooled
        else:
            assert not again.demand.pooled


def test_a_norm_of_the_finest_bundles_is_no_pool_and_a_pool_of_one_weight_is() -> None:
    machine = make_machine()
    # A norm's weight and bias on one page, and a tiny weight by itself.
    trace = Trace(
        name="t",
        tensors=make_weights([MIB, 500, 500, MIB], start_bytes=0),
        steps=(make_step("a", 0), make_step("norm", 1, 2), make_step("b", 3)),
    )
    finest = finest_of(trace, machine)
    assert (1, 2) in {bundle.tensors for bundle in finest.demand.bundles}
    again = Partition.like(finest, finest.demand.bundles)
    assert again is not None
    assert not again.demand.pooled

    trace = Trace(
        name="t",
        tensors=make_weights([MIB, 500, MIB], start_bytes=0),
        steps=(make_step("a", 0), make_step("bias", 1), make_step("b", 2)),
    )
    (made, *_) = partitions(trace, machine, 64 * MIB)
    again = Partition.like(finest_of(trace, machine), made.demand.bundles)
    assert again is not None
    assert [made.demand.bundles[number].tensors for number in again.demand.pooled] == [(1,)]


@few
@given(one=traces(), other=traces(), machine=machines)
def test_bundles_of_other_weights_are_not_taken(one: Trace, other: Trace, machine: Machine) -> None:
    finest = finest_of(one, machine)
    homes = {tensor.home for _, tensor in one.homed() if tensor.size_bytes}
    if homes != {tensor.home for _, tensor in other.homed() if tensor.size_bytes}:
        assert Partition.like(finest, finest_of(other, machine).demand.bundles) is None
