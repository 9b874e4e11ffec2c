"""How weights are laid out in a slot and grouped into bundles."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mball.plan import lay_out_bundle
from mball.plan.bundles import finest_bundles, group_weights
from mball.schema import Extent, Tensor, Trace
from mball.units import KIB, MIB
from tests.plan.traces import make_machine, make_step, make_weights, traces


def test_neighbours_share_an_extent_that_over_reads_to_the_alignment() -> None:
    trace = Trace(name="t", tensors=make_weights([5_000, 300]), steps=())
    bundle = lay_out_bundle([1, 0], trace, make_machine())
    assert bundle.tensors == (0, 1)
    assert bundle.extents == (Extent(file="f", offset_bytes=1024, size_bytes=5632, slot_offset_bytes=0),)
    assert bundle.offsets_bytes == (210, 5210)
    assert bundle.size_bytes == 8192


def test_a_wide_gap_begins_a_new_extent_on_a_page() -> None:
    for gap, num_extents in ((64 * KIB, 1), (66 * KIB, 2)):
        trace = Trace(name="t", tensors=make_weights([5_000, 300], gap_bytes=gap), steps=())
        bundle = lay_out_bundle([0, 1], trace, make_machine())
        assert len(bundle.extents) == num_extents
        assert all(extent.slot_offset_bytes % 4096 == 0 for extent in bundle.extents)


def test_an_empty_weight_needs_no_extent() -> None:
    bundle = lay_out_bundle([0], Trace(name="t", tensors=make_weights([0]), steps=()), make_machine())
    assert (bundle.offsets_bytes, bundle.extents, bundle.size_bytes) == ((0,), (), 0)


@settings(max_examples=60, deadline=None)
@given(trace=traces(), data=st.data())
def test_reading_the_extents_puts_each_weight_at_its_offset(trace: Trace, data: st.DataObject) -> None:
    homed = [index for index, _ in trace.homed()]
    weights = data.draw(st.lists(st.sampled_from(homed), unique=True)) if homed else []
    bundle = lay_out_bundle(weights, trace, make_machine())
    files = {name: np.random.default_rng(seed).bytes(14_000_000) for seed, name in enumerate("ab")}
    slot = np.zeros(bundle.size_bytes, dtype=np.uint8)
    for extent in bundle.extents:
        piece = files[extent.file][extent.offset_bytes : extent.offset_bytes + extent.size_bytes]
        slot[extent.slot_offset_bytes : extent.slot_offset_bytes + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
    assert sorted(bundle.tensors) == sorted(weights)
    for index, offset in zip(bundle.tensors, bundle.offsets_bytes, strict=True):
        weight: Tensor = trace.tensors[index]
        assert weight.home is not None
        wanted = files[weight.home.file][weight.home.offset_bytes : weight.home.offset_bytes + weight.size_bytes]
        assert slot[offset : offset + weight.size_bytes].tobytes() == wanted


def groups(trace: Trace, target_bytes: int) -> list[tuple[int, ...]]:
    return [bundle.tensors for bundle in group_weights(trace, make_machine(), target_bytes)[0]]


def test_consecutive_weights_share_a_bundle_up_to_the_target() -> None:
    steps = tuple(make_step(f"s{n}", n) for n in range(5))
    assert groups(Trace(name="t", tensors=make_weights([MIB] * 5), steps=steps), 2 * MIB) == [(0, 1), (2, 3), (4,)]


def test_only_weights_used_alike_share_a_bundle() -> None:
    steps = (
        make_step("tied in", 0),
        make_step("g", 1),
        make_step("h", 2, graph="h"),
        make_step("eager", 3, graph=None),
        *(make_step(f"pause{n}", graph=None) for n in range(9)),
        make_step("eager far", 4, graph=None),
        make_step("tied out", 0),
    )
    trace = Trace(name="t", tensors=make_weights([MIB] * 5), steps=steps)
    assert groups(trace, 32 * MIB) == [(0,), (1,), (2,), (3,), (4,)]


def test_tiny_weights_are_pooled_and_unread_ones_kept_apart() -> None:
    trace = Trace(name="t", tensors=make_weights([100, MIB, 200, MIB]), steps=(make_step("a", 0, 1), make_step("b", 2)))
    bundles, pooled = group_weights(trace, make_machine(), 32 * MIB)
    assert [bundle.tensors for bundle in bundles] == [(1,), (0, 2), (3,)]
    assert pooled == {1}


def test_the_finest_bundles_share_pages_but_never_read_a_gap() -> None:
    for gap, sizes in ((0, [4096]), (60 * KIB, [4096, 4096])):
        trace = Trace(name="t", tensors=make_weights([500, 500], gap_bytes=gap), steps=(make_step("norm", 0, 1),))
        assert [bundle.size_bytes for bundle in finest_bundles(trace, make_machine())] == sizes
